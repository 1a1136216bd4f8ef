// CPU forward and backward; compiled once per instruction set. The algorithm, the tile sizes and the numerics
// are described in README.md beside this file.
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "block_sparse_attention/params.h"
#include "common/matmul_panel.h"
#include "common/vec.h"

namespace arcore::block_sparse_attention {
namespace ARCORE_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Query rows and keys of one tile: its packed keys and values stay in the second-level cache while the row
// groups of the query tile pass over them. The backward also keeps two tiles of logits there.
constexpr int kTileQ = 96;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kForwardTileK = 512;
#else
constexpr int kForwardTileK = 256;
#endif
constexpr int kTileK = 256;
static_assert(kTileQ % kMaxRows == 0 && kTileK % kPanel == 0 && kForwardTileK % kPanel == 0);
// One cache line more than a power of two, so that the rows of a tile do not compete for the same cache sets.
constexpr int kForwardTileStride = kForwardTileK + 16;
constexpr int kTileStride = kTileK + 16;

// Parallel work units that the backward wants at least; fixed, so that results do not depend on the thread
// count.
constexpr int64_t kBackwardUnits = 16;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Visits 0, n-1, 1, n-2, ...: equal shares of consecutive tasks get equal work when work grows with the
// index.
int64_t fold(int64_t i, int64_t n) {
  return i % 2 == 0 ? i / 2 : n - 1 - i / 2;
}

class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(
            std::aligned_alloc(64, static_cast<size_t>(round_up(floats, 16)) * sizeof(float)))),
        next_(data_) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return data_ != nullptr; }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += round_up(floats, 16);
    return taken;
  }

 private:
  float* data_;
  float* next_;
};

template <typename F>
void with_storage(StorageType type, F&& f) {
  switch (type) {
    case StorageType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case StorageType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case StorageType::kFloat16:
      return f(static_cast<Half*>(nullptr));
  }
}

int64_t row_offset(const Tensor4& t, int64_t b, int64_t h, int64_t row) {
  return b * t.batch + h * t.head + row * t.row;
}

// In place for float32, else converted into `buffer`.
FloatRows float_rows(StorageType type, const Tensor4& t, int64_t b, int64_t h, int64_t row, int64_t count,
                     int64_t dim, float* buffer) {
  FloatRows rows{buffer, dim};
  with_storage(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* source = static_cast<const T*>(t.data) + row_offset(t, b, h, row);
    if constexpr (std::is_same_v<T, float>) {
      rows = {source, t.row};
    } else {
      for (int64_t i = 0; i < count; ++i)
        to_float(source + i * t.row, buffer + i * dim, dim);
    }
  });
  return rows;
}

void write_row(StorageType type, const Tensor4& t, int64_t b, int64_t h, int64_t row, const float* src,
               int64_t n) {
  with_storage(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    from_float(src, static_cast<T*>(t.data) + row_offset(t, b, h, row), n);
  });
}

// n is a multiple of kLanes.
void scale_row(float* x, int64_t n, float factor) {
  const Vec f(factor);
  for (int64_t i = 0; i < n; i += kLanes)
    store(x + i, load(x + i) * f);
}

