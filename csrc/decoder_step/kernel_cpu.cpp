// CPU kernels of one decoder layer for single tokens; compiled once per instruction set. README.md beside
// this file describes the passes.
#include "common/vec.h"
#include "decoder_step/params.h"

namespace arcore::decoder_step {
namespace ARCORE_ISA {
namespace {

// Rows of weights that are read side by side: as many streams as prefetchers follow well.
constexpr int64_t kRows = 4;

inline float sum_of(Vec x) {
  return reduce_add(x);
}

void widen(const Args& args) {
  with_type(args.dtype, [&](auto type) {
    to_float(static_cast<const decltype(type)*>(args.given), args.x, args.batch * args.dim);
  });
}

void narrow(const Args& args) {
  with_type(args.dtype, [&](auto type) {
    from_float(args.x, static_cast<decltype(type)*>(args.given), args.batch * args.dim);
  });
}

template <typename T>
void normalise_by(const Args& args, const T* weight) {
  for (int64_t b = 0; b < args.batch; ++b) {
    const float* x = args.x + b * args.dim;
    float* out = args.normed + b * args.dim;
    Vec sum(0.0f);
    for (int64_t i = 0; i < args.dim; i += kLanes) {
      const Vec v = load(x + i);
      sum = fma(v, v, sum);
    }
    const float mean = sum_of(sum) / static_cast<float>(args.dim);
    const Vec factor = Vec(1.0f) / Vec(mean + args.eps).sqrt();
    for (int64_t i = 0; i < args.dim; i += kLanes)
      store(out + i, load(x + i) * factor * load_lanes(weight + i));
  }
}

void normalise(const Args& args, const void* weight) {
  with_type(args.dtype, [&](auto type) { normalise_by(args, static_cast<const decltype(type)*>(weight)); });
}

// Products of kCount rows of weights with kTokens tokens. Each (row, token) is summed by itself in the same
// order whatever the counts are, so a token's result does not depend on the others.
//
// Rows are short, so processors that fetch ahead by themselves start anew at each; `ahead` elements on, where
// the next rows lie, is asked for here. Beyond the last row that is a hint without effect.
template <int64_t kCount, int64_t kTokens, typename T>
inline void products(const T* const* rows, const float* in, int64_t in_row, int64_t cols, int64_t ahead,
                     float (*sums)[kTokens]) {
  Vec acc[kCount][kTokens];
  for (int64_t r = 0; r < kCount; ++r)
    for (int64_t t = 0; t < kTokens; ++t)
      acc[r][t] = Vec(0.0f);
  for (int64_t i = 0; i < cols; i += kLanes) {
    Vec x[kTokens];
    for (int64_t t = 0; t < kTokens; ++t)
      x[t] = load(in + t * in_row + i);
    for (int64_t r = 0; r < kCount; ++r) {
      if (ahead != 0) __builtin_prefetch(rows[r] + i + ahead, 0, 2);
      const Vec w = load_lanes(rows[r] + i);
      for (int64_t t = 0; t < kTokens; ++t)
        acc[r][t] = fma(w, x[t], acc[r][t]);
    }
  }
  for (int64_t r = 0; r < kCount; ++r)
    for (int64_t t = 0; t < kTokens; ++t)
      sums[r][t] = sum_of(acc[r][t]);
}

template <int64_t kCount, int64_t kTokens, typename T, typename F>
inline void for_tokens(const T* const* rows, const float* in, int64_t in_row, int64_t cols, int64_t ahead,
                       int64_t first, const F& use) {
  float sums[kCount][kTokens];
  products<kCount, kTokens, T>(rows, in + first * in_row, in_row, cols, first == 0 ? ahead : 0, sums);
  for (int64_t t = 0; t < kTokens; ++t) {
    float of_token[kCount];
    for (int64_t r = 0; r < kCount; ++r)
      of_token[r] = sums[r][t];
    use(first + t, of_token);
  }
}

// Calls use(token, sums[kCount]) for every token.
template <int64_t kCount, typename T, typename F>
inline void each_token(const T* const* rows, int64_t batch, const float* in, int64_t in_row, int64_t cols,
                       int64_t ahead, const F& use) {
  int64_t t = 0;
  for (; t + 4 <= batch; t += 4)
    for_tokens<kCount, 4, T>(rows, in, in_row, cols, ahead, t, use);
  if (t + 2 <= batch) {
    for_tokens<kCount, 2, T>(rows, in, in_row, cols, ahead, t, use);
    t += 2;
  }
  if (t < batch) for_tokens<kCount, 1, T>(rows, in, in_row, cols, ahead, t, use);
}

template <int64_t kCount, typename T>
inline void multiply_rows(const Weights& w, int64_t batch, const float* in, int64_t in_row, float* out,
                          int64_t out_row, bool add, int64_t row) {
  const T* rows[kCount];
  for (int64_t r = 0; r < kCount; ++r)
    rows[r] = static_cast<const T*>(w.weight) + (row + r) * w.cols;
  each_token<kCount, T>(rows, batch, in, in_row, w.cols, kCount * w.cols,
                        [&](int64_t token, const float* sums) {
                          float* dst = out + token * out_row + row;
                          for (int64_t r = 0; r < kCount; ++r) {
                            const float value = sums[r] + (w.bias != nullptr ? w.bias[row + r] : 0.0f);
                            dst[r] = add ? dst[r] + value : value;
                          }
                        });
}

void multiply(const Weights& w, int64_t batch, const float* in, int64_t in_row, float* out, int64_t out_row,
              bool add, int64_t begin, int64_t end) {
  with_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows)
      multiply_rows<kRows, T>(w, batch, in, in_row, out, out_row, add, row);
    for (; row < end; ++row)
      multiply_rows<1, T>(w, batch, in, in_row, out, out_row, add, row);
  });
}

