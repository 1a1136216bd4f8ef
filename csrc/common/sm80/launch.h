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
};

// `stream` is a cudaStream_t. 0, kGridTooLarge, kSharedTooLarge, or the cudaError_t of a launch that failed.
// A grid without blocks is no launch.
template <typename Args>
int launch(void (*kernel)(Args), const LaunchShape& shape, [[maybe_unused]] void* stream, const Args& args) {
  if (shape.x <= 0 || shape.y <= 0 || shape.z <= 0) return 0;
  if (shape.x > kMostBlocks || shape.y > kMostBlocksYZ || shape.z > kMostBlocksYZ) return kGridTooLarge;
#if defined(ARCORE_CUDA_HOST)
  return cuda_host::launch(kernel, shape.x, shape.y, shape.z, shape.threads, shape.shared_bytes, args);
#else
  if (shape.shared_bytes > 48 * 1024) {
    const int error = allow_shared(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
    if (error != 0) return error;
  }
  const dim3 grid(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y),
                  static_cast<unsigned>(shape.z));
  kernel<<<grid, static_cast<unsigned>(shape.threads), static_cast<size_t>(shape.shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
#endif
}

}  // namespace arcore
