// The first-order recurrence h[t] = a[t] h[t - 1] + b[t] for GPUs from sm_80 on. A lane goes through one row,
// step by step, so the bits are those of the CPU's loop, whatever the factors; a warp brings tiles of 32 rows
// and 32 steps through shared memory, one ahead.
#pragma once

#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "selective_scan/params.h"

namespace arcore::selective_scan {

constexpr int kLinearTile = 32, kLinearPitch = kLinearTile + 1;  // a column of a tile lies in 32 banks

template <typename T>
ARCORE_LAUNCH_BOUNDS(32, 8)
ARCORE_KERNEL scan_linear(ARCORE_KERNEL_ARGS LinearArgs args) {
  constexpr int kSize = kLinearTile * kLinearPitch;
  T* tiles = reinterpret_cast<T*>(shared_memory());  // [stage][a, b][row][step]
  const int lane = lane_index();
  const int64_t first = block_x() * kLinearTile, length = args.length;
  const int rows = static_cast<int>(args.rows - first < kLinearTile ? args.rows - first : kLinearTile);
  const T* a = static_cast<const T*>(args.a) + first * length;
  const T* b = static_cast<const T*>(args.b) + first * length;
  T* out = static_cast<T*>(args.out) + first * length;
  // Where step `begin + lane` in scan order lies in its row.
  const auto place = [&](int64_t begin) { return args.reverse ? length - 1 - begin - lane : begin + lane; };
  const auto load = [&](int stage, int64_t begin) {
    const bool valid = begin + lane < length;
    const int64_t at = valid ? place(begin) : 0;
    T* to = tiles + 2 * stage * kSize + lane;
    ARCORE_UNROLL
    for (int r = 0; r < kLinearTile; ++r) {
      if (r >= rows) continue;
      copy_async<sizeof(T)>(to + r * kLinearPitch, a + r * length + at, valid);
      copy_async<sizeof(T)>(to + kSize + r * kLinearPitch, b + r * length + at, valid);
    }
  };

  T state = T{0};
  if (args.initial != nullptr && lane < rows)
    state = load_global(static_cast<const T*>(args.initial) + first + lane);
  load(0, 0);
  copy_async_commit();
  int stage = 0;
  for (int64_t begin = 0; begin < length; begin += kLinearTile, stage ^= 1) {
    if (begin + kLinearTile < length) load(stage ^ 1, begin + kLinearTile);
    copy_async_commit();
    copy_async_wait<1>();
    sync_warp();
    T* factors = tiles + 2 * stage * kSize + lane * kLinearPitch;
    T* terms = factors + kSize;
    if (lane < rows) {
      ARCORE_UNROLL
      for (int i = 0; i < kLinearTile; ++i) {
        state = add_rounded(multiply_rounded(load_shared(factors + i), state), load_shared(terms + i));
        store_shared(terms + i, state);
      }
    }
    sync_warp();
    if (begin + lane < length) {
      const int64_t at = place(begin);
      const T* from = tiles + (2 * stage + 1) * kSize + lane;
      ARCORE_UNROLL
      for (int r = 0; r < kLinearTile; ++r)
        if (r < rows) store_global(out + r * length + at, load_shared(from + r * kLinearPitch));
    }
    sync_warp();  // the next but one tile is copied to where this one lay
  }
}

template <typename T>
int launch_linear(const LinearArgs& args, void* stream) {
  if (args.length == 0) return 0;
  return launch(scan_linear<T>,
                {(args.rows + kLinearTile - 1) / kLinearTile, 1, 1, 32,
                 4 * kLinearTile * kLinearPitch * static_cast<int64_t>(sizeof(T))},
                stream, args);
}

}  // namespace arcore::selective_scan
