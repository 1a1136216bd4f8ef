// What schema.cpp hands to the kernels: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace arcore::block_sparse_attention {

// A [B, H, N, D] tensor whose last dimension is contiguous.
struct Tensor4 {
  void* data;
  int64_t batch, head, row;
};

// int32 [Bm, Hm, Nq, 2 * intervals] row bounds and, if key_bounds is set, int32 [Bm, Nk, 2]; strides 0 where
// broadcast.
struct MaskBounds {
  const int32_t* bounds;
  int64_t batch, head;
  int intervals;
  const int32_t* key_bounds;
  int64_t key_batch;
  // If words is set, keys from prefix on are nodes of a tree: query row i sees node j iff bit j of its words
  // is set. int64 [Bw, Nq, words_per_row] and int32 [Bp].
  const int64_t* words;
  int64_t words_batch, words_per_row;
  const int32_t* prefix;
  int64_t prefix_batch;
};

// float32 [Bb, Hb, Nk], added to the scaled logits; null if there is none, strides 0 where broadcast.
struct KeyBias {
  const float* data;
  int64_t batch, head;
};

struct Problem {
  int64_t batch, heads, kv_heads, nq, nk;
  int64_t dim, v_dim;  // of queries and keys, of values and outputs
  float scale;
  StorageType dtype;
  MaskBounds mask;
  KeyBias bias;
};

struct ForwardArgs {
  Problem problem;
  Tensor4 q, k, v, out;
  float* lse;  // [B, H, Nq] contiguous
};

struct BackwardArgs {
  Problem problem;
  Tensor4 grad_out, q, k, v, out, grad_q, grad_k, grad_v;
  const float* lse;       // [B, H, Nq] contiguous
  const float* grad_lse;  // [B, H, Nq] contiguous, or null
  float* grad_bias;       // [B, H, Nk] contiguous, or null
};

// Tangents whose data is null are zero.
struct TangentArgs {
  Problem problem;
  Tensor4 q, k, v, out, tangent_q, tangent_k, tangent_v, tangent_out;
  KeyBias tangent_bias;
  const float* lse;    // [B, H, Nq] contiguous
  float* tangent_lse;  // [B, H, Nq] contiguous
};

// The work is done in waves of `pairs` consecutive (batch, kv head) pairs starting at `first`, so that the
// workspace holds the packed operands of one wave only. Within a wave: pack, then run tasks, then (backward)
// reduce; each stage may be split over threads at any task boundary without changing the result.
struct Wave {
  int64_t first, pairs;
  float* workspace;
};

// Which tiles a CUDA kernel visits, for each grid (batch entry and head of the mask, stride 0 where
// broadcast): row r of the plan holds a count, the r-th row to start with (longest first), and `columns`
// places for the tiles, (column << 1) | full, ascending; with `halves` (column << 3) | seen << 1 | full,
// where bit h of `seen` says that half h of the row's side of the tile has an allowed pair. With `visits`
// there are as many places more: how many rows that the order puts before row r (the order of head 0 of the
// batch entry, for all heads) have the same tile. Places behind the count hold 0. Built by
// interval_tile_plan.
struct TilePlan {
  const int32_t* data;  // int32 [Bm, Hm, rows, pitch] contiguous
  int64_t batch, head;  // strides in int32
  int64_t rows, columns;
  int64_t pitch;  // 2 + columns, or 2 + 2 columns with visits
};

// Tiles of queries and keys that the CUDA kernels visit: forward and dQ walk the keys of a query tile, dK and
// dV the queries of a key tile.
constexpr int kForwardTileQ = 128, kForwardTileK = 64;
constexpr int kBackwardTileQ = 64, kBackwardTileK = 128;

struct PlanArgs {
  MaskBounds mask;
  int64_t batch, heads;  // grids
  int64_t nq, nk;
  int tile_q, tile_k;
  bool by_key, halves, visits;
  int32_t* plan;
  int32_t* seen;  // with visits: scratch, [batch, heads, columns]
  int64_t rows, columns, pitch;
};

