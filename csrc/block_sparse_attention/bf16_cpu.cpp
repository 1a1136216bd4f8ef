// bfloat16 forward and backward on the processor's own bfloat16 products; compiled once for AVX512-BF16 dot
// products and once for AMX tiles. The algorithm is that of kernel_cpu.cpp; README.md says what differs.
#include <immintrin.h>

#include "block_sparse_attention/params.h"
#include "block_sparse_attention/rows_cpu.h"
#include "block_sparse_attention/tile_mask_cpu.h"
#include "common/bf16_panel.h"
#include "common/vec.h"

namespace arcore::block_sparse_attention {
namespace ARCORE_ISA {
namespace {

constexpr int kPadded = kForwardTileK + 32;  // elements between rows of weights

const BFloat16* source_row(const Tensor4& t, int64_t b, int64_t h, int64_t row) {
  return static_cast<const BFloat16*>(t.data) + row_offset(t, b, h, row);
}
Bf16Rows source_rows(const Tensor4& t, int64_t b, int64_t h, int64_t row, int64_t count, int64_t dim) {
  return {source_row(t, b, h, row), t.row, count, dim};
}

// Packed operands of `rows` keys of one (batch, kv head) pair, in bfloat16 elements: keys transposed, values
// by key pairs.
struct ForwardLayout {
  int64_t dim, v_dim, keys, flags, floats;
  TransposedPanels keys_t;
  PairPanels values;
  int64_t values_at;

  ForwardLayout(const Problem& p, int64_t rows)
      : dim(pad_depth(p.dim)),
        v_dim(pad_depth(p.v_dim)),
        keys(pad_depth(rows)),
        keys_t{dim},
        values{keys, v_dim} {
    values_at = keys * dim;
    flags = (values_at + keys * v_dim) / 2;
    floats = flags + round_up(divide_up(rows, kForwardTileK), 16);
  }
};

// Rows of the layout that a thread has for itself, or 0 where all share one.
int64_t own_rows(const Problem& p) {
  return packs_by_tile(p, kTileQ) ? min_of<int64_t>(p.nk, kForwardTileK) : 0;
}

int64_t forward_workspace(const Problem& p) {
  return own_rows(p) > 0 ? 0 : ForwardLayout(p, p.nk).floats;
}
int64_t forward_pack_tasks(const Problem& p, int64_t pairs) {
  return own_rows(p) > 0 ? 0 : pairs * divide_up(p.nk, kForwardTileK);
}
int64_t forward_tasks(const Problem& p, int64_t pairs) {
  return pairs * (p.heads / p.kv_heads) * divide_up(p.nq, kTileQ);
}
int64_t forward_scratch(const Problem& p) {
  const ForwardLayout layout(p, own_rows(p));
  return kTileQ * layout.dim / 2 + kGroupRows * (kForwardTileStride + kPadded / 2) +
         kTileQ * (layout.v_dim + 2) + kForwardTileK + p.v_dim + layout.floats + 9 * 16;
}

// Packs the keys and values [k0, k0 + count) so that they begin at row `at` of the layout. Returns whether
// the values are finite.
bool pack_forward_tile(const ForwardArgs& args, const ForwardLayout& layout, int64_t b, int64_t h, int64_t k0,
                       int64_t count, int64_t at, BFloat16* packed) {
  const Problem& p = args.problem;
  pack_transposed(source_rows(args.k, b, h, k0, count, p.dim), layout.keys_t, at, packed);
  const Bf16Rows values = source_rows(args.v, b, h, k0, count, p.v_dim);
  pack_pairs(values, layout.values, at, packed + layout.values_at);
  return all_finite(values);
}

void forward_pack(const ForwardArgs& args, const Wave& wave, float*, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const ForwardLayout layout(p, p.nk);
  const int64_t tiles = divide_up(p.nk, kForwardTileK);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / tiles, tile = task % tiles, k0 = tile * kForwardTileK;
    const int64_t b = (wave.first + pair) / p.kv_heads, h = (wave.first + pair) % p.kv_heads;
    float* base = wave.workspace + pair * layout.floats;
    const int64_t count = min_of<int64_t>(kForwardTileK, p.nk - k0);
    const bool finite =
        pack_forward_tile(args, layout, b, h, k0, count, k0, reinterpret_cast<BFloat16*>(base));
    base[layout.flags + tile] = finite ? 0.0f : 1.0f;
  }
}

// 2^x for x <= 0, exact at 0, else within 3e-6, a thousandth of a weight's rounding to bfloat16; 0 below
// -150.
Vec exp2_negative(Vec value) {
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-200.0f), value);  // NaN stays NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  constexpr float kPoly[5] = {1.0f, 0.6931241750717163f, 0.24024099111557007f, 0.055906426161527634f,
                              0.009582852013409138f};
  __m512 p = _mm512_set1_ps(kPoly[4]);
  for (int i = 3; i >= 0; --i)
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPoly[i]));
  return _mm512_scalef_ps(p, n);
}

