// What schema.cpp hands to the kernel: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/chunk.h"
#include "common/dtype.h"
#include "common/marks.h"

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

// ---- CUDA ----

// Channels of a head that a block has, and steps that it takes at once: a cell. Cells lie on a grid, whatever
// sequences there are. `parts`: of the inputs, see tiles_sm80.cuh.
constexpr int kTileChannels = 64;
constexpr int cell_steps(int64_t states, int parts) {
  return states > 128 || parts > 1 ? 32 : 64;
}

// Steps of a cell, one bit each: which start a sequence, which end one (cu_seqlens), and which are none:
// padding, or behind the row.
struct CellMarks {
  uint64_t starts, ends, skipped;
};

// What all launches of a call share. Step sizes are four of [batch, heads, cells * steps], `sizes` floats
// each, one after the other: dt; the log2 of the decay from the cell's start, or from that of the sequence in
// it, in two parts; and, for gradients only, the derivative of dt.
struct CudaLayout {
  int64_t cells, steps, tiles;  // of a row, of a cell, of the channels of a head
  const int32_t* marks;         // common/marks.h, or null: whole rows
  bool packed;
  CellMarks* cell_marks;  // [batch, cells]
  float* dt;
  int64_t sizes;
  bool slopes;
  // Of the device; results do not depend on them.
  int64_t multiprocessors, shared_of_multiprocessor;
};

struct StepCuda {
  Args in;
  CudaLayout layout;
};

// What happens to the states before the cells of a launch ([batch, cells, heads, dim, states]).
enum class StateUse {
  kNone,
  kKeep,   // they are written
  kOwn,    // what a cell adds to the state is written in their place, and what becomes of the state before
  kEnter,  // each block starts from the one of its first cell
};

// State <- decay state + sum over steps of weight left right^T, over the cells [begin, end): the states, from
// x and B, or, backwards, their gradients, from the gradient of y and C.
struct ScanCuda {
  Args in;
  CudaLayout layout;
  View left, right;
  bool outputs;                                 // also out; forwards only
  bool backwards;                               // from the last cell to the first
  int parts, left_parts;                        // of right, x, B and C; of left: see tiles_sm80.cuh
  int64_t begin, end, segments, segment_cells;  // blocks of a row and head, and how many cells each has
  const float* enter;                           // [batch, heads, dim, states] or null: zeros
  float* leave;                                 // the same, or null
  const float* run_enter;                       // packed rows: [sequences, heads, dim, states] or null: zeros
  float* run_leave;                             // the same, or null
  StateUse use;
  float* states;
  float* passes;  // [batch, cells, heads]: the decay of a cell, -1 where the state before does not pass it
};

// The states before the cells, from what each adds: in place, in order.
struct FoldCuda {
  int64_t batch, cells, heads, size;  // size: dim * states
  bool backwards;
  const float* enter;
  float* leave;
  float* states;
  const float* passes;
};

// The gradient of y, and that of z, where there is a gate.
struct GateCuda {
  Args in;
  CudaLayout layout;
  View grad_out, grad_z;
  View y;  // float32; becomes its gradient
};

// Gradients of what goes into the cells [begin, end), from the states before them and the gradients of those
// after them. A block has a cell and `heads` heads of a group, one of `slices` blocks.
struct GradientCuda {
  Args in;
  CudaLayout layout;
  int parts, left_parts;  // of x, B and C; of the gradient of y
  int64_t begin, end, slices, heads;
  const float *states, *grad_states;  // [batch, cells, heads, dim, states]
  const float* grad_last_state;       // packed rows: [sequences, heads, dim, states], or null: zeros
  View grad_y, grad_x, grad_dt;
  float *partial_A, *partial_bias;  // [batch, cells of the row, heads]
  float* partial_D;                 // [batch, cells of the row, heads, dim], or null
  float *partial_B, *partial_C;     // [batch, groups, slices, cells * steps, states]
  View grad_B, grad_C;
};

// Shared memory forbids more states where the inputs have three parts.
constexpr int64_t kMostStatesOfThreeParts = 128;

// 0 or a cudaError_t.
int launch_marks_sm80(const MarkArgs&, void* stream);
int launch_carry_sm80(const CarryArgs&, void* stream);
int launch_steps_sm80(const StepCuda&, void* stream);
int launch_scan_sm80(const ScanCuda&, void* stream);
int launch_fold_sm80(const FoldCuda&, void* stream);
int launch_gate_sm80(const GateCuda&, void* stream);
int launch_gradients_sm80(const GradientCuda&, void* stream);

}  // namespace arcore::ssd
