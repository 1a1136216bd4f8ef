// Keeps some of the 32-bit lanes of arrays, in order, in place. For kernel files only.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/vec.h"

namespace arcore::sample {
namespace ARCORE_ISA {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kCompactLanes = 16;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kCompactLanes = 8;

// For each set of lanes, their numbers from the lowest on, one byte each.
struct LaneTable {
  uint8_t lanes[256][8];
};
constexpr LaneTable make_lane_table() {
  LaneTable table{};
  for (int set = 0; set < 256; ++set) {
    int n = 0;
    for (uint8_t lane = 0; lane < 8; ++lane)
      if (set >> lane & 1) table.lanes[set][n++] = lane;
  }
  return table;
}
static constexpr LaneTable kLaneTable = make_lane_table();
#else
constexpr int kCompactLanes = 1;
#endif

// The lanes below n - i.
static inline uint32_t lanes_left(int64_t n, int64_t i) {
  constexpr uint32_t kAll = (1u << kCompactLanes) - 1u;
  return n - i >= kCompactLanes ? kAll : (1u << (n - i)) - 1u;
}

// What `compact` keeps: kCompactLanes bits for the lanes from i on.

// low <= key <= high.
struct Between {
  const int32_t* key;
  int64_t n;
  int32_t low, high;

  uint32_t operator()(int64_t i) const {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i k = _mm512_loadu_si512(key + i);
    const __mmask16 above = _mm512_cmp_epi32_mask(k, _mm512_set1_epi32(low), _MM_CMPINT_NLT);
    return _mm512_mask_cmp_epi32_mask(above, k, _mm512_set1_epi32(high), _MM_CMPINT_LE) & lanes_left(n, i);
#elif defined(CPU_CAPABILITY_AVX2)
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key + i));
    const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), k),
                                            _mm256_cmpgt_epi32(k, _mm256_set1_epi32(high)));
    return ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(outside))) & lanes_left(n, i);
#else
    return key[i] >= low && key[i] <= high;
#endif
  }
};

// Entries whose bits are all set, rather than none.
struct Marked {
  const int32_t* keep;
  int64_t n;

  uint32_t operator()(int64_t i) const {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i k = _mm512_loadu_si512(keep + i);
    return _mm512_test_epi32_mask(k, k) & lanes_left(n, i);
#elif defined(CPU_CAPABILITY_AVX2)
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keep + i));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(k))) & lanes_left(n, i);
#else
    return keep[i] & 1;
#endif
  }
};

// to[a][j] = from[a][i] for the j-th i in [0, n) that `select` keeps; returns their number. from[a] null: the
// number first + i. to[a] may be from[a], or lie before it. Arrays are as long as the next multiple of 16 of
// n.
template <int kArrays, typename Select>
static inline int64_t compact(int64_t n, const Select& select, const int32_t* const (&from)[kArrays],
                              int32_t* const (&to)[kArrays], int64_t first = 0) {
  int64_t out = 0;
  for (int64_t i = 0; i < n; i += kCompactLanes) {
    const uint32_t lanes = select(i);
    if (lanes == 0) continue;
    // Compressing in a register and storing whole vectors: a compressing store is slow on several CPUs. What
    // is written too much lies below i + kCompactLanes and was read before.
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i number =
        _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first + i)),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int a = 0; a < kArrays; ++a) {
      const __m512i x = from[a] == nullptr ? number : _mm512_loadu_si512(from[a] + i);
      _mm512_storeu_si512(to[a] + out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), x));
    }
#elif defined(CPU_CAPABILITY_AVX2)
    const __m256i number = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(first + i)),
                                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i order =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTable.lanes[lanes])));
    for (int a = 0; a < kArrays; ++a) {
      const __m256i x =
          from[a] == nullptr ? number : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from[a] + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to[a] + out), _mm256_permutevar8x32_epi32(x, order));
    }
#else
    for (int a = 0; a < kArrays; ++a)
      to[a][out] = from[a] == nullptr ? static_cast<int32_t>(first + i) : from[a][i];
#endif
    out += __builtin_popcount(lanes);
  }
  return out;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::sample
