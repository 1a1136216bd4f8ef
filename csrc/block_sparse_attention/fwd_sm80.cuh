// Forward for GPUs from sm_80 on: mma.sync, cp.async, ldmatrix. A block owns 128 query rows of one head and
// walks the 64-key tiles of its plan row; a warp owns 32 rows, or 16 where head_dim is above 80 and registers
// are short.
#pragma once

#include "block_sparse_attention/params.h"
#include "block_sparse_attention/tiles_sm80.cuh"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"

namespace arcore::block_sparse_attention {

struct ForwardKernelArgs {
  ForwardCuda cuda;
  float factor;  // |scale| log2(e)
  bool negate;   // scale < 0
  bool q_aligned, k_aligned, v_aligned, out_aligned;
};

template <int kDim>
struct ForwardShape {
  static constexpr int kMTiles = kDim <= 80 ? 2 : 1, kWarpRows = 16 * kMTiles;
  static constexpr int kThreads = kForwardTileQ / kWarpRows * 32;
  static constexpr int kNTiles = kForwardTileK / 8, kDTiles = kDim / 8;
  static constexpr int kQ = kForwardTileQ * Pitch<kDim>::value, kKeys = kForwardTileK * Pitch<kDim>::value;
  static constexpr int kSharedBytes = (kQ + 2 * kKeys) * 2;
};

// Sets what the mask forbids to -inf.
template <int kMTiles, int kNTiles>
ARCORE_DEVICE void mask_scores(float (&s)[kMTiles][kNTiles][4], const uint32_t (&forbidden)[kMTiles]) {
  ARCORE_UNROLL
  for (int m = 0; m < kMTiles; ++m)
    ARCORE_UNROLL
  for (int n = 0; n < kNTiles; ++n)
    ARCORE_UNROLL
  for (int e = 0; e < 4; ++e)
    if (forbidden[m] >> (4 * n + e) & 1u) s[m][n][e] = negative_infinity();
}

// One step of the online softmax. s: scores in, weights out; o is scaled to the new maximum.
template <int kMTiles, int kNTiles, int kDTiles>
ARCORE_DEVICE void online_softmax(float (&s)[kMTiles][kNTiles][4], float (&o)[kMTiles][kDTiles][4],
                                  float (&highest)[kMTiles][2], float (&sum)[kMTiles][2], float factor) {
  ARCORE_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float best = highest[m][half];
      ARCORE_UNROLL
      for (int n = 0; n < kNTiles; ++n)
        best = fmaxf(best, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      best = fmaxf(best, shuffle_xor(best, 1));
      best = fmaxf(best, shuffle_xor(best, 2));
      // A row that has seen nothing yet has no maximum to subtract.
      const float offset = best == negative_infinity() ? 0.0f : best * factor;
      const float shrink = exp2_approx(highest[m][half] * factor - offset);
      highest[m][half] = best;
      float total = 0.0f;
      ARCORE_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        ARCORE_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[m][n][e] = exp2_approx(s[m][n][e] * factor - offset);
          total += s[m][n][e];
        }
      }
      sum[m][half] = sum[m][half] * shrink + total;
      ARCORE_UNROLL
      for (int d = 0; d < kDTiles; ++d) {
        o[m][d][2 * half] *= shrink;
        o[m][d][2 * half + 1] *= shrink;
      }
    }
  }
}

