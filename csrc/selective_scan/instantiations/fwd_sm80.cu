#include "common/sm80/marks.cuh"
#include "selective_scan/fwd_sm80.cuh"

// sass scan_forward<Shape<4, 4>, true>: LDGSTS.E.BYPASS.128 >= 4; no LDL

namespace arcore::selective_scan {

int64_t blocks_per_row_sm80(int64_t state, int64_t cells, int64_t cell) {
  const int64_t channels = channels_for_state(state);
  return cells * ((cell + channels - 1) / channels);
}

int launch_marks_sm80(const MarkArgs& args, void* stream) {
  return launch_marks(args, stream);
}

int launch_carry_sm80(const CarryArgs& args, void* stream) {
  return launch_carry(args, stream);
}

int launch_forward_sm80(const ForwardCuda& cuda, void* stream) {
  const int64_t state = cuda.args.problem.state;
  return state <= kFewStates ? launch_for_few_states<LaunchForward>(cuda, state, stream)
                             : launch_forward_many_sm80(cuda, stream);
}

}  // namespace arcore::selective_scan
