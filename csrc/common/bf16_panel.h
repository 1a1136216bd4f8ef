// Products of bfloat16 matrices with float32 sums: C[rows x 16 blocks] (+)= A[rows x K] * B[K x 16 blocks],
// by AMX tiles (ARCORE_AMX) or AVX512-BF16 dot products, on the same packed panels.
//
// Both units multiply pairs of neighbours in K. B is cut into panels of 32 columns, [K / 2][32][2]; K is a
// multiple of 32 (dot products: of 2), and what pads it is 0. A is row-major.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "common/vec.h"

namespace arcore {
inline namespace ARCORE_ISA {

constexpr int64_t kDepthStep = 32;

static inline int64_t pad_depth(int64_t n) {
  return round_up(n, kDepthStep);
}

struct Bf16Rows {
  const BFloat16* data;
  int64_t stride, count, dim;
  const BFloat16* row(int64_t i) const { return data + i * stride; }
};

// Rows of `depth` elements as the columns of B: panels of 32 rows.
struct TransposedPanels {
  int64_t depth;
  int64_t panel() const { return depth * 32; }
  int64_t offset(int64_t row) const { return row / 32 * panel() + row % 32 * 2; }
};

// Rows as the rows of B: panels of 32 columns.
struct PairPanels {
  int64_t rows, dim;
  int64_t panel() const { return rows * 32; }
  int64_t offset(int64_t panel_index, int64_t row) const { return panel_index * panel() + row * 32; }
};

// Two vectors of floats, rounded.
static inline void store_pair(BFloat16* dst, Vec low, Vec high) {
  _mm512_storeu_si512(dst, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

static inline __mmask32 first_elements(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : n <= 0 ? __mmask32{0} : (__mmask32{1} << n) - 1;
}
// Elements [d, d + 32) of a row; 0 beyond its end.
static inline __m512i load_elements(const Bf16Rows& rows, int64_t i, int64_t d) {
  if (i >= rows.count) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi16(first_elements(rows.dim - d), rows.row(i) + d);
}

static inline bool all_finite(const Bf16Rows& rows) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 bad = 0;
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t d = 0; d < rows.dim; d += 32)
      bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(load_elements(rows, i, d), exponent), exponent);
  return bad == 0;
}

// [count, dim] -> [count, padded] with zeros.
static inline void copy_rows(const Bf16Rows& rows, int64_t padded, BFloat16* dst) {
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t d = 0; d < padded; d += 32)
      _mm512_storeu_si512(dst + i * padded + d, load_elements(rows, i, d));
}

static inline float dot(const BFloat16* a, const BFloat16* b, int64_t n) {
  Vec sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    sum = fma(load_lanes(a + i), load_lanes(b + i), sum);
  float total = reduce_add(sum);
  for (; i < n; ++i)
    total += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return total;
}

// Rows into panels that begin at row `at`, a multiple of 32; whole panels are written.
static inline void pack_transposed(const Bf16Rows& rows, const TransposedPanels& panels, int64_t at,
                                   BFloat16* dst) {
  alignas(64) float block[16 * 16];
  for (int64_t i = 0; i < rows.count; i += 16) {
    float* panel = reinterpret_cast<float*>(dst + panels.offset(at + i));
    for (int64_t d = 0; d < panels.depth; d += 32) {
      for (int64_t r = 0; r < 16; ++r)
        _mm512_store_si512(block + r * 16, load_elements(rows, i + r, d));
      // A pair of elements moves as one float.
      transpose_block(block, 16, panel + d / 2 * 32, 32);
    }
  }
  if ((rows.count - 1) % 32 < 16) {
    BFloat16* half = dst + panels.offset(at + (rows.count - 1) / 32 * 32 + 16);
    for (int64_t d = 0; d < panels.depth / 2; ++d)
      std::memset(half + d * 64, 0, 64);
  }
}

// Two vectors of floats, rounded, as pairs: element j of both, for each j.
static inline __m512i rounded_pairs(Vec even, Vec odd) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both);
}
// And back.
static inline Vec even_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
static inline Vec odd_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Two rows as pairs: element j of both, for each j.
static inline __m512i pairs_of(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

static inline void pack_pairs(const Bf16Rows& rows, const PairPanels& panels, int64_t at, BFloat16* dst) {
  for (int64_t i = 0; i < round_up(rows.count, 32); i += 2)
    for (int64_t d = 0; d < panels.dim; d += 32) {
      const __m512i even = load_elements(rows, i, d), odd = load_elements(rows, i + 1, d);
      BFloat16* out = dst + panels.offset(d / 32, at + i);
      _mm512_storeu_si512(out, pairs_of(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
      _mm512_storeu_si512(out + 32,
                          pairs_of(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1)));
    }
}

// A block of 32 rows and 16 columns, transposed.
static inline void turn_block(const BFloat16* src, int64_t src_stride, BFloat16* dst, int64_t dst_stride) {
  alignas(64) float pairs[16 * 16];
  for (int64_t i = 0; i < 16; ++i) {
    const BFloat16* row = src + 2 * i * src_stride;
    _mm512_store_si512(pairs + i * 16,
                       pairs_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)),
                                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + src_stride))));
  }
  transpose_block(pairs, 16, reinterpret_cast<float*>(dst), dst_stride / 2);
}

#if defined(ARCORE_AMX)

// The tiles of this thread for as long as the object lives: 0 to 3 sums, 4 rows of A, 5 to 7 of B.
class Bf16Unit {
 public:
  // Rows that one call takes at most, and what K has to be a multiple of.
  static constexpr int64_t kRows = 16, kDepth = 32;

  Bf16Unit() { configure(16); }
  ~Bf16Unit() { _tile_release(); }
  Bf16Unit(const Bf16Unit&) = delete;
  Bf16Unit& operator=(const Bf16Unit&) = delete;

