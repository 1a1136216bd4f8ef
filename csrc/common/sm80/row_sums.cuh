// The sums of row_state.h over a row of logits, for kernels: every op that returns a log-probability takes it
// from here, so that the number a sampler returns is the one that scoring the token again gives.
#pragma once

#include "common/row_state.h"
#include "common/sm80/device.h"

namespace arcore {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

// Columns that one block reads where long rows are cut; a function of nothing, so that a row always gives the
// same bits.
constexpr int64_t kRowSlice = 16384;
ARCORE_HOST_DEVICE int64_t row_slices(int64_t columns) {
  return columns > 2 * kRowSlice ? (columns + kRowSlice - 1) / kRowSlice : 1;
}

// exp is 0 from here on; keeps -inf out of products with that 0.
constexpr float kExpIsZero = -88.0f;

// Numbers of all threads of a block of kRowThreads, combined in one fixed order; every thread gets the
// result. `scratch` holds kRowWarps numbers; the block may use it again after the next barrier.
template <typename T, typename F>
ARCORE_DEVICE T combine_block(T value, T* scratch, const F& f) {
  for (int mask = 16; mask > 0; mask >>= 1)
    value = f(value, shuffle_xor(value, mask));
  const int warp = warp_index();
  if (lane_index() == 0) scratch[warp] = value;
  sync_threads();
  T total = scratch[0];
  for (int w = 1; w < kRowWarps; ++w)
    total = f(total, scratch[w]);
  sync_threads();
  return total;
}

ARCORE_DEVICE RowState empty_row() {
  return {-HUGE_VAL, 0.0, 0.0, -HUGE_VAL};
}

// Two parts of a row, the first one first.
ARCORE_DEVICE RowState merge_rows(const RowState& a, const RowState& b, double inverse_temperature) {
  // Field by field: a choice between the structures would put them into local memory.
  const bool first = a.max >= b.max;
  RowState out{first ? a.max : b.max, first ? a.sum : b.sum, first ? a.weighted : b.weighted, 0.0};
  const RowState low{first ? b.max : a.max, first ? b.sum : a.sum, first ? b.weighted : a.weighted, 0.0};
  out.target = a.target > b.target ? a.target : b.target;
  if (a.target != a.target || b.target != b.target) out.target = a.target != a.target ? a.target : b.target;
  if (low.max == -HUGE_VAL) {
    // Nothing but -inf, and NaN where its sum says so.
    out.sum += low.sum;
    out.weighted += low.weighted;
    return out;
  }
  const double drop = (low.max - out.max) * inverse_temperature, shrink = exp(drop);
  out.sum += low.sum * shrink;
  if (shrink > 0.0) out.weighted += (low.weighted + drop * low.sum) * shrink;
  return out;
}

// Sums over columns [0, n) of values that get(column) returns, by a block. for_each(f) calls f(value) for
// each of this thread's columns, the same ones each time.
template <typename Each>
ARCORE_DEVICE RowState sum_row(const Each& for_each, float inverse_temperature, bool entropy,
                               double* scratch) {
  float highest = -HUGE_VALF;
  for_each([&](float y) { highest = fmaxf(highest, y); });
  auto larger = [](float a, float b) { return fmaxf(a, b); };
  highest = combine_block(highest, reinterpret_cast<float*>(scratch), larger);
  const float shift = highest == -HUGE_VALF ? 0.0f : highest;
  float sum = 0.0f, weighted = 0.0f;
  for_each([&](float y) {
    const float d = multiply_rounded(add_rounded(y, -shift), inverse_temperature), e = expf(d);
    sum = add_rounded(sum, e);
    if (entropy) weighted = fused_multiply_add(d < kExpIsZero ? kExpIsZero : d, e, weighted);
  });
  auto add = [](double a, double b) { return add_rounded(a, b); };
  RowState state = empty_row();
  state.max = static_cast<double>(highest);
  state.sum = combine_block(static_cast<double>(sum), scratch, add);
  state.weighted = entropy ? combine_block(static_cast<double>(weighted), scratch, add) : 0.0;
  return state;
}

// Eight neighbouring numbers of a row, as 16 bytes at a time where they lie on 16 bytes. kReadonly: nobody
// writes to the row while the kernel runs.
constexpr int kTogether = 8;
template <bool kReadonly, typename T>
ARCORE_DEVICE void load_eight(const T* from, bool aligned, T (&values)[kTogether]) {
  if (!aligned) {
    ARCORE_UNROLL
    for (int j = 0; j < kTogether; ++j)
      values[j] = from[j];
    return;
  }
  ARCORE_UNROLL
  for (int l = 0; l < kTogether * static_cast<int>(sizeof(T)) / 16; ++l) {
    const auto* at = reinterpret_cast<const Vector16*>(from) + l;
    const Vector16 v = kReadonly ? load_readonly(at) : load_global(at);
    memcpy(reinterpret_cast<char*>(values) + 16 * l, &v, 16);
  }
}
template <typename T>
ARCORE_DEVICE void store_eight(T* to, bool aligned, const T (&values)[kTogether]) {
  if (!aligned) {
    ARCORE_UNROLL
    for (int j = 0; j < kTogether; ++j)
      store_global(to + j, values[j]);
    return;
  }
  ARCORE_UNROLL
  for (int l = 0; l < kTogether * static_cast<int>(sizeof(T)) / 16; ++l) {
    Vector16 v;
    memcpy(&v, reinterpret_cast<const char*>(values) + 16 * l, 16);
    store_global(reinterpret_cast<Vector16*>(to) + l, v);
  }
}

// f(column, value) for columns [begin, end) of a row, a thread's share: eight neighbours at a time. Which
// thread has which column depends on `begin` and `end` alone, so that the sums of a row do not depend on its
// type or its address.
template <typename T, typename F>
ARCORE_DEVICE void for_each_column(const T* row, int64_t begin, int64_t end, const F& f) {
  const bool aligned = (reinterpret_cast<uintptr_t>(row + begin) & 15) == 0;
  const int64_t n = end - begin, whole = n / kTogether;
  for (int64_t i = thread_index(); i < whole; i += kRowThreads) {
    T values[kTogether];
    load_eight<true>(row + begin + i * kTogether, aligned, values);
    ARCORE_UNROLL
    for (int j = 0; j < kTogether; ++j)
      f(begin + i * kTogether + j, to_float(values[j]));
  }
  for (int64_t i = whole * kTogether + thread_index(); i < n; i += kRowThreads)
    f(begin + i, to_float(row[begin + i]));
}

// to[column] = f(column, from[column]) for columns [0, n), with the same shares; `to` may be `from`.
template <typename T, typename F>
ARCORE_DEVICE void transform_columns(const T* from, T* to, int64_t n, const F& f) {
  const bool from_aligned = (reinterpret_cast<uintptr_t>(from) & 15) == 0,
             to_aligned = (reinterpret_cast<uintptr_t>(to) & 15) == 0;
  const int64_t whole = n / kTogether;
  for (int64_t i = thread_index(); i < whole; i += kRowThreads) {
    T values[kTogether];
    load_eight<false>(from + i * kTogether, from_aligned, values);
    ARCORE_UNROLL
    for (int j = 0; j < kTogether; ++j)
      values[j] = from_float<T>(f(i * kTogether + j, to_float(values[j])));
    store_eight(to + i * kTogether, to_aligned, values);
  }
  for (int64_t i = whole * kTogether + thread_index(); i < n; i += kRowThreads)
    to[i] = from_float<T>(f(i, to_float(from[i])));
}
template <typename T>
ARCORE_DEVICE void clear_columns(T* to, int64_t n) {
  const bool aligned = (reinterpret_cast<uintptr_t>(to) & 15) == 0;
  const int64_t whole = n / kTogether;
  T zeros[kTogether];
  ARCORE_UNROLL
  for (int j = 0; j < kTogether; ++j)
    zeros[j] = from_float<T>(0.0f);
  for (int64_t i = thread_index(); i < whole; i += kRowThreads)
    store_eight(to + i * kTogether, aligned, zeros);
  for (int64_t i = whole * kTogether + thread_index(); i < n; i += kRowThreads)
    to[i] = zeros[0];
}

// The same share of columns for numbers that are computed: f(column).
template <typename F>
ARCORE_DEVICE void for_each_own_column(int64_t begin, int64_t end, const F& f) {
  const int64_t n = end - begin, whole = n / kTogether;
  for (int64_t i = thread_index(); i < whole; i += kRowThreads)
    for (int j = 0; j < kTogether; ++j)
      f(begin + i * kTogether + j);
  for (int64_t i = whole * kTogether + thread_index(); i < n; i += kRowThreads)
    f(begin + i);
}

}  // namespace arcore
