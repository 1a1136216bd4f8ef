// Backward for GPUs from sm_80 on, in two kernels without atomics: dK and dV by key tile, dQ by query tile.
// Weights are computed anew from the lse.
#pragma once

#include "block_sparse_attention/params.h"
#include "block_sparse_attention/tiles_sm80.cuh"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"

namespace arcore::block_sparse_attention {

struct BackwardKernelArgs {
  BackwardCuda cuda;
  float factor;  // scale log2(e)
  bool aligned;  // grad_out, q, k and v
  bool grad_q_aligned, grad_k_aligned, grad_v_aligned;
};

// Both kernels: eight warps of 16 rows, 128 rows of their own and 64 of the other side at a time, in two
// stages.
template <int kDim>
struct BackwardShape {
  static constexpr int kThreads = 256, kNTiles = 8, kDTiles = kDim / 8, kOwnRows = 128, kOtherRows = 64;
  static constexpr int kNTilesByKey = kDim <= 80 ? 8 : 4;
  static constexpr int kOwnSize = kOwnRows * Pitch<kDim>::value, kOtherSize = kOtherRows * Pitch<kDim>::value;
  static constexpr int kRowNumbers =
      2 * kOtherRows;  // lse and delta of a stage, where the other side are queries
  static constexpr int kSharedBytes = (2 * kOwnSize + 4 * kOtherSize) * 2;
  static constexpr int kSharedBytesByKey = kSharedBytes + 2 * kRowNumbers * 4;
};
static_assert(BackwardShape<64>::kOwnRows == kBackwardTileK &&
              BackwardShape<64>::kOtherRows == kBackwardTileQ);
static_assert(BackwardShape<64>::kOwnRows == kForwardTileQ && BackwardShape<64>::kOtherRows == kForwardTileK);

// delta = rowsum(grad_out * out) - grad_lse. A warp per row.
template <typename T>
ARCORE_LAUNCH_BOUNDS(128, 1)
ARCORE_KERNEL row_deltas(ARCORE_KERNEL_ARGS BackwardKernelArgs args) {
  const BackwardArgs& a = args.cuda.args;
  const Problem& p = a.problem;
  const int64_t row = block_x() * 4 + warp_index();
  if (row >= p.batch * p.heads * p.nq) return;
  const int64_t pair = row / p.nq, batch = pair / p.heads, head = pair % p.heads;
  const T* grad = head_of<const T>(a.grad_out, batch, head) + row % p.nq * a.grad_out.row;
  const T* out = head_of<const T>(a.out, batch, head) + row % p.nq * a.out.row;
  float sum = 0.0f;
  for (int64_t d = lane_index(); d < p.dim; d += 32)
    sum += to_float(grad[d]) * to_float(out[d]);
  sum = warp_sum(sum);
  if (lane_index() == 0) args.cuda.delta[row] = a.grad_lse == nullptr ? sum : sum - a.grad_lse[row];
}

// The exponent to subtract: a row whose weights are all 0 has lse -inf.
ARCORE_DEVICE float log2_of_sum(float lse) {
  return lse == negative_infinity() ? -negative_infinity() : lse * kLog2E;
}

// The tiles of queries that a key tile meets, head by head of its group.
struct QueryTiles {
  const TilePlan& plan;
  const int32_t* first_row;  // that of head 0
  int32_t head, last_head;
  PlanRow row;
  int32_t i;

