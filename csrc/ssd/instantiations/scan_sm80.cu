#include "common/sm80/marks.cuh"
#include "ssd/bwd_sm80.cuh"
#include "ssd/scan_sm80.cuh"
#include "ssd/steps_sm80.cuh"

namespace arcore::ssd {

int launch_marks_sm80(const MarkArgs& args, void* stream) {
  return launch_marks(args, stream);
}

int launch_carry_sm80(const CarryArgs& args, void* stream) {
  return launch_carry(args, stream);
}

int launch_steps_sm80(const StepCuda& call, void* stream) {
  const int64_t blocks = call.in.batch * call.layout.cells * ((call.in.heads + kStepWarps - 1) / kStepWarps);
  const auto run = call.layout.steps == 64 ? step_sizes<64> : step_sizes<32>;
  return launch(run, {blocks, 1, 1, kStepThreads, 0}, stream, call);
}

int launch_scan_sm80(const ScanCuda& call, void* stream) {
  if (!call.outputs) return launch_states_sm80(call, stream);
  const auto run = call.parts == 3   ? launch_outputs_of_three_parts_sm80
                   : call.parts == 2 ? launch_outputs_of_two_parts_sm80
                                     : launch_outputs_of_one_part_sm80;
  return run(call, stream);
}

int launch_fold_sm80(const FoldCuda& call, void* stream) {
  const int64_t blocks = (call.heads * call.size + kFoldThreads - 1) / kFoldThreads;
  return launch(fold_states, {call.batch * blocks, 1, 1, kFoldThreads, 0}, stream, call);
}

int launch_gate_sm80(const GateCuda& call, void* stream) {
  const Args& p = call.in;
  const int64_t blocks = (p.batch * p.length * p.heads * p.dim + kFoldThreads - 1) / kFoldThreads;
  return launch(through_gate, {blocks, 1, 1, kFoldThreads, 0}, stream, call);
}

int launch_gradients_sm80(const GradientCuda& call, void* stream) {
  const auto run = call.parts == 3   ? launch_gradients_of_three_parts_sm80
                   : call.parts == 2 ? launch_gradients_of_two_parts_sm80
                                     : launch_gradients_of_one_part_sm80;
  const int error = run(call, stream);
  if (error != 0) return error;
  const Args& p = call.in;
  const int64_t sums = p.batch * p.groups * (call.end - call.begin) * call.layout.steps * p.states;
  return launch(sum_slices, {(sums + kFoldThreads - 1) / kFoldThreads, 2, 1, kFoldThreads, 0}, stream, call);
}

}  // namespace arcore::ssd
