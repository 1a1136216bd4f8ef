// float32 forward and backward without matrix instructions: every product is a fused multiply-add, so results
// are as exact as float32 allows. 256 threads; a thread owns 4 x 4 of a tile of 64 x 64 scores.
#pragma once

#include "block_sparse_attention/bwd_sm80.cuh"
#include "block_sparse_attention/fwd_sm80.cuh"
#include "block_sparse_attention/params.h"
#include "block_sparse_attention/tiles_sm80.cuh"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"

namespace arcore::block_sparse_attention {

// Thread (row, column) = (t / 16, t % 16) owns scores (4 row + i, column + 16 j) and results (4 row + i,
// column + 16 j) of head_dim. One number of padding per row keeps reads of a column off one bank.
template <int kDim>
struct Fp32Shape {
  static constexpr int kThreads = 256, kTile = 64, kPitch = kDim + 1, kScorePitch = kTile + 1;
  static constexpr int kResults = kDim / 16;  // results of a thread per row
  static constexpr int kRows = kTile * kPitch, kScores = kTile * kScorePitch;
};

template <int kDim>
ARCORE_DEVICE void load_rows_fp32(float* to, const float* from, int64_t row_stride, int64_t first,
                                  int64_t rows, int64_t dim) {
  using Shape = Fp32Shape<kDim>;
  for (int i = thread_index(); i < Shape::kTile * kDim; i += Shape::kThreads) {
    const int row = i / kDim, d = i % kDim;
    const bool valid = first + row < rows && d < dim;
    copy_async<4>(to + row * Shape::kPitch + d, from + (valid ? (first + row) * row_stride + d : 0), valid);
  }
}

// s[i][j] = a(4 row + i) . b(column + 16 j)
template <int kDim>
ARCORE_DEVICE void multiply_rows_fp32(float (&s)[4][4], const float* a, const float* b) {
  constexpr int kPitch = Fp32Shape<kDim>::kPitch;
  const int row = thread_index() / 16, column = thread_index() % 16;
  ARCORE_UNROLL
  for (int i = 0; i < 4; ++i)
    ARCORE_UNROLL
  for (int j = 0; j < 4; ++j)
    s[i][j] = 0.0f;
  ARCORE_NO_UNROLL
  for (int d = 0; d < kDim; ++d) {
    float x[4], y[4];
    ARCORE_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = a[(4 * row + i) * kPitch + d];
      y[i] = b[(column + 16 * i) * kPitch + d];
    }
    ARCORE_UNROLL
    for (int i = 0; i < 4; ++i)
      ARCORE_UNROLL
    for (int j = 0; j < 4; ++j)
      s[i][j] = fused_multiply_add(x[i], y[j], s[i][j]);
  }
}

// What marks a forbidden pair: a NaN that no arithmetic gives.
constexpr uint32_t kForbiddenScore = 0x7fbadbadu;

// acc[i][x] += sum_j scores(4 row + i, j) b(j, column + 16 x) over allowed pairs; with kTransposed scores(j,
// 4 row + i).
template <int kDim, bool kTransposed>
ARCORE_DEVICE void multiply_fp32(float (&acc)[4][kDim / 16], const float* scores, const float* b) {
  using Shape = Fp32Shape<kDim>;
  const int row = thread_index() / 16, column = thread_index() % 16;
  ARCORE_NO_UNROLL
  for (int j = 0; j < Shape::kTile; ++j) {
    float x[4];
    bool allowed[4];
    ARCORE_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = kTransposed ? scores[j * Shape::kScorePitch + 4 * row + i]
                         : scores[(4 * row + i) * Shape::kScorePitch + j];
      allowed[i] = float_bits(x[i]) != kForbiddenScore;
    }
    ARCORE_UNROLL
    for (int d = 0; d < kDim / 16; ++d) {
      const float y = b[j * Shape::kPitch + column + 16 * d];
      ARCORE_UNROLL
      for (int i = 0; i < 4; ++i)
        acc[i][d] = allowed[i] ? fused_multiply_add(x[i], y, acc[i][d]) : acc[i][d];
    }
  }
}

