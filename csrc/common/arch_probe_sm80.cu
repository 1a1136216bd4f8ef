// Proves that this build's device code runs on the GPU at hand: a kernel that reports the architecture it was
// compiled for. `arcore env` calls it through torch.ops.arcore.cuda_arch_probe.
#include <cuda_runtime.h>

namespace arcore::machine {

namespace {

__global__ void write_arch(int* out) {
#if defined(__CUDA_ARCH__)
  *out = __CUDA_ARCH__ / 10;
#endif
}

}  // namespace

// The architecture (80, 90, ...) of the code that ran, or minus the CUDA error.
int cuda_arch_probe() {
  int* device = nullptr;
  int arch = 0;
  cudaError_t error = cudaMalloc(&device, sizeof(int));
  if (error != cudaSuccess) return -static_cast<int>(error);
  write_arch<<<1, 1>>>(device);
  error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(&arch, device, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(device);
  return error == cudaSuccess ? arch : -static_cast<int>(error);
}

}  // namespace arcore::machine
