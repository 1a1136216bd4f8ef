#include "ssd/bwd_sm80.cuh"

namespace arcore::ssd {

int launch_gradients_of_two_parts_sm80(const GradientCuda& call, void* stream) {
  const int64_t states = call.in.states;
  if (call.left_parts == 2) {
    if (states <= 64) return launch_cells<Shape<64, 2>>(call, stream);
    if (states <= 128) return launch_cells<Shape<128, 2>>(call, stream);
    return launch_cells<Shape<256, 2>>(call, stream);
  }
  return states <= 64 ? launch_cells<Shape<64, 2, 3>>(call, stream)
                      : launch_cells<Shape<kMostStatesOfThreeParts, 2, 3>>(call, stream);
}

}  // namespace arcore::ssd
