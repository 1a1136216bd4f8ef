// What the sm_80 kernels share: tiles in shared memory, products of fragments, and what a mask forbids.
#pragma once

#include "block_sparse_attention/params.h"
#include "common/sm80/device.h"

namespace arcore::block_sparse_attention {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

ARCORE_DEVICE float negative_infinity() {
  return bits_float(0xff800000u);
}

// A tile of rows of kDim 16-bit numbers. Eight numbers of padding per row shift each row by 16 bytes modulo
// the 128 bytes of the banks, so that the eight rows of an ldmatrix never meet in a bank.
template <int kDim>
struct Pitch {
  static_assert(kDim % 16 == 0);
  static constexpr int value = kDim + 8;
};

// Are all rows of t on 16 bytes?
inline bool rows_aligned(const Tensor4& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch % 8 == 0 && t.head % 8 == 0 &&
         t.row % 8 == 0;
}

// Starts the copy of rows [first, first + kRows) of `from` into `to`; rows from `rows` on and columns from
// `dim` on become 0. Without alignment the copy is done at once, by plain loads.
template <typename T, int kDim, int kRows, int kThreads>
ARCORE_DEVICE void load_tile(T* to, const T* from, int64_t row_stride, int64_t first, int64_t rows, int dim,
                             bool aligned) {
  constexpr int kChunks = kDim / 8;
  for (int i = thread_index(); i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = first + row < rows && chunk * 8 < dim;
    T* target = to + row * Pitch<kDim>::value + chunk * 8;
    const T* source = from + (valid ? (first + row) * row_stride + chunk * 8 : 0);
    if (aligned) {
      copy_async<16>(target, source, valid);
    } else {
      Vector16 v{};
      if (valid) {
        ARCORE_UNROLL
        for (int w = 0; w < 4; ++w) {
          uint16_t low, high;
          memcpy(&low, source + 2 * w, 2);
          memcpy(&high, source + 2 * w + 1, 2);
          v.word[w] = static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
        }
      }
      store_shared(reinterpret_cast<Vector16*>(target), v);
    }
  }
}

// c[m][n] += a b^T for 16 m rows of a and 8 n rows of b, both in shared memory, over kDim columns.
template <typename T, int kDim, int kMTiles, int kNTiles>
ARCORE_DEVICE void multiply_rows(float (&c)[kMTiles][kNTiles][4], const T* a, const T* b) {
  constexpr int kPitch = Pitch<kDim>::value;
  static_assert(kNTiles % 2 == 0);
  const int lane = lane_index();
  const T* a_row = a + (lane % 16) * kPitch + lane / 16 * 8;
  const T* b_row = b + (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
  ARCORE_UNROLL
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t fa[kMTiles][4];
    ARCORE_UNROLL
    for (int m = 0; m < kMTiles; ++m)
      load_matrix4(fa[m], a_row + m * 16 * kPitch + k * 16);
    ARCORE_UNROLL
    for (int n = 0; n < kNTiles; n += 2) {
      uint32_t fb[4];
      load_matrix4(fb, b_row + n * 8 * kPitch + k * 16);
      ARCORE_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        mma_16816<T>(c[m][n], fa[m], fb[0], fb[1]);
        mma_16816<T>(c[m][n + 1], fa[m], fb[2], fb[3]);
      }
    }
  }
}

// Lays fragments over a tile of 16 kMTiles rows in shared memory, rounded to T. For one warp.
template <typename T, int kDim, int kMTiles>
ARCORE_DEVICE void store_fragments(T* tile, const float (&c)[kMTiles][kDim / 8][4]) {
  const int lane = lane_index();
  ARCORE_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    ARCORE_UNROLL
    for (int d = 0; d < kDim / 8; ++d) {
      T* at = tile + (m * 16 + lane / 4) * Pitch<kDim>::value + d * 8 + 2 * (lane % 4);
      store_shared(reinterpret_cast<uint32_t*>(at), pack2<T>(c[m][d][0], c[m][d][1]));
      store_shared(reinterpret_cast<uint32_t*>(at + 8 * Pitch<kDim>::value),
                   pack2<T>(c[m][d][2], c[m][d][3]));
    }
  }
}

// Writes kRows rows of a tile to rows [first, rows) of `to`. For one warp.
template <typename T, int kDim, int kRows>
ARCORE_DEVICE void store_rows(T* to, int64_t row_stride, const T* tile, int64_t first, int64_t rows, int dim,
                              bool aligned) {
  constexpr int kChunks = kDim / 8;
  for (int i = lane_index(); i < kRows * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (first + row >= rows || chunk * 8 >= dim) continue;
    const T* source = tile + row * Pitch<kDim>::value + chunk * 8;
    T* target = to + (first + row) * row_stride + chunk * 8;
    if (aligned) {
      store_global(reinterpret_cast<Vector16*>(target),
                   load_shared(reinterpret_cast<const Vector16*>(source)));
    } else {
      for (int e = 0; e < 8; ++e)
        target[e] = source[e];
    }
  }
}

