// sass forward: HGMMA >= 20; STG.E.128 >= 2; no LDL; no STL
// sass forward: MUFU.EX2 >= 64 between WARPGROUP.DEPBAR.LE gsb0, 0x1 and WARPGROUP.DEPBAR.LE gsb0, 0x0
#include "block_sparse_attention/fwd_sm90.cuh"

namespace arcore::block_sparse_attention::sm90 {

int start_forward_d128(const ForwardParams& params, unsigned blocks, void* stream) {
  return start_forward<128>(params, blocks, stream);
}

}  // namespace arcore::block_sparse_attention::sm90
