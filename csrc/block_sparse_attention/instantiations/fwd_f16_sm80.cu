// claims: mma.sync, cp.async, ldmatrix
#include "block_sparse_attention/fwd_sm80.cuh"

namespace arcore::block_sparse_attention {

int launch_forward_f16_sm80(const ForwardCuda& cuda, void* stream) {
  return launch_forward_any_dim<float16>(cuda, stream);
}

}  // namespace arcore::block_sparse_attention