// Softmax numerators of one row as bfloat16, from its logits s times `factor` > 0; updates the row's running
// maximum (of s), sum and output.
void online_softmax(const float* s, Span cols, float factor, BFloat16* weights, float* row_max,
                    float* row_sum, float* out, int64_t out_floats) {
  Vec top0(-kInfinity), top1(-kInfinity);
  for (int64_t j = cols.lo; j < cols.hi; j += 32) {
    top0 = max(top0, load(s + j));
    top1 = max(top1, load(s + j + 16));
  }
  const float tile_max = reduce_max(max(top0, top1));
  const float old_max = *row_max;
  const float new_max = old_max > tile_max ? old_max : tile_max;
  const Vec shift(new_max == -kInfinity ? 0.0f : new_max), c(factor * kLog2e);
  Vec sum0(0.0f), sum1(0.0f);
  for (int64_t j = cols.lo; j < cols.hi; j += 32) {
    const Vec w0 = exp2_negative((load(s + j) - shift) * c);
    const Vec w1 = exp2_negative((load(s + j + 16) - shift) * c);
    store_pair(weights + j, w0, w1);
    sum0 = sum0 + w0;
    sum1 = sum1 + w1;
  }
  const float sum = reduce_add(sum0 + sum1);
  if (old_max == -kInfinity) {
    *row_sum = sum;
  } else if (new_max == old_max) {
    *row_sum += sum;
  } else {
    alignas(64) float correction[kLanes];
    store(correction, exp2_negative((Vec(old_max) - shift) * c));
    *row_sum = *row_sum * correction[0] + sum;
    scale_row(out, out_floats, correction[0]);
  }
  *row_max = new_max;
}

// x = x * factor + bias on whole steps of columns.
void scale_and_add(float* x, Span cols, float factor, const float* bias) {
  const Vec f(factor);
  for (int64_t j = cols.lo; j < cols.hi; j += kLanes)
    store(x + j, bias == nullptr ? load(x + j) * f : load(x + j) * f + load(bias + j));
}

// A bias that may be read on whole steps of columns.
const float* step_bias(const KeyBias& bias, int64_t b, int64_t h, int64_t k0, int64_t keys, float* buffer) {
  const float* copied = tile_bias(bias, b, h, k0, keys, buffer);
  if (copied != nullptr) fill_columns(buffer, keys, round_up(keys, kColumnStep), 0.0f);
  return copied;
}

// out += weight * x for a row x that may hold NaN or infinity.
void careful_add(float weight, const BFloat16* x, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d)
    out[d] += weight * static_cast<float>(x[d]);
}

