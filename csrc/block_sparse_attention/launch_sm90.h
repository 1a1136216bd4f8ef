// What the sm_90a kernel and the host code that starts it agree on.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "block_sparse_attention/params.h"
#include "block_sparse_attention/tile_loop_sm90.h"

namespace arcore::block_sparse_attention::sm90 {

// A [B, H, N, D] tensor as the copy engine sees it. Steps are 0 where all heads or batch entries share
// memory.
struct Operand {
  CUtensorMap map;
  int32_t head_step, batch_step;
};

struct ForwardParams {
  Operand q, k, v;
  ForwardArgs args;
  TilePlan plan;
  Schedule schedule;
  int32_t* counter;  // 0 at the start, or null where every unit has a block of its own
  float scale_log2e;
  bool wide_stores;  // rows of `out` start at multiples of 16 bytes
};

struct BackwardParams {
  Operand grad_out, q, k, v;  // boxes of 64 rows
  BackwardCuda cuda;
  Schedule by_query, by_key;
  int32_t* counters;  // by key, by query; as above
  float scale_log2e;
  bool wide_grad_q, wide_grad_k, wide_grad_v;
};

// One pass of five products beside the two kernels of seven.
struct FusedParams {
  BackwardParams backward;
  int32_t* ticket;   // the next unit
  int32_t* visited;  // [B, H, query tiles]: key tiles whose sums have arrived
  float* sums;       // [B, H, query tiles, 64, padded head dim], a thread's registers side by side
  int64_t query_tiles;
};

int start_forward_d64(const ForwardParams& params, unsigned blocks, void* stream);
int start_forward_d96(const ForwardParams& params, unsigned blocks, void* stream);
int start_forward_d128(const ForwardParams& params, unsigned blocks, void* stream);

// dK and dV, then dQ; cuda.delta is computed before.
int start_backward_d64(const BackwardParams& params, int64_t multiprocessors, void* stream);
int start_backward_d96(const BackwardParams& params, int64_t multiprocessors, void* stream);
int start_backward_d128(const BackwardParams& params, int64_t multiprocessors, void* stream);

int start_fused_d64(const FusedParams& params, int64_t multiprocessors, void* stream);
int start_fused_d96(const FusedParams& params, int64_t multiprocessors, void* stream);
int start_fused_d128(const FusedParams& params, int64_t multiprocessors, void* stream);

}  // namespace arcore::block_sparse_attention::sm90
