// Register-blocked matrix kernels on packed panels: C[R x kPanel] (+)= A[R x K] * B[K x kPanel].
//
// B is a panel: K rows of `kPitch` vectors, of which the first V are used; or the rows of any matrix. A is
// read by broadcasts, row-major or transposed. The R x V accumulators live in registers: 6 x 2 for 16
// registers (AVX2), 12 x 2 for 32 (AVX-512).
#pragma once

#include "common/vec.h"

namespace arcore {
inline namespace ARCORE_ISA {

// lda is the stride between rows of A (between its columns if A is transposed); ldb, that between rows of B
// where kPitch is 0.
using MicroKernel = void (*)(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                             int64_t k);

template <int R, int V, int kPitch, bool kTransposedA, bool kAccumulate>
static void micro_kernel(const float* ARCORE_RESTRICT a, int64_t lda, const float* ARCORE_RESTRICT b,
                         int64_t ldb, float* ARCORE_RESTRICT c, int64_t ldc, int64_t k) {
  if constexpr (kPitch > 0) ldb = kPitch * kLanes;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      acc[r][v] = Vec(0.0f);

  if constexpr (kTransposedA) {
    for (int64_t i = 0; i < k; ++i, a += lda, b += ldb) {
      Vec bv[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        bv[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec av(a[r]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          acc[r][v] = fma(av, bv[v], acc[r][v]);
      }
    }
  } else {
    // Three rows share a pointer (base, base + lda, base + 2 lda), which keeps all addresses in registers.
    constexpr int kBases = (R + 2) / 3;
    const float* base[kBases];
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g)
      base[g] = a + 3 * g * lda;
    for (int64_t i = 0; i < k; ++i, b += ldb) {
      Vec bv[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        bv[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec av(base[r / 3][(r % 3) * lda]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          acc[r][v] = fma(av, bv[v], acc[r][v]);
      }
#pragma GCC unroll 8
      for (int g = 0; g < kBases; ++g)
        ++base[g];
    }
  }

#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* out = c + r * ldc + v * kLanes;
      store(out, kAccumulate ? load(out) + acc[r][v] : acc[r][v]);
    }
}

// The kernels for 1..kMaxRows rows.
template <int V, int kPitch, bool kTransposedA, bool kAccumulate>
struct MicroKernels {
  MicroKernel of_rows[kMaxRows + 1];
  constexpr MicroKernels() : of_rows{} { fill<1>(); }

 private:
  template <int R>
  constexpr void fill() {
    of_rows[R] = &micro_kernel<R, V, kPitch, kTransposedA, kAccumulate>;
    if constexpr (R < kMaxRows) fill<R + 1>();
  }
};

// C = A * B for the first `vectors` vectors of a wide panel.
static inline void multiply(int rows, int vectors, const float* a, int64_t lda, const float* b, float* c,
                            int64_t ldc, int64_t k) {
  static constexpr MicroKernels<1, 2, false, false> kHalf;
  static constexpr MicroKernels<2, 2, false, false> kWhole;
  (vectors == 2 ? kWhole.of_rows[rows] : kHalf.of_rows[rows])(a, lda, b, 0, c, ldc, k);
}

// C += A * B for the first `vectors` vectors of a wide panel.
static inline void multiply_more(int rows, int vectors, const float* a, int64_t lda, const float* b, float* c,
                                 int64_t ldc, int64_t k) {
  static constexpr MicroKernels<1, 2, false, true> kHalf;
  static constexpr MicroKernels<2, 2, false, true> kWhole;
  (vectors == 2 ? kWhole.of_rows[rows] : kHalf.of_rows[rows])(a, lda, b, 0, c, ldc, k);
}

// C += A * B; `vectors` is the width of the panel, 1 or 2.
static inline void multiply_add(int rows, int vectors, const float* a, int64_t lda, const float* b, float* c,
                                int64_t ldc, int64_t k) {
  static constexpr MicroKernels<1, 1, false, true> kNarrow;
  static constexpr MicroKernels<2, 2, false, true> kWide;
  (vectors == 2 ? kWide.of_rows[rows] : kNarrow.of_rows[rows])(a, lda, b, 0, c, ldc, k);
}

// C += A * B, where the rows of B lie ldb apart: a matrix as it is, without panels.
static inline void multiply_add_rows(int rows, int vectors, const float* a, int64_t lda, const float* b,
                                     int64_t ldb, float* c, int64_t ldc, int64_t k) {
  static constexpr MicroKernels<1, 0, false, true> kNarrow;
  static constexpr MicroKernels<2, 0, false, true> kWide;
  (vectors == 2 ? kWide.of_rows[rows] : kNarrow.of_rows[rows])(a, lda, b, ldb, c, ldc, k);
}

// C += A^T * B.
static inline void multiply_add_transposed(int rows, int vectors, const float* a, int64_t lda, const float* b,
                                           float* c, int64_t ldc, int64_t k) {
  static constexpr MicroKernels<1, 1, true, true> kNarrow;
  static constexpr MicroKernels<2, 2, true, true> kWide;
  (vectors == 2 ? kWide.of_rows[rows] : kNarrow.of_rows[rows])(a, lda, b, 0, c, ldc, k);
}

// A matrix [rows, dim] cut into column panels, each [rows, width] contiguous; width is kPanel, or kLanes for
// a last half panel. Columns beyond dim are 0.
struct ColumnPanels {
  int64_t rows, dim;

  int64_t padded_dim() const { return round_up(dim, kLanes); }
  int64_t floats() const { return rows * padded_dim(); }
  int64_t count() const { return (padded_dim() + kPanel - 1) / kPanel; }
  int vectors(int64_t panel) const { return (panel + 1) * kPanel <= padded_dim() ? 2 : 1; }
  int64_t offset(int64_t panel, int64_t row) const {
    return panel * kPanel * rows + row * vectors(panel) * kLanes;
  }
};

// Rows of floats.
struct FloatRows {
  const float* data;
  int64_t stride;
  const float* row(int64_t i) const { return data + i * stride; }
};

// [count, dim] rows -> transposed panels: for every kPanel rows, [dim][kPanel]; rows beyond count are 0.
static inline void pack_transposed(FloatRows rows, int64_t count, int64_t dim, float* dst) {
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const int64_t here = max_of<int64_t>(0, min_of<int64_t>(kLanes, count - half));
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t width = min_of<int64_t>(kLanes, dim - d);
      if (here == kLanes && width == kLanes) {
        transpose_block(rows.row(half) + d, rows.stride, dst + d * kPanel + half, kPanel);
        continue;
      }
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < kLanes; ++i)
          dst[(d + j) * kPanel + half + i] = i < here ? rows.row(half + i)[d + j] : 0.0f;
    }
  }
}

// One row into column panels; columns beyond dim become 0.
static inline void pack_row(const float* row, const ColumnPanels& panels, int64_t index, float* dst) {
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int64_t width = panels.vectors(p) * kLanes, begin = p * kPanel;
    float* out = dst + panels.offset(p, index);
    const int64_t n = min_of(width, panels.dim - begin);
    if (n == kPanel) {
      store(out, load(row + begin));
      store(out + kLanes, load(row + begin + kLanes));
      continue;
    }
    for (int64_t i = 0; i < n; ++i)
      out[i] = row[begin + i];
    for (int64_t i = n; i < width; ++i)
      out[i] = 0.0f;
  }
}

}  // namespace ARCORE_ISA
}  // namespace arcore
