// What schema.cpp hands to the kernel: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/chunk.h"
#include "common/dtype.h"

namespace arcore::ssd {

// A [batch, time, head or group, last] tensor; data is null where an optional tensor is absent. A reversed
// view has a negative time stride and points at the last step.
struct View {
  void* data;
  int64_t batch, time, head, last;
  StorageType dtype;
};

struct Args {
  int64_t batch, length, heads, dim, states, groups;
  bool softplus;
  float dt_low, dt_high;
  int64_t chunk_rows;   // 1 if every batch row has the same chunks, else batch
  const Chunk* chunks;  // of row b: [first_chunk[b], first_chunk[b + 1])
  const int64_t* first_chunk;
  View x, z, out;
  View dt;                     // last is unused
  View B, C;                   // head is the group
  const float* A;              // [heads]
  const float* D;              // [heads, dim] or null
  const float* dt_bias;        // [heads] or null
  const float* initial_state;  // [rows, heads, dim, states] contiguous or null
  float* last_state;           // the same
};

// Partial sums of one task, or one (batch row, head), added in fixed order by backward_reduce and by
// sum_rows.
struct BackwardArgs {
  Args in;                       // out and last_state are not used
  View grad_out;                 // data null: zero
  const float* grad_last_state;  // as last_state, or null: zero
  View grad_x, grad_dt, grad_z, grad_B, grad_C;
  float* grad_initial_state;        // [rows, heads, dim, states] or null
  float *partial_A, *partial_bias;  // [batch, heads]
  float* partial_D;                 // [batch, heads, dim]
  float *partial_B, *partial_C;     // [tasks, length, states] in scan order
};

// Work is split into tasks, one per (batch row, block of heads that share B and C).
struct CpuKernels {
  int64_t (*tasks)(const Args&);
  int64_t (*workspace)(const Args&);  // floats per thread
  void (*forward)(const Args&, float* workspace, int64_t begin, int64_t end);
  int64_t (*backward_workspace)(const BackwardArgs&);
  void (*backward)(const BackwardArgs&, float* workspace, int64_t begin, int64_t end);
  void (*backward_reduce)(const BackwardArgs&, int64_t begin, int64_t end);  // tasks: batch * groups
};

}  // namespace arcore::ssd
