#include "block_sparse_attention/fp32_sm80.cuh"

namespace arcore::block_sparse_attention {

int launch_forward_fp32_sm80(const ForwardCuda& cuda, void* stream) {
  const ForwardKernelArgs args = forward_kernel_args(cuda);
  const int64_t dim = cuda.args.problem.dim;
  if (dim <= 64) return launch_forward_fp32<64>(args, stream);
  if (dim <= 96) return launch_forward_fp32<96>(args, stream);
  return launch_forward_fp32<128>(args, stream);
}

int launch_backward_fp32_sm80(const BackwardCuda& cuda, void* stream) {
  const BackwardKernelArgs args = backward_kernel_args(cuda);
  const int64_t dim = cuda.args.problem.dim;
  if (dim <= 64) return launch_backward_fp32<64>(args, stream);
  if (dim <= 96) return launch_backward_fp32<96>(args, stream);
  return launch_backward_fp32<128>(args, stream);
}

}  // namespace arcore::block_sparse_attention