void scaled_copy(const float* src, float* dst, int64_t n, float factor) {
  const Vec f(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(dst + i, load(src + i) * f);
  for (; i < n; ++i)
    dst[i] = src[i] * factor;
}

// x * 0 summed is 0 for finite values and NaN otherwise.
float zero_if_finite(const float* x, int64_t n) {
  Vec sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    sum = fma(load(x + i), Vec(0.0f), sum);
  float rest = reduce_add(sum);
  for (; i < n; ++i)
    rest += x[i] * 0.0f;
  return rest;
}

struct Span {
  int64_t lo = 0, hi = 0;
  bool empty() const { return lo >= hi; }
  bool covers(int64_t begin, int64_t end) const { return lo <= begin && hi >= end; }
};

Span intersect(Span a, Span b) {
  const Span s{max_of(a.lo, b.lo), min_of(a.hi, b.hi)};
  return s.empty() ? Span{} : s;
}
Span hull(Span a, Span b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {min_of(a.lo, b.lo), max_of(a.hi, b.hi)};
}

// The key ranges of one query row: disjoint, ascending.
struct RowSpans {
  Span first, second;
};

RowSpans row_spans(const Problem& p, int64_t b, int64_t h, int64_t row) {
  const MaskBounds& m = p.mask;
  const int32_t* bounds = m.bounds + b * m.batch + h * m.head + row * 2 * m.intervals;
  const Span keys{0, p.nk};
  RowSpans spans{intersect({bounds[0], bounds[1]}, keys), {}};
  if (m.intervals == 2) {
    Span other = intersect({bounds[2], bounds[3]}, keys);
    if (spans.first.empty() || (!other.empty() && other.lo < spans.first.lo)) {
      const Span swapped = spans.first;
      spans.first = other;
      other = swapped;
    }
    if (!other.empty() && other.lo <= spans.first.hi)
      spans.first.hi = max_of(spans.first.hi, other.hi);
    else
      spans.second = other;
  }
  return spans;
}

// What one query tile and one key tile have in common. Key positions are relative to the key tile.
struct TileMask {
  const Problem* problem;
  int64_t batch;
  int64_t q0, k0;
  int rows, keys;
  RowSpans spans[kTileQ];
  int groups;
  int group_begin[kTileQ + 1];  // rows [group_begin[g], group_begin[g + 1]) are computed together
  Span group_spans[kTileQ][2];  // hulls of the group's first and second spans
  // Set by enter_key_tile:
  Span columns[kTileQ];  // keys that some row of the group may see
  Span any;              // hull of all groups
  bool use_key_bounds;   // some (row, key) of the tile is ruled out by the per-key query ranges

  int group_rows(int g) const { return group_begin[g + 1] - group_begin[g]; }

  void enter_query_tile(const Problem& p, int64_t b, int64_t h, int64_t row) {
    problem = &p;
    batch = b;
    q0 = row;
    rows = static_cast<int>(min_of<int64_t>(kTileQ, p.nq - row));
    for (int r = 0; r < rows; ++r)
      spans[r] = row_spans(p, b, h, q0 + r);
    // A group ends after kMaxRows rows, or before a row at which the spans jump to a new level (a scale, a
    // block, a document) and stay there: one group for both levels would compute the keys of both for all its
    // rows.
    groups = 0;
    group_begin[0] = 0;
    for (int r = 1; r <= rows; ++r) {
      const bool level_begins = r < rows && jumps(r) && (r + 1 == rows || !jumps(r + 1));
      if (r < rows && r - group_begin[groups] < kMaxRows && !level_begins) continue;
      Span first, second;
      for (int i = group_begin[groups]; i < r; ++i) {
        first = hull(first, spans[i].first);
        second = hull(second, spans[i].second);
      }
      group_spans[groups][0] = first;
      group_spans[groups][1] = second;
      group_begin[++groups] = r;
    }
  }

  static bool far(Span a, Span b) {
    return a.lo - b.lo > kLanes || b.lo - a.lo > kLanes || a.hi - b.hi > kLanes || b.hi - a.hi > kLanes;
  }
  bool jumps(int r) const {
    return far(spans[r - 1].first, spans[r].first) || far(spans[r - 1].second, spans[r].second);
  }

  const int32_t* key_ranges() const {
    return problem->mask.key_bounds + batch * problem->mask.key_batch + 2 * k0;
  }

  // False if the two tiles share no allowed pair (or none that a row group can reach).
  bool enter_key_tile(int64_t key, int64_t tile) {
    k0 = key;
    keys = static_cast<int>(min_of<int64_t>(tile, problem->nk - key));
    any = {};
    Span visible{k0, k0 + keys};
    bool reachable = false;
    for (int g = 0; g < groups && !reachable; ++g)
      reachable =
          !intersect(group_spans[g][0], visible).empty() || !intersect(group_spans[g][1], visible).empty();
    if (!reachable) return false;
    use_key_bounds = false;
    if (problem->mask.key_bounds != nullptr) {
      const int32_t* ranges = key_ranges();
      Span seen;
      for (int j = 0; j < keys; ++j) {
        const Span queries{ranges[2 * j], ranges[2 * j + 1]};
        if (!intersect(queries, {q0, q0 + rows}).empty()) seen = hull(seen, {k0 + j, k0 + j + 1});
        use_key_bounds |= !queries.covers(q0, q0 + rows);
      }
      visible = intersect(visible, seen);
    }
    for (int g = 0; g < groups; ++g) {
      const Span s = hull(intersect(group_spans[g][0], visible), intersect(group_spans[g][1], visible));
      columns[g] = s.empty() ? Span{} : Span{s.lo - k0, s.hi - k0};
      any = hull(any, columns[g]);
    }
    return !any.empty();
  }

  // The group's columns widened to whole vectors: what is computed of a row of logits.
  Span computed(int g) const {
    if (columns[g].empty()) return {};
    return {columns[g].lo / kLanes * kLanes, round_up(columns[g].hi, kLanes)};
  }

  bool row_is_full(int r, Span cols) const {
    return !use_key_bounds && (spans[r].first.covers(k0 + cols.lo, k0 + cols.hi) ||
                               spans[r].second.covers(k0 + cols.lo, k0 + cols.hi));
  }

  bool allowed(int r, int64_t column) const {
    const int64_t key = k0 + column;
    const bool in_spans = (key >= spans[r].first.lo && key < spans[r].first.hi) ||
                          (key >= spans[r].second.lo && key < spans[r].second.hi);
    if (!in_spans || !use_key_bounds) return in_spans;
    const int32_t* range = key_ranges() + 2 * column;
    return range[0] <= q0 + r && q0 + r < range[1];
  }

  // x[column] = value on every column of [cols.lo, cols.hi) that row r may not see; cols holds whole vectors.
  void fill_forbidden(int r, Span cols, float* x, float value) const {
    const Span here{k0 + cols.lo, k0 + cols.hi};
    const Span first = intersect(spans[r].first, here), second = intersect(spans[r].second, here);
    if (first.empty() || second.empty()) {
      fill_outside(hull(first, second), cols, x, value);
    } else {
      // The gap between the two, then what lies outside of both.
      for (int64_t j = first.hi; j < second.lo; ++j)
        x[j - k0] = value;
      fill_outside(hull(first, second), cols, x, value);
    }
    if (use_key_bounds) {
      const int32_t* ranges = key_ranges();
      const int64_t row = q0 + r, end = min_of<int64_t>(cols.hi, keys);
      for (int64_t j = cols.lo; j < end; ++j) {
        const bool seen = ranges[2 * j] <= row && row < ranges[2 * j + 1];
        x[j] = seen ? x[j] : value;
      }
    }
  }

 private:
  // Vector by vector: a scalar store just before a vector load of the same line would stall it.
  void fill_outside(Span keep, Span cols, float* x, float value) const {
    const int64_t lo = keep.empty() ? cols.hi : keep.lo - k0, hi = keep.empty() ? cols.hi : keep.hi - k0;
    int64_t j = cols.lo;
    for (; j < lo; j += kLanes)
      store(x + j, keep_lanes(load(x + j), lo - j, hi - j, Vec(value)));
    for (j = max_of(j, hi / kLanes * kLanes); j < cols.hi; j += kLanes)
      store(x + j, keep_lanes(load(x + j), lo - j, hi - j, Vec(value)));
  }
};

// Whether each pair has one query tile only. Then nobody shares its packed keys, and each key tile is packed
// just before it is used, into scratch that stays in cache, instead of once into the workspace.
bool packs_by_tile(const Problem& p) {
  return p.heads == p.kv_heads && p.nq <= kTileQ;
}

// Packed operands of one (batch, kv head) pair.
struct ForwardLayout {
  int64_t keys_t, values, flags, floats;
  ColumnPanels value_panels;

  ForwardLayout(const Problem& p, int64_t keys) : value_panels{keys, p.dim} {
    keys_t = 0;
    values = keys_t + round_up(keys, kPanel) * p.dim;
    flags = values + round_up(value_panels.floats(), 16);
    floats = flags + round_up(divide_up(keys, kForwardTileK), 16);
  }
  explicit ForwardLayout(const Problem& p) : ForwardLayout(p, p.nk) {}
};

int64_t forward_workspace(const Problem& p) {
  return packs_by_tile(p) ? 0 : ForwardLayout(p).floats;
}
int64_t forward_pack_tasks(const Problem& p, int64_t pairs) {
  return packs_by_tile(p) ? 0 : pairs * divide_up(p.nk, kForwardTileK);
}

// Packs the keys and values [k0, k0 + keys) so that they begin at row `at` of the layout. Returns NaN if a
// value is not finite, else 0.
float pack_forward_tile(const ForwardArgs& args, const ForwardLayout& layout, int64_t b, int64_t h,
                        int64_t k0, int64_t keys, int64_t at, float* base, float* buffer) {
  const Problem& p = args.problem;
  float flag = 0.0f;
  for (int64_t j = 0; j < keys; j += kPanel) {
    const int64_t count = min_of<int64_t>(kPanel, keys - j);
    pack_transposed(float_rows(p.dtype, args.k, b, h, k0 + j, count, p.dim, buffer), count, p.dim,
                    base + layout.keys_t + (at + j) * p.dim);
    const FloatRows values = float_rows(p.dtype, args.v, b, h, k0 + j, count, p.dim, buffer);
    for (int64_t i = 0; i < count; ++i) {
      flag += zero_if_finite(values.row(i), p.dim);
      pack_row(values.row(i), layout.value_panels, at + j + i, base + layout.values);
    }
  }
  return flag;
}

void forward_pack(const ForwardArgs& args, const Wave& wave, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const ForwardLayout layout(p);
  const int64_t tiles = divide_up(p.nk, kForwardTileK);
  Scratch scratch(kPanel * p.dim);
  float* buffer = scratch.take(kPanel * p.dim);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / tiles, tile = task % tiles, k0 = tile * kForwardTileK;
    const int64_t b = (wave.first + pair) / p.kv_heads, h = (wave.first + pair) % p.kv_heads;
    float* base = wave.workspace + pair * layout.floats;
    const int64_t keys = min_of<int64_t>(kForwardTileK, p.nk - k0);
    base[layout.flags + tile] = pack_forward_tile(args, layout, b, h, k0, keys, k0, base, buffer);
  }
}

