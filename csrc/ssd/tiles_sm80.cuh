// What the sm_80 kernels share: tiles in shared memory, numbers as sums of two of 16 bits, products of
// triangles, and which steps see each other.
//
// All products run on tensor cores: factors bfloat16, sums float32. A number that is not bfloat16 is the sum
// of two or three that are, to 2^-18 or 2^-26 of it, and a product of such sums leaves out what is smaller.
// Inputs have one part where all of them are bfloat16, three where one is float32, else two, which hold a
// float16 exactly. What is computed has three parts where inputs do, else two.
#pragma once

#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "common/sm80/sequence.cuh"
#include "ssd/params.h"

namespace arcore::ssd {

// Beyond this the decay of one step is 0 (or infinite) in any case; sums of such steps stay finite, so that
// A = -inf forgets instead of giving -inf - -inf.
constexpr double kLargestLog = 1e5;

// kInputParts: of x, B and C. kLeftParts: of what the states are made of, with B or C: x or the gradient of
// y. Eight numbers of padding per row of a tile shift each row by 16 bytes modulo the 128 bytes of the banks,
// so that the eight rows of an ldmatrix never meet in a bank.
template <int kStatesOfTile, int kInputParts, int kLeftParts = kInputParts>
struct Shape {
  static constexpr int kStates = kStatesOfTile, kInputs = kInputParts, kLeft = kLeftParts;
  static constexpr int kSplit = kInputs == 3 ? 3 : 2;  // parts of what is computed
  static constexpr int kSteps = cell_steps(kStates, kInputs), kRows = kSteps / 16;
  static constexpr int kPitchN = kStates + 8, kPitchP = kTileChannels + 8, kPitchS = kSteps + 8;
  // Numbers of one part of a tile: steps by states, by channels, by steps.
  static constexpr int kTileN = kSteps * kPitchN, kTileP = kSteps * kPitchP, kTileS = kSteps * kPitchS;
};

// ---- numbers in parts ----

// Two numbers, one word for each part.
template <int kParts>
struct Split {
  uint32_t part[kParts];
};
template <int kParts>
ARCORE_DEVICE Split<kParts> split(float a, float b) {
  Split<kParts> s;
  ARCORE_UNROLL
  for (int i = 0; i < kParts; ++i) {
    s.part[i] = pack2<bfloat16>(a, b);
    float x, y;
    unpack2<bfloat16>(s.part[i], x, y);
    a -= x;
    b -= y;
  }
  return s;
}

ARCORE_DEVICE bool half_not_finite(uint32_t half) {
  return (half & 0x7f80u) == 0x7f80u;
}
ARCORE_DEVICE bool word_not_finite(uint32_t word) {
  return half_not_finite(word) || half_not_finite(word >> 16);
}
// Bits of the halves of a word that hold finite numbers.
ARCORE_DEVICE uint32_t finite_bits(uint32_t word) {
  return (half_not_finite(word) ? 0u : 0xffffu) | (half_not_finite(word >> 16) ? 0u : 0xffff0000u);
}

// Element i of a word, and of all parts of it.
template <int kParts>
ARCORE_DEVICE void join(const uint32_t (&words)[kParts], float& low, float& high) {
  low = high = 0.0f;
  ARCORE_UNROLL
  for (int i = kParts - 1; i >= 0; --i) {
    float x, y;
    unpack2<bfloat16>(words[i], x, y);
    low += x;
    high += y;
  }
}

// Elements `at` and `at` + 1 of a tile whose parts lie `part` numbers apart.
template <int kParts>
ARCORE_DEVICE void load_two(const bfloat16* tile, int at, int part, float& first, float& second) {
  uint32_t words[kParts];
  ARCORE_UNROLL
  for (int i = 0; i < kParts; ++i)
    words[i] = load_shared(reinterpret_cast<const uint32_t*>(tile + at + i * part));
  join(words, first, second);
}

// c += a b, the small products first. `at`: 0 or 2, which of the two column tiles of b.
template <int kA, int kB>
ARCORE_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[kA][4], const uint32_t (&b)[kB][4], int at) {
  ARCORE_UNROLL
  for (int sum = 2; sum >= 0; --sum) {
    ARCORE_UNROLL
    for (int i = 0; i < kA; ++i) {
      const int j = sum - i;
      if (j >= 0 && j < kB) mma_16816<bfloat16>(c, a[i], b[j][at], b[j][at + 1]);
    }
  }
}

