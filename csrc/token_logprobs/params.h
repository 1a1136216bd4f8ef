// What schema.cpp hands to the kernels: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/row_state.h"

namespace arcore::token_logprobs {

constexpr int kMaxRowDims = 8;

// The rows of a [..., V] tensor whose last dimension is contiguous, in row-major order of the leading
// dimensions. Dimensions that strides allow to merge are merged, so that usually one is left.
struct Rows {
  void* data;
  int dims;
  int64_t sizes[kMaxRowDims], strides[kMaxRowDims];
};

// The kept set: none given, one bool per column, or bit `column % 32` of int32 word `column / 32`.
enum class MaskKind { kNone, kBool, kBits };

// Columns [first_column, first_column + columns) of the logits, whose rows may have more of them.
struct Problem {
  int64_t rows, columns, first_column;
  StorageType dtype;
  double softcap;                 // 0: none
  double temperature;             // where temperature_rows is null
  const float* temperature_rows;  // [rows]
  const int64_t* target;          // [rows], column of the whole row, or ignore_index
  int64_t ignore_index;
  MaskKind mask_kind;
  Rows mask;  // over all columns
};

// A row leaves its RowState behind, for its log-sum-exp and its gradient.
constexpr int64_t kStateDoubles = 4;
static_assert(sizeof(RowState) == kStateDoubles * sizeof(double));

struct UpdateArgs {
  Problem problem;
  Rows logits;
  RowState* state;  // [rows]; written if first_column is 0, else continued
  bool entropy;
};

// What label smoothing and top-1 agreement ask of a row: the columns that can occur, their y, and the
// largest.
struct Tally {
  double sum;     // of y where it is above -inf
  double count;   // of such columns
  double best;    // the largest y
  double column;  // the lowest column that has it; -1 where there is none
};
constexpr int64_t kTallyDoubles = 4;
static_assert(sizeof(Tally) == kTallyDoubles * sizeof(double));

struct TallyArgs {
  Problem problem;
  Rows logits;
  Tally* tally;  // [rows]; written if first_column is 0, else continued
};

struct FinishArgs {
  Problem problem;
  const RowState* state;
  float *logp, *logsumexp;  // [rows]
  float* entropy;           // [rows], or null
};

struct BackwardArgs {
  Problem problem;
  Rows logits, grad;  // may be the same memory
  const RowState* state;
  const float *grad_logp, *grad_logsumexp, *grad_entropy;  // [rows], or null
  float* grad_temperature;                                 // [rows], or null; what these columns add to it
  const float* grad_mean;                                  // [rows], or null; of the mean of y / temperature
  const Tally* tally;                                      // [rows], where grad_mean is given; CPU only
};

struct CpuKernels {
  void (*update)(const UpdateArgs&, int64_t begin, int64_t end);
  void (*finish)(const FinishArgs&, int64_t begin, int64_t end);
  void (*backward)(const BackwardArgs&, int64_t begin, int64_t end);
  void (*tally)(const TallyArgs&, int64_t begin, int64_t end);
};

// ---- CUDA ----

struct UpdateCuda {
  UpdateArgs args;
  FinishArgs finish;  // logp null: the row is continued later
  int64_t slices;     // per row: row_slices_sm80
  RowState* partial;  // [rows, slices] where slices > 1
};

int64_t row_slices_sm80(int64_t columns);

// 0 or a cudaError_t.
int launch_update_sm80(const UpdateCuda&, void* stream);
int launch_finish_sm80(const FinishArgs&, void* stream);
int launch_backward_sm80(const BackwardArgs&, void* stream);

}  // namespace arcore::token_logprobs
