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
};

struct Problem {
  int64_t batch, heads, kv_heads, nq, nk, dim;
  float scale;
  StorageType dtype;
  MaskBounds mask;
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
};

// The work is done in waves of `pairs` consecutive (batch, kv head) pairs starting at `first`, so that the
// workspace holds the packed operands of one wave only. Within a wave: pack, then run tasks, then (backward)
// reduce; each stage may be split over threads at any task boundary without changing the result.
struct Wave {
  int64_t first, pairs;
  float* workspace;
};

struct CpuKernels {
  // Floats of workspace that one (batch, kv head) pair needs.
  int64_t (*forward_workspace)(const Problem&);
  int64_t (*forward_pack_tasks)(const Problem&, int64_t pairs);
  void (*forward_pack)(const ForwardArgs&, const Wave&, int64_t begin, int64_t end);
  int64_t (*forward_tasks)(const Problem&, int64_t pairs);
  void (*forward)(const ForwardArgs&, const Wave&, int64_t begin, int64_t end);

  int64_t (*backward_workspace)(const Problem&);
  int64_t (*backward_pack_tasks)(const Problem&, int64_t pairs);
  void (*backward_pack)(const BackwardArgs&, const Wave&, int64_t begin, int64_t end);
  int64_t (*backward_tasks)(const Problem&, int64_t pairs);
  void (*backward)(const BackwardArgs&, const Wave&, int64_t begin, int64_t end);
  int64_t (*backward_reduce_tasks)(const Problem&, int64_t pairs);
  void (*backward_reduce)(const BackwardArgs&, const Wave&, int64_t begin, int64_t end);
};

}  // namespace arcore::block_sparse_attention
