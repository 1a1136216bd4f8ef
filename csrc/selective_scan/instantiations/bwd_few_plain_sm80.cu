// sass scan_backward<Shape<4, 4>, true>: LDGSTS.E.BYPASS.128 >= 10; STG.E.128 >= 3; no LDL; no STL

#include "selective_scan/bwd_sm80.cuh"

namespace arcore::selective_scan {

int launch_backward_few_plain_sm80(const BackwardCuda& cuda, void* stream) {
  return launch_for_few_states<Backward<true>::Launch>(cuda, cuda.args.problem.state, stream);
}

}  // namespace arcore::selective_scan
