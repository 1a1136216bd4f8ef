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

// Whether all work before the cudaEvent_t has ended: 1, 0, or minus the CUDA error. A capture that is under
// way on this thread forbids the question unless the thread's mode is relaxed; asking records nothing.
int cuda_event_done(void* event) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return -static_cast<int>(error);
  const cudaError_t answer = cudaEventQuery(static_cast<cudaEvent_t>(event));
  error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (answer != cudaSuccess)
    (void)cudaGetLastError();  // not ready is an answer, not a failure to report later
  if (error != cudaSuccess) return -static_cast<int>(error);
  if (answer == cudaErrorNotReady) return 0;
  return answer == cudaSuccess ? 1 : -static_cast<int>(answer);
}

}  // namespace arcore::machine
