// SIMD vocabulary of the CPU kernels, and the only file that uses at::vec.
//
// Included by kernel_cpu.cpp files, which are compiled once per instruction set; everything here has internal
// linkage or lives in an inline namespace named after that instruction set, so the variants never meet at
// link time.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#define ARCORE_RESTRICT __restrict__

namespace arcore {
inline namespace ARCORE_ISA {

using Vec = at::vec::Vectorized<float>;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

constexpr int kLanes = Vec::size();

// Register blocking of the matrix kernels: kMaxRows x (2 vectors) accumulators fill the register file.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kMaxRows = 12;
#else
constexpr int kMaxRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;

template <typename T>
static inline T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
static inline T max_of(T a, T b) {
  return a < b ? b : a;
}
static inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

static inline Vec load(const float* p) {
  return Vec::loadu(p);
}
static inline void store(float* p, Vec x) {
  x.store(p);
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return at::vec::fmadd(a, b, c);
}

// x, in a register from here on: else a compiler may read it from memory at each use.
static inline Vec in_register(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 held = x;
  asm("" : "+v"(held));
  return held;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 held = x;
  asm("" : "+x"(held));
  return held;
#else
  return x;
#endif
}

// exp(x) for x <= 88, about 1 ulp; 0 below -87.33 (where float32 would be denormal); NaN stays NaN.
// 2^n * p(f) with n = round(x * log2 e) and the degree-6 minimax polynomial of 2^f on |f| <= 1/2 (relative
// error 2e-9 before rounding, 8e-8 after).
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kExpLowest = -87.33f;
constexpr float kExpPoly[7] = {1.0f,
                               0.6931471824645996f,
                               0.24022646248340607f,
                               0.05550328642129898f,
                               0.009618489071726799f,
                               0.0013399930903688073f,
                               0.0001534581242594868f};

#if defined(CPU_CAPABILITY_AVX512)
static inline Vec exp(Vec value) {
  const __m512 x = value;
  // max(c, x) returns x when x is NaN.
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(kExpLowest), x);
  const __m512 log2e = _mm512_set1_ps(kLog2e);
  const __m512 n =
      _mm512_roundscale_ps(_mm512_mul_ps(clamped, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmsub_ps(clamped, log2e, n);
  __m512 p = _mm512_set1_ps(kExpPoly[6]);
  for (int i = 5; i >= 0; --i)
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExpPoly[i]));
  const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExpLowest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(keep, p, n);
}
static inline float reduce_max(Vec x) {
  return _mm512_reduce_max_ps(x);
}
static inline float reduce_add(Vec x) {
  return _mm512_reduce_add_ps(x);
}
#elif defined(CPU_CAPABILITY_AVX2)
static inline Vec exp(Vec value) {
  const __m256 x = value;
  const __m256 lowest = _mm256_set1_ps(kExpLowest);
  const __m256 clamped = _mm256_max_ps(lowest, x);
  const __m256 log2e = _mm256_set1_ps(kLog2e);
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(clamped, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_fmsub_ps(clamped, log2e, n);
  __m256 p = _mm256_set1_ps(kExpPoly[6]);
  for (int i = 5; i >= 0; --i)
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExpPoly[i]));
  const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shifted));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, lowest, _CMP_NLT_UQ));
}
static inline float reduce_max(Vec value) {
  const __m256 x = value;
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  m = _mm_max_ss(m, _mm_shuffle_ps(m, m, 1));
  return _mm_cvtss_f32(m);
}
static inline float reduce_add(Vec value) {
  const __m256 x = value;
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
#else
static inline Vec exp(Vec value) {
  float x[kLanes], out[kLanes];
  value.store(x);
  for (int i = 0; i < kLanes; ++i) {
    const float clamped = x[i] < kExpLowest ? kExpLowest : x[i];
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const float n = (clamped * kLog2e + 12582912.0f) - 12582912.0f;
    const float f = clamped * kLog2e - n;
    float p = kExpPoly[6];
    for (int j = 5; j >= 0; --j)
      p = p * f + kExpPoly[j];
    const int32_t exponent = (x[i] == x[i] ? static_cast<int32_t>(n) + 127 : 127) << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof(power));
    out[i] = x[i] < kExpLowest ? 0.0f : p * power;
  }
  return Vec::loadu(out);
}
static inline float reduce_max(Vec value) {
  float x[kLanes];
  value.store(x);
  float m = x[0];
  for (int i = 1; i < kLanes; ++i)
    m = x[i] > m ? x[i] : m;
  return m;
}
static inline float reduce_add(Vec value) {
  float x[kLanes];
  value.store(x);
  float s = x[0];
  for (int i = 1; i < kLanes; ++i)
    s += x[i];
  return s;
}
#endif

