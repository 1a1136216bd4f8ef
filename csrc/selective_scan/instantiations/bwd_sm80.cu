#include "selective_scan/bwd_sm80.cuh"

namespace arcore::selective_scan {

int launch_backward_sm80(const BackwardCuda& cuda, void* stream) {
  const Problem& p = cuda.args.problem;
  const bool few = p.state <= kFewStates;
  const bool plain = cuda.layout.marks == nullptr && cuda.args.in.B.groups != 0 && cuda.args.in.C.groups != 0;
  const auto run = plain ? few ? launch_backward_few_plain_sm80 : launch_backward_many_plain_sm80
                   : few ? launch_backward_few_any_sm80
                         : launch_backward_many_any_sm80;
  const int error = run(cuda, stream);
  if (error != 0) return error;
  const int64_t groups_B = cuda.args.grad_B.data == nullptr ? 0 : cuda.args.grad_B.groups;
  const int64_t groups_C = cuda.args.grad_C.data == nullptr ? 0 : cuda.args.grad_C.groups;
  const int64_t results = p.batch * (groups_B > groups_C ? groups_B : groups_C) * p.length * p.state;
  return launch(sum_slices, {(results + 127) / 128, 2, 1, 128, 0}, stream, cuda);
}

}  // namespace arcore::selective_scan