void forward(const ForwardArgs& args, const Wave& wave, float* memory, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const bool by_tile = own_rows(p) > 0;
  const ForwardLayout layout(p, by_tile ? own_rows(p) : p.nk);
  const int64_t group = p.heads / p.kv_heads, tiles = divide_up(p.nq, kTileQ);
  const int64_t stride = layout.v_dim;
  const int blocks = static_cast<int>(divide_up(p.v_dim, 16));
  Scratch scratch(memory);
  BFloat16* q = reinterpret_cast<BFloat16*>(scratch.take(kTileQ * layout.dim / 2));
  float* s = scratch.take(kGroupRows * kForwardTileStride);
  BFloat16* weights = reinterpret_cast<BFloat16*>(scratch.take(kGroupRows * kPadded / 2));
  float* out = scratch.take(kTileQ * stride);
  float* row_max = scratch.take(kTileQ);
  float* row_sum = scratch.take(kTileQ);
  float* bias_buffer = scratch.take(kForwardTileK);
  float* own = by_tile ? scratch.take(layout.floats) : nullptr;
  Bf16Unit unit;
  TileMask mask;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / (group * tiles);
    const int64_t b = (wave.first + pair) / p.kv_heads, hk = (wave.first + pair) % p.kv_heads;
    const int64_t h = hk * group + task / tiles % group;
    float* base = by_tile ? own : wave.workspace + pair * layout.floats;
    BFloat16* packed = reinterpret_cast<BFloat16*>(base);
    mask.enter_query_tile(p, b, h, fold(task % tiles, tiles) * kTileQ);
    copy_rows(source_rows(args.q, b, h, mask.q0, mask.rows, p.dim), layout.dim, q);
    for (int r = 0; r < mask.rows; ++r) {
      row_max[r] = -kInfinity;
      row_sum[r] = 0.0f;
    }
    fill_columns(out, 0, mask.rows * stride, 0.0f);
    // A bias, or a scale that turns the order around, is applied to the logits; else the scale is part of the
    // exponent.
    const bool plain = p.bias.data == nullptr && p.scale > 0.0f;
    const float factor = plain ? p.scale : 1.0f;

    for (int64_t k0 = 0; k0 < p.nk; k0 += kForwardTileK) {
      if (!mask.enter_key_tile(k0, kForwardTileK)) continue;
      // Row of the layout at which this tile begins.
      const int64_t at = by_tile ? 0 : k0;
      const bool careful = by_tile ? !pack_forward_tile(args, layout, b, hk, k0, mask.keys, 0, packed)
                                   : base[layout.flags + k0 / kForwardTileK] != 0.0f;
      const TileAhead ahead(args, b, hk, k0 + kForwardTileK, by_tile ? kForwardTileK : 0);
      const float* bias = step_bias(p.bias, b, h, k0, mask.keys, bias_buffer);
      for (int g = 0; g < mask.groups; ++g) {
        const Span cols = mask.computed(g);
        if (cols.empty()) continue;
        const int row = mask.group_begin[g], rows = mask.group_rows(g);
        const int steps = static_cast<int>((cols.hi - cols.lo) / 32);
        unit.multiply(rows, layout.dim, q + row * layout.dim, layout.dim,
                      packed + layout.keys_t.offset(at + cols.lo), layout.keys_t.panel(), 2 * steps,
                      s + cols.lo, kForwardTileStride);
        for (int r = 0; r < rows; ++r) {
          float* logits = s + r * kForwardTileStride;
          if (!plain) scale_and_add(logits, cols, p.scale, bias);
          if (!mask.row_is_full(row + r, cols)) mask.fill_forbidden(row + r, cols, logits, -kInfinity);
          ahead.ask(row + r, mask.rows);
          online_softmax(logits, cols, factor, weights + r * kPadded, row_max + row + r, row_sum + row + r,
                         out + (row + r) * stride, stride);
        }
        if (careful) {
          for (int r = 0; r < rows; ++r)
            for (int64_t j = mask.columns[g].lo; j < mask.columns[g].hi; ++j)
              if (mask.allowed(row + r, j))
                careful_add(static_cast<float>(weights[r * kPadded + j]), source_row(args.v, b, hk, k0 + j),
                            p.v_dim, out + (row + r) * stride);
          continue;
        }
        unit.multiply_add(rows, cols.hi - cols.lo, weights + cols.lo, kPadded,
                          packed + layout.values_at + layout.values.offset(0, at + cols.lo),
                          layout.values.panel(), blocks, out + row * stride, stride);
      }
    }

    float* lse = args.lse + (b * p.heads + h) * p.nq + mask.q0;
    for (int r = 0; r < mask.rows; ++r) {
      const bool empty = row_sum[r] == 0.0f;
      scale_row(out + r * stride, stride, empty ? 0.0f : 1.0f / row_sum[r]);
      write_row(p.dtype, args.out, b, h, mask.q0 + r, out + r * stride, p.v_dim);
      lse[r] = empty ? -kInfinity : row_max[r] * factor + __builtin_logf(row_sum[r]);
    }
  }
}

