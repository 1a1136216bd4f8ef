#include "ssd/bwd_sm80.cuh"

namespace arcore::ssd {

int launch_gradients_of_three_parts_sm80(const GradientCuda& call, void* stream) {
  return call.in.states <= 64 ? launch_cells<Shape<64, 3>>(call, stream)
                              : launch_cells<Shape<kMostStatesOfThreeParts, 3>>(call, stream);
}

}  // namespace arcore::ssd
