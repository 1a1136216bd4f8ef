// claims: mma.sync, cp.async, ldmatrix
// sass forward<: HMMA.16816.F32 >= 64; LDGSTS.E.BYPASS.128 >= 3; no LDL; no STL
// sass forward<: LDSM.16.M88.4 >= 8; LDSM.16.MT88.4 >= 8
// sass false>: STG.E.128 >= 1
#include "block_sparse_attention/fwd_sm80.cuh"

namespace arcore::block_sparse_attention {

int launch_forward_f16_sm80(const ForwardCuda& cuda, void* stream) {
  return launch_forward_any_dim<float16>(cuda, stream);
}

}  // namespace arcore::block_sparse_attention
