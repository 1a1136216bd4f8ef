#include "sample/run_sm80.cuh"

// sass run_short_rows: LDG.E.128.CONSTANT >= 8; ATOMS.ADD >= 2; no ATOMS.CAS

namespace arcore::sample {

ARCORE_LAUNCH_BOUNDS(kShortThreads, 2)
ARCORE_KERNEL run_short_rows(ARCORE_KERNEL_ARGS RunCuda cuda) {
  run_row<kShortThreads, Home::kShared>(cuda);
}

int launch_short_rows_sm80(const RunCuda& cuda, void* stream) {
  const Problem& p = cuda.problem;
  return launch(run_short_rows, {p.outer * p.inner, 1, 1, kShortThreads, shared_of(p.vocab)}, stream, cuda);
}

}  // namespace arcore::sample