// Results of a product, rounded to T, as the left factor of the next one: columns become the inner dimension.
template <typename T, int kMTiles, int kNTiles>
ARCORE_DEVICE void as_left_factor(uint32_t (&a)[kMTiles][kNTiles / 2][4],
                                  const float (&c)[kMTiles][kNTiles][4]) {
  ARCORE_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    ARCORE_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      a[m][n / 2][n % 2 * 2] = pack2<T>(c[m][n][0], c[m][n][1]);
      a[m][n / 2][n % 2 * 2 + 1] = pack2<T>(c[m][n][2], c[m][n][3]);
    }
  }
}

// ---- numbers that are not finite ----
//
// 0 * NaN is NaN, so a product over forbidden pairs, whose left factor is 0, would let through what the right
// factor holds there. Where a tile has forbidden pairs and numbers that are not finite, the product is taken
// with these numbers as 0, and they are added to the results of those rows only that may see them.

template <typename T>
ARCORE_DEVICE bool half_not_finite(uint32_t half) {
  constexpr uint32_t kExponent = std::is_same_v<T, bfloat16> ? 0x7f80u : 0x7c00u;
  return (half & kExponent) == kExponent;
}
template <typename T>
ARCORE_DEVICE bool word_not_finite(uint32_t word) {
  return half_not_finite<T>(word & 0xffffu) || half_not_finite<T>(word >> 16);
}
template <typename T>
ARCORE_DEVICE uint32_t finite_word(uint32_t word) {
  if (half_not_finite<T>(word & 0xffffu)) word &= 0xffff0000u;
  if (half_not_finite<T>(word >> 16)) word &= 0x0000ffffu;
  return word;
}

// Does this thread's share of a tile hold a number that is not finite?
template <typename T, int kDim, int kRows, int kThreads>
ARCORE_DEVICE bool share_not_finite(const T* tile) {
  constexpr int kChunks = kDim / 8;
  bool found = false;
  for (int i = thread_index(); i < kRows * kChunks; i += kThreads) {
    const Vector16 v = load_shared(
        reinterpret_cast<const Vector16*>(tile + i / kChunks * Pitch<kDim>::value + i % kChunks * 8));
    ARCORE_UNROLL
    for (int w = 0; w < 4; ++w)
      found |= word_not_finite<T>(v.word[w]);
  }
  return found;
}

// c[m][d] += a b for b of 16 kSteps rows and kDim columns in shared memory; with kFiniteOnly, numbers of b
// that are not finite count as 0.
template <typename T, int kDim, int kMTiles, int kSteps, bool kFiniteOnly = false>
ARCORE_DEVICE void multiply(float (&c)[kMTiles][kDim / 8][4], const uint32_t (&a)[kMTiles][kSteps][4],
                            const T* b) {
  constexpr int kPitch = Pitch<kDim>::value;
  const int lane = lane_index();
  const T* b_row = b + (lane % 16) * kPitch + lane / 16 * 8;
  ARCORE_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    ARCORE_UNROLL
    for (int d = 0; d < kDim / 8; d += 2) {
      uint32_t fb[4];
      load_matrix4_transposed(fb, b_row + k * 16 * kPitch + d * 8);
      if constexpr (kFiniteOnly) {
        ARCORE_UNROLL
        for (int i = 0; i < 4; ++i)
          fb[i] = finite_word<T>(fb[i]);
      }
      ARCORE_UNROLL
      for (int m = 0; m < kMTiles; ++m) {
        mma_16816<T>(c[m][d], a[m][k], fb[0], fb[1]);
        mma_16816<T>(c[m][d + 1], a[m][k], fb[2], fb[3]);
      }
    }
  }
}

// `multiply` where bit 4 n + e of forbidden[m] says that element e of column tile n of the left factor is 0
// because the mask forbids it. kWeights: the left factor is positive where it is allowed, so that infinities
// stay; else what is not finite gives NaN.
template <typename T, int kDim, int kMTiles, int kSteps, bool kWeights>
ARCORE_DEVICE void multiply_guarded(float (&c)[kMTiles][kDim / 8][4], const uint32_t (&a)[kMTiles][kSteps][4],
                                    const uint32_t (&forbidden)[kMTiles], const T* b) {
  constexpr int kPitch = Pitch<kDim>::value;
  const int lane = lane_index();
  ARCORE_NO_UNROLL
  for (int j = 0; j < 16 * kSteps; ++j) {
    const T* row = b + j * kPitch;
    bool found = false;
    for (int d = 2 * lane; d < kDim; d += 64)
      found |= word_not_finite<T>(load_shared(reinterpret_cast<const uint32_t*>(row + d)));
    if (!any_lane(found)) continue;
    ARCORE_UNROLL
    for (int m = 0; m < kMTiles; ++m) {
      // The lane of these rows that holds column j.
      const uint32_t word = shuffle(forbidden[m], (lane & ~3) | (j % 8 / 2)) >> (j / 8 * 4 + j % 2);
      ARCORE_UNROLL
      for (int d = 0; d < kDim / 8; ++d) {
        ARCORE_UNROLL
        for (int e = 0; e < 2; ++e) {
          float value = to_float(row[d * 8 + 2 * (lane % 4) + e]);
          if (value - value == 0.0f) continue;
          if constexpr (!kWeights) value = bits_float(0x7fc00000u);
          if ((word & 1u) == 0u) c[m][d][e] += value;
          if ((word & 4u) == 0u) c[m][d][2 + e] += value;
        }
      }
    }
  }
  multiply<T, kDim, kMTiles, kSteps, true>(c, a, b);
}