template <typename T, int kDim, bool kSplit>
ARCORE_LAUNCH_BOUNDS(ForwardShape<kDim>::kThreads, 1)
ARCORE_KERNEL forward(ARCORE_KERNEL_ARGS ForwardKernelArgs args) {
  using Shape = ForwardShape<kDim>;
  constexpr int kMTiles = Shape::kMTiles, kNTiles = Shape::kNTiles, kDTiles = Shape::kDTiles;
  constexpr int kPitch = Pitch<kDim>::value;
  const ForwardArgs& a = args.cuda.args;
  const Problem& p = a.problem;
  T* q_tile = reinterpret_cast<T*>(shared_memory());
  T* k_tile = q_tile + Shape::kQ;
  T* v_tile = k_tile + Shape::kKeys;
  const int lane = lane_index(), warp = warp_index();

  const Work work = work_of_block(block_x(), p.batch * p.heads, args.cuda.plan.rows);
  const int64_t batch = work.pair / p.heads, head = work.pair % p.heads,
                kv_head = head / (p.heads / p.kv_heads);
  const int32_t* grid = plan_grid(args.cuda.plan, batch, head);
  const int64_t q_row = load_readonly(grid + work.place * args.cuda.plan.pitch + 1);
  const PlanRow row = plan_row(args.cuda.plan, grid, q_row);
  int32_t begin = 0, end = row.count;
  if constexpr (kSplit) {
    begin = static_cast<int32_t>(block_y() * row.count / args.cuda.splits);
    end = static_cast<int32_t>((block_y() + 1) * row.count / args.cuda.splits);
  }
  const int64_t q0 = q_row * kForwardTileQ;
  const int32_t* bounds = p.mask.bounds + batch * p.mask.batch + head * p.mask.head;
  const int32_t* keys = p.mask.key_bounds == nullptr ? nullptr : p.mask.key_bounds + batch * p.mask.key_batch;
  const int dim = static_cast<int>(p.dim);
  const T* k_head = head_of<const T>(a.k, batch, kv_head);
  const T* v_head = head_of<const T>(a.v, batch, kv_head);

  float o[kMTiles][kDTiles][4] = {};
  float highest[kMTiles][2], sum[kMTiles][2];
  ARCORE_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    highest[m][0] = highest[m][1] = negative_infinity();
    sum[m][0] = sum[m][1] = 0.0f;
  }

  if (begin < end) {
    load_tile<T, kDim, kForwardTileQ, Shape::kThreads>(q_tile, head_of<const T>(a.q, batch, head), a.q.row,
                                                       q0, p.nq, dim, args.q_aligned);
    load_tile<T, kDim, kForwardTileK, Shape::kThreads>(
        k_tile, k_head, a.k.row, static_cast<int64_t>(row.tile(begin) >> 1) * kForwardTileK, p.nk, dim,
        args.k_aligned);
    copy_async_commit();
  }
  for (int32_t i = begin; i < end; ++i) {
    const int32_t tile = row.tile(i);
    const int64_t key0 = static_cast<int64_t>(tile >> 1) * kForwardTileK;
    // The last barrier of the step before says that nobody reads the values any more.
    load_tile<T, kDim, kForwardTileK, Shape::kThreads>(v_tile, v_head, a.v.row, key0, p.nk, dim,
                                                       args.v_aligned);
    copy_async_commit();
    copy_async_wait<1>();
    sync_threads();

    float s[kMTiles][kNTiles][4] = {};
    multiply_rows<T, kDim, kMTiles, kNTiles>(s, q_tile + warp * Shape::kWarpRows * kPitch, k_tile);
    if (args.negate) {
      ARCORE_UNROLL
      for (int m = 0; m < kMTiles; ++m)
        ARCORE_UNROLL
      for (int n = 0; n < kNTiles; ++n)
        ARCORE_UNROLL
      for (int e = 0; e < 4; ++e)
        s[m][n][e] = -s[m][n][e];
    }
    const bool partial = (tile & 1) == 0 || key0 + kForwardTileK > p.nk;
    uint32_t forbidden[kMTiles];
    if (partial) {
      find_forbidden<kMTiles, kNTiles>(forbidden, p, bounds, keys, q0 + warp * Shape::kWarpRows, key0);
      mask_scores<kMTiles, kNTiles>(s, forbidden);
    }

    copy_async_wait<0>();
    sync_threads();
    if (i + 1 < end) {
      load_tile<T, kDim, kForwardTileK, Shape::kThreads>(
          k_tile, k_head, a.k.row, static_cast<int64_t>(row.tile(i + 1) >> 1) * kForwardTileK, p.nk, dim,
          args.k_aligned);
      copy_async_commit();
    }
    online_softmax<kMTiles, kNTiles, kDTiles>(s, o, highest, sum, args.factor);
    uint32_t weights[kMTiles][kNTiles / 2][4];
    as_left_factor<T, kMTiles, kNTiles>(weights, s);
    // Its barrier also ends the step.
    if (partial && sync_threads_or(share_not_finite<T, kDim, kForwardTileK, Shape::kThreads>(v_tile)))
      multiply_guarded<T, kDim, kMTiles, kNTiles / 2, true>(o, weights, forbidden, v_tile);
    else
      multiply<T, kDim, kMTiles, kNTiles / 2>(o, weights, v_tile);
    sync_threads();
  }

  ARCORE_UNROLL
  for (int m = 0; m < kMTiles; ++m) {
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float total = sum[m][half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const float best = highest[m][half];
      const bool empty = total == 0.0f;
      const float inverse = empty ? 0.0f : 1.0f / total;
      const int64_t q = q0 + warp * Shape::kWarpRows + m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && q < p.nq) {
        const float lse = empty ? negative_infinity() : (best * args.factor + log2_approx(total)) * kLn2;
        const int64_t at = (batch * p.heads + head) * p.nq + q;
        if constexpr (kSplit)
          args.cuda.partial_lse[block_y() * p.batch * p.heads * p.nq + at] = lse;
        else
          a.lse[at] = lse;
      }
      ARCORE_UNROLL
      for (int d = 0; d < kDTiles; ++d) {
        o[m][d][2 * half] *= inverse;
        o[m][d][2 * half + 1] *= inverse;
      }
    }
  }
  if constexpr (kSplit) {
    float* out =
        args.cuda.partial_out + (block_y() * p.batch * p.heads + batch * p.heads + head) * p.nq * p.dim;
    ARCORE_UNROLL
    for (int m = 0; m < kMTiles; ++m)
      ARCORE_UNROLL
    for (int half = 0; half < 2; ++half)
      ARCORE_UNROLL
    for (int d = 0; d < kDTiles; ++d) {
      const int64_t q = q0 + warp * Shape::kWarpRows + m * 16 + half * 8 + lane / 4;
      const int column = d * 8 + 2 * (lane % 4);
      if (q >= p.nq || column >= dim) continue;
      out[q * p.dim + column] = o[m][d][2 * half];
      out[q * p.dim + column + 1] = o[m][d][2 * half + 1];
    }
  } else {
    // Each warp lays its rows over its own queries and writes them in pieces of 16 bytes.
    T* mine = q_tile + warp * Shape::kWarpRows * kPitch;
    store_fragments<T, kDim, kMTiles>(mine, o);
    sync_warp();
    store_rows<T, kDim, Shape::kWarpRows>(head_of<T>(a.out, batch, head), a.out.row, mine,
                                          q0 + warp * Shape::kWarpRows, p.nq, dim, args.out_aligned);
  }
}

