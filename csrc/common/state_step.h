// One step of the states of a slice of channels. For kernel_cpu.cpp files.
#pragma once

#include "common/vec.h"

namespace arcore {
inline namespace ARCORE_ISA {

// Channels of a slice, and most states of a channel.
constexpr int64_t kSlice = 128;
constexpr int64_t kMaxStates = 256;

// What one (batch row, head, slice) works on; whole vectors beyond `count` and `states` hold zeros.
struct alignas(64) Slice {
  int64_t count, states, padded;  // channels, states, states rounded up to whole vectors
  alignas(64) float dt[kSlice], drive[kSlice], y[kSlice];  // dt times log2(e), dt times x
  alignas(64) float B[kMaxStates + 16], C[kMaxStates + 16];
  alignas(64) float tail[3][kMaxStates + 16];  // a channel's states where they are no whole vectors
};

constexpr int64_t kTogether = 4;  // channels whose arithmetic overlaps; they share the loads of B and C

// Some channels, of which `from` and `to` are the first one's states and `stride` leads to the next ones:
// state = a state + drive B, and the products C state of each summed into one vector. kTied: a is one number.
template <bool kTied, int64_t kChannels>
static inline void advance(const float* A, const Slice& s, int64_t channel, float a_log, const float* from,
                           float* to, int64_t stride, Vec* sums) {
  Vec dt[kChannels], drive[kChannels], a[kChannels], sum[kChannels];
  for (int64_t k = 0; k < kChannels; ++k) {
    dt[k] = Vec(s.dt[channel + k]);
    drive[k] = Vec(s.drive[channel + k]);
    if constexpr (kTied) a[k] = exp2(dt[k] * Vec(a_log));
    sum[k] = Vec(0.0f);
  }
  for (int64_t n = 0; n < s.padded; n += kLanes) {
    const Vec B = load(s.B + n), C = load(s.C + n);
    for (int64_t k = 0; k < kChannels; ++k) {
      if constexpr (!kTied) a[k] = exp2(dt[k] * load(A + k * s.states + n));
      const Vec h = fma(load(from + k * stride + n), a[k], drive[k] * B);
      store(to + k * stride + n, h);
      sum[k] = fma(h, C, sum[k]);
    }
  }
  for (int64_t k = 0; k < kChannels; ++k)
    sums[k] = sum[k];
}

}  // namespace ARCORE_ISA
}  // namespace arcore
