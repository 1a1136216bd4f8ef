// What schema.cpp hands to the kernel: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/named_rows.h"

namespace arcore::selective_state_update {

// A [batch, step, head, channel or state] tensor; data is null where an optional tensor is absent. Mamba-1
// has one head.
struct View {
  void* data;
  int64_t batch, step, head, last;
  StorageType dtype;
};

struct State {
  void* data;
  int64_t row, head, channel, state;
  StorageType dtype;
};

// The state before the first step of each row and after each; data null: not wanted. Of the state's dtype.
struct Snapshots {
  void* data;
  int64_t batch, step, head, channel, state;
};

struct Args {
  int64_t steps;
  int64_t batch, heads, dim, states, groups;
  bool softplus;
  // One decay for all channels and states of a head: A is then [heads].
  bool tied;
  State state;
  View x, dt, z, out;
  View B, C;             // head is the group
  const float* A;        // [heads, dim, states] contiguous, or [heads] if tied
  const float* D;        // [heads, dim] or null
  const float* dt_bias;  // [heads, dim] or null
  const int64_t* rows;   // [batch] row of the state; `pad` or negative: nothing to do; or null
  int64_t pad;
  const int64_t* counts;  // [batch] how many of the steps count, or null: all
  Snapshots snapshots;
};

// Work is split into tasks, one per (head, slice of `slice` channels); each goes through the batch in order,
// so rows of the state that are named twice are updated one after the other.
struct CpuKernels {
  int64_t slice;
  void (*update)(const Args&, int64_t begin, int64_t end);
};

// ---- CUDA ----

struct UpdateCuda {
  Args args;  // rows is not used
  NamedRows rows;
  int64_t state_rows;
};

// 0 or a cudaError_t.
int launch_update_sm80(const UpdateCuda&, void* stream);

}  // namespace arcore::selective_state_update
