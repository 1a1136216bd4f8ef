// sass backward: HGMMA >= 12; STG.E.128 >= 2; no LDL; no STL
// sass backward: MUFU.EX2 >= 32 between WARPGROUP.DEPBAR.LE gsb0, 0x1 and WARPGROUP.DEPBAR.LE gsb0, 0x0
#include "block_sparse_attention/bwd_sm90.cuh"

namespace arcore::block_sparse_attention::sm90 {

int start_backward_d64(const BackwardParams& params, int64_t multiprocessors, void* stream) {
  return start_backward<64>(params, multiprocessors, stream);
}

}  // namespace arcore::block_sparse_attention::sm90
