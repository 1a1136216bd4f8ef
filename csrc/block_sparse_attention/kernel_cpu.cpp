// CPU forward, backward and forward-mode derivative; compiled once per instruction set. The algorithm, the
// tile sizes and the numerics are described in README.md beside this file.
#include <type_traits>

#include "block_sparse_attention/params.h"
#include "block_sparse_attention/rows_cpu.h"
#include "block_sparse_attention/tile_mask_cpu.h"
#include "common/matmul_panel.h"
#include "common/vec.h"

namespace arcore::block_sparse_attention {
namespace ARCORE_ISA {
namespace {

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

void scaled_copy(const float* src, float* dst, int64_t n, float factor) {
  const Vec f(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(dst + i, load(src + i) * f);
  for (; i < n; ++i)
    dst[i] = src[i] * factor;
}

// x * 0 summed is 0 for finite values and NaN otherwise.
float zero_if_finite(const FloatRows& rows, int64_t count, int64_t n) {
  Vec sums[2] = {Vec(0.0f), Vec(0.0f)};
  float rest = 0.0f;
  for (int64_t r = 0; r < count; ++r) {
    const float* x = rows.row(r);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      Vec& sum = sums[i / kLanes % 2];
      sum = fma(load(x + i), Vec(0.0f), sum);
    }
    for (; i < n; ++i)
      rest += x[i] * 0.0f;
  }
  return rest + reduce_add(sums[0] + sums[1]);
}

// Packed operands of one (batch, kv head) pair.
struct ForwardLayout {
  int64_t keys_t, values, flags, floats;
  ColumnPanels value_panels;