// Score (i, j) of this thread is allowed.
ARCORE_DEVICE bool allowed_fp32(const RowRanges& ranges, const int32_t* keys, int64_t key, int64_t row,
                                int64_t nk) {
  if (!ranges.holds(static_cast<int32_t>(key))) return false;
  return keys == nullptr || key_sees(keys, key, nk, row);
}

template <int kDim>
ARCORE_LAUNCH_BOUNDS(256, 1)
ARCORE_KERNEL forward_fp32(ARCORE_KERNEL_ARGS ForwardKernelArgs args) {
  using Shape = Fp32Shape<kDim>;
  const ForwardArgs& a = args.cuda.args;
  const Problem& p = a.problem;
  float* q_tile = reinterpret_cast<float*>(shared_memory());
  float* k_tile = q_tile + Shape::kRows;
  float* v_tile = k_tile + Shape::kRows;
  float* scores = v_tile + Shape::kRows;
  const int row = thread_index() / 16, column = thread_index() % 16;

  // Two blocks per row of the plan, whose tiles have 128 queries.
  constexpr int kParts = kForwardTileQ / Shape::kTile;
  const Work work = work_of_block(block_x() / kParts, p.batch * p.heads, args.cuda.plan.rows);
  const int64_t batch = work.pair / p.heads, head = work.pair % p.heads,
                kv_head = head / (p.heads / p.kv_heads);
  const int32_t* grid = plan_grid(args.cuda.plan, batch, head);
  const int64_t q_row = load_readonly(grid + work.place * args.cuda.plan.pitch + 1);
  const PlanRow tiles = plan_row(args.cuda.plan, grid, q_row);
  const int64_t q0 = q_row * kForwardTileQ + block_x() % kParts * Shape::kTile;
  if (q0 >= p.nq) return;
  const int32_t* bounds = p.mask.bounds + batch * p.mask.batch + head * p.mask.head;
  const int32_t* keys = p.mask.key_bounds == nullptr ? nullptr : p.mask.key_bounds + batch * p.mask.key_batch;

  RowRanges ranges[4];
  float acc[4][Shape::kResults] = {}, highest[4], sum[4];
  ARCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    ranges[i] = row_ranges(bounds, p, q0 + 4 * row + i);
    highest[i] = negative_infinity();
    sum[i] = 0.0f;
  }
  load_rows_fp32<kDim>(q_tile, head_of<const float>(a.q, batch, head), a.q.row, q0, p.nq, p.dim);
  for (int32_t t = 0; t < tiles.count; ++t) {
    const int64_t key0 = static_cast<int64_t>(tiles.tile(t) >> 1) * kForwardTileK;
    load_rows_fp32<kDim>(k_tile, head_of<const float>(a.k, batch, kv_head), a.k.row, key0, p.nk, p.dim);
    load_rows_fp32<kDim>(v_tile, head_of<const float>(a.v, batch, kv_head), a.v.row, key0, p.nk, p.dim);
    copy_async_commit();
    copy_async_wait<0>();
    sync_threads();
    float s[4][4];
    multiply_rows_fp32<kDim>(s, q_tile, k_tile);
    ARCORE_UNROLL
    for (int i = 0; i < 4; ++i) {
      bool allowed[4];
      float best = highest[i];
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        allowed[j] = allowed_fp32(ranges[i], keys, key0 + column + 16 * j, q0 + 4 * row + i, p.nk);
        s[i][j] = allowed[j] ? s[i][j] * p.scale : negative_infinity();
        best = fmaxf(best, s[i][j]);
      }
      // The 16 threads of a row are half a warp.
      for (int lanes = 8; lanes > 0; lanes >>= 1)
        best = fmaxf(best, shuffle_xor(best, lanes));
      const float offset = best == negative_infinity() ? 0.0f : best;
      const float shrink = exp2f((highest[i] - offset) * kLog2E);
      highest[i] = best;
      float total = 0.0f;
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float weight = exp2f((s[i][j] - offset) * kLog2E);
        total += weight;
        scores[(4 * row + i) * Shape::kScorePitch + column + 16 * j] =
            allowed[j] ? weight : bits_float(kForbiddenScore);
      }
      for (int lanes = 8; lanes > 0; lanes >>= 1)
        total += shuffle_xor(total, lanes);
      sum[i] = sum[i] * shrink + total;
      ARCORE_UNROLL
      for (int d = 0; d < Shape::kResults; ++d)
        acc[i][d] *= shrink;
    }
    sync_threads();
    multiply_fp32<kDim, false>(acc, scores, v_tile);
    sync_threads();
  }
  if (tiles.count == 0) {
    copy_async_commit();
    copy_async_wait<0>();
  }
  float* out = head_of<float>(a.out, batch, head);
  ARCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t q = q0 + 4 * row + i;
    if (q >= p.nq) continue;
    const bool empty = sum[i] == 0.0f;
    const float inverse = empty ? 0.0f : 1.0f / sum[i];
    if (column == 0)
      a.lse[(batch * p.heads + head) * p.nq + q] = empty ? negative_infinity() : highest[i] + logf(sum[i]);
    ARCORE_UNROLL
    for (int d = 0; d < Shape::kResults; ++d)
      if (column + 16 * d < p.dim) out[q * a.out.row + column + 16 * d] = acc[i][d] * inverse;
  }
}