// Packed operands of one (batch, kv head) pair and of the `group` query heads that share it. Offsets `..._at`
// are in bfloat16 elements, the others in floats.
struct BackwardLayout {
  int64_t dim, v_dim, keys, rows, group, chunks, tiles_q, tiles_k;
  TransposedPanels keys_t, values_t;
  PairPanels keys_by_pairs, queries_by_pairs, grads_by_pairs;
  int64_t values_t_at, keys_at, key_flags, query_head, floats;
  // Relative to a query head:
  int64_t grad_rows_at, queries_at, grads_at, delta, query_flags, partial, touched, query_floats;

  explicit BackwardLayout(const Problem& p)
      : dim(pad_depth(p.dim)),
        v_dim(pad_depth(p.v_dim)),
        keys(pad_depth(p.nk)),
        rows(pad_depth(p.nq)),
        keys_t{dim},
        values_t{v_dim},
        keys_by_pairs{keys, dim},
        queries_by_pairs{rows, dim},
        grads_by_pairs{rows, v_dim} {
    group = p.heads / p.kv_heads;
    tiles_q = divide_up(p.nq, kTileQ);
    tiles_k = divide_up(p.nk, kTileK);
    chunks = max_of<int64_t>(1, min_of(tiles_k, divide_up(kBackwardUnits, p.kv_heads)));
    values_t_at = keys * dim;
    keys_at = values_t_at + keys * v_dim;
    key_flags = (keys_at + keys * dim) / 2;
    query_head = key_flags + round_up(tiles_k, 16);

    grad_rows_at = rows * dim;
    queries_at = grad_rows_at + rows * v_dim;
    grads_at = queries_at + rows * dim;
    delta = (grads_at + rows * v_dim) / 2;
    query_flags = delta + rows;
    partial = query_flags + round_up(tiles_q, 16);
    touched = partial + chunks * rows * dim;
    query_floats = touched + round_up(chunks * tiles_q, 16);
    floats = query_head + group * query_floats;
  }

  float* head(float* base, int64_t g) const { return base + query_head + g * query_floats; }
  float* partial_of(float* head, int64_t chunk) const { return head + partial + chunk * rows * dim; }
  float* touched_of(float* head, int64_t chunk) const { return head + touched + chunk * tiles_q; }
};

int64_t backward_workspace(const Problem& p) {
  return BackwardLayout(p).floats;
}
int64_t backward_pack_tasks(const Problem& p, int64_t pairs) {
  const BackwardLayout layout(p);
  return pairs * (layout.tiles_k + layout.group * layout.tiles_q);
}
int64_t backward_tasks(const Problem& p, int64_t pairs) {
  return pairs * BackwardLayout(p).chunks;
}
int64_t backward_reduce_tasks(const Problem& p, int64_t pairs) {
  const BackwardLayout layout(p);
  return pairs * layout.group * layout.tiles_q;
}
constexpr int kBlockStride = kTileK + 32;  // elements between rows of P and dS
constexpr int kTurnedStride = kTileQ + 32;

int64_t backward_scratch(const Problem& p) {
  const BackwardLayout layout(p);
  return 2 * kGroupRows * kTileStride + kTileQ * kBlockStride + kTileK * kTurnedStride +
         kTileK * (layout.dim + layout.v_dim) + 2 * kTileK + 16 * 16;
}

