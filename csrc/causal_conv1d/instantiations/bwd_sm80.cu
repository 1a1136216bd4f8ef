#include "causal_conv1d/bwd_sm80.cuh"

namespace arcore::causal_conv1d {

int launch_backward_sm80(const BackwardCuda& cuda, void* stream) {
  switch (cuda.args.problem.width) {
    case 2:
      return launch_backward<2>(cuda, stream);
    case 3:
      return launch_backward<3>(cuda, stream);
    case 4:
      return launch_backward<4>(cuda, stream);
    default:
      return launch_backward<0>(cuda, stream);
  }
}

}  // namespace arcore::causal_conv1d
