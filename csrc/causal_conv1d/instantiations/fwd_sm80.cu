#include "causal_conv1d/fwd_sm80.cuh"

namespace arcore::causal_conv1d {

int launch_forward_sm80(const ForwardCuda& cuda, void* stream) {
  switch (cuda.args.problem.width) {
    case 2:
      return launch_forward<2>(cuda, stream);
    case 3:
      return launch_forward<3>(cuda, stream);
    case 4:
      return launch_forward<4>(cuda, stream);
    default:
      return launch_forward<0>(cuda, stream);
  }
}

}  // namespace arcore::causal_conv1d