static inline Vec max(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

// Where a < b: x, elsewhere (also where a or b is NaN): y.
static inline Vec where_less(Vec a, Vec b, Vec x, Vec y) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
#else
  return Vec::blendv(y, x, a < b);
#endif
}

static inline Vec abs(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_abs_ps(x);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
#else
  return x.abs();
#endif
}

// 2^x. Below -126 the result is at most 2^-126; from 128 on it is infinite (AVX-512) or 2^127.5 (elsewhere).
#if defined(CPU_CAPABILITY_AVX512)
static inline Vec exp2(Vec value) {
  const __m512 x = value;
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(kExpPoly[6]);
  for (int i = 5; i >= 0; --i)
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExpPoly[i]));
  return _mm512_scalef_ps(p, n);
}
#elif defined(CPU_CAPABILITY_AVX2)
static inline Vec exp2(Vec value) {
  // max(c, x) returns x when x is NaN.
  const __m256 x = _mm256_max_ps(_mm256_set1_ps(-126.0f), _mm256_min_ps(_mm256_set1_ps(127.49f), value));
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const __m256 magic = _mm256_set1_ps(12582912.0f);
  const __m256 shifted = _mm256_add_ps(x, magic);
  const __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
  __m256 p = _mm256_set1_ps(kExpPoly[6]);
  for (int i = 5; i >= 0; --i)
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExpPoly[i]));
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}
#else
static inline Vec exp2(Vec value) {
  float x[kLanes], out[kLanes];
  value.store(x);
  for (int i = 0; i < kLanes; ++i) {
    const float clamped = x[i] < -126.0f ? -126.0f : x[i] > 127.49f ? 127.49f : x[i];
    const float n = (clamped + 12582912.0f) - 12582912.0f;
    const float f = clamped - n;
    float p = kExpPoly[6];
    for (int j = 5; j >= 0; --j)
      p = p * f + kExpPoly[j];
    const int32_t exponent = (x[i] == x[i] ? static_cast<int32_t>(n) + 127 : 127) << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof(power));
    out[i] = p * power;
  }
  return Vec::loadu(out);
}
#endif

// exp(x) for any x: infinite from 88.73 on, where `exp` above would leave the exponent's range.
static inline Vec exp_any(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return exp(x);
#else
  // exp(x) = exp(x - 64) * exp(64) for large x; the product rounds to infinity by itself.
  const Vec large = where_less(Vec(64.0f), x, Vec(64.0f), Vec(0.0f));
  const Vec capped = where_less(Vec(120.0f), x, Vec(120.0f), x);
  return exp(capped - large) * where_less(Vec(64.0f), x, Vec(6.2351490808116169e27f), Vec(1.0f));
#endif
}

// log(1 + t) for 0 <= t <= 1, relative error below 2e-7, also for tiny t: 2 atanh(t / (2 + t)).
static inline Vec log1p_unit(Vec t) {
  const Vec s = t / (Vec(2.0f) + t), s2 = s * s;
  Vec p(1.0f / 15);
  for (int k = 13; k >= 1; k -= 2)
    p = fma(p, s2, Vec(1.0f / static_cast<float>(k)));
  return Vec(2.0f) * s * p;
}

