// The draw: which token 64 random bits pick from a row of probabilities.
//
// Probabilities become integers, multiples of 2^-62, and the cumulative distribution is summed in uint64.
// Integer sums do not depend on their order, so a sum by blocks, by vectors, by threads or by warps gives the
// same token bit for bit. The level is floor(bits * total / 2^64) < total, and the token is the first one
// whose inclusive cumulative sum is strictly above the level; therefore
//   - a token of probability 0 is never drawn, and a draw never runs past the last positive token;
//   - the row need not be normalised: total may be anything below 4, also the tiny mass of a residual;
//   - rounding is far below float32's: a token of probability p is drawn with probability
//     (p + d) / total, |d| <= 2^-62, and one below 2^-62 never.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace arcore {

constexpr float kProbabilityScale = 0x1p62f;
// Tokens whose sum is skipped or entered at once by a walk.
constexpr int64_t kWalkBlock = 64;

// floor(p * 2^62) for 0 <= p <= 1. NaN and negative numbers count as 0, numbers above 1 as 1.
ARCORE_HOST_DEVICE uint64_t fixed_point(float p) {
  // On the bits, without branches: compilers vectorise sums of this.
  constexpr int32_t kOne = 0x3f800000, kInfinity = 0x7f800000;
  int32_t bits;
  std::memcpy(&bits, &p, sizeof(bits));
  bits &= ~(bits >> 31) & -static_cast<int32_t>(bits <= kInfinity);
  bits = bits < kOne ? bits : kOne;
  float capped;
  std::memcpy(&capped, &bits, sizeof(capped));
  return static_cast<uint64_t>(static_cast<int64_t>(capped * kProbabilityScale));
}

// floor(bits * total / 2^64).
ARCORE_HOST_DEVICE uint64_t level_of(uint64_t bits, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(bits, total);
#else
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(bits) * total) >> 64);
#endif
}

// The sum of n numbers that lie `stride` apart.
ARCORE_HOST_DEVICE uint64_t fixed_sum(const float* p, int64_t n, int64_t stride = 1) {
  uint64_t sum = 0;
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i)
      sum += fixed_point(p[i]);
  else
    for (int64_t i = 0; i < n; ++i)
      sum += fixed_point(p[i * stride]);
  return sum;
}

// The first index whose inclusive cumulative sum is above `level`; n if there is none.
ARCORE_HOST_DEVICE int64_t walk_to_level(const float* p, int64_t n, uint64_t level, int64_t stride = 1) {
  for (int64_t begin = 0; begin < n; begin += kWalkBlock) {
    const int64_t end = n - begin < kWalkBlock ? n : begin + kWalkBlock;
    const uint64_t sum = fixed_sum(p + begin * stride, end - begin, stride);
    if (sum <= level) {
      level -= sum;
      continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t q = fixed_point(p[i * stride]);
      if (q > level) return i;
      level -= q;
    }
  }
  return n;
}

// The token that `bits` picks from p[0..n), n numbers in [0, 1] that add up to less than 4, in vocabulary
// order; -1 if no token has a probability of 2^-62 or more.
ARCORE_HOST_DEVICE int64_t inverse_cdf(const float* p, int64_t n, uint64_t bits, int64_t stride = 1) {
  const uint64_t total = fixed_sum(p, n, stride);
  if (total == 0) return -1;
  const int64_t token = walk_to_level(p, n, level_of(bits, total), stride);
  return token < n ? token : -1;  // only a row outside the contract, whose sum overflowed, ends at n
}

}  // namespace arcore
