#include "sample/run_sm80.cuh"

// sass make_keys: LDG.E.128.CONSTANT >= 8; STG.E.128 >= 1; no LDL

namespace arcore::sample {

// Long rows without clusters: first the keys, by a block for each slice, into global memory ...
ARCORE_LAUNCH_BOUNDS(kShortThreads, 2)
ARCORE_KERNEL make_keys(ARCORE_KERNEL_ARGS RunCuda cuda) {
  const Problem& p = cuda.problem;
  auto* scratch = reinterpret_cast<Scratch*>(shared_memory());
  const int64_t slices = slices_of(p.vocab), number = block_x() / slices, slice = block_x() % slices;
  const int64_t first = slice * kSliceTokens;
  const Scalars s = scalars_of(p, number);
  Row<kShortThreads, Home::kGlobal> row(cuda.keys + number * key_stride(p.vocab) + first, first,
                                        first + kSliceTokens < p.vocab ? kSliceTokens : p.vocab - first,
                                        *scratch, s.steepness, 1.0f);
  if (!s.valid) return;
  load_row(p, s, {number / p.inner, number % p.inner}, row);
  if (thread_index() != 0) return;
  int32_t* range = cuda.ranges + block_x() * kRangeWords;
  range[0] = row.range.low;
  range[1] = row.range.high;
  range[2] = static_cast<int32_t>(row.range.count);
}
// ... then all else.
ARCORE_LAUNCH_BOUNDS(kLongThreads, 1)
ARCORE_KERNEL run_made_rows(ARCORE_KERNEL_ARGS RunCuda cuda) {
  run_row<kLongThreads, Home::kGlobal>(cuda);
}

int launch_sliced_rows_sm80(const RunCuda& cuda, void* stream) {
  const Problem& p = cuda.problem;
  const int64_t rows = p.outer * p.inner;
  const int error =
      launch(make_keys, {rows * slices_of(p.vocab), 1, 1, kShortThreads, shared_of(0)}, stream, cuda);
  return error != 0 ? error : launch(run_made_rows, {rows, 1, 1, kLongThreads, shared_of(0)}, stream, cuda);
}

}  // namespace arcore::sample
