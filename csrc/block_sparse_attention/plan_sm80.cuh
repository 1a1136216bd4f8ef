// Builds the tile plan of an interval mask on the device: which tiles hold an allowed pair, which hold
// nothing else.
#pragma once

#include "block_sparse_attention/params.h"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"

namespace arcore::block_sparse_attention {

constexpr int kPlanThreads = 128;
constexpr int kPlanColumns = 1024;  // columns whose kinds fit in shared memory at once

// What a warp finds of the tile [q0, q1) x [k0, k1): bit 0 if some pair is allowed, bit 1 if all are. The
// rule is that of classify_tile in common/tile_plan.h; lanes share the rows.
ARCORE_DEVICE int classify_by_warp(const int32_t* rows, int intervals, const int32_t* keys, int64_t q0,
                                   int64_t q1, int64_t k0, int64_t k1) {
  const int lane = lane_index();
  bool open = true;
  if (keys != nullptr)
    for (int64_t j = k0 + lane; j < k1; j += 32)
      open &= load_readonly(keys + 2 * j) <= q0 && load_readonly(keys + 2 * j + 1) >= q1;
  const bool keys_open = all_lanes(open);
  bool any = false, all = keys_open;
  for (int64_t i = q0 + lane; i < q1; i += 32) {
    bool covered = false;
    for (int x = 0; x < intervals; ++x) {
      const int64_t from = load_readonly(rows + (i * intervals + x) * 2);
      const int64_t to = load_readonly(rows + (i * intervals + x) * 2 + 1);
      const int64_t lo = from > k0 ? from : k0, hi = to < k1 ? to : k1;
      if (lo >= hi) continue;
      covered |= lo == k0 && hi == k1;
      any |= keys_open;
      for (int64_t j = lo; j < hi && !any; ++j)
        any = load_readonly(keys + 2 * j) <= i && i < load_readonly(keys + 2 * j + 1);
    }
    all &= covered;
  }
  const bool some = any_lane(any), every = all_lanes(all);
  return (some ? 1 : 0) | (some && every ? 2 : 0);
}

// A block per row of the plan.
ARCORE_KERNEL plan_rows(ARCORE_KERNEL_ARGS PlanArgs args) {
  auto* kinds = reinterpret_cast<int32_t*>(shared_memory());  // [kPlanColumns]
  const int lane = lane_index(), warp = warp_index();
  const int64_t row = block_x() % args.rows, grid = block_x() / args.rows, head = grid % args.heads,
                batch = grid / args.heads;
  const int32_t* rows = args.mask.bounds + batch * args.mask.batch + head * args.mask.head;
  const int32_t* keys =
      args.mask.key_bounds == nullptr ? nullptr : args.mask.key_bounds + batch * args.mask.key_batch;
  int32_t* out = args.plan + block_x() * args.pitch;
  int32_t count = 0;
  for (int64_t first = 0; first < args.columns; first += kPlanColumns) {
    const int here =
        static_cast<int>(args.columns - first < kPlanColumns ? args.columns - first : kPlanColumns);
    for (int c = warp; c < here; c += kPlanThreads / 32) {
      const int64_t tq = args.by_key ? first + c : row, tk = args.by_key ? row : first + c;
      const int64_t q0 = tq * args.tile_q, k0 = tk * args.tile_k;
      const int64_t q1 = q0 + args.tile_q < args.nq ? q0 + args.tile_q : args.nq;
      const int64_t k1 = k0 + args.tile_k < args.nk ? k0 + args.tile_k : args.nk;
      int kind = 0;
      if (!args.halves) {
        kind = classify_by_warp(rows, args.mask.intervals, keys, q0, q1, k0, k1);
      } else {
        const int64_t q = q0 + args.tile_q / 2 < q1 ? q0 + args.tile_q / 2 : q1;
        const int64_t k = k0 + args.tile_k / 2 < k1 ? k0 + args.tile_k / 2 : k1;
        const int first = args.by_key ? classify_by_warp(rows, args.mask.intervals, keys, q0, q1, k0, k)
                                      : classify_by_warp(rows, args.mask.intervals, keys, q0, q, k0, k1);
        const int second = args.by_key ? classify_by_warp(rows, args.mask.intervals, keys, q0, q1, k, k1)
                                       : classify_by_warp(rows, args.mask.intervals, keys, q, q1, k0, k1);
        // A half that lies outside of the matrix has no pair, and none that is forbidden.
        const bool one = args.by_key ? k == k1 : q == q1;
        const int full = first >> 1 & (one ? 1 : second >> 1);
        kind = (first & 1) << 1 | (one ? 0 : (second & 1) << 2) | full;
      }
      if (lane == 0) kinds[c] = kind;
    }
    sync_threads();
    if (warp == 0) {
      for (int c = 0; c < here; c += 32) {
        const int kind = c + lane < here ? kinds[c + lane] : 0;
        const uint32_t taken = ballot(kind != 0);
        const int before = count_bits(taken & ((1u << lane) - 1u));
        const int64_t column = first + c + lane;
        if (kind != 0)
          out[2 + count + before] =
              static_cast<int32_t>(args.halves ? column << 3 | kind : column << 1 | (kind >> 1));
        count += count_bits(taken);
      }
    }
    sync_threads();
  }
  if (thread_index() == 0) out[0] = count;
  if (warp == 0)  // no place is left as it was
    for (int64_t c = count + lane; c < args.columns; c += 32)
      out[2 + c] = 0;
}

// A block per grid: the place of each row among the rows by falling counts, ties by rising rows.
ARCORE_KERNEL order_rows(ARCORE_KERNEL_ARGS PlanArgs args) {
  const int64_t pitch = args.pitch;
  int32_t* plan = args.plan + block_x() * args.rows * pitch;
  for (int64_t row = thread_index(); row < args.rows; row += block_threads()) {
    const int32_t count = plan[row * pitch];
    int64_t place = 0;
    for (int64_t other = 0; other < args.rows; ++other) {
      const int32_t c = plan[other * pitch];
      place += c > count || (c == count && other < row);
    }
    plan[place * pitch + 1] = static_cast<int32_t>(row);
  }
}

// A block per grid: which visit of its column each tile is, rows in the order of head 0. Rows follow each
// other; the tiles of one are in different columns.
ARCORE_KERNEL number_visits(ARCORE_KERNEL_ARGS PlanArgs args) {
  const int64_t grid = block_x(), first = grid / args.heads * args.heads;
  int32_t* plan = args.plan + grid * args.rows * args.pitch;
  const int32_t* order = args.plan + first * args.rows * args.pitch;
  int32_t* seen = args.seen + grid * args.columns;
  for (int64_t c = thread_index(); c < args.columns; c += block_threads())
    seen[c] = 0;
  sync_threads();
  for (int64_t rank = 0; rank < args.rows; ++rank) {
    int32_t* row = plan + order[rank * args.pitch + 1] * args.pitch;
    const int32_t count = row[0];
    for (int64_t i = thread_index(); i < args.columns; i += block_threads())
      row[2 + args.columns + i] = i < count ? seen[row[2 + i] >> 1]++ : 0;
    sync_threads();
  }
}

inline int launch_plan(const PlanArgs& args, void* stream) {
  const int64_t grids = args.heads * args.batch;
  int error = launch(plan_rows, {args.rows * grids, 1, 1, kPlanThreads, kPlanColumns * 4}, stream, args);
  if (error == 0) error = launch(order_rows, {grids, 1, 1, kPlanThreads, 0}, stream, args);
  if (error == 0 && args.visits)
    error = launch(number_visits, {grids, 1, 1, 2 * kPlanThreads, 0}, stream, args);
  return error;
}

}  // namespace arcore::block_sparse_attention