// ---- fragments from tiles; `tile` is the first of 16 rows and columns, parts lie `part` numbers apart ----

template <int kParts>
ARCORE_DEVICE void load_rows(uint32_t (&a)[kParts][4], const bfloat16* tile, int pitch, int part) {
  const int lane = lane_index();
  const bfloat16* row = tile + (lane % 16) * pitch + lane / 16 * 8;
  ARCORE_UNROLL
  for (int i = 0; i < kParts; ++i)
    load_matrix4(a[i], row + i * part);
}
// The transposed tile, as a left factor.
template <int kParts>
ARCORE_DEVICE void load_rows_transposed(uint32_t (&a)[kParts][4], const bfloat16* tile, int pitch, int part) {
  const int lane = lane_index();
  const bfloat16* row = tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
  ARCORE_UNROLL
  for (int i = 0; i < kParts; ++i)
    load_matrix4_transposed(a[i], row + i * part);
}
// As a right factor: 16 rows by two tiles of 8 columns, [0], [1] and [2], [3].
template <int kParts>
ARCORE_DEVICE void load_columns(uint32_t (&b)[kParts][4], const bfloat16* tile, int pitch, int part) {
  const int lane = lane_index();
  const bfloat16* row = tile + (lane % 16) * pitch + lane / 16 * 8;
  ARCORE_UNROLL
  for (int i = 0; i < kParts; ++i)
    load_matrix4_transposed(b[i], row + i * part);
}
// The transposed tile as a right factor: its rows are the columns.
template <int kParts>
ARCORE_DEVICE void load_columns_transposed(uint32_t (&b)[kParts][4], const bfloat16* tile, int pitch,
                                           int part) {
  const int lane = lane_index();
  const bfloat16* row = tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
  ARCORE_UNROLL
  for (int i = 0; i < kParts; ++i)
    load_matrix4(b[i], row + i * part);
}

// ---- tiles from global memory ----

// Do all rows lie on 16 bytes?
ARCORE_DEVICE bool rows_aligned(const View& v) {
  const int64_t numbers = v.dtype == StorageType::kFloat32 ? 3 : 7;
  return v.data != nullptr && v.last == 1 && ((v.batch | v.time | v.head) & numbers) == 0 &&
         (reinterpret_cast<uintptr_t>(v.data) & 15) == 0;
}

// Up to 8 numbers of a row.
template <typename T>
ARCORE_DEVICE void load_eight(const T* from, int64_t stride, int count, bool aligned, float (&to)[8]) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  if (aligned && count == 8) {
    ARCORE_UNROLL
    for (int i = 0; i < 8; i += kVector) {
      const Vector16 raw = load_readonly(reinterpret_cast<const Vector16*>(from + i));
      ARCORE_UNROLL
      for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4)
          to[i + w] = bits_float(raw.word[w]);
        else
          unpack2<T>(raw.word[w], to[i + 2 * w], to[i + 2 * w + 1]);
      }
    }
    return;
  }
  ARCORE_UNROLL
  for (int i = 0; i < 8; ++i)
    to[i] = i < count ? to_float(load_readonly(from + i * stride)) : 0.0f;
}