// Two rows of the gate and the same two of the other half.
template <typename T>
void gate_by(const Args& args, int64_t begin, int64_t end) {
  const Weights& w = args.gate_up;
  constexpr int64_t kPairs = kRows / 2;
  for (int64_t f = begin; f < end; f += kPairs) {
    const T* rows[kRows];
    const T* weight = static_cast<const T*>(w.weight);
    for (int64_t p = 0; p < kPairs; ++p) {
      // An odd last pair is computed twice.
      const int64_t row = min_of<int64_t>(f + p, end - 1);
      rows[p] = weight + row * w.cols;
      rows[kPairs + p] = weight + (args.hidden + row) * w.cols;
    }
    each_token<kRows, T>(rows, args.batch, args.normed, args.dim, w.cols, kPairs * w.cols,
                         [&](int64_t token, const float* sums) {
                           for (int64_t p = 0; p < kPairs && f + p < end; ++p) {
                             float gated = sums[p], up = sums[kPairs + p];
                             if (w.bias != nullptr) {
                               gated += w.bias[f + p];
                               up += w.bias[args.hidden + f + p];
                             }
                             float lanes[kLanes];
                             store(lanes, silu(Vec(gated)));
                             args.activated[token * args.hidden + f + p] = lanes[0] * up;
                           }
                         });
  }
}