int64_t forward_tasks(const Problem& p, int64_t pairs) {
  return pairs * (p.heads / p.kv_heads) * divide_up(p.nq, kTileQ);
}

// Softmax numerators of one row in place of its logits; updates the row's running maximum, sum and output.
void online_softmax(float* s, Span cols, float* row_max, float* row_sum, float* out, int64_t out_floats) {
  Vec top0(-kInfinity), top1(-kInfinity);
  int64_t j = cols.lo;
  for (; j + kPanel <= cols.hi; j += kPanel) {
    top0 = max(top0, load(s + j));
    top1 = max(top1, load(s + j + kLanes));
  }
  if (j < cols.hi) top0 = max(top0, load(s + j));
  const float tile_max = reduce_max(max(top0, top1));
  const float old_max = *row_max;
  const float new_max = old_max > tile_max ? old_max : tile_max;
  // While no logit is above -inf any finite shift serves: all weights are exp(-inf) = 0.
  const Vec shift(new_max == -kInfinity ? 0.0f : new_max);
  Vec sum0(0.0f), sum1(0.0f);
  for (j = cols.lo; j + kPanel <= cols.hi; j += kPanel) {
    const Vec w0 = exp(load(s + j) - shift), w1 = exp(load(s + j + kLanes) - shift);
    store(s + j, w0);
    store(s + j + kLanes, w1);
    sum0 = sum0 + w0;
    sum1 = sum1 + w1;
  }
  if (j < cols.hi) {
    const Vec w = exp(load(s + j) - shift);
    store(s + j, w);
    sum0 = sum0 + w;
  }
  const float sum = reduce_add(sum0 + sum1);
  if (old_max == -kInfinity) {
    *row_sum = sum;
  } else if (new_max == old_max) {
    *row_sum += sum;
  } else {
    alignas(64) float correction[kLanes];
    store(correction, exp(Vec(old_max) - shift));
    *row_sum = *row_sum * correction[0] + sum;
    scale_row(out, out_floats, correction[0]);
  }
  *row_max = new_max;
}

