#include "block_sparse_attention/plan_sm80.cuh"

namespace arcore::block_sparse_attention {

int launch_plan_sm80(const PlanArgs& args, void* stream) {
  return launch_plan(args, stream);
}

}  // namespace arcore::block_sparse_attention
