// Products of weights with a few tokens, of which each weight is read once. For kernel_cpu.cpp files;
// decoder_step/README.md describes them.
#pragma once

#include <type_traits>

#include "common/vec.h"
#include "common/weight_blocks.h"
#include "common/weights.h"

namespace arcore {
inline namespace ARCORE_ISA {

// Rows of weights that are read side by side: as many streams as prefetchers follow well, and with a block of
// tokens about as many sums as there are registers.
constexpr int64_t kRows = 4;
// Tokens whose sums are formed in one pass over the rows.
constexpr int64_t kBlock = 8;
// Tokens whose sums stay in registers beside what a pass needs of rows and tokens, and how many take a pass
// of a larger block. Blocks take registers to open them.
constexpr int64_t kTokensOfThin = kLanes == 16 ? 0 : 3;
template <typename T>
constexpr int64_t kMostOfPass = kLanes == 16  ? 6
                                : kIsBlock<T> ? 2
                                              : kTokensOfThin;
template <typename T>
constexpr int64_t kPass = kLanes == 16 ? 4 : kMostOfPass<T>;
// Columns of a pass over rows that several pass: with the tokens' they lie in the first-level cache.
constexpr int64_t kColumns = kLanes == 16 ? int64_t{1} << 62 : 512;
// Rows that several blocks of tokens pass one after the other, while they lie in the first caches.
constexpr int64_t kPanelRows = 16;

// Calls f(first token, number of tokens), both constants, for the passes of a block.
template <int64_t kWidth, int64_t kTokens, int64_t kFirst = 0, typename F>
static inline void each_pass(const F& f) {
  if constexpr (kFirst < kTokens) {
    f(std::integral_constant<int64_t, kFirst>{},
      std::integral_constant<int64_t, (kTokens - kFirst < kWidth ? kTokens - kFirst : kWidth)>{});
    each_pass<kWidth, kTokens, kFirst + kWidth>(f);
  }
}

static inline float sum_of(Vec x) {
  return reduce_add(x);
}

// Lanes of a row that has `left` elements more, 0 behind its end.
template <typename T>
static inline Vec load_some(const T* p, int64_t left) {
  return left >= kLanes ? load_lanes(p) : left <= 0 ? Vec(0.0f) : load_lanes(p, left);
}

// Tokens as products read them: blocks of at most kBlock, in each [cols / kLanes][tokens][kLanes], so that a
// pass over a row reads one stream of whole lines. Columns are padded with zeros to whole lines.
template <typename Float>
struct Packed {
  Float* data;
  int64_t batch, cols;
  Float* block(int64_t first) const { return data + first * padded(cols); }
  // Lanes [col, col + kLanes) of a token.
  Float* at(int64_t token, int64_t col) const {
    const int64_t first = token / kBlock * kBlock;
    return block(first) + col * min_of(kBlock, batch - first) + (token - first) * kLanes;
  }
};

// `count` floats to storage.
static inline void narrow(StorageType dtype, const float* from, void* to, int64_t count) {
  with_type(dtype, [&](auto type) { from_float(from, static_cast<decltype(type)*>(to), count); });
}

// Tokens [batch, cols], rows `from_row` apart, packed.
static inline void pack(StorageType dtype, const void* from, int64_t from_row, int64_t batch, int64_t cols,
                        float* to) {
  const Packed<float> packed{to, batch, cols};
  with_type(dtype, [&](auto type) {
    const auto* rows = static_cast<const decltype(type)*>(from);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < padded(cols); i += kLanes)
        store(packed.at(b, i), load_some(rows + b * from_row + i, cols - i));
  });
}

// out = rms_norm(x) * weight of rows [batch, dim], packed.
template <typename T>
static inline void normalise_rows(const float* x, int64_t batch, int64_t dim, float eps, const T* weight,
                                  float* to) {
  const Packed<float> out{to, batch, dim};
  for (int64_t b = 0; b < batch; ++b) {
    const float* row = x + b * dim;
    Vec sum(0.0f);
    for (int64_t i = 0; i < dim; i += kLanes) {
      const Vec v = load_some(row + i, dim - i);
      sum = fma(v, v, sum);
    }
    const float mean = sum_of(sum) / static_cast<float>(dim);
    const Vec factor = Vec(1.0f) / Vec(mean + eps).sqrt();
    for (int64_t i = 0; i < padded(dim); i += kLanes) {
      const int64_t left = dim - i;
      store(out.at(b, i), load_some(row + i, left) * factor * load_some(weight + i, left));
    }
  }
}

// Sums of kRows rows of weights with kTokens packed tokens over columns [from, to), added to `acc`. Each is
// summed lane by lane along the row, so a token's result does not depend on the others. kTokens tokens of the
// kPacked that are packed together, whose first is at `in`.
//
// Rows are short, so processors that fetch ahead by themselves start anew at each; what lies `ahead` elements
// of T on is asked for here, by the first that reads a row. Beyond the last row that is a hint without
// effect.
//
// Blocks become the floats that they stand for, in registers, so that they give the bits of a weight that
// holds those floats.
template <bool kAsk, int64_t kTokens, int64_t kPacked, typename T>
static inline void accumulate(const T* const (&rows)[kRows], const float* in, int64_t from, int64_t to,
                              int64_t ahead, Vec (*sums)[kRows]) {
  Vec acc[kTokens][kRows];
#pragma GCC unroll 8
  for (int64_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r)
      acc[t][r] = sums[t][r];
  // Lanes [i, i + kLanes) of all rows, which weight(r) gives.
  const auto add = [&](int64_t i, const auto& weight) {
    if constexpr (kTokens == kTokensOfThin) {
      // Tokens and one row at a time, which leaves all other registers to the sums.
      Vec x[kTokens];
#pragma GCC unroll 8
      for (int64_t t = 0; t < kTokens; ++t)
        x[t] = in_register(load(in + i * kPacked + t * kLanes));
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        const Vec w = weight(r);
#pragma GCC unroll 8
        for (int64_t t = 0; t < kTokens; ++t)
          acc[t][r] = fma(w, x[t], acc[t][r]);
      }
    } else {
      Vec w[kRows];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r)
        w[r] = weight(r);
#pragma GCC unroll 8
      for (int64_t t = 0; t < kTokens; ++t) {
        const Vec x = in_register(load(in + i * kPacked + t * kLanes));
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r)
          acc[t][r] = fma(w[r], x, acc[t][r]);
      }
    }
  };
  const auto ask = [&](int64_t i) {
    if constexpr (kAsk) {
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r)
        __builtin_prefetch(rows[r] + i + ahead, 0, 2);
    }
  };
  if constexpr (kIsBlock<T>) {
    for (int64_t b = from / kBlockValues; b < to / kBlockValues; ++b) {
      ask(b);
      const Opened<T> blocks[kRows] = {Opened<T>(rows[0][b]), Opened<T>(rows[1][b]), Opened<T>(rows[2][b]),
                                       Opened<T>(rows[3][b])};
      each_vector([&](auto first) {
        constexpr int64_t kFirst = decltype(first)::value;
        add(b * kBlockValues + kFirst, [&](int64_t r) { return blocks[r].template at<kFirst>(); });
      });
    }
  } else {
    const auto step = [&](int64_t i) { add(i, [&](int64_t r) { return load_lanes(rows[r] + i); }); };
    constexpr int64_t kLine = 64 / sizeof(T);
    int64_t i = from;
    for (; i + kLine <= to; i += kLine) {
      ask(i);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kLine; j += kLanes)
        step(i + j);
    }
    for (; i + kLanes <= to; i += kLanes)
      step(i);
    if (i < to) add(i, [&](int64_t r) { return load_lanes(rows[r] + i, to - i); });
  }
