// What schema.cpp hands to the kernel: raw pointers and int64 sizes in elements, no torch types.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/weights.h"

namespace arcore::decoder_step {

// Hidden channels of a task of `gate`.
constexpr int64_t kGroup = 16;

// Some tokens of each text go through a layer; token t of a text is row text * drafts + t of x.
struct Args {
  int64_t batch, dim, heads, kv_heads, head_dim, hidden;
  int64_t drafts;  // tokens per text; batch is a multiple
  int64_t window;  // tokens seen, the new one included; 0 for all
  float eps, scale;
  StorageType dtype;  // of the caller's x, the norms' weights and the cache
  void* given;        // the caller's x, [batch, dim]
  float* x;           // the same as floats, read and written; `given` itself where that is float32
  const void *norm1, *norm2;
  Weights qkv, out, gate_up, down;
  // [batch / drafts, kv_heads, length, head_dim] with strides; new token t of a text is written at
  // `lengths[text] + t`.
  void *keys, *values;
  int64_t key_row, key_head, value_row, value_head;
  const float *cos, *sin;  // [1 or batch, head_dim]; the sine is negative in the first half
  int64_t angle_row;
  const int64_t* lengths;  // [batch / drafts]
  // [batch], bit t says that new token t of the text is seen, with the token's own bit and none above it;
  // null when each new token sees those before it.
  const int64_t* seen;
  // Scratch, and x where the caller's is 16 bits: projected [batch, qkv.rows], where what a head mixed takes
  // the place of its query; scores [batch, heads, longest]; and packed, as products read tokens, with padded
  // columns, normed [batch, dim], mixed [batch, heads * head_dim], activated [batch, hidden]. Packed scratch
  // begins at whole lines.
  float *normed, *projected, *mixed, *activated, *scores;
  int64_t longest;
};

struct CpuKernels {
  // x from `given`, for 16-bit storage.
  void (*widen)(const Args&);
  // `count` floats to storage.
  void (*narrow)(StorageType, const float* from, void* to, int64_t count);
  // Tokens [batch, cols], rows `from_row` apart, packed.
  void (*pack)(StorageType, const void* from, int64_t from_row, int64_t batch, int64_t cols, float* to);
  // normed = rms_norm(x) * weight, for all rows.
  void (*normalise)(const Args&, const void* weight);
  // out[b, r] (+)= weights[r] . in[b] + bias[r] for rows [begin, end); `in` is packed.
  void (*multiply)(const Weights&, int64_t batch, const float* in, float* out, bool add, int64_t begin,
                   int64_t end);
  // Rows [begin, end) of a weight as floats, [end - begin, cols].
  void (*expand)(const Weights&, float* out, int64_t begin, int64_t end);
  // activated[b, f] = silu(gate) * up for f in kGroup * [begin, end).
  void (*gate)(const Args&, int64_t begin, int64_t end);
  // Rotates, writes the cache and attends, for (text, key head) in [begin, end).
  void (*attend)(const Args&, int64_t begin, int64_t end);
};

}  // namespace arcore::decoder_step