void pack_query_tile(const BackwardArgs& args, const BackwardLayout& layout, int64_t b, int64_t h,
                     int64_t tile, float* head) {
  const Problem& p = args.problem;
  const int64_t q0 = tile * kTileQ, count = min_of<int64_t>(kTileQ, p.nq - q0);
  BFloat16* packed = reinterpret_cast<BFloat16*>(head);
  const Bf16Rows queries = source_rows(args.q, b, h, q0, count, p.dim);
  const Bf16Rows grads = source_rows(args.grad_out, b, h, q0, count, p.v_dim);
  copy_rows(queries, layout.dim, packed + q0 * layout.dim);
  copy_rows(grads, layout.v_dim, packed + layout.grad_rows_at + q0 * layout.v_dim);
  pack_pairs(queries, layout.queries_by_pairs, q0, packed + layout.queries_at);
  pack_pairs(grads, layout.grads_by_pairs, q0, packed + layout.grads_at);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (b * p.heads + h) * p.nq + q0 + i;
    const float delta = dot(grads.row(i), source_row(args.out, b, h, q0 + i), p.v_dim);
    head[layout.delta + q0 + i] = args.grad_lse == nullptr ? delta : delta - args.grad_lse[at];
  }
  head[layout.query_flags + tile] = all_finite(queries) && all_finite(grads) ? 0.0f : 1.0f;
}

void backward_pack(const BackwardArgs& args, const Wave& wave, float*, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  const int64_t per_pair = layout.tiles_k + layout.group * layout.tiles_q;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t pair = task / per_pair;
    const int64_t b = (wave.first + pair) / p.kv_heads, hk = (wave.first + pair) % p.kv_heads;
    float* base = wave.workspace + pair * layout.floats;
    BFloat16* packed = reinterpret_cast<BFloat16*>(base);
    int64_t rest = task % per_pair;
    if (rest < layout.tiles_k) {
      const int64_t k0 = rest * kTileK, count = min_of<int64_t>(kTileK, p.nk - k0);
      const Bf16Rows keys = source_rows(args.k, b, hk, k0, count, p.dim);
      pack_transposed(keys, layout.keys_t, k0, packed);
      pack_transposed(source_rows(args.v, b, hk, k0, count, p.v_dim), layout.values_t, k0,
                      packed + layout.values_t_at);
      pack_pairs(keys, layout.keys_by_pairs, k0, packed + layout.keys_at);
      base[layout.key_flags + rest] = all_finite(keys) ? 0.0f : 1.0f;
      continue;
    }
    rest -= layout.tiles_k;
    const int64_t g = rest / layout.tiles_q;
    pack_query_tile(args, layout, b, hk * layout.group + g, rest % layout.tiles_q, layout.head(base, g));
  }
}

// P and dS of row r as bfloat16 from its logits (in s, before the scale) and dP (in ds); 0 where the row may
// not see. The sum that dS is measured from is found as in kernel_cpu.cpp.
void row_gradients(const TileMask& mask, int r, Span cols, float scale, const float* bias, float lse,
                   float delta, float grad_lse, float* s, float* ds, BFloat16* p_row, BFloat16* ds_row) {
  const Vec shift(lse == -kInfinity ? 0.0f : lse), factor(scale), zero(0.0f);
  const bool cut = !mask.row_is_full(r, cols), alone = mask.row_ends_here(r);
  Vec most(0.0f), sum(0.0f);
  if (bias != nullptr) scale_and_add(s, cols, scale, bias);
  const Vec f = bias == nullptr ? factor : Vec(1.0f);
  for (int64_t j = cols.lo; j < cols.hi; j += kLanes)
    store(s + j, exp(load(s + j) * f - shift));
  if (cut) {
    mask.fill_forbidden(r, cols, s, 0.0f);
    mask.fill_forbidden(r, cols, ds, 0.0f);
  }
  for (int64_t j = cols.lo; j < cols.hi; j += kLanes) {
    most = max(most, load(s + j));
    if (alone) sum = fma(load(s + j), load(ds + j), sum);
  }
  float mean = alone ? reduce_add(sum) - grad_lse : delta;
  if (!alone && reduce_max(most) >= 1.0f)
    for (int64_t j = cols.lo; j < cols.hi; ++j)
      if (s[j] >= 1.0f) mean = ds[j] - grad_lse;
  const Vec from(mean);
  for (int64_t j = cols.lo; j < cols.hi; j += 32) {
    const Vec w0 = load(s + j), w1 = load(s + j + 16);
    store_pair(p_row + j, w0, w1);
    store(ds + j, w0 * (load(ds + j) - from));
    store(ds + j + 16, w1 * (load(ds + j + 16) - from));
  }
  if (cut) mask.fill_forbidden(r, cols, ds, 0.0f);
  for (int64_t j = cols.lo; j < cols.hi; j += 32)
    store_pair(ds_row + j, load(ds + j), load(ds + j + 16));
}

