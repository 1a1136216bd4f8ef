// The kernels that write common/marks.h, and what states of sequences without steps are.
#pragma once

#include "common/marks.h"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"

namespace arcore {

// A thread per step of a row packed by cu_seqlens; bounds that are not sorted cannot make it read or write
// outside.
ARCORE_KERNEL mark_packed(ARCORE_KERNEL_ARGS MarkArgs args) {
  const int64_t t = block_x() * block_threads() + thread_index();
  if (t >= args.length) return;
  const int64_t at = args.reverse ? args.length - 1 - t : t;
  // The last sequence that starts at or before `at`: empty ones before it start there too.
  int64_t low = 0, high = args.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (args.cu_seqlens[middle] <= at)
      low = middle;
    else
      high = middle;
  }
  const bool first = at == args.cu_seqlens[low], last = at == args.cu_seqlens[low + 1] - 1;
  int32_t mark = static_cast<int32_t>(low << 8);
  if (args.reverse ? last : first) mark |= kRestart;
  if (args.reverse ? first : last) mark |= kEnd;
  args.marks[t] = mark;
}

// A warp per row with sequence ids: a step restarts where its id differs from the last one that was not
// negative.
ARCORE_KERNEL mark_ids(ARCORE_KERNEL_ARGS MarkArgs args) {
  const int64_t row = block_x();
  const int lane = lane_index();
  int32_t before = -1;
  for (int64_t begin = 0; begin < args.length; begin += 32) {
    const int64_t t = begin + lane;
    const int64_t at = args.reverse ? args.length - 1 - t : t;
    const int32_t id = t < args.length ? args.seq_idx[row * args.id_batch + at * args.id_time] : -1;
    const uint32_t valid = ballot(id >= 0);
    const uint32_t earlier = valid & ((1u << lane) - 1u);
    const int source = earlier != 0u ? 31 - leading_zeros(earlier) : 0;
    const int32_t found = shuffle(id, source);
    const int32_t previous = earlier != 0u ? found : before;
    if (t < args.length)
      args.marks[row * args.length + t] = id < 0 ? kPadding : previous >= 0 && previous != id ? kRestart : 0;
    const int newest = valid != 0u ? 31 - leading_zeros(valid) : 0;
    const int32_t last = shuffle(id, newest);
    if (valid != 0u) before = last;
  }
}

ARCORE_KERNEL carry_states(ARCORE_KERNEL_ARGS CarryArgs args) {
  const int64_t i = block_x() * block_threads() + thread_index();
  if (i < args.size) args.last[i] = args.first == nullptr ? 0.0f : args.first[i];
}

// 0 or a cudaError_t.
inline int launch_marks(const MarkArgs& args, void* stream) {
  if (args.cu_seqlens == nullptr)
    return launch(mark_ids, {args.length == 0 ? 0 : args.batch, 1, 1, 32, 0}, stream, args);
  return launch(mark_packed, {(args.length + 127) / 128, 1, 1, 128, 0}, stream, args);
}

inline int launch_carry(const CarryArgs& args, void* stream) {
  return launch(carry_states, {(args.size + 127) / 128, 1, 1, 128, 0}, stream, args);
}

}  // namespace arcore
