// More shared memory for a block than the 48 KiB that every kernel may have; for host code of CUDA files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
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

}  // namespace arcore
