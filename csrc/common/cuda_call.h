// What cuda.cpp files share: the current device and stream, launch errors, and the library that a kernel is
// registered in. With ARCORE_CUDA_HOST the same files serve tests/cuda_host: kernels run on the CPU, on CPU
// tensors, behind torch.ops.arcore_cuda_host.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

#include "common/check.h"
#include "common/launch_errors.h"

#if defined(ARCORE_CUDA_HOST)
#define ARCORE_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(arcore_cuda_host, CPU, m)
#else
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define ARCORE_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(arcore, CUDA, m)
#endif

namespace arcore {

// The device of `like` is current while this lives; its stream() is where PyTorch would launch now.
class __attribute__((visibility("hidden"))) CudaScope {
 public:
#if defined(ARCORE_CUDA_HOST)
  explicit CudaScope(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit CudaScope(const torch::stable::Tensor& like)
      : device_(like.get_device_index()), guard_(like.get_device_index()) {}
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// `major` * 10 + `minor` of the current device; 80 in tests/cuda_host.
inline int compute_capability() {
#if defined(ARCORE_CUDA_HOST)
  return 80;
#else
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
#endif
}

// Multiprocessors of the current device, for grids that should fill it. Results never depend on it.
inline int multiprocessors() {
#if defined(ARCORE_CUDA_HOST)
  return 4;
#else
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#endif
}

// Bytes of shared memory of a multiprocessor of the current device, which its blocks share.
inline int64_t shared_of_multiprocessor() {
#if defined(ARCORE_CUDA_HOST)
  return int64_t{164} * 1024;
#else
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return bytes;
#endif
}

// Bytes that a call may take for what it could compute again; little in tests/cuda_host, so that small calls
// go the way of large ones. Results never depend on it.
constexpr int64_t workspace_bytes() {
#if defined(ARCORE_CUDA_HOST)
  return int64_t{64} << 10;
#else
  return int64_t{512} << 20;
#endif
}

#if !defined(ARCORE_BUILD_CUDA_ARCHS)
#define ARCORE_BUILD_CUDA_ARCHS ""
#endif

// What a failed launch means, for a device of this compute capability (80, 90, ...).
inline std::string launch_error(int error, const char* name, int capability, const char* built_archs) {
  constexpr int kNoKernelImage = 209,
                kUnsupportedPtx = 222;  // cudaErrorNoKernelImageForDevice, ...UnsupportedPtxVersion
  if (error == kGridTooLarge)
    return "expected work of at most " + std::to_string(kMostBlocks) +
           " blocks, which is what one launch holds, but got more; split the call along its batch";
  if (error == kSharedTooLarge)
    return "expected a GPU with more shared memory per block than this one of compute capability " +
           std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
           " has for the sizes of this call; make them smaller or move the tensors to the CPU";
  const std::string arch = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  if (error == kNoKernelImage || error == kUnsupportedPtx) {
    if (capability < 80)
      return "expected a GPU of compute capability 8.0 or newer but got " + arch +
             "; move the tensors to the CPU";
    return std::string("this build has kernels for ") + built_archs +
           " but the GPU is of compute capability " + arch +
           "; build arcore again with TORCH_CUDA_ARCH_LIST=" + arch;
  }
  return std::string("the kernel could not be launched: ") + name + " (CUDA error " + std::to_string(error) +
         ")";
}

inline void check_launch(const char* op, int error) {
  if (error == 0) return;
#if defined(ARCORE_CUDA_HOST)
  const char* name = "refused by the executor";
#else
  const char* name = cudaGetErrorName(static_cast<cudaError_t>(error));
#endif
  fail("arcore::", op, ": ", launch_error(error, name, compute_capability(), ARCORE_BUILD_CUDA_ARCHS));
}

}  // namespace arcore
