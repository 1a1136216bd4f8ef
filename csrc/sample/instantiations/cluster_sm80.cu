#include "sample/run_sm80.cuh"

// sass run_cluster_rows on sm_90: LDG.E.128.CONSTANT >= 8; UCGABAR_WAIT >= 1; LD.E.64 >= 1; no ATOMS.CAS

namespace arcore::sample {

ARCORE_LAUNCH_BOUNDS(kLongThreads, 1)
ARCORE_KERNEL run_cluster_rows(ARCORE_KERNEL_ARGS RunCuda cuda) {
#if defined(ARCORE_CUDA_HOST) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  run_row<kLongThreads, Home::kCluster>(cuda);
#endif
}

int most_blocks_of_a_row_sm80() {
  return cluster_limit(run_cluster_rows, kLongThreads, shared_of(kClusterTokens));
}

int launch_cluster_rows_sm80(const RunCuda& cuda, void* stream) {
  const Problem& p = cuda.problem;
  const int64_t shared = shared_of(slice_of_cluster(p.vocab, cuda.blocks));
  return launch(run_cluster_rows, {p.outer * p.inner * cuda.blocks, 1, 1, kLongThreads, shared, cuda.blocks},
                stream, cuda);
}

}  // namespace arcore::sample
