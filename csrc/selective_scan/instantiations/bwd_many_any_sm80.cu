#include "selective_scan/bwd_sm80.cuh"

namespace arcore::selective_scan {

int launch_backward_many_any_sm80(const BackwardCuda& cuda, void* stream) {
  return launch_for_many_states<Backward<false>::Launch>(cuda, cuda.args.problem.state, stream);
}

}  // namespace arcore::selective_scan