// A row whose weights are all 0 has lse -inf.
ARCORE_DEVICE float subtracted_lse(float lse) {
  return lse == negative_infinity() ? -negative_infinity() : lse;
}

// Weights and changes of a tile, marked where forbidden. Rows are queries.
template <int kDim>
ARCORE_DEVICE void weights_and_changes_fp32(float* weights, float* changes, const float* q_tile,
                                            const float* k_tile, const float* grad_tile, const float* v_tile,
                                            const BackwardKernelArgs& args, const int32_t* bounds,
                                            const int32_t* keys, int64_t pair, int64_t q0, int64_t key0) {
  using Shape = Fp32Shape<kDim>;
  const Problem& p = args.cuda.args.problem;
  const int row = thread_index() / 16, column = thread_index() % 16;
  float s[4][4], dp[4][4];
  multiply_rows_fp32<kDim>(s, q_tile, k_tile);
  multiply_rows_fp32<kDim>(dp, grad_tile, v_tile);
  ARCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t q = q0 + 4 * row + i;
    const RowRanges ranges = row_ranges(bounds, p, q);
    const float lse = q < p.nq ? subtracted_lse(args.cuda.args.lse[pair * p.nq + q]) : 0.0f;
    const float delta = q < p.nq ? args.cuda.delta[pair * p.nq + q] : 0.0f;
    ARCORE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const bool allowed = allowed_fp32(ranges, keys, key0 + column + 16 * j, q, p.nk);
      const float weight = exp2f((s[i][j] * p.scale - lse) * kLog2E);
      const int at = (4 * row + i) * Shape::kScorePitch + column + 16 * j;
      weights[at] = allowed ? weight : bits_float(kForbiddenScore);
      changes[at] = allowed ? weight * (dp[i][j] - delta) : bits_float(kForbiddenScore);
    }
  }
}

// A change of -0 on an allowed pair must not pass for forbidden: where it meets a number that is not finite,
// the weight or the other factor is not finite either, or the result is NaN through 0 * inf below.
template <int kDim>
ARCORE_DEVICE void store_rows_fp32(float* to, int64_t row_stride, const float (&acc)[4][kDim / 16],
                                   float scale, int64_t first, int64_t rows, int64_t dim) {
  const int row = thread_index() / 16, column = thread_index() % 16;
  ARCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (first + 4 * row + i >= rows) continue;
    ARCORE_UNROLL
    for (int d = 0; d < kDim / 16; ++d)
      if (column + 16 * d < dim) to[(first + 4 * row + i) * row_stride + column + 16 * d] = acc[i][d] * scale;
  }
}

