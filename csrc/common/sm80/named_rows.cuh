// Rows of a batch that name rows of a state, which change in place: those that name the same row follow each
// other in their order, in the block of the first of them.
#pragma once

#include "common/named_rows.h"
#include "common/sm80/device.h"

namespace arcore {

ARCORE_DEVICE int64_t named_row(const NamedRows& rows, int64_t batch) {
  if (rows.data == nullptr) return batch;
  if (rows.narrow) return load_readonly(static_cast<const int32_t*>(rows.data) + batch);
  return load_readonly(static_cast<const int64_t*>(rows.data) + batch);
}

// Whether a row of the batch before `batch` names `row`; the same answer in all threads of the block.
ARCORE_DEVICE bool named_before(const NamedRows& rows, int64_t batch, int64_t row) {
  if (rows.data == nullptr) return false;
  bool earlier = false;
  for (int64_t i = thread_index(); i < batch; i += block_threads())
    earlier |= named_row(rows, i) == row;
  return sync_threads_or(earlier);
}

// The next row of the batch, of `count`, that names `row`, or -1; the same answer in all threads of the
// block. `scratch` is shared memory.
ARCORE_DEVICE int64_t next_to_name(const NamedRows& rows, int64_t batch, int64_t count, int64_t row,
                                   uint32_t* scratch) {
  if (rows.data == nullptr) return -1;
  constexpr uint32_t kNone = 0xffffffffu;
  if (thread_index() == 0) *scratch = kNone;
  sync_threads();
  for (int64_t i = batch + 1 + thread_index(); i < count; i += block_threads())
    if (named_row(rows, i) == row) {
      atomic_min(scratch, static_cast<uint32_t>(i));
      break;
    }
  sync_threads();
  const uint32_t found = *scratch;
  sync_threads();
  return found == kNone ? -1 : static_cast<int64_t>(found);
}

}  // namespace arcore
