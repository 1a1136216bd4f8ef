// claims: cp.reduce.async.bulk.global, cp.async.bulk.global, stmatrix, ld.acquire.gpu, st.release.gpu
// sass fused_kernel: HGMMA >= 24; STSM >= 4 between HGMMA and WARPGROUP.DEPBAR.LE gsb0, 0x0
// sass fused_kernel: MUFU.EX2 >= 24 between WARPGROUP.DEPBAR.LE gsb0, 0x1 and WARPGROUP.DEPBAR.LE gsb0, 0x0
// sass fused_kernel: STS.128 >= 8; no LDL; no STL
// sass query_gradients_kernel: LDG.E.128 >= 8; STG.E.128 >= 2; no LDL; no STL
#include "block_sparse_attention/bwd_fused_sm90.cuh"

namespace arcore::block_sparse_attention::sm90 {

int start_fused_d64(const FusedParams& params, int64_t multiprocessors, void* stream) {
  return start_fused<64>(params, multiprocessors, stream);
}

}  // namespace arcore::block_sparse_attention::sm90