  ARCORE_DEVICE void open() {
    row.data = first_row + head * plan.head;
    row.count = load_readonly(row.data);
    i = 0;
  }
  ARCORE_DEVICE void skip_empty() {
    while (i >= row.count && head < last_head) {
      ++head;
      open();
    }
  }
  ARCORE_DEVICE bool more() const { return i < row.count; }
  ARCORE_DEVICE int32_t tile() const { return row.tile(i); }
  ARCORE_DEVICE void next() {
    ++i;
    skip_empty();
  }
};

template <typename T, int kDim>
ARCORE_LAUNCH_BOUNDS(256, 1)
ARCORE_KERNEL backward_by_key(ARCORE_KERNEL_ARGS BackwardKernelArgs args) {
  using Shape = BackwardShape<kDim>;
  constexpr int kPitch = Pitch<kDim>::value, kNTiles = Shape::kNTilesByKey, kDTiles = Shape::kDTiles;
  const BackwardArgs& a = args.cuda.args;
  const Problem& p = a.problem;
  T* k_tile = reinterpret_cast<T*>(shared_memory());
  T* v_tile = k_tile + Shape::kOwnSize;
  T* q_stages = v_tile + Shape::kOwnSize;
  T* grad_stages = q_stages + 2 * Shape::kOtherSize;
  float* numbers =
      reinterpret_cast<float*>(grad_stages + 2 * Shape::kOtherSize);  // [stage][lse 64, delta 64]
  const int lane = lane_index(), warp = warp_index(), thread = thread_index();
  const int dim = static_cast<int>(p.dim);

  const int64_t group = p.heads / p.kv_heads;
  const Work work = work_of_block(block_x(), p.batch * p.kv_heads, args.cuda.by_key.rows);
  const int64_t batch = work.pair / p.kv_heads, kv_head = work.pair % p.kv_heads;
  const int32_t* order = plan_grid(args.cuda.by_key, batch, kv_head * group);
  const int64_t key_tile = load_readonly(order + work.place * args.cuda.by_key.pitch + 1);
  const int64_t key0 = key_tile * kBackwardTileK;
  const int32_t* keys = p.mask.key_bounds == nullptr ? nullptr : p.mask.key_bounds + batch * p.mask.key_batch;

  const int32_t first_head = static_cast<int32_t>(kv_head * group);
  QueryTiles tiles{args.cuda.by_key,
                   plan_grid(args.cuda.by_key, batch, 0) + key_tile * args.cuda.by_key.pitch,
                   first_head,
                   first_head + static_cast<int32_t>(group) - 1,
                   {},
                   0};
  tiles.open();
  tiles.skip_empty();

  auto load_stage = [&](const QueryTiles& at, int stage) {
    const int64_t first = static_cast<int64_t>(at.tile() >> 1) * kBackwardTileQ;
    load_tile<T, kDim, kBackwardTileQ, Shape::kThreads>(q_stages + stage * Shape::kOtherSize,
                                                        head_of<const T>(a.q, batch, at.head), a.q.row, first,
                                                        p.nq, dim, args.aligned);
    load_tile<T, kDim, kBackwardTileQ, Shape::kThreads>(grad_stages + stage * Shape::kOtherSize,
                                                        head_of<const T>(a.grad_out, batch, at.head),
                                                        a.grad_out.row, first, p.nq, dim, args.aligned);
    if (thread < Shape::kRowNumbers) {
      const int64_t q = first + thread % kBackwardTileQ;
      const float* from = thread < kBackwardTileQ ? a.lse : args.cuda.delta;
      const int64_t at_row = (batch * p.heads + at.head) * p.nq + (q < p.nq ? q : 0);
      copy_async<4>(numbers + stage * Shape::kRowNumbers + thread, from + at_row, q < p.nq);
    }
  };

  float grad_k[1][kDTiles][4] = {}, grad_v[1][kDTiles][4] = {};
  if (tiles.more()) {
    load_tile<T, kDim, kBackwardTileK, Shape::kThreads>(k_tile, head_of<const T>(a.k, batch, kv_head),
                                                        a.k.row, key0, p.nk, dim, args.aligned);
    load_tile<T, kDim, kBackwardTileK, Shape::kThreads>(v_tile, head_of<const T>(a.v, batch, kv_head),
                                                        a.v.row, key0, p.nk, dim, args.aligned);
    load_stage(tiles, 0);
    copy_async_commit();
  }
  int stage = 0;
  while (tiles.more()) {
    const int32_t tile = tiles.tile();
    const int64_t head = tiles.head, q0 = static_cast<int64_t>(tile >> 1) * kBackwardTileQ;
    tiles.next();
    if (tiles.more()) {
      load_stage(tiles, stage ^ 1);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_threads();
    const T* q_tile = q_stages + stage * Shape::kOtherSize;
    const T* grad_tile = grad_stages + stage * Shape::kOtherSize;
    const float* lse = numbers + stage * Shape::kRowNumbers;

    const bool partial = (tile & 1) == 0 || q0 + kBackwardTileQ > p.nq;
    const bool guarded =
        partial && sync_threads_or(share_not_finite<T, kDim, kBackwardTileQ, Shape::kThreads>(grad_tile) ||
                                   share_not_finite<T, kDim, kBackwardTileQ, Shape::kThreads>(q_tile));
    const int64_t key = key0 + warp * 16 + lane / 4;
    const int32_t* bounds = p.mask.bounds + batch * p.mask.batch + head * p.mask.head;
    // In parts where registers are short. Rows are keys, columns queries.
    ARCORE_NO_UNROLL
    for (int first = 0; first < kBackwardTileQ; first += 8 * kNTiles) {
      float s[1][kNTiles][4] = {}, dp[1][kNTiles][4] = {};
      multiply_rows<T, kDim, 1, kNTiles>(s, k_tile + warp * 16 * kPitch, q_tile + first * kPitch);
      multiply_rows<T, kDim, 1, kNTiles>(dp, v_tile + warp * 16 * kPitch, grad_tile + first * kPitch);
      uint32_t forbidden[1] = {0u};
      if (partial) {
        ARCORE_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          ARCORE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int64_t q = q0 + first + n * 8 + 2 * (lane % 4) + e;
            const RowRanges ranges = row_ranges(bounds, p, q);
            ARCORE_UNROLL
            for (int half = 0; half < 2; ++half) {
              bool allowed = ranges.holds(static_cast<int32_t>(key + 8 * half));
              if (keys != nullptr) allowed = allowed && key_sees(keys, key + 8 * half, p.nk, q);
              if (!allowed) forbidden[0] |= 1u << (4 * n + 2 * half + e);
            }
          }
        }
      }
      ARCORE_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        ARCORE_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int column = first + n * 8 + 2 * (lane % 4) + e % 2;
          const float weight = exp2_approx(s[0][n][e] * args.factor - log2_of_sum(lse[column]));
          const float change = weight * (dp[0][n][e] - lse[kBackwardTileQ + column]);
          const bool drop = (forbidden[0] >> (4 * n + e) & 1u) != 0u;
          s[0][n][e] = drop ? 0.0f : weight;
          dp[0][n][e] = drop ? 0.0f : change;
        }
      }
      uint32_t weights[1][kNTiles / 2][4], changes[1][kNTiles / 2][4];
      as_left_factor<T, 1, kNTiles>(weights, s);
      as_left_factor<T, 1, kNTiles>(changes, dp);
      if (guarded) {
        multiply_guarded<T, kDim, 1, kNTiles / 2, true>(grad_v, weights, forbidden,
                                                        grad_tile + first * kPitch);
        multiply_guarded<T, kDim, 1, kNTiles / 2, false>(grad_k, changes, forbidden, q_tile + first * kPitch);
      } else {
        multiply<T, kDim, 1, kNTiles / 2>(grad_v, weights, grad_tile + first * kPitch);
        multiply<T, kDim, 1, kNTiles / 2>(grad_k, changes, q_tile + first * kPitch);
      }
    }
    sync_threads();
    stage ^= 1;
  }

  ARCORE_UNROLL
  for (int d = 0; d < kDTiles; ++d)
    ARCORE_UNROLL
  for (int e = 0; e < 4; ++e)
    grad_k[0][d][e] *= p.scale;
  T* my_k = k_tile + warp * 16 * kPitch;
  T* my_v = v_tile + warp * 16 * kPitch;
  store_fragments<T, kDim, 1>(my_k, grad_k);
  store_fragments<T, kDim, 1>(my_v, grad_v);
  sync_warp();
  store_rows<T, kDim, 16>(head_of<T>(a.grad_k, batch, kv_head), a.grad_k.row, my_k, key0 + warp * 16, p.nk,
                          dim, args.grad_k_aligned);
  store_rows<T, kDim, 16>(head_of<T>(a.grad_v, batch, kv_head), a.grad_v.row, my_v, key0 + warp * 16, p.nk,
                          dim, args.grad_v_aligned);
}

