#include "sample/run_sm80.cuh"

namespace arcore::sample {

int launch_run_sm80(const RunCuda& cuda, void* stream) {
  const Problem& p = cuda.problem;
  const int64_t rows = p.outer * p.inner;
  const int64_t shared = static_cast<int64_t>(sizeof(Scratch)) + (cuda.keys == nullptr ? p.vocab * 4 : 0);
  const int error = threads_for_row(p.vocab) == 256
                        ? launch(run_rows<256>, {rows, 1, 1, 256, shared}, stream, cuda)
                        : launch(run_rows<384>, {rows, 1, 1, 384, shared}, stream, cuda);
  const bool scored = cuda.out.logprob != nullptr || cuda.out.raw_logprob != nullptr;
  if (error != 0 || !scored || cuda.draws.count == 0) return error;
  return launch(score_draws, {rows, 1, 1, kRowThreads, kRowWarps * 8}, stream, cuda);
}

int launch_select_sm80(const SelectCuda& cuda, void* stream) {
  const Selection& sel = cuda.selection;
  const int64_t shared = static_cast<int64_t>(sizeof(Scratch)) + (cuda.keys == nullptr ? sel.length * 4 : 0);
  return threads_for_row(sel.length) == 256
             ? launch(select_rows<256>, {sel.rows, 1, 1, 256, shared}, stream, cuda)
             : launch(select_rows<384>, {sel.rows, 1, 1, 384, shared}, stream, cuda);
}

}  // namespace arcore::sample
