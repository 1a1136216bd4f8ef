// The sums of row_state.h in vectors, for CPU kernels. Files that include this are compiled without
// contraction of a * b + c: ops that share a row must not differ in its last bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/row_state.h"
#include "common/vec.h"

namespace arcore {
inline namespace ARCORE_ISA {

// Columns that are read from memory once and then stay in the first-level cache for both passes over them.
// The blocks of a row start at its column 0; they decide the order of its sums.
constexpr int64_t kRowBlock = 2048;
static_assert(kRowBlock % (4 * kLanes) == 0 && kRowBlock % 64 == 0);

// exp is 0 from here on. Keeps -inf out of products with that 0.
constexpr float kExpIsZero = -88.0f;

// n is a multiple of kLanes; a NaN may be overlooked.
static inline float max_of_block(const float* y, int64_t n) {
  const Vec none(-std::numeric_limits<float>::infinity());
  Vec highest[4] = {none, none, none, none};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j)
      highest[j] = max(highest[j], load(y + i + j * kLanes));
  for (; i < n; i += kLanes)
    highest[0] = max(highest[0], load(y + i));
  return reduce_max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
}

template <bool kEntropy>
static inline void add_exponentials(const float* y, int64_t n, float shift, float inverse_temperature,
                                    RowState* state) {
  const Vec center(shift), scale(inverse_temperature), lowest(kExpIsZero);
  Vec sum[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  Vec weighted[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  auto add = [&](int j, const float* from) {
    const Vec d = (load(from) - center) * scale;
    const Vec e = exp(d);
    sum[j] = sum[j] + e;
    if constexpr (kEntropy) weighted[j] = fma(max(lowest, d), e, weighted[j]);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j)
      add(j, y + i + j * kLanes);
  for (; i < n; i += kLanes)
    add(0, y + i);
  state->sum += static_cast<double>(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])));
  if constexpr (kEntropy)
    state->weighted +=
        static_cast<double>(reduce_add((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])));
}

// As add_block in float64, one element after the other, for numbers that float32 has no room for.
template <typename T>
static inline void add_block_exact(const T* y, int64_t n, double inverse_temperature, bool entropy,
                                   RowState* state) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  double highest = kNone;
  for (int64_t i = 0; i < n; ++i)
    highest = static_cast<double>(y[i]) > highest ? static_cast<double>(y[i]) : highest;
  if (highest > state->max) {
    if (state->max != kNone) {
      const double drop = (state->max - highest) * inverse_temperature, shrink = std::exp(drop);
      state->weighted = shrink > 0.0 ? (state->weighted + drop * state->sum) * shrink : 0.0;
      state->sum *= shrink;
    }
    state->max = highest;
  }
  const double shift = state->max == kNone ? 0.0 : state->max;
  for (int64_t i = 0; i < n; ++i) {
    const double d = (static_cast<double>(y[i]) - shift) * inverse_temperature, e = std::exp(d);
    state->sum += e;
    if (entropy && e != 0.0) state->weighted += d * e;
  }
}

// A block of at most kRowBlock values, padded with -inf to whole vectors, with its maximum.
static inline void add_block(const float* y, int64_t n, float highest, double inverse_temperature,
                             bool entropy, RowState* state) {
  if (!is_moderate(inverse_temperature)) return add_block_exact(y, n, inverse_temperature, entropy, state);
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  if (static_cast<double>(highest) > state->max) {
    if (state->max != kNone) {
      const double drop = (state->max - static_cast<double>(highest)) * inverse_temperature;
      const double shrink = std::exp(drop);
      if (shrink > 0.0)
        state->weighted = (state->weighted + drop * state->sum) * shrink;
      else
        state->weighted = 0.0;
      state->sum *= shrink;
    }
    state->max = highest;
  }
  // All -inf so far: with a finite shift they add 0, and a NaN among them still shows.
  const float shift = state->max == kNone ? 0.0f : static_cast<float>(state->max);
  const auto scale = static_cast<float>(inverse_temperature);
  if (entropy) {
    add_exponentials<true>(y, n, shift, scale, state);
  } else {
    add_exponentials<false>(y, n, shift, scale, state);
  }
}

}  // namespace ARCORE_ISA
}  // namespace arcore