  // `blocks` blocks of 16 columns, the first of them the first of a panel; panels lie `panel` elements apart.
  void multiply(int rows, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t panel,
                int blocks, float* c, int64_t ldc) {
    run<false>(rows, k, a, lda, b, panel, blocks, c, ldc);
  }
  void multiply_add(int rows, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t panel,
                    int blocks, float* c, int64_t ldc) {
    run<true>(rows, k, a, lda, b, panel, blocks, c, ldc);
  }

 private:
  void configure(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.bytes[t] = 64;
      config.rows[t] = static_cast<uint8_t>(t < 5 ? rows : 16);
    }
    settle(&config);
    _tile_loadconfig(&config);
    rows_ = rows;
  }

  // Tile instructions read memory that the compiler does not know of: what was stored before must be there.
  static void settle(const void* pointer) { asm volatile("" : : "r"(pointer) : "memory"); }

  template <bool kAccumulate>
  void run(int rows, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t panel, int blocks,
           float* c, int64_t ldc) {
    if (rows != rows_) configure(rows);
    settle(a);
    for (; blocks >= 4; blocks -= 4, b += 2 * panel, c += 64)
      step<4, kAccumulate>(k, a, lda, b, panel, c, ldc);
    if (blocks == 3) step<3, kAccumulate>(k, a, lda, b, panel, c, ldc);
    if (blocks == 2) step<2, kAccumulate>(k, a, lda, b, panel, c, ldc);
    if (blocks == 1) step<1, kAccumulate>(k, a, lda, b, panel, c, ldc);
    settle(c);
  }

  template <int kBlocks, bool kAccumulate>
  static void step(int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t panel, float* c,
                   int64_t ldc) {
    const size_t a_stride = static_cast<size_t>(lda) * 2, c_stride = static_cast<size_t>(ldc) * 4;
    if constexpr (kAccumulate) {
      _tile_loadd(0, c, c_stride);
      if constexpr (kBlocks > 1) _tile_loadd(1, c + 16, c_stride);
      if constexpr (kBlocks > 2) _tile_loadd(2, c + 32, c_stride);
      if constexpr (kBlocks > 3) _tile_loadd(3, c + 48, c_stride);
    } else {
      _tile_zero(0);
      if constexpr (kBlocks > 1) _tile_zero(1);
      if constexpr (kBlocks > 2) _tile_zero(2);
      if constexpr (kBlocks > 3) _tile_zero(3);
    }
    for (int64_t i = 0; i < k; i += 32, a += 32, b += 16 * 64) {
      _tile_loadd(4, a, a_stride);
      _tile_loadd(5, b, 128);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (kBlocks > 1) {
        _tile_loadd(6, b + 32, 128);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (kBlocks > 2) {
        _tile_loadd(7, b + panel, 128);
        _tile_dpbf16ps(2, 4, 7);
      }
      if constexpr (kBlocks > 3) {
        _tile_loadd(5, b + panel + 32, 128);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, c, c_stride);
    if constexpr (kBlocks > 1) _tile_stored(1, c + 16, c_stride);
    if constexpr (kBlocks > 2) _tile_stored(2, c + 32, c_stride);
    if constexpr (kBlocks > 3) _tile_stored(3, c + 48, c_stride);
  }

  int rows_ = 0;
};

#else

class Bf16Unit {
 public:
  static constexpr int64_t kRows = kMaxRows, kDepth = 2;

  void multiply(int rows, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t panel,
                int blocks, float* c, int64_t ldc) {
    run<false>(rows, k, a, lda, b, panel, blocks, c, ldc);
  }
  void multiply_add(int rows, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t panel,
                    int blocks, float* c, int64_t ldc) {
    run<true>(rows, k, a, lda, b, panel, blocks, c, ldc);
  }

 private:
  using Step = void (*)(int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, float* c, int64_t ldc);

  template <int kRows, int kBlocks, bool kAccumulate>
  static void step(int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, float* c, int64_t ldc) {
    __m512 acc[kRows][kBlocks];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kBlocks; ++v)
        acc[r][v] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 2, a += 2, b += 64) {
      __m512bh bv[kBlocks];
#pragma GCC unroll 2
      for (int v = 0; v < kBlocks; ++v)
        bv[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * 32));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * lda, sizeof(pair));
        const __m512bh av = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 2
        for (int v = 0; v < kBlocks; ++v)
          acc[r][v] = _mm512_dpbf16_ps(acc[r][v], av, bv[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kBlocks; ++v) {
        float* out = c + r * ldc + v * 16;
        _mm512_storeu_ps(out, kAccumulate ? _mm512_add_ps(_mm512_loadu_ps(out), acc[r][v]) : acc[r][v]);
      }
  }

  template <int kBlocks, bool kAccumulate>
  struct Steps {
    Step of_rows[kMaxRows + 1];
    constexpr Steps() : of_rows{} { fill<1>(); }

   private:
    template <int R>
    constexpr void fill() {
      of_rows[R] = &step<R, kBlocks, kAccumulate>;
      if constexpr (R < kMaxRows) fill<R + 1>();
    }
  };

  template <bool kAccumulate>
  static void run(int rows, int64_t k, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t panel,
                  int blocks, float* c, int64_t ldc) {
    static constexpr Steps<1, kAccumulate> kHalf;
    static constexpr Steps<2, kAccumulate> kWhole;
    for (; blocks >= 2; blocks -= 2, b += panel, c += 32)
      kWhole.of_rows[rows](k, a, lda, b, c, ldc);
    if (blocks == 1) kHalf.of_rows[rows](k, a, lda, b, c, ldc);
  }
};

#endif

}  // namespace ARCORE_ISA
}  // namespace arcore