// x / (1 + exp(-x)).
static inline Vec silu(Vec x) {
  // Beyond the cap the result is below 2e-36, and the quotient would leave the normal range.
  const Vec minus = Vec(0.0f) - x;
  const Vec below = Vec(1.0f) + exp(where_less(Vec(87.0f), minus, Vec(87.0f), minus));
#if defined(CPU_CAPABILITY_AVX512)
  // One Newton step on 14 bits: within 1.5 ulp, in half the time of a division.
  const __m512 guess = _mm512_rcp14_ps(below);
  const __m512 rest = _mm512_fnmadd_ps(below, guess, _mm512_set1_ps(1.0f));
  return _mm512_mul_ps(x, _mm512_fmadd_ps(guess, rest, guess));
#else
  return x / below;
#endif
}

// log(1 + exp(x)).
static inline Vec softplus(Vec x) {
  return max(Vec(0.0f), x) + log1p_unit(exp(Vec(0.0f) - abs(x)));
}
// The same, and its derivative 1 / (1 + exp(-x)) from the same exponential.
static inline Vec softplus(Vec x, Vec& derivative) {
  const Vec e = exp(Vec(0.0f) - abs(x)), one(1.0f);
  derivative = where_less(x, Vec(0.0f), e, one) / (one + e);
  return max(Vec(0.0f), x) + log1p_unit(e);
}

// 1 / (1 + exp(-x)).
static inline Vec sigmoid(Vec x) {
  const Vec e = exp(Vec(0.0f) - abs(x)), one(1.0f);
  return where_less(x, Vec(0.0f), e, one) / (one + e);
}

// tanh(x), about 1.5 ulp: an odd polynomial below 5/8, where 1 - exp(-2 |x|) would cancel, else from the
// exponential.
static inline Vec tanh(Vec x) {
  constexpr float kPoly[6] = {-0.3333333432674408f,  0.13333304226398468f,   -0.05395941436290741f,
                              0.021770017221570015f, -0.008347122929990292f, 0.002295974176377058f};
  const Vec size = abs(x), square = x * x, one(1.0f);
  Vec p(kPoly[5]);
  for (int k = 4; k >= 0; --k)
    p = fma(p, square, Vec(kPoly[k]));
  const Vec near_zero = fma(x, square * p, x);
  const Vec e = exp(Vec(-2.0f) * size);
  const Vec magnitude = (one - e) / (one + e);
  return where_less(size, Vec(0.625f), near_zero, where_less(x, Vec(0.0f), Vec(0.0f) - magnitude, magnitude));
}

// Lanes [begin, end) of x, `other` in the rest; begin and end may lie outside the vector.
static inline Vec keep_lanes(Vec x, int64_t begin, int64_t end, Vec other) {
  const int lo = static_cast<int>(min_of<int64_t>(max_of<int64_t>(begin, 0), kLanes));
  const int hi = static_cast<int>(min_of<int64_t>(max_of<int64_t>(end, 0), kLanes));
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 keep = static_cast<__mmask16>(((1u << hi) - 1u) & ~((1u << lo) - 1u));
  return _mm512_mask_blend_ps(keep, other, x);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane);
  const __m256i within = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(within));
#else
  float kept[kLanes], rest[kLanes];
  x.store(kept);
  other.store(rest);
  for (int i = 0; i < kLanes; ++i)
    rest[i] = i >= lo && i < hi ? kept[i] : rest[i];
  return Vec::loadu(rest);
#endif
}

// Lanes whose bit is set in the low kLanes of `bits` from x, the others from `other`.
static inline Vec keep_bits(uint32_t bits, Vec x, Vec other) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), other, x);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
#else
  float kept[kLanes], rest[kLanes];
  x.store(kept);
  other.store(rest);
  for (int i = 0; i < kLanes; ++i)
    rest[i] = bits >> i & 1u ? kept[i] : rest[i];
  return Vec::loadu(rest);
#endif
}

// One vector of 16-bit floats <-> two vectors of floats.
static inline auto widen(at::vec::Vectorized<BFloat16> x) {
  return at::vec::convert_bfloat16_float(x);
}
static inline auto widen(at::vec::Vectorized<Half> x) {
  return at::vec::convert_half_float(x);
}
static inline auto narrow(BFloat16, Vec low, Vec high) {
  return at::vec::convert_float_bfloat16(low, high);
}
static inline auto narrow(Half, Vec low, Vec high) {
  return at::vec::convert_float_half(low, high);
}