// out[r] += sum over allowed columns of w[r][j] * x[j]: for tiles where x holds NaN or infinity that a masked
// pair must not see (0 * NaN is NaN).
void careful_multiply_add(const TileMask& mask, int row, int rows, Span cols, const float* w,
                          int64_t w_stride, const float* x, const ColumnPanels& panels, int64_t x_row,
                          float* out, int64_t out_stride) {
  for (int r = 0; r < rows; ++r)
    for (int64_t j = cols.lo; j < cols.hi; ++j) {
      if (!mask.allowed(row + r, j)) continue;
      const float weight = w[r * w_stride + j];
      for (int64_t d = 0; d < panels.dim; ++d) {
        const int64_t panel = d / kPanel;
        out[r * out_stride + d] += weight * x[panels.offset(panel, x_row + j) + d % kPanel];
      }
    }
}

void forward(const ForwardArgs& args, const Wave& wave, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const bool by_tile = packs_by_tile(p);
  const ForwardLayout layout(p, by_tile ? min_of<int64_t>(p.nk, kForwardTileK) : p.nk);
  const int64_t group = p.heads / p.kv_heads, tiles = divide_up(p.nq, kTileQ);
  const ColumnPanels& vp = layout.value_panels;
  const int64_t out_stride = vp.padded_dim();
  Scratch scratch(kTileQ * (p.dim + out_stride + 2) + kMaxRows * kForwardTileStride +
                  (by_tile ? layout.floats + kPanel * p.dim : 0) + 96);
  float* q = scratch.take(kTileQ * p.dim);
  float* s = scratch.take(kMaxRows * kForwardTileStride);
  float* out = scratch.take(kTileQ * out_stride);
  float* row_max = scratch.take(kTileQ);
  float* row_sum = scratch.take(kTileQ);
  float* packed = by_tile ? scratch.take(layout.floats) : nullptr;
  float* buffer = by_tile ? scratch.take(kPanel * p.dim) : nullptr;
  TileMask mask;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / (group * tiles);
    const int64_t b = (wave.first + pair) / p.kv_heads, hk = (wave.first + pair) % p.kv_heads;
    const int64_t h = hk * group + task / tiles % group;
    float* base = by_tile ? packed : wave.workspace + pair * layout.floats;
    mask.enter_query_tile(p, b, h, fold(task % tiles, tiles) * kTileQ);

    const FloatRows queries = float_rows(p.dtype, args.q, b, h, mask.q0, mask.rows, p.dim, q);
    for (int r = 0; r < mask.rows; ++r) {
      scaled_copy(queries.row(r), q + r * p.dim, p.dim, p.scale);
      row_max[r] = -kInfinity;
      row_sum[r] = 0.0f;
    }
    for (int64_t i = 0; i < mask.rows * out_stride; i += kLanes)
      store(out + i, Vec(0.0f));

    for (int64_t k0 = 0; k0 < p.nk; k0 += kForwardTileK) {
      if (!mask.enter_key_tile(k0, kForwardTileK)) continue;
      // Row of the layout at which this tile begins.
      const int64_t at = by_tile ? 0 : k0;
      const float flag = by_tile ? pack_forward_tile(args, layout, b, hk, k0, mask.keys, 0, base, buffer)
                                 : base[layout.flags + k0 / kForwardTileK];
      const bool careful = flag != 0.0f;
      for (int g = 0; g < mask.groups; ++g) {
        const Span cols = mask.computed(g), seen = mask.columns[g];
        if (cols.empty()) continue;
        const int row = mask.group_begin[g], rows = mask.group_rows(g);
        for (int64_t panel = cols.lo / kPanel * kPanel; panel < cols.hi; panel += kPanel) {
          const Span part = intersect(cols, {panel, panel + kPanel});
          multiply(rows, static_cast<int>((part.hi - part.lo) / kLanes), q + row * p.dim, p.dim,
                   base + layout.keys_t + (at + panel) * p.dim + (part.lo - panel), s + part.lo,
                   kForwardTileStride, p.dim);
        }
        for (int r = 0; r < rows; ++r) {
          float* logits = s + r * kForwardTileStride;
          if (!mask.row_is_full(row + r, cols)) mask.fill_forbidden(row + r, cols, logits, -kInfinity);
          online_softmax(logits, cols, row_max + row + r, row_sum + row + r, out + (row + r) * out_stride,
                         out_stride);
        }
        if (careful) {
          careful_multiply_add(mask, row, rows, seen, s, kForwardTileStride, base + layout.values, vp, at,
                               out + row * out_stride, out_stride);
          continue;
        }
        for (int64_t panel = 0; panel < vp.count(); ++panel)
          multiply_add(rows, vp.vectors(panel), s + seen.lo, kForwardTileStride,
                       base + layout.values + vp.offset(panel, at + seen.lo),
                       out + row * out_stride + panel * kPanel, out_stride, seen.hi - seen.lo);
      }
    }

    float* lse = args.lse + (b * p.heads + h) * p.nq + mask.q0;
    for (int r = 0; r < mask.rows; ++r) {
      const bool empty = row_sum[r] == 0.0f;
      scale_row(out + r * out_stride, out_stride, empty ? 0.0f : 1.0f / row_sum[r]);
      write_row(p.dtype, args.out, b, h, mask.q0 + r, out + r * out_stride, p.dim);
      lse[r] = empty ? -kInfinity : row_max[r] + __builtin_logf(row_sum[r]);
    }
  }
}