#pragma GCC unroll 8
  for (int64_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r)
      sums[t][r] = acc[t][r];
}

// Products of kRows rows of weights with a block of kTokens packed tokens: sums[token * kRows + row], for
// whole vectors. Lanes are added in the order of sum_quad and sum_groups, whatever kTokens is.
//
// The sums of all tokens, a row of weights and a token have to fit into the registers, so many tokens pass in
// parts, the later ones over columns of the rows that the first has left in the first-level cache.
template <int64_t kTokens, typename T>
static inline void products(const T* const (&rows)[kRows], const float* in, int64_t cols, int64_t ahead,
                            float* sums) {
  Vec acc[kTokens][kRows];
#pragma GCC unroll 8
  for (int64_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r)
      acc[t][r] = Vec(0.0f);
  if constexpr (kTokens <= kMostOfPass<T>) {
    accumulate<true, kTokens, kTokens>(rows, in, 0, cols, ahead, acc);
  } else {
    for (int64_t from = 0; from < cols; from += kColumns) {
      const int64_t to = min_of(cols, from + kColumns);
      each_pass<kPass<T>, kTokens>([&](auto first, auto count) {
        constexpr int64_t kFirst = decltype(first)::value, kCount = decltype(count)::value;
        accumulate<kFirst == 0, kCount, kTokens>(rows, in + kFirst * kLanes, from, to, ahead, acc + kFirst);
      });
    }
  }
  constexpr int64_t kQuads = kLanes / 4;
  const Vec none(0.0f);
#pragma GCC unroll 8
  for (int64_t t = 0; t < kTokens; t += kQuads) {
    Vec quads[kQuads];
#pragma GCC unroll 4
    for (int64_t q = 0; q < kQuads; ++q)
      quads[q] =
          t + q < kTokens ? sum_quad(acc[t + q][0], acc[t + q][1], acc[t + q][2], acc[t + q][3]) : none;
    store(sums + t * kRows, sum_groups(quads));
  }
}

