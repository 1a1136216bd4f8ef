// Products within a chunk of a scan, shared by ssd and mamba3_scan: lower triangles of steps, and which
// states a backward keeps.
//
// A step may have several rows (`rank`, mamba3_scan's inputs and outputs per head): row i belongs to step i /
// rank, and "lower" means that a row meets all rows of its own step and of earlier ones.
#pragma once

#include "common/chunk.h"
#include "common/matmul_panel.h"

namespace arcore {
inline namespace ARCORE_ISA {

// One cache line more than a power of two, so that rows do not compete for the same cache sets.
constexpr int64_t kStride = kChunk + 16;
static_assert(kChunk % kPanel == 0);

// out[i] += sum over the rows j of steps up to i's of m[i][j] rows[j]; rows are given as column panels. The
// blocks on the diagonal run row by row: products with the zeros above it would carry a NaN of a later step
// into earlier ones.
static inline void add_lower(const float* m, int64_t length, int64_t rank, const ColumnPanels& columns,
                             const float* panels, float* out, int64_t pitch) {
  for (int64_t row = 0; row < length; row += kMaxRows) {
    const int rows = static_cast<int>(min_of<int64_t>(kMaxRows, length - row));
    const int64_t common = row / rank * rank;
    for (int64_t p = 0; p < columns.count(); ++p) {
      const float* from = panels + columns.offset(p, 0);
      float* to = out + row * pitch + p * kPanel;
      const int64_t width = columns.vectors(p) * kLanes;
      if (common > 0)
        multiply_add(rows, columns.vectors(p), m + row * kStride, kStride, from, to, pitch, common);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t end = ((row + r) / rank + 1) * rank;
        for (int64_t i = 0; i < width; i += kLanes) {
          Vec sum = load(to + r * pitch + i);
          for (int64_t s = common; s < end; ++s)
            sum = fma(Vec(m[(row + r) * kStride + s]), load(from + s * width + i), sum);
          store(to + r * pitch + i, sum);
        }
      }
    }
  }
}

// out[j] += sum over the rows i of steps from j's on of m[i][j] rows[i], likewise.
static inline void add_lower_transposed(const float* m, int64_t length, int64_t rank,
                                        const ColumnPanels& columns, const float* panels, float* out,
                                        int64_t pitch) {
  for (int64_t row = 0; row < length; row += kMaxRows) {
    const int rows = static_cast<int>(min_of<int64_t>(kMaxRows, length - row));
    const int64_t rest = (row + rows + rank - 1) / rank * rank;
    for (int64_t p = 0; p < columns.count(); ++p) {
      float* to = out + row * pitch + p * kPanel;
      const int64_t width = columns.vectors(p) * kLanes;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; i += kLanes) {
          Vec sum = load(to + r * pitch + i);
          for (int64_t t = (row + r) / rank * rank; t < rest; ++t)
            sum = fma(Vec(m[t * kStride + row + r]), load(panels + columns.offset(p, t) + i), sum);
          store(to + r * pitch + i, sum);
        }
      if (rest < length)
        multiply_add_transposed(rows, columns.vectors(p), m + rest * kStride + row, kStride,
                                panels + columns.offset(p, rest), to, pitch, length - rest);
    }
  }
}

// Rows into column panels, and as the columns of panels of kPanel rows.
static inline void row_panels(int64_t length, const ColumnPanels& panels, const float* rows, int64_t pitch,
                              float* dst) {
  for (int64_t t = 0; t < length; ++t)
    pack_row(rows + t * pitch, panels, t, dst);
}

static inline void transposed_panels(int64_t length, const float* rows, int64_t pitch, int64_t dim,
                                     float* dst) {
  for (int64_t s = 0; s < length; s += kPanel)
    pack_transposed({rows + s * pitch, pitch}, min_of<int64_t>(kPanel, length - s), dim, dst + s * dim);
}

static inline float dot(const float* a, const float* b, int64_t n) {
  Vec sum(0.0f);
  for (int64_t i = 0; i < n; i += kLanes)
    sum = fma(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

// Chunks of a row are gone through backwards for gradients, and each needs the state before it. Rows of up to
// kKeptChunks keep them all; longer ones keep one per segment of about the square root of their number, and
// redo the segment.
constexpr int64_t kKeptChunks = 64;

struct Segments {
  int64_t chunks, length, count;

  explicit Segments(int64_t chunks) : chunks(chunks), length(chunks), count(1) {
    if (chunks <= kKeptChunks) return;
    length = 1;
    while (length * length < chunks)
      ++length;
    count = (chunks + length - 1) / length;
  }
};

}  // namespace ARCORE_ISA
}  // namespace arcore
