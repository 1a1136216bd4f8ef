// What schema.cpp hands to the kernels: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/chunk.h"
#include "common/dtype.h"
#include "common/marks.h"
#include "common/sequence.h"

namespace arcore::selective_scan {

// B or C. Varying: [batch, group, state, time]. Constant: [channel, state], with groups = 0.
struct Coefficient {
  void* data;
  int64_t batch, channel, state, time;  // channel is the stride of the group where varying
  int64_t groups;
  StorageType dtype;
};

struct Problem {
  int64_t batch, dim, length, state;
  bool delta_softplus;
  int64_t slots;        // kept states per row
  int64_t chunk_rows;   // 1 if every batch row has the same chunks, else batch
  const Chunk* chunks;  // of row b: [first_chunk[b], first_chunk[b + 1])
  const int64_t* first_chunk;
};

struct Inputs {
  Sequence u, delta, z;
  const float* A;  // [dim, state] contiguous
  Coefficient B, C;
  const float* D;              // [dim] or null
  const float* delta_bias;     // [dim] or null
  const float* initial_state;  // [rows, dim, state] contiguous or null
};

struct ForwardArgs {
  Problem problem;
  Inputs in;
  Sequence out;
  float* last_state;  // [rows, dim, state] contiguous
  float* states;      // [batch, slots, state, dim] contiguous or null
};

// Partial sums of one (batch row, slice of channels), added in fixed order by backward_reduce.
struct BackwardArgs {
  Problem problem;
  Inputs in;
  Sequence grad_out;             // data null: zero
  const float* grad_last_state;  // null: zero
  const float* states;
  Sequence grad_u, grad_delta, grad_z;
  float* grad_initial_state;  // [rows, dim, state] contiguous or null
  float* partial_B;           // varying: [batch, slices, length, state]; constant: [batch, dim, state]
  float* partial_C;
  float* partial_A;            // [batch, dim, state]
  float* partial_D;            // [batch, dim]
  float* partial_delta_bias;   // [batch, dim]
  Coefficient grad_B, grad_C;  // varying only
};

// Tangents of out and of the last state along tangents of the inputs; where one is absent (data null) it is
// 0.
struct TangentArgs {
  Problem problem;
  Inputs in;
  Inputs along;
  Sequence out;
  float* last_state;  // [rows, dim, state] contiguous
};

// Work is split into tasks, one per (batch row, slice of channels); any split of the tasks over threads gives
// the same result.
struct CpuKernels {
  int64_t (*slices)(const Problem&, const Inputs&);
  int64_t (*forward_workspace)(const Problem&, const Inputs&);  // floats per thread
  void (*forward)(const ForwardArgs&, float* workspace, int64_t begin, int64_t end);
  int64_t (*backward_workspace)(const Problem&, const Inputs&);
  void (*backward)(const BackwardArgs&, float* workspace, int64_t begin, int64_t end);
  // Adds partial_B and partial_C over slices into grad_B and grad_C: tasks [0, batch * max(groups)).
  void (*backward_reduce)(const BackwardArgs&, int64_t begin, int64_t end);
  int64_t (*tangent_workspace)(const Problem&, const Inputs&);
  void (*tangent)(const TangentArgs&, float* workspace, int64_t begin, int64_t end);
};

// ---- CUDA ----

// Steps that a block stages at once, and the distance of the states that the CUDA forward keeps for its
// backward. python/arcore/ops/selective_scan.py has it too (CUDA_CHUNK).
constexpr int kCudaChunk = 32;

// h[t] = a[t] h[t - 1] + b[t] over the rows of contiguous [rows, length], in their own type.
struct LinearArgs {
  const void *a, *b, *initial;  // initial: [rows], or null for zeros
  void* out;
  int64_t rows, length;
  bool reverse, wide;  // from the last step to the first; float64
};

// A block works on up to `cell` channels that share B and C.
struct CudaLayout {
  int64_t cells, cell;
  int64_t blocks;        // per batch row and segment: blocks_per_row_sm80
  const int32_t* marks;  // null: whole rows
  bool packed;           // cu_seqlens: marks name rows of the states
  // Long rows of few channels are cut into segments of so many chunks, which blocks go through side by side
  // once a first launch has left what each adds to the state (backward: to its gradient) that enters it.
  int64_t segments, segment_chunks;
  float* ends;    // [batch, segments, state, dim]: what leaves a segment that is entered by zeros
  float* passes;  // [batch, segments, 2, dim]: the sum of dt, and 0 where a sequence starts inside, else 1
};

// How many chunks a segment has, for rows of `length` steps that `blocks` blocks share: a function of one
// row, so that its results do not depend on the others of a batch.
inline int64_t segment_chunks_of(int64_t length, int64_t blocks) {
  constexpr int64_t kLongRow = 8192, kLeastSteps = 1024, kMostSegments = 64, kWantedBlocks = 512;
  const int64_t chunks = (length + kCudaChunk - 1) / kCudaChunk;
  if (length < kLongRow || blocks * 2 > kWantedBlocks || blocks == 0) return chunks;
  int64_t segments = (kWantedBlocks + blocks - 1) / blocks;
  segments = segments < length / kLeastSteps ? segments : length / kLeastSteps;
  segments = segments < kMostSegments ? segments : kMostSegments;
  return (chunks + segments - 1) / segments;
}

struct ForwardCuda {
  ForwardArgs args;  // problem.chunks is not used
  CudaLayout layout;
  bool ahead;  // inputs lie so that chunks can be copied one ahead: fwd_sm80.cuh sets it
};

struct BackwardCuda {
  BackwardArgs args;
  CudaLayout layout;
  bool ahead;  // as in the forward
};  // partial_B and partial_C varying: [batch, layout.blocks, length, state] in scan order

int64_t blocks_per_row_sm80(int64_t state, int64_t cells, int64_t cell);

// 0 or a cudaError_t.
int launch_marks_sm80(const MarkArgs&, void* stream);
int launch_carry_sm80(const CarryArgs&, void* stream);
int launch_forward_sm80(const ForwardCuda&, void* stream);
int launch_backward_sm80(const BackwardCuda&, void* stream);
int launch_linear_sm80(const LinearArgs&, void* stream);

}  // namespace arcore::selective_scan
