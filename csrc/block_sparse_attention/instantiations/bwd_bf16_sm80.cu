// claims: mma.sync, cp.async, ldmatrix
#include "block_sparse_attention/bwd_sm80.cuh"

namespace arcore::block_sparse_attention {

int launch_backward_bf16_sm80(const BackwardCuda& cuda, void* stream) {
  return launch_backward_any_dim<bfloat16>(cuda, stream);
}

}  // namespace arcore::block_sparse_attention
