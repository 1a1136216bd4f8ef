#include "sample/run_sm80.cuh"

#include <cstdlib>
#include <cstring>

#include "sample/score_sm80.cuh"

// sass run_rows: LDG.E.128.CONSTANT >= 8; ATOMS.ADD >= 2; no ATOMS.CAS

namespace arcore::sample {

ARCORE_LAUNCH_BOUNDS(kLongThreads, 1)
ARCORE_KERNEL run_rows(ARCORE_KERNEL_ARGS RunCuda cuda) {
  run_row<kLongThreads, Home::kShared>(cuda);
}

int blocks_of_run_sm80(int64_t rows, int64_t vocab, int64_t multiprocessors) {
  const char* wish = std::getenv("ARCORE_SAMPLE_BLOCKS");
  const int limit = most_blocks_of_a_row_sm80();
  if (wish == nullptr || *wish == 0) return blocks_of_row(rows, vocab, limit, multiprocessors);
  if (std::strcmp(wish, "slices") == 0) return vocab > 0 ? 0 : 1;
  const int blocks = std::atoi(wish);
  const bool power = blocks > 0 && (blocks & (blocks - 1)) == 0;
  if (!power || blocks > limit) return kNoSuchBlocks;
  return slice_of_cluster(vocab, blocks) <= (blocks == 1 ? kSharedTokens : kClusterTokens) ? blocks
                                                                                           : kNoSuchBlocks;
}

int launch_run_sm80(const RunCuda& cuda, void* stream) {
  const Problem& p = cuda.problem;
  const int64_t rows = p.outer * p.inner;
  const int error = cuda.blocks == 0  ? launch_sliced_rows_sm80(cuda, stream)
                    : cuda.blocks > 1 ? launch_cluster_rows_sm80(cuda, stream)
                    : p.vocab <= kShortRow
                        ? launch_short_rows_sm80(cuda, stream)
                        : launch(run_rows, {rows, 1, 1, kLongThreads, shared_of(p.vocab)}, stream, cuda);
  const bool scored = cuda.out.logprob != nullptr || cuda.out.raw_logprob != nullptr;
  if (error != 0 || !scored || cuda.draws.count == 0) return error;
  return launch(score_draws, {rows, 1, 1, kRowThreads, kRowWarps * 8}, stream, cuda);
}

}  // namespace arcore::sample