// Work of a forward launch beyond ForwardArgs: with splits > 1, part s of each query tile's keys goes to
// partial_out [splits, B, H, Nq, D] and partial_lse [splits, B, H, Nq], float32.
struct ForwardCuda {
  ForwardArgs args;
  TilePlan plan;
  int64_t splits;
  float* partial_out;
  float* partial_lse;
};

struct BackwardCuda {
  BackwardArgs args;
  TilePlan by_query, by_key;
  float* delta;  // [B, H, Nq]: rowsum(grad_out * out) - grad_lse
};

// Launches on the current device; 0 or a cudaError_t. head_dim <= kMaxCudaHeadDim.
constexpr int kMaxCudaHeadDim = 128;
int launch_plan_sm80(const PlanArgs&, void* stream);
int launch_forward_bf16_sm80(const ForwardCuda&, void* stream);
int launch_forward_f16_sm80(const ForwardCuda&, void* stream);
int launch_forward_fp32_sm80(const ForwardCuda&, void* stream);
int launch_backward_bf16_sm80(const BackwardCuda&, void* stream);
int launch_backward_f16_sm80(const BackwardCuda&, void* stream);
int launch_backward_fp32_sm80(const BackwardCuda&, void* stream);

// sm_90a, for Hopper only; the forward takes a plan for tiles of its own, with halves. 0, a cudaError_t, or
// kUnsupportedSm90: nothing was started because the kernel cannot do the call (README.md, "sm_90a").
// `counters` is int32 scratch of kCountersSm90 numbers.
constexpr int kTileQSm90 = 128, kTileKSm90 = 128, kCountersSm90 = 2;
constexpr int kUnsupportedSm90 = -1;
int launch_forward_sm90(const ForwardArgs&, const TilePlan&, int32_t* counters, void* stream);
// Both plans are those of the sm_80 backward.
int launch_backward_sm90(const BackwardCuda&, int32_t* counters, void* stream);
// The same in one pass, with scratch for the sums of dQ and for counting them; the plan by key has visits.
struct FusedScratch {
  int64_t numbers, sums;  // int32, float32
};
FusedScratch fused_scratch_sm90(const BackwardCuda&);
int launch_fused_sm90(const BackwardCuda&, int32_t* numbers, float* sums, void* stream);

// Every stage runs over tasks [begin, end); `scratch` is memory of the calling thread alone, as many floats
// as the function named like the stage says.
struct CpuKernels {
  // Floats of workspace that one (batch, kv head) pair needs.
  int64_t (*forward_workspace)(const Problem&);
  int64_t (*forward_scratch)(const Problem&);
  int64_t (*forward_pack_tasks)(const Problem&, int64_t pairs);
  void (*forward_pack)(const ForwardArgs&, const Wave&, float* scratch, int64_t begin, int64_t end);
  int64_t (*forward_tasks)(const Problem&, int64_t pairs);
  void (*forward)(const ForwardArgs&, const Wave&, float* scratch, int64_t begin, int64_t end);

  int64_t (*backward_workspace)(const Problem&);
  int64_t (*backward_scratch)(const Problem&);
  int64_t (*backward_pack_tasks)(const Problem&, int64_t pairs);
  void (*backward_pack)(const BackwardArgs&, const Wave&, float* scratch, int64_t begin, int64_t end);
  int64_t (*backward_tasks)(const Problem&, int64_t pairs);
  void (*backward)(const BackwardArgs&, const Wave&, float* scratch, int64_t begin, int64_t end);
  int64_t (*backward_reduce_tasks)(const Problem&, int64_t pairs);
  void (*backward_reduce)(const BackwardArgs&, const Wave&, float* scratch, int64_t begin, int64_t end);

  int64_t (*tangent_workspace)(const Problem&);
  int64_t (*tangent_scratch)(const Problem&);
  int64_t (*tangent_pack_tasks)(const Problem&, int64_t pairs);
  void (*tangent_pack)(const TangentArgs&, const Wave&, float* scratch, int64_t begin, int64_t end);
  int64_t (*tangent_tasks)(const Problem&, int64_t pairs);
  void (*tangent)(const TangentArgs&, const Wave&, float* scratch, int64_t begin, int64_t end);
};

}  // namespace arcore::block_sparse_attention
