// What schema.cpp hands to the kernels: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/chunk.h"
#include "common/dtype.h"

namespace arcore::mamba3_scan {

// A tensor with strides by name; those that it has no dimension for are 0, and data is null where an optional
// tensor is absent. A reversed view has a negative time stride and points at the last step.
struct View {
  void* data;
  int64_t batch, time, head, rank, last;
  StorageType dtype;
};

struct Args {
  int64_t batch, length, heads, rank, dim, states, groups, angles;
  bool halves;          // pairs of states lie half of them apart, not beside each other
  int64_t chunk_rows;   // 1 if every batch row has the same chunks, else batch
  const Chunk* chunks;  // of row b: [first_chunk[b], first_chunk[b + 1]), each of at most kChunk / rank steps
  const int64_t* first_chunk;
  View x, z, out;                  // [batch, time, head, rank, dim]
  View B, C;                       // [batch, time, rank, group, state]; head is the group
  View log_decay, kept, own;       // [batch, time, head]
  View turn;                       // [batch, time, head, angle]
  const float *B_bias, *C_bias;    // [heads, rank, states] or null
  const float* D;                  // [heads] or null
  const float* initial_state;      // [rows, heads, dim, states] contiguous or null
  const float* initial_angle;      // [rows, heads, angles] or null
  float *last_state, *last_angle;  // the same
};

// Partial sums of one task, or one (batch row, head), added in fixed order by backward_reduce and by
// sum_rows.
struct BackwardArgs {
  Args in;                                         // out, last_state and last_angle are not used
  View grad_out;                                   // data null: zero
  const float *grad_last_state, *grad_last_angle;  // as last_state and last_angle, or null: zero
  View grad_x, grad_z, grad_log_decay, grad_kept, grad_own, grad_turn, grad_B, grad_C;
  float *grad_initial_state, *grad_initial_angle;  // or null
  float *partial_B_bias, *partial_C_bias;          // [batch, heads, rank, states]
  float* partial_D;                                // [batch, heads]
  float *partial_B, *partial_C;                    // [tasks, length, rank, states] in scan order
};

// One step of one token per row, which moves the states in place.
struct UpdateArgs {
  int64_t batch, heads, rank, dim, states, groups, angles;
  bool halves;
  View state;                         // [batch, head, dim, states]: rank is the stride of a channel
  View angle;                         // [batch, head, angle]
  View last_B;                        // [batch, head, rank, state]
  View last_x;                        // [batch, head, rank, dim]
  View x, out;                        // [batch, head, rank, dim]
  View B, C;                          // [batch, rank, group, state]; head is the group
  View log_decay, before, now, turn;  // [batch, head], turn [batch, head, angle]
  const float *B_bias, *C_bias, *D;
};

// Work is split into tasks, one per (batch row, block of heads of one group); an update's is a (batch row,
// head).
struct CpuKernels {
  int64_t (*tasks)(const Args&);
  int64_t (*workspace)(const Args&);  // floats per thread
  void (*forward)(const Args&, float* workspace, int64_t begin, int64_t end);
  int64_t (*backward_workspace)(const BackwardArgs&);
  void (*backward)(const BackwardArgs&, float* workspace, int64_t begin, int64_t end);
  void (*backward_reduce)(const BackwardArgs&, int64_t begin, int64_t end);  // tasks: batch * groups
  int64_t (*update_workspace)(const UpdateArgs&);
  void (*update)(const UpdateArgs&, float* workspace, int64_t begin, int64_t end);
};

}  // namespace arcore::mamba3_scan
