// The arithmetic that decides which token comes out, defined so that every instruction set, the reference in
// Python and a GPU agree to the last bit: single IEEE operations, explicit fused multiply-adds, integer sums.
// Files that include this are compiled without contraction of a * b + c.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace arcore::sample {

// float32 as integers of the same order; -0 must have become +0 before. Its own inverse on the bits.
constexpr int32_t kKeyNegInf = static_cast<int32_t>(0x807fffffu);
constexpr int32_t kKeyPosInf = 0x7f800000;
constexpr int32_t kKeyZero = 0;
// Below every key: what pads arrays.
constexpr int32_t kKeyPad = static_cast<int32_t>(0x80000000u);

ARCORE_HOST_DEVICE int32_t flip(int32_t bits) {
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
ARCORE_HOST_DEVICE int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
ARCORE_HOST_DEVICE float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
// A positive NaN is above kKeyPosInf, a negative one below kKeyNegInf.
ARCORE_HOST_DEVICE int32_t key_of(float x) {
  return flip(bits_of(x + 0.0f));
}
ARCORE_HOST_DEVICE float value_of(int32_t key) {
  return float_of(flip(key));
}

// exp(t) for t <= 0, within 1.5 ulp; 0 below -87.33, where float32 would be denormal; 1 at 0. 2^n * p(f) with
// n = round(t * log2 e), f = t * log2 e - n, |f| <= 0.5.
ARCORE_HOST_DEVICE float exp_of(float t) {
  constexpr float kLowest = -87.33f, kLog2eHigh = 0x1.715476p+0f, kLog2eLow = 0x1.4ae0cp-26f;
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer and leaves that in the low bits
  const float capped = t < kLowest ? kLowest : t;
  const float shifted = __builtin_fmaf(capped, kLog2eHigh, kRound);
  const float n = shifted - kRound;
  const float f = __builtin_fmaf(capped, kLog2eLow, __builtin_fmaf(capped, kLog2eHigh, -n));
  float p = 0x1.41d334p-13f;
  p = __builtin_fmaf(p, f, 0x1.5f456ap-10f);
  p = __builtin_fmaf(p, f, 0x1.3b2dbcp-7f);
  p = __builtin_fmaf(p, f, 0x1.c6aed4p-5f);
  p = __builtin_fmaf(p, f, 0x1.ebfbdap-3f);
  p = __builtin_fmaf(p, f, 0x1.62e430p-1f);
  p = __builtin_fmaf(p, f, 1.0f);
  // The shift drops the bits of kRound that are not the integer.
  const uint32_t scaled = static_cast<uint32_t>(bits_of(p)) + (static_cast<uint32_t>(bits_of(shifted)) << 23);
  const float e = float_of(static_cast<int32_t>(scaled));
  return t < kLowest ? 0.0f : e;
}

// A token's distance (x - top) / temperature is computed as (x / 4 - top / 4) * steepness, steepness = 4 /
// temperature in float32, each operation rounded once: quarters of finite numbers have a finite difference,
// and 4 / temperature is no denormal number for any temperature up to 3e38, so the distance is never NaN,
// even where denormals become zero.
constexpr float kQuarter = 0.25f;
ARCORE_HOST_DEVICE float steepness_of(double temperature) {
  return static_cast<float>(4.0 / temperature);
}

// Masses are multiples of 2^-k, with k such that a row of any vocabulary sums to less than 2^63.
ARCORE_HOST_DEVICE int mass_bits(int64_t vocab) {
  int k = 62;
  while (k > 0 && (int64_t{1} << (62 - k)) < vocab)
    --k;
  return k;
}

}  // namespace arcore::sample
