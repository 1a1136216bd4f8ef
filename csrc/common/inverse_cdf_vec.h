// The sums of inverse_cdf.h in vectors, for CPU kernels. They are integers, so vectors change nothing in
// them.
#pragma once

#include <cstdint>

#include "common/inverse_cdf.h"
#include "common/vec.h"

namespace arcore {
inline namespace ARCORE_ISA {

struct CheckedSum {
  uint64_t sum;
  bool good;  // no number is NaN, infinite or negative; if one is, `sum` means nothing
};

// fixed_sum of at most 2^20 numbers, which are checked on the way.
#if defined(CPU_CAPABILITY_AVX512)
static inline CheckedSum checked_sum(const float* p, int64_t n) {
  constexpr int kNanInfiniteOrNegative = 0xd9;  // categories of vfpclassps
  const __m512 one = _mm512_set1_ps(1.0f), scale = _mm512_set1_ps(kProbabilityScale);
  __m512i low = _mm512_setzero_si512(), high = low;
  __mmask16 bad = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t left = n - i;
    const __mmask16 lanes = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, p + i);
    bad |= _mm512_fpclass_ps_mask(x, kNanInfiniteOrNegative);
    const __m512 scaled = _mm512_mul_ps(_mm512_min_ps(x, one), scale);
    low = _mm512_add_epi64(low, _mm512_cvttps_epi64(_mm512_castps512_ps256(scaled)));
    high = _mm512_add_epi64(high, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(scaled, 1)));
  }
  return {static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high))), bad == 0};
}
#elif defined(CPU_CAPABILITY_AVX2)
static inline CheckedSum checked_sum(const float* p, int64_t n) {
  // There is no conversion to int64. A number's integer is high * 2^31 + low, and sums of such halves are
  // exact in double precision.
  const __m256 one = _mm256_set1_ps(1.0f), scale = _mm256_set1_ps(0x1p31f);
  const __m256 largest = _mm256_set1_ps(3.402823466e38f), zero = _mm256_setzero_ps();
  __m256d high[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()}, low[2] = {high[0], high[0]};
  __m256 good = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(p + i);
    good = _mm256_and_ps(
        good, _mm256_and_ps(_mm256_cmp_ps(x, zero, _CMP_GE_OQ), _mm256_cmp_ps(x, largest, _CMP_LE_OQ)));
    const __m256 scaled = _mm256_mul_ps(_mm256_min_ps(x, one), scale);
    const __m256 whole = _mm256_floor_ps(scaled);
    const __m256 rest = _mm256_floor_ps(_mm256_mul_ps(_mm256_sub_ps(scaled, whole), scale));
    high[0] = _mm256_add_pd(high[0], _mm256_cvtps_pd(_mm256_castps256_ps128(whole)));
    high[1] = _mm256_add_pd(high[1], _mm256_cvtps_pd(_mm256_extractf128_ps(whole, 1)));
    low[0] = _mm256_add_pd(low[0], _mm256_cvtps_pd(_mm256_castps256_ps128(rest)));
    low[1] = _mm256_add_pd(low[1], _mm256_cvtps_pd(_mm256_extractf128_ps(rest, 1)));
  }
  double h[4], l[4];
  _mm256_storeu_pd(h, _mm256_add_pd(high[0], high[1]));
  _mm256_storeu_pd(l, _mm256_add_pd(low[0], low[1]));
  CheckedSum out{(static_cast<uint64_t>(h[0] + h[1] + h[2] + h[3]) << 31) +
                     static_cast<uint64_t>(l[0] + l[1] + l[2] + l[3]),
                 _mm256_movemask_ps(good) == 0xff};
  for (; i < n; ++i) {
    out.sum += fixed_point(p[i]);
    out.good &= p[i] >= 0.0f && p[i] <= 3.402823466e38f;
  }
  return out;
}
#else
static inline CheckedSum checked_sum(const float* p, int64_t n) {
  CheckedSum out{0, true};
  for (int64_t i = 0; i < n; ++i) {
    out.sum += fixed_point(p[i]);
    out.good &= p[i] >= 0.0f && p[i] <= 3.402823466e38f;
  }
  return out;
}
#endif

}  // namespace ARCORE_ISA
}  // namespace arcore
