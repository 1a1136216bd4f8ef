#include "sample/select_sm80.cuh"

namespace arcore::sample {

int launch_select_sm80(const SelectCuda& cuda, void* stream) {
  const Selection& sel = cuda.selection;
  if (cuda.keys != nullptr)
    return launch(select_long_rows, {sel.rows, 1, 1, kLongThreads, shared_of(0)}, stream, cuda);
  if (sel.length <= kShortRow)
    return launch(select_short_rows, {sel.rows, 1, 1, kShortThreads, shared_of(sel.length)}, stream, cuda);
  return launch(select_rows, {sel.rows, 1, 1, kLongThreads, shared_of(sel.length)}, stream, cuda);
}

}  // namespace arcore::sample
