#include "selective_state_update/update_sm80.cuh"

namespace arcore::selective_state_update {

int launch_update_sm80(const UpdateCuda& cuda, void* stream) {
  switch (cuda.args.state.dtype) {
    case StorageType::kBFloat16:
      return launch_update<bfloat16>(cuda, stream);
    case StorageType::kFloat16:
      return launch_update<float16>(cuda, stream);
    default:
      return launch_update<float>(cuda, stream);
  }
}

}  // namespace arcore::selective_state_update