void clear(BFloat16* x, int64_t begin, int64_t end) {
  if (begin < end) std::memset(x + begin, 0, static_cast<size_t>(end - begin) * sizeof(BFloat16));
}

struct BackwardBuffers {
  float *s, *ds;                   // of a row group
  BFloat16 *p, *dsb;               // of the tile, by rows
  BFloat16 *p_turned, *ds_turned;  // by keys
  float *grad_k, *grad_v;
};

struct BackwardHead {
  const float* packed;
  const float* lse;
  const float* grad_lse;
  const float* bias;
  float* grad_bias;
  float* grad_q;
  int64_t h;
};

void backward_tile(const BackwardArgs& args, const BackwardLayout& layout, const TileMask& mask,
                   Bf16Unit& unit, const float* base, const BackwardHead& head, int64_t b, int64_t hk,
                   const BackwardBuffers& x) {
  const Problem& p = args.problem;
  const BFloat16* pair = reinterpret_cast<const BFloat16*>(base);
  const BFloat16* query = reinterpret_cast<const BFloat16*>(head.packed);
  const bool careful_keys = base[layout.key_flags + mask.k0 / kTileK] != 0.0f;
  const bool careful_rows = head.packed[layout.query_flags + mask.q0 / kTileQ] != 0.0f;
  const int q_blocks = static_cast<int>(divide_up(p.dim, 16)),
            v_blocks = static_cast<int>(divide_up(p.v_dim, 16));
  const Span all{mask.any.lo / 32 * 32, round_up(mask.any.hi, 32)};

  for (int g = 0; g < mask.groups; ++g) {
    const Span cols = mask.computed(g);
    const int begin = mask.group_begin[g], rows = mask.group_rows(g);
    const int64_t row0 = mask.q0 + begin;
    if (!cols.empty()) {
      const int steps = static_cast<int>((cols.hi - cols.lo) / 32);
      unit.multiply(rows, layout.dim, query + row0 * layout.dim, layout.dim,
                    pair + layout.keys_t.offset(mask.k0 + cols.lo), layout.keys_t.panel(), 2 * steps,
                    x.s + cols.lo, kTileStride);
      unit.multiply(rows, layout.v_dim, query + layout.grad_rows_at + row0 * layout.v_dim, layout.v_dim,
                    pair + layout.values_t_at + layout.values_t.offset(mask.k0 + cols.lo),
                    layout.values_t.panel(), 2 * steps, x.ds + cols.lo, kTileStride);
    }
    for (int r = 0; r < rows; ++r) {
      BFloat16* p_row = x.p + (begin + r) * kBlockStride;
      BFloat16* ds_row = x.dsb + (begin + r) * kBlockStride;
      // The products by keys read whole row ranges.
      clear(p_row, all.lo, cols.empty() ? all.hi : cols.lo);
      clear(ds_row, all.lo, cols.empty() ? all.hi : cols.lo);
      if (cols.empty()) continue;
      clear(p_row, cols.hi, all.hi);
      clear(ds_row, cols.hi, all.hi);
      float* grads = x.ds + r * kTileStride;
      row_gradients(mask, begin + r, cols, p.scale, head.bias, head.lse[row0 + r],
                    head.packed[layout.delta + row0 + r],
                    head.grad_lse == nullptr ? 0.0f : head.grad_lse[row0 + r], x.s + r * kTileStride, grads,
                    p_row, ds_row);
      if (head.grad_bias != nullptr)
        for (int64_t j = cols.lo; j < cols.hi; j += kLanes)
          store(head.grad_bias + j, load(head.grad_bias + j) + load(grads + j));
    }
    if (cols.empty()) continue;
    float* grad_q = head.grad_q + begin * layout.dim;
    if (careful_keys) {
      for (int r = 0; r < rows; ++r)
        for (int64_t j = mask.columns[g].lo; j < mask.columns[g].hi; ++j)
          if (mask.allowed(begin + r, j))
            careful_add(static_cast<float>(x.dsb[(begin + r) * kBlockStride + j]),
                        source_row(args.k, b, hk, mask.k0 + j), p.dim, grad_q + r * layout.dim);
      continue;
    }
    unit.multiply_add(rows, cols.hi - cols.lo, x.dsb + begin * kBlockStride + cols.lo, kBlockStride,
                      pair + layout.keys_at + layout.keys_by_pairs.offset(0, mask.k0 + cols.lo),
                      layout.keys_by_pairs.panel(), q_blocks, grad_q, layout.dim);
  }

  if (careful_rows) {
    for (int r = 0; r < mask.rows; ++r)
      for (int64_t j = mask.any.lo; j < mask.any.hi; ++j) {
        if (!mask.allowed(r, j)) continue;
        careful_add(static_cast<float>(x.p[r * kBlockStride + j]),
                    source_row(args.grad_out, b, head.h, mask.q0 + r), p.v_dim, x.grad_v + j * layout.v_dim);
        careful_add(static_cast<float>(x.dsb[r * kBlockStride + j]),
                    source_row(args.q, b, head.h, mask.q0 + r), p.dim, x.grad_k + j * layout.dim);
      }
    return;
  }
  // Rows up to a whole step, which the transposed products read.
  for (int r = mask.rows; r < round_up(mask.rows, 32); ++r) {
    clear(x.p + r * kBlockStride, all.lo, all.hi);
    clear(x.dsb + r * kBlockStride, all.lo, all.hi);
  }
  for (int64_t j = all.lo; j < all.hi; j += 16) {
    int64_t row0 = mask.rows, row1 = 0;
    for (int g = 0; g < mask.groups; ++g) {
      if (intersect(mask.columns[g], {j, j + 16}).empty()) continue;
      row0 = min_of<int64_t>(row0, mask.group_begin[g]);
      row1 = mask.group_begin[g + 1];
    }
    if (row0 >= row1) continue;
    row0 = row0 / 32 * 32;
    row1 = round_up(row1, 32);
    for (int64_t i = row0; i < row1; i += 32) {
      turn_block(x.p + i * kBlockStride + j, kBlockStride, x.p_turned + i, kTurnedStride);
      turn_block(x.dsb + i * kBlockStride + j, kBlockStride, x.ds_turned + i, kTurnedStride);
    }
    for (int part = 0; part < 16; part += kGroupRows) {
      const int count = static_cast<int>(min_of<int64_t>(kGroupRows, 16 - part));
      unit.multiply_add(count, row1 - row0, x.p_turned + part * kTurnedStride + row0, kTurnedStride,
                        query + layout.grads_at + layout.grads_by_pairs.offset(0, mask.q0 + row0),
                        layout.grads_by_pairs.panel(), v_blocks, x.grad_v + (j + part) * layout.v_dim,
                        layout.v_dim);
      unit.multiply_add(count, row1 - row0, x.ds_turned + part * kTurnedStride + row0, kTurnedStride,
                        query + layout.queries_at + layout.queries_by_pairs.offset(0, mask.q0 + row0),
                        layout.queries_by_pairs.panel(), q_blocks, x.grad_k + (j + part) * layout.dim,
                        layout.dim);
    }
  }
}

