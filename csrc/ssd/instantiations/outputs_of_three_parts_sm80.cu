#include "ssd/scan_sm80.cuh"

namespace arcore::ssd {

int launch_outputs_of_three_parts_sm80(const ScanCuda& call, void* stream) {
  return launch_scan_any_states<3, 3, true>(call, stream);
}

}  // namespace arcore::ssd