template <int kDim>
ARCORE_LAUNCH_BOUNDS(256, 1)
ARCORE_KERNEL backward_fp32_by_key(ARCORE_KERNEL_ARGS BackwardKernelArgs args) {
  using Shape = Fp32Shape<kDim>;
  const BackwardArgs& a = args.cuda.args;
  const Problem& p = a.problem;
  float* k_tile = reinterpret_cast<float*>(shared_memory());
  float* v_tile = k_tile + Shape::kRows;
  float* q_tile = v_tile + Shape::kRows;
  float* grad_tile = q_tile + Shape::kRows;
  float* weights = grad_tile + Shape::kRows;
  float* changes = weights + Shape::kScores;

  constexpr int kParts = kBackwardTileK / Shape::kTile;
  const int64_t group = p.heads / p.kv_heads;
  const Work work = work_of_block(block_x() / kParts, p.batch * p.kv_heads, args.cuda.by_key.rows);
  const int64_t batch = work.pair / p.kv_heads, kv_head = work.pair % p.kv_heads;
  const int32_t* order = plan_grid(args.cuda.by_key, batch, kv_head * group);
  const int64_t key_tile = load_readonly(order + work.place * args.cuda.by_key.pitch + 1);
  const int64_t key0 = key_tile * kBackwardTileK + block_x() % kParts * Shape::kTile;
  if (key0 >= p.nk) return;
  const int32_t* keys = p.mask.key_bounds == nullptr ? nullptr : p.mask.key_bounds + batch * p.mask.key_batch;

  float grad_k[4][Shape::kResults] = {}, grad_v[4][Shape::kResults] = {};
  load_rows_fp32<kDim>(k_tile, head_of<const float>(a.k, batch, kv_head), a.k.row, key0, p.nk, p.dim);
  load_rows_fp32<kDim>(v_tile, head_of<const float>(a.v, batch, kv_head), a.v.row, key0, p.nk, p.dim);
  copy_async_commit();
  copy_async_wait<0>();
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const PlanRow tiles = plan_row(args.cuda.by_key, plan_grid(args.cuda.by_key, batch, head), key_tile);
    const int32_t* bounds = p.mask.bounds + batch * p.mask.batch + head * p.mask.head;
    for (int32_t t = 0; t < tiles.count; ++t) {
      const int64_t q0 = static_cast<int64_t>(tiles.tile(t) >> 1) * kBackwardTileQ;
      load_rows_fp32<kDim>(q_tile, head_of<const float>(a.q, batch, head), a.q.row, q0, p.nq, p.dim);
      load_rows_fp32<kDim>(grad_tile, head_of<const float>(a.grad_out, batch, head), a.grad_out.row, q0, p.nq,
                           p.dim);
      copy_async_commit();
      copy_async_wait<0>();
      sync_threads();
      weights_and_changes_fp32<kDim>(weights, changes, q_tile, k_tile, grad_tile, v_tile, args, bounds, keys,
                                     batch * p.heads + head, q0, key0);
      sync_threads();
      multiply_fp32<kDim, true>(grad_v, weights, grad_tile);
      multiply_fp32<kDim, true>(grad_k, changes, q_tile);
      sync_threads();
    }
  }
  store_rows_fp32<kDim>(head_of<float>(a.grad_k, batch, kv_head), a.grad_k.row, grad_k, p.scale, key0, p.nk,
                        p.dim);
  store_rows_fp32<kDim>(head_of<float>(a.grad_v, batch, kv_head), a.grad_v.row, grad_v, 1.0f, key0, p.nk,
                        p.dim);
}