// out = sum_s exp(lse_s - lse) out_s, in the order of the parts. A warp per row.
ARCORE_DEVICE float combine_weight(float part, float best) {
  return part == negative_infinity() ? 0.0f : exp2_approx((part - best) * kLog2E);
}

template <typename T>
ARCORE_LAUNCH_BOUNDS(128, 1)
ARCORE_KERNEL combine_splits(ARCORE_KERNEL_ARGS ForwardKernelArgs args) {
  const ForwardArgs& a = args.cuda.args;
  const Problem& p = a.problem;
  const int64_t rows = p.batch * p.heads * p.nq, row = block_x() * 4 + warp_index();
  if (row >= rows) return;
  float best = negative_infinity();
  for (int64_t s = 0; s < args.cuda.splits; ++s)
    best = fmaxf(best, args.cuda.partial_lse[s * rows + row]);
  float total = 0.0f;
  bool nan = false;
  for (int64_t s = 0; s < args.cuda.splits; ++s) {
    const float part = args.cuda.partial_lse[s * rows + row];
    nan |= part != part;
    total += combine_weight(part, best);
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  const int64_t pair = row / p.nq;
  T* out = head_of<T>(a.out, pair / p.heads, pair % p.heads) + row % p.nq * a.out.row;
  for (int64_t d = lane_index(); d < p.dim; d += 32) {
    float value = 0.0f;
    for (int64_t s = 0; s < args.cuda.splits; ++s) {
      const float weight = combine_weight(args.cuda.partial_lse[s * rows + row], best);
      // A part that this row may not see holds zeros.
      if (weight != 0.0f || nan)
        value += weight * inverse * args.cuda.partial_out[(s * rows + row) * p.dim + d];
    }
    out[d] = from_float<T>(value);
  }
  if (lane_index() == 0)
    a.lse[row] = total == 0.0f ? (nan ? bits_float(0x7fc00000u) : negative_infinity())
                               : best + log2_approx(total) * kLn2;
}

template <typename T, int kDim>
int launch_forward(const ForwardKernelArgs& args, void* stream) {
  using Shape = ForwardShape<kDim>;
  const Problem& p = args.cuda.args.problem;
  const int64_t blocks = p.batch * p.heads * args.cuda.plan.rows;
  if (args.cuda.splits == 1)
    return launch(forward<T, kDim, false>, {blocks, 1, 1, Shape::kThreads, Shape::kSharedBytes}, stream,
                  args);
  const int error = launch(forward<T, kDim, true>,
                           {blocks, args.cuda.splits, 1, Shape::kThreads, Shape::kSharedBytes}, stream, args);
  if (error != 0) return error;
  const int64_t rows = p.batch * p.heads * p.nq;
  return launch(combine_splits<T>, {(rows + 3) / 4, 1, 1, 128, 0}, stream, args);
}

inline ForwardKernelArgs forward_kernel_args(const ForwardCuda& cuda) {
  const ForwardArgs& a = cuda.args;
  ForwardKernelArgs args{cuda, 0.0f, a.problem.scale < 0.0f, false, false, false, false};
  const float factor = (args.negate ? -a.problem.scale : a.problem.scale) * kLog2E;
  // 0 * -inf is NaN, so a scale of 0 becomes one whose logits are 0 to the last bit.
  args.factor = factor < 1e-30f ? 1e-30f : factor;
  args.q_aligned = rows_aligned(a.q);
  args.k_aligned = rows_aligned(a.k);
  args.v_aligned = rows_aligned(a.v);
  args.out_aligned = rows_aligned(a.out);
  return args;
}

template <typename T>
int launch_forward_any_dim(const ForwardCuda& cuda, void* stream) {
  const ForwardKernelArgs args = forward_kernel_args(cuda);
  const int64_t dim = cuda.args.problem.dim;
  if (dim <= 64) return launch_forward<T, 64>(args, stream);
  if (dim <= 80) return launch_forward<T, 80>(args, stream);
  if (dim <= 96) return launch_forward<T, 96>(args, stream);
  return launch_forward<T, 128>(args, stream);
}

}  // namespace arcore::block_sparse_attention
