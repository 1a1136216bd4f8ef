// claims: mma.sync, cp.async, ldmatrix
// sass backward_by: HMMA.16816.F32 >= 96; LDGSTS.E.BYPASS.128 >= 4; no LDL; no STL
// sass backward_by: LDSM.16.MT88.4 >= 4; STG.E.128 >= 1
#include "block_sparse_attention/bwd_sm80.cuh"

namespace arcore::block_sparse_attention {

int launch_backward_f16_sm80(const BackwardCuda& cuda, void* stream) {
  return launch_backward_any_dim<float16>(cuda, stream);
}

}  // namespace arcore::block_sparse_attention
