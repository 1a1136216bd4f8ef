// How host code starts a kernel: on a GPU with the CUDA runtime, in tests/cuda_host with the executor.
#pragma once

#include <cstdint>

#include "common/launch_errors.h"
#include "common/sm80/device.h"

#if !defined(ARCORE_CUDA_HOST)
#include "common/allow_shared.h"
#endif

namespace arcore {

struct LaunchShape {
  int64_t x, y, z;       // blocks
  int threads;           // a multiple of 32
  int64_t shared_bytes;  // dynamic shared memory
  int cluster = 1;       // neighbouring blocks in x that run as a cluster; x is a multiple of it
};

// `stream` is a cudaStream_t. 0, kGridTooLarge, kSharedTooLarge, or the cudaError_t of a launch that failed.
// A grid without blocks is no launch.
template <typename Args>
int launch(void (*kernel)(Args), const LaunchShape& shape, [[maybe_unused]] void* stream, const Args& args) {
  if (shape.x <= 0 || shape.y <= 0 || shape.z <= 0) return 0;
  if (shape.x > kMostBlocks || shape.y > kMostBlocksYZ || shape.z > kMostBlocksYZ) return kGridTooLarge;
#if defined(ARCORE_CUDA_HOST)
  return cuda_host::launch(kernel, shape.x, shape.y, shape.z, shape.threads, shape.shared_bytes,
                           shape.cluster, args);
#else
  if (shape.shared_bytes > 48 * 1024) {
    const int error = allow_shared(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
    if (error != 0) return error;
  }
  const dim3 grid(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y),
                  static_cast<unsigned>(shape.z));
  if (shape.cluster > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, args);
    return static_cast<int>(cudaGetLastError());
  }
  kernel<<<grid, static_cast<unsigned>(shape.threads), static_cast<size_t>(shape.shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
#endif
}

// The most blocks that a cluster of this kernel may have on the current device: 1 where there are no
// clusters, or where the loaded code was compiled for a GPU without them.
template <typename Args>
int cluster_limit([[maybe_unused]] void (*kernel)(Args), [[maybe_unused]] int threads,
                  [[maybe_unused]] int64_t shared_bytes) {
#if defined(ARCORE_CUDA_HOST)
  return cuda_host::cluster_limit() > 1 ? cuda_host::cluster_limit() : 1;
#else
  return most_blocks_of_cluster(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
#endif
}

}  // namespace arcore