template <typename T, int kDim>
ARCORE_LAUNCH_BOUNDS(256, 1)
ARCORE_KERNEL backward_by_query(ARCORE_KERNEL_ARGS BackwardKernelArgs args) {
  using Shape = BackwardShape<kDim>;
  constexpr int kPitch = Pitch<kDim>::value, kNTiles = Shape::kNTiles, kDTiles = Shape::kDTiles;
  const BackwardArgs& a = args.cuda.args;
  const Problem& p = a.problem;
  T* q_tile = reinterpret_cast<T*>(shared_memory());
  T* grad_tile = q_tile + Shape::kOwnSize;
  T* k_stages = grad_tile + Shape::kOwnSize;
  T* v_stages = k_stages + 2 * Shape::kOtherSize;
  const int lane = lane_index(), warp = warp_index();
  const int dim = static_cast<int>(p.dim);

  const Work work = work_of_block(block_x(), p.batch * p.heads, args.cuda.by_query.rows);
  const int64_t batch = work.pair / p.heads, head = work.pair % p.heads,
                kv_head = head / (p.heads / p.kv_heads);
  const int32_t* grid = plan_grid(args.cuda.by_query, batch, head);
  const int64_t q_row = load_readonly(grid + work.place * args.cuda.by_query.pitch + 1);
  const PlanRow row = plan_row(args.cuda.by_query, grid, q_row);
  const int64_t q0 = q_row * kForwardTileQ;
  const int32_t* bounds = p.mask.bounds + batch * p.mask.batch + head * p.mask.head;
  const int32_t* keys = p.mask.key_bounds == nullptr ? nullptr : p.mask.key_bounds + batch * p.mask.key_batch;
  const T* k_head = head_of<const T>(a.k, batch, kv_head);
  const T* v_head = head_of<const T>(a.v, batch, kv_head);

  auto load_stage = [&](int32_t i, int stage) {
    const int64_t first = static_cast<int64_t>(row.tile(i) >> 1) * kForwardTileK;
    load_tile<T, kDim, kForwardTileK, Shape::kThreads>(k_stages + stage * Shape::kOtherSize, k_head, a.k.row,
                                                       first, p.nk, dim, args.aligned);
    load_tile<T, kDim, kForwardTileK, Shape::kThreads>(v_stages + stage * Shape::kOtherSize, v_head, a.v.row,
                                                       first, p.nk, dim, args.aligned);
    copy_async_commit();
  };

  float grad_q[1][kDTiles][4] = {};
  float lse[2], delta[2];
  ARCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t q = q0 + warp * 16 + half * 8 + lane / 4, at = (batch * p.heads + head) * p.nq + q;
    lse[half] = q < p.nq ? log2_of_sum(a.lse[at]) : 0.0f;
    delta[half] = q < p.nq ? args.cuda.delta[at] : 0.0f;
  }
  if (row.count > 0) {
    load_tile<T, kDim, kForwardTileQ, Shape::kThreads>(q_tile, head_of<const T>(a.q, batch, head), a.q.row,
                                                       q0, p.nq, dim, args.aligned);
    load_tile<T, kDim, kForwardTileQ, Shape::kThreads>(grad_tile, head_of<const T>(a.grad_out, batch, head),
                                                       a.grad_out.row, q0, p.nq, dim, args.aligned);
    load_stage(0, 0);
  }
  for (int32_t i = 0; i < row.count; ++i) {
    const int stage = i % 2;
    if (i + 1 < row.count) {
      load_stage(i + 1, stage ^ 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_threads();
    const int32_t tile = row.tile(i);
    const int64_t key0 = static_cast<int64_t>(tile >> 1) * kForwardTileK;
    const T* k_tile = k_stages + stage * Shape::kOtherSize;
    const T* v_tile = v_stages + stage * Shape::kOtherSize;

    float s[1][kNTiles][4] = {}, dp[1][kNTiles][4] = {};
    multiply_rows<T, kDim, 1, kNTiles>(s, q_tile + warp * 16 * kPitch, k_tile);
    multiply_rows<T, kDim, 1, kNTiles>(dp, grad_tile + warp * 16 * kPitch, v_tile);
    const bool partial = (tile & 1) == 0 || key0 + kForwardTileK > p.nk;
    uint32_t forbidden[1] = {0u};
    if (partial) find_forbidden<1, kNTiles>(forbidden, p, bounds, keys, q0 + warp * 16, key0);
    ARCORE_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      ARCORE_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float weight = exp2_approx(s[0][n][e] * args.factor - lse[e / 2]);
        const float change = weight * (dp[0][n][e] - delta[e / 2]);
        dp[0][n][e] = (forbidden[0] >> (4 * n + e) & 1u) != 0u ? 0.0f : change;
      }
    }
    uint32_t changes[1][kNTiles / 2][4];
    as_left_factor<T, 1, kNTiles>(changes, dp);
    if (partial && sync_threads_or(share_not_finite<T, kDim, kForwardTileK, Shape::kThreads>(k_tile)))
      multiply_guarded<T, kDim, 1, kNTiles / 2, false>(grad_q, changes, forbidden, k_tile);
    else
      multiply<T, kDim, 1, kNTiles / 2>(grad_q, changes, k_tile);
    sync_threads();
  }

  ARCORE_UNROLL
  for (int d = 0; d < kDTiles; ++d)
    ARCORE_UNROLL
  for (int e = 0; e < 4; ++e)
    grad_q[0][d][e] *= p.scale;
  T* mine = q_tile + warp * 16 * kPitch;
  store_fragments<T, kDim, 1>(mine, grad_q);
  sync_warp();
  store_rows<T, kDim, 16>(head_of<T>(a.grad_q, batch, head), a.grad_q.row, mine, q0 + warp * 16, p.nq, dim,
                          args.grad_q_aligned);
}