  ForwardLayout(const Problem& p, int64_t keys) : value_panels{keys, p.v_dim} {
    keys_t = 0;
    values = keys_t + round_up(keys, kPanel) * p.dim;
    flags = values + round_up(value_panels.floats(), 16);
    floats = flags + round_up(divide_up(keys, kForwardTileK), 16);
  }
  explicit ForwardLayout(const Problem& p) : ForwardLayout(p, p.nk) {}
};

int64_t forward_workspace(const Problem& p) {
  return packs_by_tile(p, kTileQ) ? 0 : ForwardLayout(p).floats;
}
int64_t forward_pack_tasks(const Problem& p, int64_t pairs) {
  return packs_by_tile(p, kTileQ) ? 0 : pairs * divide_up(p.nk, kForwardTileK);
}

// Floats of a panel of rows, in the kernel that reads both keys and values.
int64_t row_buffer(const Problem& p) {
  return kPanel * max_of(p.dim, p.v_dim);
}

void add_bias(const float* bias, Span cols, float* x) {
  for (int64_t j = cols.lo; j < cols.hi; j += kLanes)
    store(x + j, load(x + j) + load(bias + j));
}

// Whether values are multiplied where they lie: each is read once, and its vectors are whole.
bool values_in_place(const Problem& p) {
  return packs_by_tile(p, kTileQ) && p.dtype == StorageType::kFloat32 && p.v_dim % kLanes == 0;
}

// Packs the keys and values [k0, k0 + keys) so that they begin at row `at` of the layout; finite values that
// are multiplied in place are left out. Returns NaN if a value is not finite, else 0. `unasked`: nobody has
// asked for these rows yet.
float pack_forward_tile(const ForwardArgs& args, const ForwardLayout& layout, int64_t b, int64_t h,
                        int64_t k0, int64_t keys, int64_t at, bool unasked, float* base, float* buffer) {
  const Problem& p = args.problem;
  const bool in_place = values_in_place(p);
  const TileAhead rows_ahead(args, b, h, k0, unasked ? keys : 0);
  const int64_t parts = divide_up(keys, kPanel);
  float flag = 0.0f;
  const auto pack_values = [&](const FloatRows& values, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      pack_row(values.row(i), layout.value_panels, at + first + i, base + layout.values);
  };
  for (int64_t j = 0; j < keys; j += kPanel) {
    const int64_t part = j / kPanel;
    for (int64_t next = part == 0 ? 0 : part + 3; next < min_of(parts, part + 4); ++next)
      rows_ahead.ask(next, parts);
    const int64_t count = min_of<int64_t>(kPanel, keys - j);
    pack_transposed(float_rows(p.dtype, args.k, b, h, k0 + j, count, p.dim, buffer), count, p.dim,
                    base + layout.keys_t + (at + j) * p.dim);
    const FloatRows values = float_rows(p.dtype, args.v, b, h, k0 + j, count, p.v_dim, buffer);
    flag += zero_if_finite(values, count, p.v_dim);
    if (!in_place) pack_values(values, j, count);
  }
  if (in_place && flag != 0.0f)
    pack_values(float_rows(p.dtype, args.v, b, h, k0, keys, p.v_dim, buffer), 0, keys);
  return flag;
}

int64_t forward_scratch(const Problem& p) {
  const bool by_tile = packs_by_tile(p, kTileQ);
  const ForwardLayout layout(p, by_tile ? min_of<int64_t>(p.nk, kForwardTileK) : 0);
  return kTileQ * (p.dim + layout.value_panels.padded_dim() + 2) + kMaxRows * kForwardTileStride +
         kForwardTileK + (by_tile ? layout.floats : 0) + row_buffer(p) + 8 * 16;
}

void forward_pack(const ForwardArgs& args, const Wave& wave, float* scratch, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const ForwardLayout layout(p);
  const int64_t tiles = divide_up(p.nk, kForwardTileK);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / tiles, tile = task % tiles, k0 = tile * kForwardTileK;
    const int64_t b = (wave.first + pair) / p.kv_heads, h = (wave.first + pair) % p.kv_heads;
    float* base = wave.workspace + pair * layout.floats;
    const int64_t keys = min_of<int64_t>(kForwardTileK, p.nk - k0);
    base[layout.flags + tile] = pack_forward_tile(args, layout, b, h, k0, keys, k0, true, base, scratch);
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

void forward(const ForwardArgs& args, const Wave& wave, float* memory, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const bool by_tile = packs_by_tile(p, kTileQ), in_place = values_in_place(p);
  const ForwardLayout layout(p, by_tile ? min_of<int64_t>(p.nk, kForwardTileK) : p.nk);
  const int64_t group = p.heads / p.kv_heads, tiles = divide_up(p.nq, kTileQ);
  const ColumnPanels& vp = layout.value_panels;
  const int64_t out_stride = vp.padded_dim();
  Scratch scratch(memory);
  float* q = scratch.take(kTileQ * p.dim);
  float* s = scratch.take(kMaxRows * kForwardTileStride);
  float* out = scratch.take(kTileQ * out_stride);
  float* row_max = scratch.take(kTileQ);
  float* row_sum = scratch.take(kTileQ);
  float* bias_buffer = scratch.take(kForwardTileK);
  float* buffer = scratch.take(row_buffer(p));
  float* packed = by_tile ? scratch.take(layout.floats) : nullptr;
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

    bool unasked = true;
    for (int64_t k0 = 0; k0 < p.nk; k0 += kForwardTileK) {
      if (!mask.enter_key_tile(k0, kForwardTileK)) continue;
      // Row of the layout at which this tile begins.
      const int64_t at = by_tile ? 0 : k0;
      const float flag = by_tile
                             ? pack_forward_tile(args, layout, b, hk, k0, mask.keys, 0, unasked, base, buffer)
                             : base[layout.flags + k0 / kForwardTileK];
      const bool careful = flag != 0.0f;
      const float* bias = tile_bias(p.bias, b, h, k0, mask.keys, bias_buffer);
      const TileAhead ahead(args, b, hk, k0 + kForwardTileK, by_tile ? kForwardTileK : 0);
      unasked = false;
      for (int g = 0; g < mask.groups; ++g) {
        const Span cols = mask.computed(g), seen = mask.columns[g];
        if (cols.empty()) continue;
        const int row = mask.group_begin[g], rows = mask.group_rows(g);
        constexpr int64_t kPanels = kForwardTileK / kPanel;
        for (int64_t panel = cols.lo / kPanel * kPanel; panel < cols.hi; panel += kPanel) {
          const Span part = intersect(cols, {panel, panel + kPanel});
          ahead.ask(g * kPanels + panel / kPanel, mask.groups * kPanels);
          multiply(rows, static_cast<int>((part.hi - part.lo) / kLanes), q + row * p.dim, p.dim,
                   base + layout.keys_t + (at + panel) * p.dim + (part.lo - panel), s + part.lo,
                   kForwardTileStride, p.dim);
        }
        for (int r = 0; r < rows; ++r) {
          float* logits = s + r * kForwardTileStride;
          if (bias != nullptr) add_bias(bias, cols, logits);
          if (!mask.row_is_full(row + r, cols)) mask.fill_forbidden(row + r, cols, logits, -kInfinity);
          online_softmax(logits, cols, row_max + row + r, row_sum + row + r, out + (row + r) * out_stride,
                         out_stride);
        }
        if (careful) {
          careful_multiply_add(mask, row, rows, seen, s, kForwardTileStride, base + layout.values, vp, at,
                               out + row * out_stride, out_stride);
          continue;
        }
        for (int64_t panel = 0; panel < vp.count(); ++panel) {
          float* to = out + row * out_stride + panel * kPanel;
          if (in_place)
            multiply_add_rows(rows, vp.vectors(panel), s + seen.lo, kForwardTileStride,
                              static_cast<const float*>(args.v.data) +
                                  row_offset(args.v, b, hk, k0 + seen.lo) + panel * kPanel,
                              args.v.row, to, out_stride, seen.hi - seen.lo);
          else
            multiply_add(rows, vp.vectors(panel), s + seen.lo, kForwardTileStride,
                         base + layout.values + vp.offset(panel, at + seen.lo), to, out_stride,
                         seen.hi - seen.lo);
        }
      }
    }

    float* lse = args.lse + (b * p.heads + h) * p.nq + mask.q0;
    for (int r = 0; r < mask.rows; ++r) {
      const bool empty = row_sum[r] == 0.0f;
      scale_row(out + r * out_stride, out_stride, empty ? 0.0f : 1.0f / row_sum[r]);
      write_row(p.dtype, args.out, b, h, mask.q0 + r, out + r * out_stride, p.v_dim);
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
  ColumnPanels key_panels, query_panels, grad_panels;

  explicit BackwardLayout(const Problem& p)
      : key_panels{p.nk, p.dim}, query_panels{p.nq, p.dim}, grad_panels{p.nq, p.v_dim} {
    group = p.heads / p.kv_heads;
    tiles_q = divide_up(p.nq, kTileQ);
    tiles_k = divide_up(p.nk, kTileK);
    chunks = max_of<int64_t>(1, min_of(tiles_k, divide_up(kBackwardUnits, p.kv_heads)));
    const int64_t nk = round_up(p.nk, kPanel);
    keys_t = 0;
    values_t = keys_t + nk * p.dim;
    keys = values_t + nk * p.v_dim;
    key_flags = keys + round_up(key_panels.floats(), 16);
    query_head = key_flags + round_up(tiles_k, 16);

    const int64_t panels = round_up(query_panels.floats(), 16);
    q_rows = 0;
    q = q_rows + round_up(p.nq * p.dim, 16);
    do_rows = q + panels;
    grads = do_rows + round_up(p.nq * p.v_dim, 16);
    delta = grads + round_up(grad_panels.floats(), 16);
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
    pack_transposed(float_rows(p.dtype, args.v, b, h, k0, count, p.v_dim, buffer), count, p.v_dim,
                    base + layout.values_t + k0 * p.v_dim);
    const FloatRows keys = float_rows(p.dtype, args.k, b, h, k0, count, p.dim, buffer);
    pack_transposed(keys, count, p.dim, base + layout.keys_t + k0 * p.dim);
    flag += zero_if_finite(keys, count, p.dim);
    for (int64_t i = 0; i < count; ++i)
      pack_row(keys.row(i), layout.key_panels, k0 + i, base + layout.keys);
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
    float* grad = head + layout.do_rows + i * p.v_dim;
    scaled_copy(float_rows(p.dtype, args.q, b, h, i, 1, p.dim, buffer).data, q, p.dim, p.scale);
    scaled_copy(float_rows(p.dtype, args.grad_out, b, h, i, 1, p.v_dim, buffer).data, grad, p.v_dim, 1.0f);
    const float* row = float_rows(p.dtype, args.out, b, h, i, 1, p.v_dim, buffer).data;
    Vec sum(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= p.v_dim; d += kLanes)
      sum = fma(load(grad + d), load(row + d), sum);
    float delta = reduce_add(sum);
    for (; d < p.v_dim; ++d)
      delta += grad[d] * row[d];
    flag += zero_if_finite({q, 0}, 1, p.dim) + zero_if_finite({grad, 0}, 1, p.v_dim);
    const int64_t at = (b * p.heads + h) * p.nq + i;
    head[layout.delta + i] = args.grad_lse == nullptr ? delta : delta - args.grad_lse[at];
    pack_row(q, layout.query_panels, i, head + layout.q);
    pack_row(grad, layout.grad_panels, i, head + layout.grads);
  }
  head[layout.query_flags + tile] = flag;
}

void backward_pack(const BackwardArgs& args, const Wave& wave, float* scratch, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  const int64_t per_pair = layout.tiles_k + layout.group * layout.tiles_q;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / per_pair;
    const int64_t b = (wave.first + pair) / p.kv_heads, hk = (wave.first + pair) % p.kv_heads;
    float* base = wave.workspace + pair * layout.floats;
    int64_t rest = task % per_pair;
    if (rest < layout.tiles_k) {
      pack_key_tile(args, layout, b, hk, rest, base, scratch);
      continue;
    }
    rest -= layout.tiles_k;
    const int64_t g = rest / layout.tiles_q;
    pack_query_tile(args, layout, b, hk * layout.group + g, rest % layout.tiles_q, layout.head(base, g),
                    scratch);
  }
}

int64_t backward_tasks(const Problem& p, int64_t pairs) {
  return pairs * BackwardLayout(p).chunks;
}

// P and dS of row r from its logits (in s) and dP (in ds); both are 0 where the row may not see.
//
// dS = P (dP - delta) with delta = sum of P dP - grad_lse, which equals <grad_out, out> - grad_lse. Where the
// row sees nothing outside of this tile the sum is formed here, and where a key has all the weight its dP is
// the sum: then dS is 0 as it should be, not the difference of two roundings.
void row_gradients(const TileMask& mask, int r, Span cols, float lse, float delta, float grad_lse, float* s,
                   float* ds) {
  const Vec shift(lse == -kInfinity ? 0.0f : lse);
  const bool cut = !mask.row_is_full(r, cols), alone = mask.row_ends_here(r);
  Vec mean(delta);
  float top;
  if (cut || alone) {
    for (int64_t j = cols.lo; j < cols.hi; j += kLanes)
      store(s + j, exp(load(s + j) - shift));
    if (cut) {
      mask.fill_forbidden(r, cols, s, 0.0f);
      mask.fill_forbidden(r, cols, ds, 0.0f);
    }
    Vec sum(0.0f), most(0.0f);
    for (int64_t j = cols.lo; j < cols.hi; j += kLanes) {
      sum = fma(load(s + j), load(ds + j), sum);
      most = max(most, load(s + j));
    }
    if (alone) mean = Vec(reduce_add(sum) - grad_lse);
    top = reduce_max(most);
  } else {
    Vec most(0.0f);
    for (int64_t j = cols.lo; j < cols.hi; j += kLanes) {
      const Vec weight = exp(load(s + j) - shift);
      store(s + j, weight);
      most = max(most, weight);
    }
    top = reduce_max(most);
  }
  if (top >= 1.0f && !alone)
    for (int64_t j = cols.lo; j < cols.hi; ++j)
      if (s[j] >= 1.0f) mean = Vec(ds[j] - grad_lse);
  for (int64_t j = cols.lo; j < cols.hi; j += kLanes)
    store(ds + j, load(s + j) * (load(ds + j) - mean));
  // 0 * (0 - mean) is NaN where the mean is.
  if (cut) mask.fill_forbidden(r, cols, ds, 0.0f);
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

// What backward_tile reads and adds to for one query head; rows of grad_* are padded to whole vectors.
struct BackwardHead {
  const float* packed;    // of the query head
  const float* lse;       // [Nq]
  const float* grad_lse;  // [Nq] or null
  const float* bias;      // of the key tile, or null
  float* grad_bias;       // of the key tile, or null
  float* grad_q;          // of the query tile
};

void backward_tile(const Problem& p, const BackwardLayout& layout, const TileMask& mask, const float* base,
                   const BackwardHead& head, float* s, float* ds, float* grad_k, float* grad_v) {
  const int64_t stride = layout.key_panels.padded_dim(), v_stride = layout.grad_panels.padded_dim();
  for (int64_t panel = mask.any.lo / kPanel * kPanel; panel < mask.any.hi; panel += kPanel)
    for (int g = 0; g < mask.groups; ++g) {
      const Span part = intersect(mask.computed(g), {panel, panel + kPanel});
      if (part.empty()) continue;
      const int rows = mask.group_rows(g), vectors = static_cast<int>((part.hi - part.lo) / kLanes);
      const int64_t begin = mask.group_begin[g], row = mask.q0 + begin, to = begin * kTileStride + part.lo;
      const int64_t key = mask.k0 + panel, within = part.lo - panel;
      multiply(rows, vectors, head.packed + layout.q_rows + row * p.dim, p.dim,
               base + layout.keys_t + key * p.dim + within, s + to, kTileStride, p.dim);
      multiply(rows, vectors, head.packed + layout.do_rows + row * p.v_dim, p.v_dim,
               base + layout.values_t + key * p.v_dim + within, ds + to, kTileStride, p.v_dim);
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
      if (head.bias != nullptr) add_bias(head.bias, cols, weights);
      const int64_t row = mask.q0 + r;
      row_gradients(mask, r, cols, head.lse[row], head.packed[layout.delta + row],
                    head.grad_lse == nullptr ? 0.0f : head.grad_lse[row], weights, grads);
      // The transposed products below read whole row ranges.
      fill_columns(weights, all.lo, cols.lo, 0.0f);
      fill_columns(weights, cols.hi, all.hi, 0.0f);
      fill_columns(grads, all.lo, cols.lo, 0.0f);
      fill_columns(grads, cols.hi, all.hi, 0.0f);
      if (head.grad_bias != nullptr)
        for (int64_t j = cols.lo; j < cols.hi; j += kLanes)
          store(head.grad_bias + j, load(head.grad_bias + j) + load(grads + j));
    }
  }

  const ColumnPanels &qp = layout.query_panels, &gp = layout.grad_panels;
  if (head.packed[layout.query_flags + mask.q0 / kTileQ] != 0.0f) {
    careful_multiply_add_transposed(mask, s, head.packed + layout.grads, gp, grad_v, v_stride);
    careful_multiply_add_transposed(mask, ds, head.packed + layout.q, qp, grad_k, stride);
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
      const int64_t w = row0 * kTileStride + j;
      for (int64_t panel = 0; panel < max_of(qp.count(), gp.count()); ++panel) {
        if (panel < gp.count())
          multiply_add_transposed(keys, gp.vectors(panel), s + w, kTileStride,
                                  head.packed + layout.grads + gp.offset(panel, mask.q0 + row0),
                                  grad_v + j * v_stride + panel * kPanel, v_stride, row1 - row0);
        if (panel < qp.count())
          multiply_add_transposed(keys, qp.vectors(panel), ds + w, kTileStride,
                                  head.packed + layout.q + qp.offset(panel, mask.q0 + row0),
                                  grad_k + j * stride + panel * kPanel, stride, row1 - row0);
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
                             base + layout.keys, kp, mask.k0, head.grad_q + row * stride, stride);
      else
        multiply_add(mask.group_rows(g), kp.vectors(panel), ds + row * kTileStride + cols.lo, kTileStride,
                     base + layout.keys + kp.offset(panel, mask.k0 + cols.lo),
                     head.grad_q + row * stride + panel * kPanel, stride, cols.hi - cols.lo);
    }
}

int64_t backward_scratch(const Problem& p) {
  const BackwardLayout layout(p);
  const int64_t tile = 2 * kTileQ * kTileStride + 2 * kTileK +
                       kTileK * (layout.key_panels.padded_dim() + layout.grad_panels.padded_dim());
  return max_of(tile, row_buffer(p)) + 6 * 16;
}

void backward(const BackwardArgs& args, const Wave& wave, float* memory, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  const int64_t stride = layout.key_panels.padded_dim(), v_stride = layout.grad_panels.padded_dim();
  Scratch scratch(memory);
  float* s = scratch.take(kTileQ * kTileStride);
  float* ds = scratch.take(kTileQ * kTileStride);
  float* grad_k = scratch.take(kTileK * stride);
  float* grad_v = scratch.take(kTileK * v_stride);
  float* bias_buffer = scratch.take(kTileK);
  float* grad_bias = scratch.take(kTileK);
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
      fill_columns(grad_v, 0, keys * v_stride, 0.0f);
      for (int64_t g = 0; g < layout.group; ++g) {
        float* packed = layout.head(base, g);
        const int64_t h = hk * layout.group + g, first = (b * p.heads + h) * p.nq;
        BackwardHead head{packed,
                          args.lse + first,
                          args.grad_lse == nullptr ? nullptr : args.grad_lse + first,
                          tile_bias(p.bias, b, h, k0, keys, bias_buffer),
                          args.grad_bias == nullptr ? nullptr : grad_bias,
                          nullptr};
        if (head.grad_bias != nullptr) fill_columns(grad_bias, 0, kTileK, 0.0f);
        float* touched = layout.touched_of(packed, chunk);
        for (int64_t t = 0; t < layout.tiles_q; ++t) {
          mask.enter_query_tile(p, b, h, t * kTileQ);
          if (!mask.enter_key_tile(k0, kTileK)) continue;
          head.grad_q = layout.partial_of(packed, chunk) + mask.q0 * stride;
          if (touched[t] == 0.0f) fill_columns(head.grad_q, 0, mask.rows * stride, 0.0f);
          touched[t] = 1.0f;
          backward_tile(p, layout, mask, base, head, s, ds, grad_k, grad_v);
        }
        if (head.grad_bias != nullptr)
          for (int64_t j = 0; j < keys; ++j)
            args.grad_bias[(b * p.heads + h) * p.nk + k0 + j] = grad_bias[j];
      }
      for (int64_t j = 0; j < keys; ++j) {
        write_row(p.dtype, args.grad_k, b, hk, k0 + j, grad_k + j * stride, p.dim);
        write_row(p.dtype, args.grad_v, b, hk, k0 + j, grad_v + j * v_stride, p.v_dim);
      }
    }
  }
}

int64_t backward_reduce_tasks(const Problem& p, int64_t pairs) {
  const BackwardLayout layout(p);
  return pairs * layout.group * layout.tiles_q;
}

void backward_reduce(const BackwardArgs& args, const Wave& wave, float* row, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  const int64_t stride = layout.query_panels.padded_dim();
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

// Packed keys and values of one (batch, kv head) pair, and their tangents.
struct TangentLayout {
  int64_t keys_t, values, tangent_keys_t, tangent_values, flags, floats;
  ColumnPanels value_panels;

  explicit TangentLayout(const Problem& p) : value_panels{p.nk, p.v_dim} {
    const int64_t keys = round_up(p.nk, kPanel) * p.dim, panels = round_up(value_panels.floats(), 16);
    keys_t = 0;
    tangent_keys_t = keys;
    values = tangent_keys_t + keys;
    tangent_values = values + panels;
    flags = tangent_values + panels;
    floats = flags + round_up(divide_up(p.nk, kTileK), 16);
  }
};

int64_t tangent_workspace(const Problem& p) {
  return TangentLayout(p).floats;
}
int64_t tangent_scratch(const Problem& p) {
  const int64_t out = kTileQ * (round_up(p.v_dim, kLanes) + p.v_dim);
  return 2 * kTileQ * p.dim + out + 2 * kMaxRows * kTileStride + 3 * kTileQ + 2 * kTileK + row_buffer(p) +
         12 * 16;
}
int64_t tangent_pack_tasks(const Problem& p, int64_t pairs) {
  return pairs * divide_up(p.nk, kTileK);
}

void tangent_pack(const TangentArgs& args, const Wave& wave, float* buffer, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const TangentLayout layout(p);
  const int64_t tiles = divide_up(p.nk, kTileK);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / tiles, tile = task % tiles, k1 = min_of(p.nk, (tile + 1) * kTileK);
    const int64_t b = (wave.first + pair) / p.kv_heads, h = (wave.first + pair) % p.kv_heads;
    float* base = wave.workspace + pair * layout.floats;
    float flag = 0.0f;
    auto pack = [&](const Tensor4& keys, int64_t keys_t, const Tensor4& values, int64_t values_at) {
      for (int64_t k0 = tile * kTileK; k0 < k1; k0 += kPanel) {
        const int64_t count = min_of<int64_t>(kPanel, k1 - k0);
        if (keys.data != nullptr)
          pack_transposed(float_rows(p.dtype, keys, b, h, k0, count, p.dim, buffer), count, p.dim,
                          base + keys_t + k0 * p.dim);
        if (values.data == nullptr) continue;
        const FloatRows rows = float_rows(p.dtype, values, b, h, k0, count, p.v_dim, buffer);
        flag += zero_if_finite(rows, count, p.v_dim);
        for (int64_t i = 0; i < count; ++i)
          pack_row(rows.row(i), layout.value_panels, k0 + i, base + values_at);
      }
    };
    pack(args.k, layout.keys_t, args.v, layout.values);
    pack(args.tangent_k, layout.tangent_keys_t, args.tangent_v, layout.tangent_values);
    base[layout.flags + tile] = flag;
  }
}

int64_t tangent_tasks(const Problem& p, int64_t pairs) {
  return pairs * (p.heads / p.kv_heads) * divide_up(p.nq, kTileQ);
}

// The tangent of the logit with the most weight among these: a value to measure the row's tangents from, so
// that what all its keys share does not drown what they differ in. `found` stays false if the row sees no
// key.
float reference_tangent(const float* s, const float* tangent, Span cols, bool* found) {
  float most = -kInfinity, value = 0.0f;
  for (int64_t j = cols.lo; j < cols.hi; ++j)
    if (s[j] > most) {
      most = s[j];
      value = tangent[j];
      *found = true;
    }
  return value;
}

void tangent(const TangentArgs& args, const Wave& wave, float* memory, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const TangentLayout layout(p);
  const int64_t group = p.heads / p.kv_heads, tiles = divide_up(p.nq, kTileQ);
  const ColumnPanels& vp = layout.value_panels;
  const int64_t out_stride = vp.padded_dim();
  const bool moves_q = args.tangent_q.data != nullptr, moves_k = args.tangent_k.data != nullptr,
             moves_v = args.tangent_v.data != nullptr;
  Scratch scratch(memory);
  float* q = scratch.take(kTileQ * p.dim);
  float* tangent_q = scratch.take(kTileQ * p.dim);
  float* s = scratch.take(kMaxRows * kTileStride);
  float* ts = scratch.take(kMaxRows * kTileStride);
  float* sums = scratch.take(kTileQ * out_stride);
  float* out = scratch.take(kTileQ * p.v_dim);
  float* mean = scratch.take(kTileQ);
  float* reference = scratch.take(kTileQ);
  float* bias_buffer = scratch.take(kTileK);
  float* tangent_bias_buffer = scratch.take(kTileK);
  float* buffer = scratch.take(row_buffer(p));
  bool found[kTileQ];
  TileMask mask;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / (group * tiles);
    const int64_t b = (wave.first + pair) / p.kv_heads, hk = (wave.first + pair) % p.kv_heads;
    const int64_t h = hk * group + task / tiles % group;
    const float* base = wave.workspace + pair * layout.floats;
    mask.enter_query_tile(p, b, h, fold(task % tiles, tiles) * kTileQ);
    const int64_t first = (b * p.heads + h) * p.nq + mask.q0;
    for (int r = 0; r < mask.rows; ++r) {
      const int64_t row = mask.q0 + r;
      scaled_copy(float_rows(p.dtype, args.q, b, h, row, 1, p.dim, buffer).data, q + r * p.dim, p.dim,
                  p.scale);
      if (moves_q)
        scaled_copy(float_rows(p.dtype, args.tangent_q, b, h, row, 1, p.dim, buffer).data,
                    tangent_q + r * p.dim, p.dim, p.scale);
      mean[r] = reference[r] = 0.0f;
      found[r] = false;
    }
    fill_columns(sums, 0, mask.rows * out_stride, 0.0f);

    for (int64_t k0 = 0; k0 < p.nk; k0 += kTileK) {
      if (!mask.enter_key_tile(k0, kTileK)) continue;
      const bool careful = base[layout.flags + k0 / kTileK] != 0.0f;
      const float* bias = tile_bias(p.bias, b, h, k0, mask.keys, bias_buffer);
      const float* tangent_bias = tile_bias(args.tangent_bias, b, h, k0, mask.keys, tangent_bias_buffer);
      for (int g = 0; g < mask.groups; ++g) {
        const Span cols = mask.computed(g), seen = mask.columns[g];
        if (cols.empty()) continue;
        const int row = mask.group_begin[g], rows = mask.group_rows(g);
        if (!moves_q)
          for (int r = 0; r < rows; ++r)
            fill_columns(ts + r * kTileStride, cols.lo, cols.hi, 0.0f);
        for (int64_t panel = cols.lo / kPanel * kPanel; panel < cols.hi; panel += kPanel) {
          const Span part = intersect(cols, {panel, panel + kPanel});
          const int vectors = static_cast<int>((part.hi - part.lo) / kLanes);
          const int64_t key = (k0 + panel) * p.dim + (part.lo - panel);
          multiply(rows, vectors, q + row * p.dim, p.dim, base + layout.keys_t + key, s + part.lo,
                   kTileStride, p.dim);
          if (moves_q)
            multiply(rows, vectors, tangent_q + row * p.dim, p.dim, base + layout.keys_t + key, ts + part.lo,
                     kTileStride, p.dim);
          if (moves_k)
            multiply_more(rows, vectors, q + row * p.dim, p.dim, base + layout.tangent_keys_t + key,
                          ts + part.lo, kTileStride, p.dim);
        }
        // s: weights; ts: weights times how far the logits' tangents lie from the row's reference.
        for (int r = 0; r < rows; ++r) {
          float* weights = s + r * kTileStride;
          float* moves = ts + r * kTileStride;
          if (bias != nullptr) add_bias(bias, cols, weights);
          if (tangent_bias != nullptr) add_bias(tangent_bias, cols, moves);
          if (!mask.row_is_full(row + r, cols)) {
            mask.fill_forbidden(row + r, cols, weights, -kInfinity);
            mask.fill_forbidden(row + r, cols, moves, 0.0f);
          }
          if (!found[row + r]) reference[row + r] = reference_tangent(weights, moves, cols, &found[row + r]);
          const float lse = args.lse[first + row + r];
          const Vec shift(lse == -kInfinity ? 0.0f : lse), from(reference[row + r]);
          Vec sum(0.0f);
          for (int64_t j = cols.lo; j < cols.hi; j += kLanes) {
            const Vec weight = exp(load(weights + j) - shift);
            const Vec moved = weight * (load(moves + j) - from);
            store(weights + j, weight);
            store(moves + j, moved);
            sum = sum + moved;
          }
          mean[row + r] += reduce_add(sum);
        }
        if (careful) {
          careful_multiply_add(mask, row, rows, seen, ts, kTileStride, base + layout.values, vp, k0,
                               sums + row * out_stride, out_stride);
          if (moves_v)
            careful_multiply_add(mask, row, rows, seen, s, kTileStride, base + layout.tangent_values, vp, k0,
                                 sums + row * out_stride, out_stride);
          continue;
        }
        for (int64_t panel = 0; panel < vp.count(); ++panel) {
          const int64_t at = vp.offset(panel, k0 + seen.lo);
          float* to = sums + row * out_stride + panel * kPanel;
          multiply_add(rows, vp.vectors(panel), ts + seen.lo, kTileStride, base + layout.values + at, to,
                       out_stride, seen.hi - seen.lo);
          if (moves_v)
            multiply_add(rows, vp.vectors(panel), s + seen.lo, kTileStride, base + layout.tangent_values + at,
                         to, out_stride, seen.hi - seen.lo);
        }
      }
    }

    for (int r = 0; r < mask.rows; ++r) {
      const float* value = float_rows(p.dtype, args.out, b, h, mask.q0 + r, 1, p.v_dim, out).data;
      float* sum = sums + r * out_stride;
      if (mean[r] != 0.0f)
        for (int64_t d = 0; d < p.v_dim; ++d)
          sum[d] -= mean[r] * value[d];
      write_row(p.dtype, args.tangent_out, b, h, mask.q0 + r, sum, p.v_dim);
      args.tangent_lse[first + r] = reference[r] + mean[r];
    }
  }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{
      forward_workspace, forward_scratch,    forward_pack_tasks,    forward_pack,        forward_tasks,
      forward,           backward_workspace, backward_scratch,      backward_pack_tasks, backward_pack,
      backward_tasks,    backward,           backward_reduce_tasks, backward_reduce,     tangent_workspace,
      tangent_scratch,   tangent_pack_tasks, tangent_pack,          tangent_tasks,       tangent};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::block_sparse_attention
