// claims: cp.async
// sass scan_linear: LDGSTS >= 64; no FFMA; no DFMA; no LDL; no STL
#include "selective_scan/linear_sm80.cuh"

namespace arcore::selective_scan {

int launch_linear_sm80(const LinearArgs& args, void* stream) {
  return args.wide ? launch_linear<double>(args, stream) : launch_linear<float>(args, stream);
}

}  // namespace arcore::selective_scan
