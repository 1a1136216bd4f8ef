// What schema.cpp hands to the kernel: raw pointers and int64 sizes in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/weights.h"

namespace arcore::mamba_step {

// Channels of a task of `convolve`; whole vectors of any instruction set.
constexpr int64_t kGroup = 16;
// Taps of the convolution.
constexpr int64_t kFewestTaps = 2, kMostTaps = 8;
// States of a channel.
constexpr int64_t kMostStates = 256;

struct Args {
  int64_t batch, dim, inner, rank, states, taps;
  float eps;
  StorageType dtype;  // of the caller's x
  void* given;        // the caller's x, [batch, dim]
  float* x;           // the same as floats, read and written; `given` itself where that is float32
  const float* norm;
  // [2 inner, dim], [rank + 2 states, inner], [inner, rank], [dim, inner].
  Weights in_proj, x_proj, dt_proj, out_proj;
  const float* conv_weight;  // [inner, taps] with strides
  int64_t weight_channel, weight_tap;
  const float* conv_bias;  // [inner] or null
  const float *A, *D;      // [inner, states], [inner]
  void* conv_state;        // [batch, taps - 1, inner] with strides, oldest input first
  StorageType conv_dtype;
  int64_t conv_row, conv_time;
  float* state;  // [batch, inner, states], rows with a stride
  int64_t state_row;
  // Scratch: projected [batch, 2 inner], selected [batch, rank + 2 states], delta [batch, inner]; and packed,
  // as products read tokens, with padded columns, normed [batch, dim], low_rank [batch, rank] and mixed
  // [batch, inner], which is the convolution's output and then the scan's. Packed scratch begins at whole
  // lines.
  float *normed, *low_rank, *mixed, *projected, *selected, *delta;
};

struct CpuKernels {
  int64_t slice;  // channels of a task of `scan`
  // x from `given`, for 16-bit storage.
  void (*widen)(const Args&);
  // `count` floats to storage.
  void (*narrow)(StorageType, const float* from, void* to, int64_t count);
  // normed = rms_norm(x) * norm.
  void (*normalise)(const Args&);
  // Tokens [batch, cols] of floats, rows `from_row` apart, packed.
  void (*pack)(StorageType, const void* from, int64_t from_row, int64_t batch, int64_t cols, float* to);
  // out[b, r] (+)= weights[r] . in[b] + bias[r] for rows [begin, end); `in` is packed.
  void (*multiply)(const Weights&, int64_t batch, const float* in, float* out, bool add, int64_t begin,
                   int64_t end);
  // mixed = silu(convolution), and its state moves on, for channels kGroup * [begin, end).
  void (*convolve)(const Args&, int64_t begin, int64_t end);
  // Step sizes, and mixed = the gated output of the scan, whose state moves on, for channels
  // slice * [begin, end).
  void (*scan)(const Args&, int64_t begin, int64_t end);
};

}  // namespace arcore::mamba_step