// Packed operands of one (batch, kv head) pair and of the `group` query heads that share it.
struct BackwardLayout {
  int64_t keys_t, values_t, keys, key_flags, query_head, floats;
  // Relative to a query head:
  int64_t q_rows, q, do_rows, grads, delta, query_flags, partial, touched, query_floats;
  int64_t group, chunks, tiles_q, tiles_k;
  ColumnPanels key_panels, query_panels;

  explicit BackwardLayout(const Problem& p) : key_panels{p.nk, p.dim}, query_panels{p.nq, p.dim} {
    group = p.heads / p.kv_heads;
    tiles_q = divide_up(p.nq, kTileQ);
    tiles_k = divide_up(p.nk, kTileK);
    chunks = max_of<int64_t>(1, min_of(tiles_k, divide_up(kBackwardUnits, p.batch * p.kv_heads)));
    const int64_t nk = round_up(p.nk, kPanel);
    keys_t = 0;
    values_t = keys_t + nk * p.dim;
    keys = values_t + nk * p.dim;
    key_flags = keys + round_up(key_panels.floats(), 16);
    query_head = key_flags + round_up(tiles_k, 16);

    const int64_t rows = round_up(p.nq * p.dim, 16), panels = round_up(query_panels.floats(), 16);
    q_rows = 0;
    q = q_rows + rows;
    do_rows = q + panels;
    grads = do_rows + rows;
    delta = grads + panels;
    query_flags = delta + round_up(p.nq, 16);
    partial = query_flags + round_up(tiles_q, 16);
    touched = partial + chunks * panels;
    query_floats = touched + round_up(chunks * tiles_q, 16);
    floats = query_head + group * query_floats;
  }

  float* head(float* base, int64_t g) const { return base + query_head + g * query_floats; }
  // Accumulator of the query gradient of one chunk of key tiles: [Nq, padded_dim], row-major.
  float* partial_of(float* head, int64_t chunk) const {
    return head + partial + chunk * round_up(query_panels.floats(), 16);
  }
  float* touched_of(float* head, int64_t chunk) const { return head + touched + chunk * tiles_q; }
};

int64_t backward_workspace(const Problem& p) {
  return BackwardLayout(p).floats;
}

