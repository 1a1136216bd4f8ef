// More shared memory for a block than the 48 KiB that every kernel may have, and clusters of more than 8
// blocks; for host code of CUDA files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "common/launch_errors.h"

namespace arcore {

// A kernel asks once for each device, for the most that there is, so that no other thread's launch of it
// finds a limit below its own need. 0, kSharedTooLarge or a cudaError_t.
inline int allow_shared(const void* kernel, int64_t bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && bytes > most) return kSharedTooLarge;
  const std::lock_guard<std::mutex> lock(mutex);
  if (error == cudaSuccess && allowed.count({kernel, device}) == 0) {
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most - static_cast<int>(attributes.sharedSizeBytes));
    if (error == cudaSuccess) allowed.insert({kernel, device});
  }
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<int>(error);
}

// 16 blocks where the device can, else 8; 1 where it has no clusters, or where the code of the kernel that
// was loaded was compiled for a GPU without them (PTX of 8.0 on a newer GPU). Asked once for each kernel and
// device.
inline int most_blocks_of_cluster(const void* kernel, int threads, int64_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find({kernel, device}); error == cudaSuccess && found != known.end())
    return found->second;
  int most = 1;
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && major >= 9 && attributes.ptxVersion >= 90 &&
      allow_shared(kernel, shared_bytes) == 0) {
    most = 8;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 16;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(16);
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0)
      most = 16;
  }
  (void)cudaGetLastError();
  if (error == cudaSuccess) known[{kernel, device}] = most;
  return most;
}

}  // namespace arcore