inline BackwardKernelArgs backward_kernel_args(const BackwardCuda& cuda) {
  const BackwardArgs& a = cuda.args;
  BackwardKernelArgs args{cuda, a.problem.scale * kLog2E, false, false, false, false};
  // As in the forward: a scale of 0 must not make NaN of an infinite product.
  if (fabsf(args.factor) < 1e-30f) args.factor = 1e-30f;
  args.aligned = rows_aligned(a.grad_out) && rows_aligned(a.q) && rows_aligned(a.k) && rows_aligned(a.v);
  args.grad_q_aligned = rows_aligned(a.grad_q);
  args.grad_k_aligned = rows_aligned(a.grad_k);
  args.grad_v_aligned = rows_aligned(a.grad_v);
  return args;
}

template <typename T>
int launch_row_deltas(const BackwardKernelArgs& args, void* stream) {
  const Problem& p = args.cuda.args.problem;
  return launch(row_deltas<T>, {(p.batch * p.heads * p.nq + 3) / 4, 1, 1, 128, 0}, stream, args);
}

template <typename T, int kDim>
int launch_backward(const BackwardKernelArgs& args, void* stream) {
  using Shape = BackwardShape<kDim>;
  const Problem& p = args.cuda.args.problem;
  int error = launch_row_deltas<T>(args, stream);
  if (error != 0) return error;
  error =
      launch(backward_by_key<T, kDim>,
             {p.batch * p.kv_heads * args.cuda.by_key.rows, 1, 1, Shape::kThreads, Shape::kSharedBytesByKey},
             stream, args);
  if (error != 0) return error;
  return launch(backward_by_query<T, kDim>,
                {p.batch * p.heads * args.cuda.by_query.rows, 1, 1, Shape::kThreads, Shape::kSharedBytes},
                stream, args);
}

template <typename T>
int launch_backward_any_dim(const BackwardCuda& cuda, void* stream) {
  const BackwardKernelArgs args = backward_kernel_args(cuda);
  const int64_t dim = cuda.args.problem.dim;
  if (dim <= 64) return launch_backward<T, 64>(args, stream);
  if (dim <= 80) return launch_backward<T, 80>(args, stream);
  if (dim <= 96) return launch_backward<T, 96>(args, stream);
  return launch_backward<T, 128>(args, stream);
}

}  // namespace arcore::block_sparse_attention