// Columns [column, column + columns) of the steps from `begin` on; steps in `skipped` and the columns behind
// become 0, and all of an absent tensor. Asynchronous where it can be: the caller commits and waits.
template <int kParts, int kSteps, int kWidth, int kThreads>
ARCORE_DEVICE void load_tile(bfloat16* to, const View& v, int64_t batch, int64_t head, int64_t begin,
                             int64_t column, int columns, uint64_t skipped, bool aligned) {
  constexpr int kPitch = kWidth + 8, kPart = kSteps * kPitch, kEights = kWidth / 8;
  if (v.data == nullptr) columns = 0;
  const int64_t first = batch * v.batch + head * v.head + begin * v.time + column * v.last;
  ARCORE_NO_UNROLL
  for (int i = hide(thread_index()); i < kSteps * kEights; i += kThreads) {
    const int row = i / kEights, c = i % kEights * 8;
    const int left = (skipped >> row & 1) != 0 ? 0 : columns - c, count = left < 0 ? 0 : left > 8 ? 8 : left;
    const int64_t at = first + row * v.time + c * v.last;
    bfloat16* place = to + row * kPitch + c;
    if constexpr (kParts == 1) {
      const auto* data = static_cast<const bfloat16*>(v.data);
      if (aligned && (count == 0 || count == 8)) {
        copy_async<16>(place, count == 8 ? data + at : data, count == 8);
        continue;
      }
      Vector16 words{};
      ARCORE_UNROLL
      for (int e = 0; e < 8; ++e) {
        uint16_t bits = 0;
        if (e < count) bits = load_readonly(reinterpret_cast<const uint16_t*>(data) + at + e * v.last);
        words.word[e / 2] |= static_cast<uint32_t>(bits) << (e % 2 * 16);
      }
      store_shared(reinterpret_cast<Vector16*>(place), words);
    } else {
      float values[8] = {};
      if (count > 0) {
        switch (v.dtype) {
          case StorageType::kBFloat16:
            load_eight(static_cast<const bfloat16*>(v.data) + at, v.last, count, aligned, values);
            break;
          case StorageType::kFloat16:
            load_eight(static_cast<const float16*>(v.data) + at, v.last, count, aligned, values);
            break;
          default:
            load_eight(static_cast<const float*>(v.data) + at, v.last, count, aligned, values);
        }
      }
      Vector16 words[kParts];
      ARCORE_UNROLL
      for (int w = 0; w < 4; ++w) {
        // What is not finite has no second part, which would be NaN.
        const Split<kParts> both = split<kParts>(values[2 * w], values[2 * w + 1]);
        words[0].word[w] = both.part[0];
        ARCORE_UNROLL
        for (int part = 1; part < kParts; ++part)
          words[part].word[w] = both.part[part] & finite_bits(both.part[0]);
      }
      ARCORE_UNROLL
      for (int part = 0; part < kParts; ++part)
        store_shared(reinterpret_cast<Vector16*>(place + part * kPart), words[part]);
    }
  }
}

// `kCount` rows of kSteps floats, `stride` apart in global memory and next to each other in shared memory.
template <int kSteps, int kCount, int kThreads>
ARCORE_DEVICE void load_vectors(float* to, const float* from, int64_t stride, int64_t at) {
  constexpr int kQuads = kSteps / 4;
  for (int i = hide(thread_index()); i < kCount * kQuads; i += kThreads) {
    const int which = i / kQuads, quad = i % kQuads * 4;
    copy_async<16>(to + which * kSteps + quad, from + which * stride + at + quad);
  }
}

// Two neighbours of a row, or one.
ARCORE_DEVICE void store_two(const View& v, int64_t at, float first, float second, bool both, bool paired) {
  if (both && paired) {
    switch (v.dtype) {
      case StorageType::kBFloat16:
        store_global(reinterpret_cast<uint32_t*>(static_cast<bfloat16*>(v.data) + at),
                     pack2<bfloat16>(first, second));
        return;
      case StorageType::kFloat16:
        store_global(reinterpret_cast<uint32_t*>(static_cast<float16*>(v.data) + at),
                     pack2<float16>(first, second));
        return;
      default:
        store_global(reinterpret_cast<Vector8*>(static_cast<float*>(v.data) + at),
                     Vector8{{float_bits(first), float_bits(second)}});
        return;
    }
  }
  store_any(v.data, v.dtype, at, first);
  if (both) store_any(v.data, v.dtype, at + v.last, second);
}
// Whether pairs that begin at even channels lie on their size.
ARCORE_DEVICE bool rows_paired(const View& v) {
  const uintptr_t bytes = v.dtype == StorageType::kFloat32 ? 8 : 4;
  return v.last == 1 && ((v.batch | v.time | v.head) & 1) == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % bytes == 0;
}

