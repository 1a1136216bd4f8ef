#include "causal_conv1d/update_sm80.cuh"

namespace arcore::causal_conv1d {

int launch_update_sm80(const UpdateCuda& cuda, void* stream) {
  switch (cuda.args.width) {
    case 2:
      return launch_update<2>(cuda, stream);
    case 3:
      return launch_update<3>(cuda, stream);
    case 4:
      return launch_update<4>(cuda, stream);
    default:
      return launch_update<0>(cuda, stream);
  }
}

}  // namespace arcore::causal_conv1d