int64_t backward_pack_tasks(const Problem& p, int64_t pairs) {
  const BackwardLayout layout(p);
  return pairs * (layout.tiles_k + layout.group * layout.tiles_q);
}

void pack_key_tile(const BackwardArgs& args, const BackwardLayout& layout, int64_t b, int64_t h, int64_t tile,
                   float* base, float* buffer) {
  const Problem& p = args.problem;
  const int64_t k1 = min_of(p.nk, (tile + 1) * kTileK);
  float flag = 0.0f;
  for (int64_t k0 = tile * kTileK; k0 < k1; k0 += kPanel) {
    const int64_t count = min_of<int64_t>(kPanel, k1 - k0);
    pack_transposed(float_rows(p.dtype, args.v, b, h, k0, count, p.dim, buffer), count, p.dim,
                    base + layout.values_t + k0 * p.dim);
    const FloatRows keys = float_rows(p.dtype, args.k, b, h, k0, count, p.dim, buffer);
    pack_transposed(keys, count, p.dim, base + layout.keys_t + k0 * p.dim);
    for (int64_t i = 0; i < count; ++i) {
      flag += zero_if_finite(keys.row(i), p.dim);
      pack_row(keys.row(i), layout.key_panels, k0 + i, base + layout.keys);
    }
  }
  base[layout.key_flags + tile] = flag;
}

void pack_query_tile(const BackwardArgs& args, const BackwardLayout& layout, int64_t b, int64_t h,
                     int64_t tile, float* head, float* buffer) {
  const Problem& p = args.problem;
  const int64_t q1 = min_of(p.nq, (tile + 1) * kTileQ);
  float flag = 0.0f;
  for (int64_t i = tile * kTileQ; i < q1; ++i) {
    float* q = head + layout.q_rows + i * p.dim;
    float* grad = head + layout.do_rows + i * p.dim;
    scaled_copy(float_rows(p.dtype, args.q, b, h, i, 1, p.dim, buffer).data, q, p.dim, p.scale);
    scaled_copy(float_rows(p.dtype, args.grad_out, b, h, i, 1, p.dim, buffer).data, grad, p.dim, 1.0f);
    const float* row = float_rows(p.dtype, args.out, b, h, i, 1, p.dim, buffer).data;
    Vec sum(0.0f), check(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= p.dim; d += kLanes) {
      sum = fma(load(grad + d), load(row + d), sum);
      check = fma(load(grad + d), Vec(0.0f), fma(load(q + d), Vec(0.0f), check));
    }
    float delta = reduce_add(sum);
    flag += reduce_add(check);
    for (; d < p.dim; ++d) {
      delta += grad[d] * row[d];
      flag += grad[d] * 0.0f + q[d] * 0.0f;
    }
    const int64_t at = (b * p.heads + h) * p.nq + i;
    head[layout.delta + i] = args.grad_lse == nullptr ? delta : delta - args.grad_lse[at];
    pack_row(q, layout.query_panels, i, head + layout.q);
    pack_row(grad, layout.query_panels, i, head + layout.grads);
  }
  head[layout.query_flags + tile] = flag;
}

void backward_pack(const BackwardArgs& args, const Wave& wave, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  const int64_t per_pair = layout.tiles_k + layout.group * layout.tiles_q;
  Scratch scratch(kPanel * p.dim);
  float* buffer = scratch.take(kPanel * p.dim);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / per_pair;
    const int64_t b = (wave.first + pair) / p.kv_heads, hk = (wave.first + pair) % p.kv_heads;
    float* base = wave.workspace + pair * layout.floats;
    int64_t rest = task % per_pair;
    if (rest < layout.tiles_k) {
      pack_key_tile(args, layout, b, hk, rest, base, buffer);
      continue;
    }
    rest -= layout.tiles_k;
    const int64_t g = rest / layout.tiles_q;
    pack_query_tile(args, layout, b, hk * layout.group + g, rest % layout.tiles_q, layout.head(base, g),
                    buffer);
  }
}

int64_t backward_tasks(const Problem& p, int64_t pairs) {
  return pairs * BackwardLayout(p).chunks;
}

// P and dS of one row from its logits (in s) and dP (in ds).
void row_gradients(float* s, float* ds, Span cols, float lse, float delta) {
  const Vec shift(lse), mean(delta);
  for (int64_t j = cols.lo; j < cols.hi; j += kLanes) {
    const Vec weight = exp(load(s + j) - shift);
    store(s + j, weight);
    store(ds + j, weight * (load(ds + j) - mean));
  }
}

void fill_columns(float* x, int64_t begin, int64_t end, float value) {
  for (int64_t j = begin; j < end; ++j)
    x[j] = value;
}