// ---- which steps see each other ----

// Bits [begin, end).
ARCORE_DEVICE uint64_t bits_between(int begin, int end) {
  const uint64_t below = end >= 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
  return begin >= 64 ? 0 : below & ~((uint64_t{1} << begin) - 1);
}
// Where the sequence of step t starts, or 0.
ARCORE_DEVICE int first_of(uint64_t starts, int t) {
  const uint64_t before = starts & bits_between(0, t + 1);
  return before == 0 ? 0 : 63 - leading_zeros64(before);
}
ARCORE_DEVICE int first_start(uint64_t starts, int steps) {
  return starts == 0 ? steps : lowest_bit64(starts);
}

// Steps [begin, end) of a cell that belong to one sequence, the first ones to the one before (maybe none).
struct Run {
  int begin, end;

  ARCORE_DEVICE uint64_t bits() const { return bits_between(begin, end); }
  ARCORE_DEVICE bool holds(int t) const { return begin <= t && t < end; }
};
ARCORE_DEVICE Run run_of(uint64_t starts, int number, int steps) {
  Run run{0, steps};
  for (int i = 0; i < number; ++i) {
    run.begin = lowest_bit64(starts);
    starts &= starts - 1;
  }
  run.end = first_start(starts, steps);
  return run;
}

// log2 of the decay from step s to step t, and the decay.
ARCORE_DEVICE float decay_between(const float* high, const float* low, int s, int t) {
  return exp2_approx((high[t] - high[s]) + (low[t] - low[s]));
}

// ---- triangles: blocks of 16 x 16 steps up to the diagonal, shared by the warps ----

template <int kSteps, int kWarps>
struct Triangle {
  static constexpr int kRows = kSteps / 16, kBlocks = kRows * (kRows + 1) / 2,
                       kMine = (kBlocks + kWarps - 1) / kWarps;
  // The number of the warp's block m, and which it is; false where it has none.
  ARCORE_DEVICE static bool block(int warp, int m, int& number, int& row, int& column) {
    number = warp + m * kWarps;
    row = number >= 6 ? 3 : number >= 3 ? 2 : number >= 1 ? 1 : 0;
    column = number - row * (row + 1) / 2;
    return number < kBlocks;
  }
};

// Blocks of rows columns^T over kWidth numbers: element (t, s) is row t of `rows` times row s of `columns`.
template <int kA, int kB, int kSteps, int kWidth, int kWarps>
ARCORE_DEVICE void multiply_triangle(float (&c)[Triangle<kSteps, kWarps>::kMine][2][4], const bfloat16* rows,
                                     const bfloat16* columns, int warp) {
  using Blocks = Triangle<kSteps, kWarps>;
  constexpr int kPitch = kWidth + 8, kPart = kSteps * kPitch;
  ARCORE_UNROLL
  for (int k = 0; k < kWidth / 16; ++k) {
    ARCORE_UNROLL
    for (int m = 0; m < Blocks::kMine; ++m) {
      int number, i, j;
      if (!Blocks::block(warp, m, number, i, j)) continue;
      uint32_t a[kA][4], b[kB][4];
      load_rows<kA>(a, rows + i * 16 * kPitch + k * 16, kPitch, kPart);
      load_columns_transposed<kB>(b, columns + j * 16 * kPitch + k * 16, kPitch, kPart);
      multiply(c[m][0], a, b, 0);
      multiply(c[m][1], a, b, 2);
    }
  }
}

// Where element e (0 to 3) of column tile n of this lane's part of a block is.
ARCORE_DEVICE int row_in_block(int e) {
  return lane_index() / 4 + e / 2 * 8;
}
ARCORE_DEVICE int column_in_block(int n, int e) {
  return n * 8 + 2 * (lane_index() % 4) + e % 2;
}

