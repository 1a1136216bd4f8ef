#include "ssd/scan_sm80.cuh"

namespace arcore::ssd {

int launch_states_sm80(const ScanCuda& call, void* stream) {
  const bool same = call.left_parts == call.parts;
  const auto run = call.parts == 3 ? launch_scan_any_states<3, 3, false>
                   : call.parts == 2
                       ? (same ? launch_scan_any_states<2, 2, false> : launch_scan_any_states<2, 3, false>)
                       : (same ? launch_scan_any_states<1, 1, false> : launch_scan_any_states<1, 3, false>);
  return run(call, stream);
}

}  // namespace arcore::ssd