void gate(const Args& args, int64_t begin, int64_t end) {
  with_type(args.gate_up.dtype, [&](auto type) { gate_by<decltype(type)>(args, begin, end); });
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

// Logits of one query for the keys [start, stop); returns the largest.
template <typename T>
float score_keys(const float* q, const T* keys, int64_t dim, int64_t start, int64_t stop, float* scores) {
  float largest = -3.4e38f;
  int64_t t = start;
  for (; t + kLanes <= stop; t += kLanes) {
    Vec sums[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      const T* key = keys + (t + j) * dim;
      Vec acc = load(q) * load_lanes(key);
      for (int64_t i = kLanes; i < dim; i += kLanes)
        acc = fma(load(q + i), load_lanes(key + i), acc);
      sums[j] = acc;
    }
    Vec quads[kLanes / 4];
    for (int64_t j = 0; j < kLanes / 4; ++j)
      quads[j] = sum_quad(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
    const Vec all = sum_groups(quads);
    store(scores + t - start, all);
    largest = max_of(largest, reduce_max(all));
  }
  for (; t < stop; ++t) {
    const T* key = keys + t * dim;
    Vec acc = load(q) * load_lanes(key);
    for (int64_t i = kLanes; i < dim; i += kLanes)
      acc = fma(load(q + i), load_lanes(key + i), acc);
    scores[t - start] = sum_of(acc);
    largest = max_of(largest, scores[t - start]);
  }
  return largest;
}

// One vector-width of channels after the other, each summed over all keys in order.
template <typename T>
void weigh_values(const float* weights, const T* values, int64_t dim, int64_t count, float factor,
                  float* out) {
  constexpr int64_t kWide = 4;
  for (int64_t first = 0; first < dim; first += kWide * kLanes) {
    const int64_t vectors = min_of<int64_t>(kWide, (dim - first) / kLanes);
    Vec acc[kWide];
    for (int64_t v = 0; v < vectors; ++v)
      acc[v] = Vec(0.0f);
    for (int64_t t = 0; t < count; ++t) {
      const Vec w(weights[t]);
      const T* value = values + t * dim + first;
      for (int64_t v = 0; v < vectors; ++v)
        acc[v] = fma(w, load_lanes(value + v * kLanes), acc[v]);
    }
    for (int64_t v = 0; v < vectors; ++v)
      store(out + first + v * kLanes, acc[v] * Vec(factor));
  }
}

// Weights of `count` scores, not yet divided by their sum, which is returned.
float exponentials(float* scores, int64_t count, float largest) {
  float total = 0.0f;
  Vec sums(0.0f);
  int64_t t = 0;
  for (; t + kLanes <= count; t += kLanes) {
    const Vec e = exp2((load(scores + t) - Vec(largest)) * Vec(kLog2e));
    store(scores + t, e);
    sums = sums + e;
  }
  for (; t < count; ++t) {
    float lanes[kLanes];
    store(lanes, exp2(Vec((scores[t] - largest) * kLog2e)));
    scores[t] = lanes[0];
    total += lanes[0];
  }
  return total + sum_of(sums);
}

// One query on the keys [start, stop).
template <typename T>
void attend_range(const float* query, const T* keys, const T* values, int64_t dim, int64_t start,
                  int64_t stop, float* scores, float* out) {
  const float largest = score_keys(query, keys, dim, start, stop, scores);
  const float total = exponentials(scores, stop - start, largest);
  weigh_values(scores, values + start * dim, dim, stop - start, 1.0f / total, out);
}

// One query on the keys [0, length) and on those behind them whose bit is set.
template <typename T>
void attend_tree(const float* query, const T* keys, const T* values, int64_t dim, int64_t length,
                 uint64_t bits, float* scores, float* out) {
  float largest = score_keys(query, keys, dim, 0, length, scores);
  int64_t count = length;
  for (uint64_t left = bits; left != 0; left &= left - 1) {
    const int64_t slot = length + __builtin_ctzll(left);
    largest = max_of(largest, score_keys(query, keys, dim, slot, slot + 1, scores + count));
    ++count;
  }
  const float factor = 1.0f / exponentials(scores, count, largest);
  weigh_values(scores, values, dim, length, factor, out);
  count = length;
  for (uint64_t left = bits; left != 0; left &= left - 1) {
    const T* value = values + (length + __builtin_ctzll(left)) * dim;
    const Vec w(scores[count++] * factor);
    for (int64_t i = 0; i < dim; i += kLanes)
      store(out + i, fma(w, load_lanes(value + i), load(out + i)));
  }
}

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
      rotate(key, args.cos + b * args.angle_row, args.sin + b * args.angle_row, dim, 1.0f);
      for (int64_t i = 0; i < dim; i += kLanes) {
        store_lanes(keys + (length + t) * dim + i, load(key + i));
        store_lanes(values + (length + t) * dim + i, load(value + i));
      }
    }
    for (int64_t t = 0; t < args.drafts; ++t) {
      const int64_t b = text * args.drafts + t, stop = length + t + 1;
      const uint64_t before = (uint64_t{2} << t) - 1;
      const uint64_t bits = args.seen != nullptr ? static_cast<uint64_t>(args.seen[b]) : before;
      const int64_t start = args.window > 0 ? max_of<int64_t>(0, stop - args.window) : 0;
      float* row = args.projected + b * args.qkv.rows;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t own = b * args.heads + head * group + g;
        float* query = row + (head * group + g) * dim;
        rotate(query, args.cos + b * args.angle_row, args.sin + b * args.angle_row, dim, args.scale);
        float* scores = args.scores + own * args.longest;
        if (bits == before)
          attend_range(query, keys, values, dim, start, stop, scores, args.mixed + own * dim);
        else
          attend_tree(query, keys, values, dim, length, bits, scores, args.mixed + own * dim);
      }
    }
  }
}

void attend(const Args& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { attend_by<decltype(type)>(args, begin, end); });
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{widen, narrow, normalise, multiply, gate, attend};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::decoder_step