// kLanes storage elements -> one vector of floats and back.
static inline Vec load_lanes(const float* p) {
  return Vec::loadu(p);
}
static inline void store_lanes(float* p, Vec x) {
  x.store(p);
}
#if defined(CPU_CAPABILITY_AVX512)
static inline Vec load_lanes(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline Vec load_lanes(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store_lanes(BFloat16* p, Vec x) {
  const __m512i both = narrow(BFloat16{}, x, x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(both));
}
static inline void store_lanes(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(CPU_CAPABILITY_AVX2)
static inline Vec load_lanes(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline Vec load_lanes(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store_lanes(BFloat16* p, Vec x) {
  const __m256i both = narrow(BFloat16{}, x, x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(both));
}
static inline void store_lanes(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
template <typename T>
static inline Vec load_lanes(const T* p) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i)
    x[i] = static_cast<float>(p[i]);
  return Vec::loadu(x);
}
template <typename T>
static inline void store_lanes(T* p, Vec value) {
  float x[kLanes];
  value.store(x);
  for (int i = 0; i < kLanes; ++i)
    p[i] = static_cast<T>(x[i]);
}
#endif

// The first n of them, 0 <= n <= kLanes: nothing behind is read, its lanes are 0, or written.
#if defined(CPU_CAPABILITY_AVX512)
static inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}
static inline Vec load_lanes(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
static inline void store_lanes(float* p, Vec x, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
static inline Vec load_lanes(const BFloat16* p, int64_t n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline void store_lanes(BFloat16* p, Vec x, int64_t n) {
  const __m512i both = narrow(BFloat16{}, x, x);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_castsi512_si256(both));
}
#elif defined(CPU_CAPABILITY_AVX2)
static inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Vec load_lanes(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, first_lanes(n));
}
static inline void store_lanes(float* p, Vec x, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes(n), x);
}
#endif
template <typename T>
static inline Vec load_lanes(const T* p, int64_t n) {
  T some[kLanes] = {};
  std::memcpy(some, p, static_cast<size_t>(n) * sizeof(T));
  return load_lanes(some);
}
template <typename T>
static inline void store_lanes(T* p, Vec x, int64_t n) {
  T some[kLanes];
  store_lanes(some, x);
  std::memcpy(p, some, static_cast<size_t>(n) * sizeof(T));
}

// n storage elements -> n floats and back.
static inline void to_float(const float* ARCORE_RESTRICT src, float* ARCORE_RESTRICT dst, int64_t n) {
  std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
}
template <typename T>
static inline void to_float(const T* ARCORE_RESTRICT src, float* ARCORE_RESTRICT dst, int64_t n) {
  using Narrow = at::vec::Vectorized<T>;
  int64_t i = 0;
  for (; i + Narrow::size() <= n; i += Narrow::size()) {
    auto [low, high] = widen(Narrow::loadu(src + i));
    low.store(dst + i);
    high.store(dst + i + kLanes);
  }
  for (; i < n; ++i)
    dst[i] = static_cast<float>(src[i]);
}
static inline void from_float(const float* ARCORE_RESTRICT src, float* ARCORE_RESTRICT dst, int64_t n) {
  std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
}
template <typename T>
static inline void from_float(const float* ARCORE_RESTRICT src, T* ARCORE_RESTRICT dst, int64_t n) {
  using Narrow = at::vec::Vectorized<T>;
  int64_t i = 0;
  for (; i + Narrow::size() <= n; i += Narrow::size())
    narrow(T{}, Vec::loadu(src + i), Vec::loadu(src + i + kLanes)).store(dst + i);
  for (; i < n; ++i)
    dst[i] = static_cast<T>(src[i]);
}

// Calls f with a value of the storage type.
template <typename F>
static inline void with_type(StorageType dtype, const F& f) {
  switch (dtype) {
    case StorageType::kFloat32:
      return f(float{});
    case StorageType::kBFloat16:
      return f(BFloat16{});
    case StorageType::kFloat16:
      return f(Half{});
  }
}

// x where the bits of mask are set, else 0, whatever x is there.
static inline Vec keep_bits(Vec x, const uint32_t* mask) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_and_ps(x, _mm512_loadu_ps(mask));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_and_ps(x, _mm256_loadu_ps(reinterpret_cast<const float*>(mask)));
#else
  float values[kLanes];
  x.store(values);
  for (int i = 0; i < kLanes; ++i)
    values[i] = mask[i] ? values[i] : 0.0f;
  return Vec::loadu(values);
#endif
}

// dst[j][i] = src[i][j] for a kLanes x kLanes block of floats.
#if defined(CPU_CAPABILITY_AVX2)
static inline void transpose_8x8(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i)
    r[i] = _mm256_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif
#if defined(CPU_CAPABILITY_AVX512)
// Four rounds of 16 shuffles: pairs of rows, of pairs, of quarters of a vector, of halves.
static inline void transpose_16x16(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    r[i] = _mm512_loadu_ps(src + i * src_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  // r[i + j]: column 4 q + j of rows i to i + 3, in quarter q.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
    _mm512_storeu_ps(dst + j * dst_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(dst + (j + 4) * dst_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(dst + (j + 8) * dst_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(dst + (j + 12) * dst_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}
#endif
static inline void transpose_block(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
#if defined(CPU_CAPABILITY_AVX512)
  transpose_16x16(src, src_stride, dst, dst_stride);
#elif defined(CPU_CAPABILITY_AVX2)
  transpose_8x8(src, src_stride, dst, dst_stride);
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j)
      dst[j * dst_stride + i] = src[i * src_stride + j];
#endif
}

// Sums of four vectors at once: lane i of every group of four lanes holds a part of the sum of vi; adding the
// groups gives the sums.
#if defined(CPU_CAPABILITY_AVX512)
static inline Vec sum_quad(Vec v0, Vec v1, Vec v2, Vec v3) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
  const __m512d da = _mm512_castps_pd(a), db = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(da, db)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(da, db)));
}
// Lane 4 i + j of the result: the sum that quad i holds in its lanes j.
static inline Vec sum_groups(const Vec (&quads)[4]) {
  auto fold = [](__m512 p, __m512 q) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
  };
  return fold(fold(quads[0], quads[1]), fold(quads[2], quads[3]));
}
#elif defined(CPU_CAPABILITY_AVX2)
static inline Vec sum_quad(Vec v0, Vec v1, Vec v2, Vec v3) {
  const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(v0, v1), _mm256_unpackhi_ps(v0, v1));
  const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(v2, v3), _mm256_unpackhi_ps(v2, v3));
  const __m256d da = _mm256_castps_pd(a), db = _mm256_castps_pd(b);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(da, db)),
                       _mm256_castpd_ps(_mm256_unpackhi_pd(da, db)));
}
static inline Vec sum_groups(const Vec (&quads)[2]) {
  return _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                       _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}
#else
static inline Vec sum_quad(Vec v0, Vec v1, Vec v2, Vec v3) {
  float x[4][kLanes], out[kLanes];
  v0.store(x[0]);
  v1.store(x[1]);
  v2.store(x[2]);
  v3.store(x[3]);
  for (int g = 0; g < kLanes; g += 4)
    for (int i = 0; i < 4; ++i)
      out[g + i] = (x[i][g] + x[i][g + 2]) + (x[i][g + 1] + x[i][g + 3]);
  return Vec::loadu(out);
}
static inline Vec sum_groups(const Vec (&quads)[kLanes / 4]) {
  float out[kLanes];
  for (int q = 0; q < kLanes / 4; ++q) {
    float x[kLanes];
    quads[q].store(x);
    for (int i = 0; i < 4; ++i) {
      out[4 * q + i] = x[i];
      for (int g = 4; g < kLanes; g += 4)
        out[4 * q + i] += x[g + i];
    }
  }
  return Vec::loadu(out);
}
#endif

}  // namespace ARCORE_ISA
}  // namespace arcore