template <int kDim>
ARCORE_LAUNCH_BOUNDS(256, 1)
ARCORE_KERNEL backward_fp32_by_query(ARCORE_KERNEL_ARGS BackwardKernelArgs args) {
  using Shape = Fp32Shape<kDim>;
  const BackwardArgs& a = args.cuda.args;
  const Problem& p = a.problem;
  float* q_tile = reinterpret_cast<float*>(shared_memory());
  float* grad_tile = q_tile + Shape::kRows;
  float* k_tile = grad_tile + Shape::kRows;
  float* v_tile = k_tile + Shape::kRows;
  float* weights = v_tile + Shape::kRows;
  float* changes = weights + Shape::kScores;

  constexpr int kParts = kForwardTileQ / Shape::kTile;
  const Work work = work_of_block(block_x() / kParts, p.batch * p.heads, args.cuda.by_query.rows);
  const int64_t batch = work.pair / p.heads, head = work.pair % p.heads,
                kv_head = head / (p.heads / p.kv_heads);
  const int32_t* grid = plan_grid(args.cuda.by_query, batch, head);
  const int64_t q_row = load_readonly(grid + work.place * args.cuda.by_query.pitch + 1);
  const PlanRow tiles = plan_row(args.cuda.by_query, grid, q_row);
  const int64_t q0 = q_row * kForwardTileQ + block_x() % kParts * Shape::kTile;
  if (q0 >= p.nq) return;
  const int32_t* bounds = p.mask.bounds + batch * p.mask.batch + head * p.mask.head;
  const int32_t* keys = p.mask.key_bounds == nullptr ? nullptr : p.mask.key_bounds + batch * p.mask.key_batch;

  float grad_q[4][Shape::kResults] = {};
  load_rows_fp32<kDim>(q_tile, head_of<const float>(a.q, batch, head), a.q.row, q0, p.nq, p.dim);
  load_rows_fp32<kDim>(grad_tile, head_of<const float>(a.grad_out, batch, head), a.grad_out.row, q0, p.nq,
                       p.dim);
  copy_async_commit();
  copy_async_wait<0>();
  for (int32_t t = 0; t < tiles.count; ++t) {
    const int64_t key0 = static_cast<int64_t>(tiles.tile(t) >> 1) * kForwardTileK;
    load_rows_fp32<kDim>(k_tile, head_of<const float>(a.k, batch, kv_head), a.k.row, key0, p.nk, p.dim);
    load_rows_fp32<kDim>(v_tile, head_of<const float>(a.v, batch, kv_head), a.v.row, key0, p.nk, p.dim);
    copy_async_commit();
    copy_async_wait<0>();
    sync_threads();
    weights_and_changes_fp32<kDim>(weights, changes, q_tile, k_tile, grad_tile, v_tile, args, bounds, keys,
                                   work.pair, q0, key0);
    sync_threads();
    multiply_fp32<kDim, false>(grad_q, changes, k_tile);
    sync_threads();
  }
  store_rows_fp32<kDim>(head_of<float>(a.grad_q, batch, head), a.grad_q.row, grad_q, p.scale, q0, p.nq,
                        p.dim);
}

template <int kDim>
int launch_forward_fp32(const ForwardKernelArgs& args, void* stream) {
  using Shape = Fp32Shape<kDim>;
  const Problem& p = args.cuda.args.problem;
  const int64_t blocks = p.batch * p.heads * args.cuda.plan.rows * (kForwardTileQ / Shape::kTile);
  return launch(forward_fp32<kDim>, {blocks, 1, 1, Shape::kThreads, (3 * Shape::kRows + Shape::kScores) * 4},
                stream, args);
}

template <int kDim>
int launch_backward_fp32(const BackwardKernelArgs& args, void* stream) {
  using Shape = Fp32Shape<kDim>;
  const Problem& p = args.cuda.args.problem;
  const int64_t shared = (4 * Shape::kRows + 2 * Shape::kScores) * 4;
  int error = launch_row_deltas<float>(args, stream);
  if (error != 0) return error;
  error = launch(backward_fp32_by_key<kDim>,
                 {p.batch * p.kv_heads * args.cuda.by_key.rows * (kBackwardTileK / Shape::kTile), 1, 1,
                  Shape::kThreads, shared},
                 stream, args);
  if (error != 0) return error;
  return launch(backward_fp32_by_query<kDim>,
                {p.batch * p.heads * args.cuda.by_query.rows * (kForwardTileQ / Shape::kTile), 1, 1,
                 Shape::kThreads, shared},
                stream, args);
}

}  // namespace arcore::block_sparse_attention
