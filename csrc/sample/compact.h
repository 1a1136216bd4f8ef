// Keeps some of the 32-bit lanes of arrays, in order, in place. For kernel files only.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/vec.h"

namespace arcore::sample {
namespace ARCORE_ISA {

#if defined(CPU_CAPABILITY_AVX2)
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
#endif

// to[a][j] = from[a][i] for the j-th i in [0, n) with keep[i] != 0 (all bits set or none); returns their
// number. to[a] may be from[a]. Arrays are as long as the next multiple of 16 of n; keep is 0 from n on.
template <int kArrays>
static inline int64_t compact(int64_t n, const int32_t* keep, const int32_t* const (&from)[kArrays],
                              int32_t* const (&to)[kArrays]) {
  int64_t out = 0;
#if defined(CPU_CAPABILITY_AVX512)
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i k = _mm512_loadu_si512(keep + i);
    const __mmask16 lanes = _mm512_test_epi32_mask(k, k);
    // Compressing in a register and storing whole vectors: a compressing store is slow on several CPUs. What
    // is written too much lies below i + 16 and was read before.
    for (int a = 0; a < kArrays; ++a)
      _mm512_storeu_si512(to[a] + out, _mm512_maskz_compress_epi32(lanes, _mm512_loadu_si512(from[a] + i)));
    out += __builtin_popcount(lanes);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  for (int64_t i = 0; i < n; i += 8) {
    const int lanes = _mm256_movemask_ps(
        _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keep + i))));
    const __m256i order =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTable.lanes[lanes])));
    for (int a = 0; a < kArrays; ++a) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from[a] + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to[a] + out), _mm256_permutevar8x32_epi32(x, order));
    }
    out += __builtin_popcount(static_cast<unsigned>(lanes));
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    for (int a = 0; a < kArrays; ++a)
      to[a][out] = from[a][i];
    out += keep[i] & 1;
  }
#endif
  return out;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::sample