// How far ahead of rows that lie one after the other memory is asked for, in elements: where the next of them
// lie or, where those are few bytes, as far on as covers the time that memory takes.
template <typename T>
static inline int64_t ahead_of(int64_t pitch, int64_t rows) {
  constexpr int64_t kBytes = 8192;
  const int64_t bytes = kRows * pitch * static_cast<int64_t>(sizeof(T));
  return max_of<int64_t>(1, kBytes / bytes) * rows * pitch;
}

// Floats that `products` may write.
constexpr int64_t kSums = kBlock * kRows;
static_assert(kSums % kLanes == 0 && kLineFloats % kLanes == 0);

template <int64_t kCount>
using Tokens = std::integral_constant<int64_t, kCount>;

template <typename F>
static inline void with_tokens(int64_t tokens, const F& f) {
  switch (tokens) {
    case 1:
      return f(Tokens<1>{});
    case 2:
      return f(Tokens<2>{});
    case 3:
      return f(Tokens<3>{});
    case 4:
      return f(Tokens<4>{});
    case 5:
      return f(Tokens<5>{});
    case 6:
      return f(Tokens<6>{});
    case 7:
      return f(Tokens<7>{});
    default:
      return f(Tokens<8>{});
  }
}

// Calls f(Tokens, first token, from, to) so that all blocks of tokens pass all of [begin, end), `panel` of it
// at a time where there are several blocks.
template <typename F>
static inline void each_block(int64_t batch, int64_t begin, int64_t end, int64_t panel, const F& f) {
  if (batch <= kBlock) panel = end - begin;
  for (int64_t from = begin; from < end; from += panel)
    for (int64_t first = 0; first < batch; first += kBlock)
      with_tokens(min_of(kBlock, batch - first),
                  [&](auto tokens) { f(tokens, first, from, min_of(end, from + panel)); });
}

template <typename T>
static inline void multiply_by(const Weights& w, const Packed<const float>& in, float* out, bool add,
                               int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(w.weight);
  const int64_t pitch = elements<T>(w.cols), ahead = ahead_of<T>(pitch, kRows);
  each_block(in.batch, begin, end, kPanelRows, [&](auto tokens, int64_t first, int64_t from, int64_t to) {
    constexpr int64_t kTokens = decltype(tokens)::value;
    alignas(64) float sums[kSums];
    for (int64_t row = from; row < to; row += kRows) {
      const T* rows[kRows];
      // The last row stands in for rows that are not there.
      for (int64_t r = 0; r < kRows; ++r)
        rows[r] = weight + min_of(row + r, to - 1) * pitch;
      products<kTokens>(rows, in.block(first), w.cols, ahead, sums);
      const int64_t count = min_of(kRows, to - row);
      for (int64_t t = 0; t < kTokens; ++t) {
        float* dst = out + (first + t) * w.rows + row;
        for (int64_t r = 0; r < count; ++r) {
          const float value = sums[t * kRows + r] + (w.bias != nullptr ? w.bias[row + r] : 0.0f);
          dst[r] = add ? dst[r] + value : value;
        }
      }
    }
  });
}

// out[b, r] (+)= weights[r] . in[b] + bias[r] for rows [begin, end); `in` is packed.
static inline void multiply(const Weights& w, int64_t batch, const float* in, float* out, bool add,
                            int64_t begin, int64_t end) {
  with_weight(w.type, [&](auto type) {
    multiply_by<decltype(type)>(w, Packed<const float>{in, batch, w.cols}, out, add, begin, end);
  });
}

template <typename T>
static inline void expand_by(const T* from, int64_t count, float* to) {
  if constexpr (kIsBlock<T>) {
    for (int64_t b = 0; b < count / kBlockValues; ++b) {
      const Opened<T> block(from[b]);
      each_vector([&](auto first) {
        constexpr int64_t kFrom = decltype(first)::value;
        store(to + b * kBlockValues + kFrom, block.template at<kFrom>());
      });
    }
  } else {
    to_float(from, to, count);
  }
}

// Rows [begin, end) of a weight as floats, [end - begin, cols].
static inline void expand(const Weights& w, float* out, int64_t begin, int64_t end) {
  with_weight(w.type, [&](auto type) {
    using T = decltype(type);
    expand_by(static_cast<const T*>(w.weight) + begin * elements<T>(w.cols), (end - begin) * w.cols, out);
  });
}

}  // namespace ARCORE_ISA
}  // namespace arcore