// A block of a triangle, in parts, into a tile of steps by steps.
template <int kSplit, int kSteps>
ARCORE_DEVICE void store_block(bfloat16* tile, int i, int j, const float (&c)[2][4]) {
  constexpr int kPitch = kSteps + 8, kPart = kSteps * kPitch;
  ARCORE_UNROLL
  for (int n = 0; n < 2; ++n) {
    ARCORE_UNROLL
    for (int e = 0; e < 4; e += 2) {
      const Split<kSplit> both = split<kSplit>(c[n][e], c[n][e + 1]);
      bfloat16* at = tile + (16 * i + row_in_block(e)) * kPitch + 16 * j + column_in_block(n, 0);
      ARCORE_UNROLL
      for (int part = 0; part < kSplit; ++part)
        store_shared(reinterpret_cast<uint32_t*>(at + part * kPart), both.part[part]);
    }
  }
}

// ---- numbers that are not finite ----
//
// 0 * NaN is NaN, so a product with a triangle, which is 0 where steps do not see each other, would let
// through what the right factor holds there. It is taken with numbers that are not finite as 0, and these are
// added to the results of those steps that see them.

// c[m] are the rows of the 16-row tile `first_row` + m; `right` begins at the warp's columns. kTransposed:
// row s of the result sums over the steps t that see it.
template <int kSplit, int kSteps, bool kTransposed, int kCount, int kColumns>
ARCORE_DEVICE void add_not_finite(float (&c)[kCount][kColumns][4], const bfloat16* triangle, int first_row,
                                  const bfloat16* right, int pitch, uint64_t starts) {
  constexpr int kPitch = kSteps + 8, kPart = kSteps * kPitch;
  ARCORE_NO_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    float values[kColumns][2];
    bool found = false;
    ARCORE_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      ARCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        values[n][e] = to_float(right[k * pitch + column_in_block(n, e)]);
        found |= values[n][e] - values[n][e] != 0.0f;
      }
    }
    if (!any_lane(found)) continue;
    ARCORE_UNROLL
    for (int m = 0; m < kCount; ++m) {
      ARCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * (first_row + m) + row_in_block(2 * half);
        const int t = kTransposed ? k : row, s = kTransposed ? row : k;
        if (s > t || s < first_of(starts, t)) continue;
        float weight = 0.0f;
        ARCORE_UNROLL
        for (int part = kSplit - 1; part >= 0; --part)
          weight += to_float(triangle[part * kPart + t * kPitch + s]);
        ARCORE_UNROLL
        for (int n = 0; n < kColumns; ++n) {
          ARCORE_UNROLL
          for (int e = 0; e < 2; ++e)
            if (values[n][e] - values[n][e] != 0.0f) c[m][n][2 * half + e] += weight * values[n][e];
        }
      }
    }
  }
}

// c += triangle right, over all steps and two tiles of columns.
template <int kSplit, int kParts, int kSteps>
ARCORE_DEVICE void multiply_by_triangle(float (&c)[kSteps / 16][2][4], const bfloat16* triangle,
                                        const bfloat16* right, int pitch, uint64_t starts) {
  constexpr int kRows = kSteps / 16, kPitch = kSteps + 8, kPart = kSteps * kPitch;
  uint32_t b[kRows][kParts][4];
  bool found = false;
  ARCORE_UNROLL
  for (int k = 0; k < kRows; ++k) {
    load_columns<kParts>(b[k], right + k * 16 * pitch, pitch, kSteps * pitch);
    ARCORE_UNROLL
    for (int i = 0; i < 4; ++i)
      found |= word_not_finite(b[k][0][i]);
  }
  if (any_lane(found)) {
    ARCORE_UNROLL
    for (int k = 0; k < kRows; ++k)
      ARCORE_UNROLL
    for (int i = 0; i < 4; ++i)
      b[k][0][i] &= finite_bits(b[k][0][i]);
    add_not_finite<kSplit, kSteps, false>(c, triangle, 0, right, pitch, starts);
  }
  ARCORE_UNROLL
  for (int k = 0; k < kRows; ++k) {
    ARCORE_UNROLL
    for (int m = k; m < kRows; ++m) {
      uint32_t a[kSplit][4];
      load_rows<kSplit>(a, triangle + m * 16 * kPitch + k * 16, kPitch, kPart);
      multiply(c[m][0], a, b[k], 0);
      multiply(c[m][1], a, b[k], 2);
    }
  }
}

}  // namespace arcore::ssd
