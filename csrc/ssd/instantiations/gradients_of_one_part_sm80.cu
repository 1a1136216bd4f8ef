// claims: mma.sync, cp.async, ldmatrix
// sass cell_gradients<Shape<128, 1, 1> >: HMMA.16816.F32.BF16 >= 352; LDGSTS.E.BYPASS.128 >= 3
// sass cell_gradients: no LDL; no STL
#include "ssd/bwd_sm80.cuh"

namespace arcore::ssd {

int launch_gradients_of_one_part_sm80(const GradientCuda& call, void* stream) {
  const int64_t states = call.in.states;
  if (call.left_parts == 1) {
    if (states <= 64) return launch_cells<Shape<64, 1, 1>>(call, stream);
    if (states <= 128) return launch_cells<Shape<128, 1, 1>>(call, stream);
    return launch_cells<Shape<256, 1, 1>>(call, stream);
  }
  if (states <= 64) return launch_cells<Shape<64, 1, 3>>(call, stream);
  if (states <= 128) return launch_cells<Shape<128, 1, 3>>(call, stream);
  return launch_cells<Shape<256, 1, 3>>(call, stream);
}

}  // namespace arcore::ssd
