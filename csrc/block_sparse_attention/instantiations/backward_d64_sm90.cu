#include "block_sparse_attention/bwd_sm90.cuh"

namespace arcore::block_sparse_attention::sm90 {

int start_backward_d64(const BackwardParams& params, int64_t multiprocessors, void* stream) {
  return start_backward<64>(params, multiprocessors, stream);
}

}  // namespace arcore::block_sparse_attention::sm90
