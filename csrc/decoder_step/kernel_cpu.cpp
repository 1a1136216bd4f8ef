// CPU kernels of one decoder layer for single tokens; compiled once per instruction set. README.md beside
// this file describes the passes.
#include "common/vec.h"
#include "common/weight_products.h"
#include "decoder_step/params.h"

namespace arcore::decoder_step {
namespace ARCORE_ISA {
namespace {

static_assert(kGroup % kLanes == 0);

void widen(const Args& args) {
  with_type(args.dtype, [&](auto type) {
    to_float(static_cast<const decltype(type)*>(args.given), args.x, args.batch * args.dim);
  });
}

void normalise(const Args& args, const void* weight) {
  with_type(args.dtype, [&](auto type) {
    normalise_rows(args.x, args.batch, args.dim, args.eps, static_cast<const decltype(type)*>(weight),
                   args.normed);
  });
}

template <typename T>
void gate_by(const Args& args, int64_t begin, int64_t end) {
  const Weights& w = args.gate_up;
  const T* weight = static_cast<const T*>(w.weight);
  const int64_t pitch = elements<T>(w.cols);
  const Packed<const float> in{args.normed, args.batch, args.dim};
  const Packed<float> out{args.activated, args.batch, args.hidden};
  // Two rows of the gate and the same two of the other half.
  constexpr int64_t kPairs = kRows / 2;
  const int64_t ahead = ahead_of<T>(pitch, kPairs);
  each_block(args.batch, begin, end, 1, [&](auto tokens, int64_t first, int64_t from, int64_t to) {
    constexpr int64_t kTokens = decltype(tokens)::value;
    alignas(64) float sums[kSums], gated[kTokens][kGroup], up[kTokens][kGroup];
    for (int64_t f = from * kGroup; f < to * kGroup; f += kGroup) {
      const int64_t count = min_of(kGroup, args.hidden - f);
      for (int64_t p = 0; p < count; p += kPairs) {
        // The last row stands in for one that is not there.
        const T* rows[kRows];
        for (int64_t k = 0; k < kPairs; ++k) {
          rows[k] = weight + min_of(f + p + k, args.hidden - 1) * pitch;
          rows[kPairs + k] = rows[k] + args.hidden * pitch;
        }
        products<kTokens>(rows, in.block(first), w.cols, ahead, sums);
        for (int64_t t = 0; t < kTokens; ++t)
          for (int64_t k = 0; k < kPairs; ++k) {
            gated[t][p + k] = sums[t * kRows + k];
            up[t][p + k] = sums[t * kRows + kPairs + k];
          }
      }
      for (int64_t i = 0; i < min_of(kGroup, padded(args.hidden) - f); i += kLanes) {
        const int64_t left = count - i;
        const bool biased = w.bias != nullptr;
        const Vec of_gate = biased ? load_some(w.bias + f + i, left) : Vec(0.0f);
        const Vec of_up = biased ? load_some(w.bias + args.hidden + f + i, left) : Vec(0.0f);
        for (int64_t t = 0; t < kTokens; ++t)
          store(out.at(first + t, f + i),
                silu(load_some(gated[t] + i, left) + of_gate) * (load_some(up[t] + i, left) + of_up));
      }
    }
  });
}

void gate(const Args& args, int64_t begin, int64_t end) {
  with_weight(args.gate_up.type, [&](auto type) { gate_by<decltype(type)>(args, begin, end); });
}

// Rotates a head in place; channel i is paired with channel i + half.
void rotate(float* head, const float* cos, const float* sin, int64_t dim, float factor) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = (a * cos[i] + b * sin[i]) * factor;
    head[i + half] = (b * cos[i + half] + a * sin[i + half]) * factor;
  }
}

// Keys and values that all queries of a task pass before the next ones are read: they stay in the first
// cache.
constexpr int64_t kChunk = 64;

// Lane sums of kQueries queries times a key of `dim` channels, which are kVectors vectors unless that is 0.
// Heads may end within a vector.
template <int64_t kQueries, int64_t kVectors, typename T>
inline void match(float* const (&q)[kQueries], const T* key, int64_t dim, Vec (&sums)[kQueries]) {
#pragma GCC unroll 2
  for (int64_t n = 0; n < kQueries; ++n)
    sums[n] = Vec(0.0f);
  const int64_t whole = kVectors != 0 ? kVectors * kLanes : dim / kLanes * kLanes;
#pragma GCC unroll 8
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec k = load_lanes(key + i);
#pragma GCC unroll 2
    for (int64_t n = 0; n < kQueries; ++n)
      sums[n] = fma(load(q[n] + i), k, sums[n]);
  }
  if (kVectors == 0 && whole < dim) {
    const Vec k = load_lanes(key + whole, dim - whole);
    for (int64_t n = 0; n < kQueries; ++n)
      sums[n] = fma(load_lanes(q[n] + whole, dim - whole), k, sums[n]);
  }
}