void backward(const BackwardArgs& args, const Wave& wave, float* memory, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  Scratch scratch(memory);
  auto elements = [&](int64_t count) { return reinterpret_cast<BFloat16*>(scratch.take(count / 2)); };
  BackwardBuffers x{};
  x.s = scratch.take(kGroupRows * kTileStride);
  x.ds = scratch.take(kGroupRows * kTileStride);
  x.p = elements(kTileQ * kBlockStride);
  x.dsb = elements(kTileQ * kBlockStride);
  x.p_turned = elements(16 * kTurnedStride);
  x.ds_turned = elements(16 * kTurnedStride);
  x.grad_k = scratch.take(kTileK * layout.dim);
  x.grad_v = scratch.take(kTileK * layout.v_dim);
  float* bias_buffer = scratch.take(kTileK);
  float* grad_bias = scratch.take(kTileK);
  Bf16Unit unit;
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
      fill_columns(x.grad_k, 0, kTileK * layout.dim, 0.0f);
      fill_columns(x.grad_v, 0, kTileK * layout.v_dim, 0.0f);
      for (int64_t g = 0; g < layout.group; ++g) {
        float* packed = layout.head(base, g);
        const int64_t h = hk * layout.group + g, first = (b * p.heads + h) * p.nq;
        BackwardHead head{packed,
                          args.lse + first,
                          args.grad_lse == nullptr ? nullptr : args.grad_lse + first,
                          step_bias(p.bias, b, h, k0, keys, bias_buffer),
                          args.grad_bias == nullptr ? nullptr : grad_bias,
                          nullptr,
                          h};
        if (head.grad_bias != nullptr) fill_columns(grad_bias, 0, kTileK, 0.0f);
        float* touched = layout.touched_of(packed, chunk);
        for (int64_t t = 0; t < layout.tiles_q; ++t) {
          mask.enter_query_tile(p, b, h, t * kTileQ);
          if (!mask.enter_key_tile(k0, kTileK)) continue;
          head.grad_q = layout.partial_of(packed, chunk) + mask.q0 * layout.dim;
          if (touched[t] == 0.0f) fill_columns(head.grad_q, 0, mask.rows * layout.dim, 0.0f);
          touched[t] = 1.0f;
          backward_tile(args, layout, mask, unit, base, head, b, hk, x);
        }
        if (head.grad_bias != nullptr)
          for (int64_t j = 0; j < keys; ++j)
            args.grad_bias[(b * p.heads + h) * p.nk + k0 + j] = grad_bias[j];
      }
      for (int64_t j = 0; j < keys; ++j) {
        scale_row(x.grad_k + j * layout.dim, layout.dim, p.scale);
        write_row(p.dtype, args.grad_k, b, hk, k0 + j, x.grad_k + j * layout.dim, p.dim);
        write_row(p.dtype, args.grad_v, b, hk, k0 + j, x.grad_v + j * layout.v_dim, p.v_dim);
      }
    }
  }
}

