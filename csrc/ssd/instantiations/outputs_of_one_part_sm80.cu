// claims: mma.sync, cp.async, ldmatrix
// sass scan_cells<Shape<128, 1, 1>, true>: HMMA.16816.F32.BF16 >= 344; LDGSTS.E.BYPASS.128 >= 3
// sass scan_cells<Shape<128, 1, 1>, true>: LDSM.16.MT88.4 >= 36
// sass scan_cells: no LDL; no STL
#include "ssd/scan_sm80.cuh"

namespace arcore::ssd {

int launch_outputs_of_one_part_sm80(const ScanCuda& call, void* stream) {
  return launch_scan_any_states<1, 1, true>(call, stream);
}

}  // namespace arcore::ssd