// Logits of queries for `count` <= kLanes keys. That of a key depends on nothing else.
template <int64_t kQueries, int64_t kVectors, bool kAll, typename T>
inline void score_block(float* const (&q)[kQueries], const T* keys, int64_t dim, int64_t count,
                        float* const (&scores)[kQueries], int64_t place) {
  Vec quads[kQueries][kLanes / 4];
  for (int64_t j = 0; j < kLanes; j += 4) {
    Vec sums[4][kQueries];
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k)
      if (kAll || j + k < count)
        match<kQueries, kVectors>(q, keys + (j + k) * dim, dim, sums[k]);
      else
        for (int64_t n = 0; n < kQueries; ++n)
          sums[k][n] = Vec(0.0f);
    for (int64_t n = 0; n < kQueries; ++n)
      quads[n][j / 4] = sum_quad(sums[0][n], sums[1][n], sums[2][n], sums[3][n]);
  }
  for (int64_t n = 0; n < kQueries; ++n)
    if (kAll)
      store(scores[n] + place, sum_groups(quads[n]));
    else
      store_lanes(scores[n] + place, sum_groups(quads[n]), count);
}

template <int64_t kQueries, int64_t kVectors, typename T>
void score_keys_of(float* const (&q)[kQueries], const T* keys, int64_t dim, int64_t count,
                   float* const (&scores)[kQueries]) {
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes)
    score_block<kQueries, kVectors, true>(q, keys + t * dim, dim, kLanes, scores, t);
  if (t < count) score_block<kQueries, kVectors, false>(q, keys + t * dim, dim, count - t, scores, t);
}

template <int64_t kQueries, typename T>
void score_keys(float* const (&q)[kQueries], const T* keys, int64_t dim, int64_t count,
                float* const (&scores)[kQueries]) {
  // The most frequent width.
  constexpr int64_t kUsual = 64;
  if (dim == kUsual)
    score_keys_of<kQueries, kUsual / kLanes>(q, keys, dim, count, scores);
  else
    score_keys_of<kQueries, 0>(q, keys, dim, count, scores);
}

// out += weights times values for each query, kVectors vectors of channels; each channel in the order of the
// values.
template <int64_t kQueries, int64_t kVectors, typename T>
inline void weigh(float* const (&weights)[kQueries], const T* values, int64_t dim, int64_t count,
                  float* const (&out)[kQueries], int64_t place) {
  Vec acc[kQueries][kVectors];
#pragma GCC unroll 2
  for (int64_t n = 0; n < kQueries; ++n)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v)
      acc[n][v] = load(out[n] + place + v * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    Vec w[kQueries];
#pragma GCC unroll 2
    for (int64_t n = 0; n < kQueries; ++n)
      w[n] = Vec(weights[n][t]);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      const Vec value = load_lanes(values + t * dim + place + v * kLanes);
#pragma GCC unroll 2
      for (int64_t n = 0; n < kQueries; ++n)
        acc[n][v] = fma(w[n], value, acc[n][v]);
    }
  }
#pragma GCC unroll 2
  for (int64_t n = 0; n < kQueries; ++n)
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v)
      store(out[n] + place + v * kLanes, acc[n][v]);
}

template <int64_t kQueries, typename T>
void weigh_values(float* const (&weights)[kQueries], const T* values, int64_t dim, int64_t count,
                  float* const (&out)[kQueries]) {
  constexpr int64_t kWide = 4;
  int64_t i = 0;
  for (; i + kWide * kLanes <= dim; i += kWide * kLanes)
    weigh<kQueries, kWide>(weights, values, dim, count, out, i);
  for (; i + kLanes <= dim; i += kLanes)
    weigh<kQueries, 1>(weights, values, dim, count, out, i);
  if (i == dim) return;
  const int64_t lanes = dim - i;
  for (int64_t n = 0; n < kQueries; ++n) {
    Vec acc = load_lanes(out[n] + i, lanes);
    for (int64_t t = 0; t < count; ++t)
      acc = fma(Vec(weights[n][t]), load_lanes(values + t * dim + i, lanes), acc);
    store_lanes(out[n] + i, acc, lanes);
  }
}

// Makes weights of `count` >= 1 scores, not yet divided by their sum, which is returned.
float exponentials(float* scores, int64_t count) {
  const int64_t whole = count / kLanes * kLanes, rest = count - whole;
  float largest = scores[whole == count ? 0 : whole];
  for (int64_t t = whole; t < count; ++t)
    largest = max_of(largest, scores[t]);
  Vec largest_lanes(largest);
  for (int64_t t = 0; t < whole; t += kLanes)
    largest_lanes = max(largest_lanes, load(scores + t));
  const Vec shift(reduce_max(largest_lanes)), log2e(kLog2e);
  Vec sums(0.0f);
  for (int64_t t = 0; t < whole; t += kLanes) {
    const Vec e = exp2((load(scores + t) - shift) * log2e);
    store(scores + t, e);
    sums = sums + e;
  }
  if (rest != 0) {
    const Vec e = exp2((load_lanes(scores + whole, rest) - shift) * log2e);
    store_lanes(scores + whole, e, rest);
    sums = sums + keep_lanes(e, 0, rest, Vec(0.0f));
  }
  return sum_of(sums);
}