// ---- masks ----

// The key ranges of one query row; none for rows outside the mask.
struct RowRanges {
  int32_t from[2];
  uint32_t size[2];

  ARCORE_DEVICE bool holds(int32_t key) const {
    return static_cast<uint32_t>(key - from[0]) < size[0] || static_cast<uint32_t>(key - from[1]) < size[1];
  }
};

// Bounds outside of the keys are cut to them.
ARCORE_DEVICE RowRanges row_ranges(const int32_t* rows, const Problem& p, int64_t row) {
  RowRanges r{{0, 0}, {0u, 0u}};
  if (row >= p.nq) return r;
  const int32_t nk = static_cast<int32_t>(p.nk);
  ARCORE_UNROLL
  for (int x = 0; x < 2; ++x) {
    if (x >= p.mask.intervals) continue;
    const int32_t low = load_readonly(rows + (row * p.mask.intervals + x) * 2);
    const int32_t high = load_readonly(rows + (row * p.mask.intervals + x) * 2 + 1);
    const int32_t from = low > 0 ? low : 0, to = high < nk ? high : nk;
    r.from[x] = from;
    r.size[x] = to > from ? static_cast<uint32_t>(to - from) : 0u;
  }
  return r;
}

ARCORE_DEVICE bool key_sees(const int32_t* keys, int64_t key, int64_t nk, int64_t row) {
  return key < nk && load_readonly(keys + 2 * key) <= row && row < load_readonly(keys + 2 * key + 1);
}

// Bit 4 n + e of forbidden[m]: the mask forbids element e of column tile n; rows are queries, columns keys.
template <int kMTiles, int kNTiles>
ARCORE_DEVICE void find_forbidden(uint32_t (&forbidden)[kMTiles], const Problem& p, const int32_t* rows,
                                  const int32_t* keys, int64_t row0, int64_t key0) {
  const int lane = lane_index(), column = 2 * (lane % 4);
  ARCORE_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    forbidden[m] = 0u;
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + m * 16 + half * 8 + lane / 4;
      const RowRanges ranges = row_ranges(rows, p, row);
      ARCORE_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        ARCORE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int64_t key = key0 + n * 8 + column + e;
          bool allowed = ranges.holds(static_cast<int32_t>(key));
          if (keys != nullptr) allowed = allowed && key_sees(keys, key, p.nk, row);
          if (!allowed) forbidden[m] |= 1u << (4 * n + 2 * half + e);
        }
      }
    }
  }
}

// The plan's row and its tiles.
struct PlanRow {
  const int32_t* data;
  int32_t count;

  ARCORE_DEVICE int32_t tile(int32_t i) const { return load_readonly(data + 2 + i); }
};

ARCORE_DEVICE const int32_t* plan_grid(const TilePlan& plan, int64_t batch, int64_t head) {
  return plan.data + batch * plan.batch + head * plan.head;
}
ARCORE_DEVICE PlanRow plan_row(const TilePlan& plan, const int32_t* grid, int64_t row) {
  const int32_t* data = grid + row * plan.pitch;
  return {data, load_readonly(data)};
}

template <typename T>
ARCORE_DEVICE T* head_of(const Tensor4& t, int64_t batch, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch + head * t.head;
}

// Which heads are worked on together, so that their keys and values stay in the second-level cache while
// every row of the plan passes over them.
constexpr int64_t kHeadsTogether = 16;

struct Work {
  int64_t pair, place;  // (batch, head) pair; place in the longest-first order
};

ARCORE_DEVICE Work work_of_block(int64_t block, int64_t pairs, int64_t rows) {
  const int64_t section = block / (kHeadsTogether * rows), first = section * kHeadsTogether;
  const int64_t here = pairs - first < kHeadsTogether ? pairs - first : kHeadsTogether;
  const int64_t rest = block - first * rows;
  return {first + rest % here, rest / here};
}

}  // namespace arcore::block_sparse_attention