// key_out[j] += sum over rows that see key j of w[r][j] * x[r]; the transposed twin of careful_multiply_add.
void careful_multiply_add_transposed(const TileMask& mask, const float* w, const float* x,
                                     const ColumnPanels& panels, float* key_out, int64_t out_stride) {
  for (int r = 0; r < mask.rows; ++r)
    for (int64_t j = mask.any.lo; j < mask.any.hi; ++j) {
      if (!mask.allowed(r, j)) continue;
      const float weight = w[r * kTileStride + j];
      for (int64_t d = 0; d < panels.dim; ++d)
        key_out[j * out_stride + d] += weight * x[panels.offset(d / kPanel, mask.q0 + r) + d % kPanel];
    }
}

void backward_tile(const Problem& p, const BackwardLayout& layout, const TileMask& mask, const float* base,
                   const float* head, const float* lse, float* s, float* ds, float* grad_k, float* grad_v,
                   float* grad_q) {
  const int64_t stride = layout.key_panels.padded_dim();
  for (int64_t panel = mask.any.lo / kPanel * kPanel; panel < mask.any.hi; panel += kPanel)
    for (int g = 0; g < mask.groups; ++g) {
      const Span part = intersect(mask.computed(g), {panel, panel + kPanel});
      if (part.empty()) continue;
      const int rows = mask.group_rows(g), vectors = static_cast<int>((part.hi - part.lo) / kLanes);
      const int64_t row = mask.group_begin[g], at = (mask.q0 + row) * p.dim, to = row * kTileStride + part.lo;
      const int64_t packed = (mask.k0 + panel) * p.dim + (part.lo - panel);
      multiply(rows, vectors, head + layout.q_rows + at, p.dim, base + layout.keys_t + packed, s + to,
               kTileStride, p.dim);
      multiply(rows, vectors, head + layout.do_rows + at, p.dim, base + layout.values_t + packed, ds + to,
               kTileStride, p.dim);
    }

  const Span all{mask.any.lo / kLanes * kLanes, round_up(mask.any.hi, kLanes)};
  for (int g = 0; g < mask.groups; ++g) {
    const Span cols = mask.computed(g);
    for (int r = mask.group_begin[g]; r < mask.group_begin[g + 1]; ++r) {
      float* weights = s + r * kTileStride;
      float* grads = ds + r * kTileStride;
      if (cols.empty()) {
        fill_columns(weights, all.lo, all.hi, 0.0f);
        fill_columns(grads, all.lo, all.hi, 0.0f);
        continue;
      }
      row_gradients(weights, grads, cols, lse[mask.q0 + r], head[layout.delta + mask.q0 + r]);
      if (!mask.row_is_full(r, cols)) {
        mask.fill_forbidden(r, cols, weights, 0.0f);
        mask.fill_forbidden(r, cols, grads, 0.0f);
      }
      // The transposed products below read whole row ranges.
      fill_columns(weights, all.lo, cols.lo, 0.0f);
      fill_columns(weights, cols.hi, all.hi, 0.0f);
      fill_columns(grads, all.lo, cols.lo, 0.0f);
      fill_columns(grads, cols.hi, all.hi, 0.0f);
    }
  }

  const ColumnPanels& qp = layout.query_panels;
  if (head[layout.query_flags + mask.q0 / kTileQ] != 0.0f) {
    careful_multiply_add_transposed(mask, s, head + layout.grads, qp, grad_v, stride);
    careful_multiply_add_transposed(mask, ds, head + layout.q, qp, grad_k, stride);
  } else {
    for (int64_t j = mask.any.lo; j < mask.any.hi; j += kMaxRows) {
      const int64_t end = min_of<int64_t>(j + kMaxRows, mask.any.hi);
      int64_t row0 = mask.rows, row1 = 0;
      for (int g = 0; g < mask.groups; ++g) {
        if (intersect(mask.columns[g], {j, end}).empty()) continue;
        row0 = min_of<int64_t>(row0, mask.group_begin[g]);
        row1 = mask.group_begin[g + 1];
      }
      if (row0 >= row1) continue;
      const int keys = static_cast<int>(end - j);
      for (int64_t panel = 0; panel < qp.count(); ++panel) {
        const int64_t x = qp.offset(panel, mask.q0 + row0), w = row0 * kTileStride + j,
                      to = j * stride + panel * kPanel;
        multiply_add_transposed(keys, qp.vectors(panel), s + w, kTileStride, head + layout.grads + x,
                                grad_v + to, stride, row1 - row0);
        multiply_add_transposed(keys, qp.vectors(panel), ds + w, kTileStride, head + layout.q + x,
                                grad_k + to, stride, row1 - row0);
      }
    }
  }

  const ColumnPanels& kp = layout.key_panels;
  const bool careful = base[layout.key_flags + mask.k0 / kTileK] != 0.0f;
  for (int64_t panel = 0; panel < (careful ? 1 : kp.count()); ++panel)
    for (int g = 0; g < mask.groups; ++g) {
      const Span cols = mask.columns[g];
      if (cols.empty()) continue;
      const int row = mask.group_begin[g];
      if (careful)
        careful_multiply_add(mask, row, mask.group_rows(g), cols, ds + row * kTileStride, kTileStride,
                             base + layout.keys, kp, mask.k0, grad_q + row * stride, stride);
      else
        multiply_add(mask.group_rows(g), kp.vectors(panel), ds + row * kTileStride + cols.lo, kTileStride,
                     base + layout.keys + kp.offset(panel, mask.k0 + cols.lo),
                     grad_q + row * stride + panel * kPanel, stride, cols.hi - cols.lo);
    }
}