void backward_reduce(const BackwardArgs& args, const Wave& wave, float* row, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  const BackwardLayout layout(p);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task % layout.tiles_q, g = task / layout.tiles_q % layout.group;
    const int64_t pair = task / (layout.tiles_q * layout.group);
    const int64_t b = (wave.first + pair) / p.kv_heads,
                  h = (wave.first + pair) % p.kv_heads * layout.group + g;
    float* head = layout.head(wave.workspace + pair * layout.floats, g);
    for (int64_t i = tile * kTileQ; i < min_of(p.nq, (tile + 1) * kTileQ); ++i) {
      fill_columns(row, 0, layout.dim, 0.0f);
      for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
        if (layout.touched_of(head, chunk)[tile] == 0.0f) continue;
        const float* part = layout.partial_of(head, chunk) + i * layout.dim;
        for (int64_t d = 0; d < layout.dim; d += kLanes)
          store(row + d, load(row + d) + load(part + d));
      }
      scale_row(row, layout.dim, p.scale);
      write_row(p.dtype, args.grad_q, b, h, i, row, p.dim);
    }
  }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{forward_workspace,
                                       forward_scratch,
                                       forward_pack_tasks,
                                       forward_pack,
                                       forward_tasks,
                                       forward,
                                       backward_workspace,
                                       backward_scratch,
                                       backward_pack_tasks,
                                       backward_pack,
                                       backward_tasks,
                                       backward,
                                       backward_reduce_tasks,
                                       backward_reduce,
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       nullptr};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::block_sparse_attention