// A query of a task: what it sees are keys [start, length) of the text, then new tokens by their bits.
struct Query {
  float *head, *scores;
  int64_t start, count;
  uint64_t bits;
};

template <typename T>
void attend_by(const Args& args, int64_t begin, int64_t end) {
  const int64_t dim = args.head_dim, group = args.heads / args.kv_heads;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t text = task / args.kv_heads, head = task % args.kv_heads;
    const int64_t length = args.lengths[text];
    T* keys = static_cast<T*>(args.keys) + text * args.key_row + head * args.key_head;
    T* values = static_cast<T*>(args.values) + text * args.value_row + head * args.value_head;
    for (int64_t t = 0; t < args.drafts; ++t) {
      const int64_t b = text * args.drafts + t;
      float* row = args.projected + b * args.qkv.rows;
      float* key = row + (args.heads + head) * dim;
      const float* value = row + (args.heads + args.kv_heads + head) * dim;
      const float *cos = args.cos + b * args.angle_row, *sin = args.sin + b * args.angle_row;
      for (int64_t g = 0; g < group; ++g)
        rotate(row + (head * group + g) * dim, cos, sin, dim, args.scale);
      rotate(key, cos, sin, dim, 1.0f);
      for (int64_t i = 0; i < dim; i += kLanes) {
        const int64_t lanes = min_of<int64_t>(kLanes, dim - i);
        store_lanes(keys + (length + t) * dim + i, load_lanes(key + i, lanes), lanes);
        store_lanes(values + (length + t) * dim + i, load_lanes(value + i, lanes), lanes);
      }
    }
    const int64_t queries = args.drafts * group;
    const auto query = [&](int64_t i) {
      const int64_t t = i / group, b = text * args.drafts + t, own = head * group + i % group;
      const uint64_t before = (uint64_t{2} << t) - 1;
      const uint64_t bits = args.seen != nullptr ? static_cast<uint64_t>(args.seen[b]) : before;
      const int64_t start = args.window > 0 ? max_of<int64_t>(0, length + t + 1 - args.window) : 0;
      // A window may begin behind the text, within the new tokens.
      const int64_t hidden = max_of<int64_t>(0, start - length);
      return Query{args.projected + b * args.qkv.rows + own * dim,
                   args.scores + (b * args.heads + own) * args.longest, min_of(start, length),
                   length - min_of(start, length), bits >> hidden << hidden};
    };
    // Calls f for all queries and the keys that they see before the new ones, two queries at a time where
    // they see the same ones.
    const auto each_chunk = [&](const auto& f) {
      for (int64_t from = 0; from < length; from += kChunk)
        for (int64_t i = 0; i < queries; ++i) {
          const Query q = query(i);
          const int64_t first = max_of(from, q.start), last = min_of(from + kChunk, length);
          if (first >= last) continue;
          const int64_t place = first - q.start;
          if (i + 1 < queries && query(i + 1).start == q.start) {
            const Query other = query(++i);
            float* const heads[] = {q.head, other.head};
            float* const scores[] = {q.scores + place, other.scores + place};
            f(heads, scores, first, last - first);
          } else {
            float* const heads[] = {q.head};
            float* const scores[] = {q.scores + place};
            f(heads, scores, first, last - first);
          }
        }
    };
    each_chunk([&](const auto& heads, const auto& scores, int64_t first, int64_t count) {
      score_keys(heads, keys + first * dim, dim, count, scores);
    });
    for (int64_t i = 0; i < queries; ++i) {
      const Query q = query(i);
      int64_t count = q.count;
      for (uint64_t left = q.bits; left != 0; left &= left - 1)
        score_keys<1>({q.head}, keys + (length + __builtin_ctzll(left)) * dim, dim, 1, {q.scores + count++});
      const Vec factor(1.0f / exponentials(q.scores, count));
      for (int64_t t = 0; t < count; t += kLanes) {
        const int64_t lanes = min_of<int64_t>(kLanes, count - t);
        store_lanes(q.scores + t, load_lanes(q.scores + t, lanes) * factor, lanes);
      }
      // What the query mixes takes its place.
      std::memset(q.head, 0, static_cast<size_t>(dim) * sizeof(float));
    }
    each_chunk([&](const auto& heads, const auto& scores, int64_t first, int64_t count) {
      weigh_values(scores, values + first * dim, dim, count, heads);
    });
    for (int64_t i = 0; i < queries; ++i) {
      const Query q = query(i);
      int64_t count = q.count;
      for (uint64_t left = q.bits; left != 0; left &= left - 1)
        weigh_values<1>({q.scores + count++}, values + (length + __builtin_ctzll(left)) * dim, dim, 1,
                        {q.head});
    }
  }
}

void attend(const Args& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { attend_by<decltype(type)>(args, begin, end); });
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{widen, narrow, pack, normalise, multiply, expand, gate, attend};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::decoder_step