void backward(const BackwardArgs& args, const Wave& wave, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  const int64_t stride = layout.key_panels.padded_dim();
  Scratch scratch(2 * kTileQ * kTileStride + 2 * kTileK * stride + 64);
  float* s = scratch.take(kTileQ * kTileStride);
  float* ds = scratch.take(kTileQ * kTileStride);
  float* grad_k = scratch.take(kTileK * stride);
  float* grad_v = scratch.take(kTileK * stride);
  TileMask mask;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / layout.chunks, chunk = fold(task % layout.chunks, layout.chunks);
    const int64_t b = (wave.first + pair) / p.kv_heads, hk = (wave.first + pair) % p.kv_heads;
    float* base = wave.workspace + pair * layout.floats;
    const int64_t tile0 = layout.tiles_k * chunk / layout.chunks,
                  tile1 = layout.tiles_k * (chunk + 1) / layout.chunks;
    for (int64_t g = 0; g < layout.group; ++g) {
      float* touched = layout.touched_of(layout.head(base, g), chunk);
      for (int64_t t = 0; t < layout.tiles_q; ++t)
        touched[t] = 0.0f;
    }
    for (int64_t k0 = tile0 * kTileK; k0 < min_of(p.nk, tile1 * kTileK); k0 += kTileK) {
      const int64_t keys = min_of<int64_t>(kTileK, p.nk - k0);
      fill_columns(grad_k, 0, keys * stride, 0.0f);
      fill_columns(grad_v, 0, keys * stride, 0.0f);
      for (int64_t g = 0; g < layout.group; ++g) {
        float* head = layout.head(base, g);
        const int64_t h = hk * layout.group + g;
        float* touched = layout.touched_of(head, chunk);
        for (int64_t t = 0; t < layout.tiles_q; ++t) {
          mask.enter_query_tile(p, b, h, t * kTileQ);
          if (!mask.enter_key_tile(k0, kTileK)) continue;
          float* grad_q = layout.partial_of(head, chunk) + mask.q0 * stride;
          if (touched[t] == 0.0f) fill_columns(grad_q, 0, mask.rows * stride, 0.0f);
          touched[t] = 1.0f;
          backward_tile(p, layout, mask, base, head, args.lse + (b * p.heads + h) * p.nq, s, ds, grad_k,
                        grad_v, grad_q);
        }
      }
      for (int64_t j = 0; j < keys; ++j) {
        write_row(p.dtype, args.grad_k, b, hk, k0 + j, grad_k + j * stride, p.dim);
        write_row(p.dtype, args.grad_v, b, hk, k0 + j, grad_v + j * stride, p.dim);
      }
    }
  }
}

int64_t backward_reduce_tasks(const Problem& p, int64_t pairs) {
  const BackwardLayout layout(p);
  return pairs * layout.group * layout.tiles_q;
}

void backward_reduce(const BackwardArgs& args, const Wave& wave, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  const int64_t stride = layout.query_panels.padded_dim();
  Scratch scratch(stride);
  float* row = scratch.take(stride);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task % layout.tiles_q, g = task / layout.tiles_q % layout.group;
    const int64_t pair = task / (layout.tiles_q * layout.group);
    const int64_t b = (wave.first + pair) / p.kv_heads,
                  h = (wave.first + pair) % p.kv_heads * layout.group + g;
    float* head = layout.head(wave.workspace + pair * layout.floats, g);
    for (int64_t i = tile * kTileQ; i < min_of(p.nq, (tile + 1) * kTileQ); ++i) {
      fill_columns(row, 0, stride, 0.0f);
      for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
        if (layout.touched_of(head, chunk)[tile] == 0.0f) continue;
        const float* part = layout.partial_of(head, chunk) + i * stride;
        for (int64_t d = 0; d < stride; d += kLanes)
          store(row + d, load(row + d) + load(part + d));
      }
      scale_row(row, stride, p.scale);
      write_row(p.dtype, args.grad_q, b, h, i, row, p.dim);
    }
  }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{
      forward_workspace, forward_pack_tasks, forward_pack,          forward_tasks,
      forward,           backward_workspace, backward_pack_tasks,   backward_pack,
      backward_tasks,    backward,           backward_reduce_tasks, backward_reduce};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::block_sparse_attention
