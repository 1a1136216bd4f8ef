#include "selective_scan/fwd_sm80.cuh"

namespace arcore::selective_scan {

int launch_forward_many_sm80(const ForwardCuda& cuda, void* stream) {
  return launch_for_many_states<LaunchForward>(cuda, cuda.args.problem.state, stream);
}

}  // namespace arcore::selective_scan
