// What schema.cpp hands to the kernels: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/named_rows.h"
#include "common/sequence.h"

namespace arcore::causal_conv1d {

// Steps of one sequence of a packed row, in scan order.
struct Span {
  int64_t begin, length;
};

// With spans, every sequence of a packed row counts as a row of the batch: batch strides of sequences are 0,
// and `length` is that of the packed row.
struct Problem {
  int64_t batch, dim, length, width;
  bool silu;
  const Span* spans;  // [batch] or null
};

struct Inputs {
  Sequence x;
  const float* weight;   // [dim, width] contiguous
  const float* bias;     // [dim] or null
  const float* history;  // [batch, dim, width - 1] contiguous or null: the inputs before x
  // All bits set where the output may use the tap, else 0: [batch, width, length], or null if it always may.
  // The last tap's row also says which outputs are real; the others are 0.
  const uint32_t* masks;
};

struct ForwardArgs {
  Problem problem;
  Inputs in;
  Sequence out;
};

struct BackwardArgs {
  Problem problem;
  Inputs in;
  Sequence grad_out;  // data null: zero
  Sequence grad_x;
  float* partial_weight;  // [batch, dim, width]
  float* partial_bias;    // [batch, dim]
  float* grad_history;    // [batch, dim, width - 1] contiguous or null
};

// The state before the first new input of each row and after each of them; data null: not wanted.
struct Snapshots {
  void* data;  // of the state's dtype
  int64_t batch, step, channel, time;
};

// One token or a few per row against a state of the last inputs.
struct UpdateArgs {
  int64_t batch, dim, steps, width, state_length;
  bool silu;
  Sequence x, out, state;
  const float* weight;
  const float* bias;
  const int64_t* write_at;  // [batch] position of the first new input in a circular state, or null: shift
  const int64_t* rows;      // [batch] row of the state, negative: padding, or null
  const int64_t* counts;    // [batch] how many of the new inputs count, or null: all
  Snapshots snapshots;
};

// Work is split into tasks, one per (batch row, group of `lanes` channels).
struct CpuKernels {
  int64_t lanes;
  int64_t (*forward_workspace)(const Problem&);  // floats per thread
  void (*forward)(const ForwardArgs&, float* workspace, int64_t begin, int64_t end);
  int64_t (*backward_workspace)(const Problem&);
  void (*backward)(const BackwardArgs&, float* workspace, int64_t begin, int64_t end);
  void (*update)(const UpdateArgs&, int64_t begin, int64_t end);  // tasks: batch rows
};

// ---- CUDA ----

// Steps and channels of a block; a backward block writes partial sums for each of its runs of steps.
constexpr int kCudaSteps = 64, kCudaChannels = 32;
constexpr int64_t kMaxCudaWidth = 129;

// Sequence ids in scan order: data points at the first step. data null: every row is one sequence.
struct SequenceIds {
  const int32_t* data;
  int64_t batch, time;
};

struct ForwardCuda {
  ForwardArgs args;  // in.masks is not used
  SequenceIds ids;
  Sequence final_states;
};

struct BackwardCuda {
  // partial_weight: [batch * runs, dim, width], partial_bias: [batch * runs, dim], runs of kCudaSteps steps.
  BackwardArgs args;
  SequenceIds ids;
  const float* grad_final;  // [batch, dim, width - 1] contiguous or null
};

struct UpdateCuda {
  UpdateArgs args;  // rows and write_at are not used
  NamedRows rows, write_at;
  int64_t state_rows;
};

// 0 or a cudaError_t.
int launch_forward_sm80(const ForwardCuda&, void* stream);
int launch_backward_sm80(const BackwardCuda&, void* stream);
int launch_update_sm80(const UpdateCuda&, void* stream);

}  // namespace arcore::causal_conv1d
