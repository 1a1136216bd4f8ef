// What schema.cpp hands to the kernels: raw pointers and int64 strides in elements, no torch types.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace arcore::sample {

constexpr int kMaxSources = 8;

// Columns of the settings matrix, one row of float64 per row of logits (or one for all). A filter is off at
// the value that stands behind it. ops/sample.py fills the matrix and has the same order.
enum Setting {
  kTemperature,  // below kLowestTemperature: the likeliest token alone
  kTopK,         // off: -1, 0, vocab and above
  kTopP,         // off: 1
  kMinP,         // off: 0
  kTypicalP,     // off: 1
  kEpsilon,      // off: 0
  kEta,          // off: 0
  kRepetition,   // off: 1
  kPresence,     // off: 0
  kFrequency,    // off: 0
  kWeights,      // of the sources, in their order
};

constexpr double kLowestTemperature = 1e-5;

// Whether a row's settings are numbers that the kernels can work with. They come in tensors, whose values
// nobody reads before, so that a row with other ones has no distribution. ops/sample.py asks the same of
// plain numbers.
ARCORE_HOST_DEVICE bool settings_hold(const double* s, int num_sources) {
  // Comparisons with NaN are false.
  auto within = [](double x, double low, double high) { return x >= low && x <= high; };
  bool hold = within(s[kTemperature], 0.0, 3e38) && within(s[kTopK], -1.0, HUGE_VAL) &&
              within(s[kTopP], 0.0, 1.0) && within(s[kMinP], 0.0, 1.0) && within(s[kTypicalP], 0.0, 1.0) &&
              within(s[kEpsilon], 0.0, 1.0) && within(s[kEta], 0.0, 1.0) &&
              within(s[kRepetition], 1e-6, 1e6) && within(s[kPresence], -3e38, 3e38) &&
              within(s[kFrequency], -3e38, 3e38);
  for (int i = 0; i < num_sources; ++i)
    hold = hold && within(s[kWeights + i], -3e38, 3e38);
  return hold;
}

enum class Order : int64_t { kHf, kVllm, kJoint };
enum class Mode : int64_t { kInverseCdf, kGumbel, kGreedy };

// One element per (row, token); rows are numbered outer * inner_size + inner.
struct View {
  const void* data;  // null where an optional tensor is absent
  int64_t outer, inner, last;
  StorageType dtype;
};

struct Problem {
  int64_t outer, inner, vocab;
  int num_sources;
  View sources[kMaxSources];  // logits that are mixed with the weights of the settings
  const double* settings;
  int64_t settings_stride;  // 0: one row for all
  View bias;                // float32
  View mask;                // bool: one byte per token; packed: bit i % 32 of word i / 32
  bool mask_is_packed;
  View history, prompt;  // int64 token ids, others than [0, vocab) are padding
  int64_t history_length, prompt_length;
  Order order;
};

// Every pointer but `valid` may be null: not wanted.
struct Outputs {
  uint8_t* valid;   // [rows]
  float* entropy;   // [rows], nats
  int32_t* kept;    // [rows, ceil(vocab / 32)], bit i % 32 of word i / 32
  float* probs;     // [rows, vocab]
  int64_t* tokens;  // [rows, draws]
  float* prob;      // [rows, draws]
  float* logprob;
  float* raw_logprob;
};

struct Draws {
  Mode mode;
  int64_t count;  // per row
  const int64_t* seeds;
  const int64_t* offsets;
  int64_t seed_stride, offset_stride;  // 0: one for all
};

// How a cut through equal confidences is made: as many as wanted, lowest positions first; all of them; none.
enum class Ties : int64_t { kExact, kAll, kNone };

struct Selection {
  const float* confidence;    // [rows, length] contiguous
  const uint8_t* candidates;  // [rows, length] contiguous, or null: all
  int64_t rows, length;
  const int64_t* count;  // [rows], or one number with stride 0
  int64_t count_stride;
  // Gumbel noise times `temperature` is added where that is not 0; strides as in Draws.
  double temperature;
  const int64_t* seeds;
  const int64_t* offsets;
  int64_t seed_stride, offset_stride;
  Ties ties;
  uint8_t* chosen;  // [rows, length]
};

struct CpuKernels {
  int64_t (*workspace_bytes)(int64_t vocab);  // per thread; the workspace starts on a cache line
  // Rows [begin, end); draws are made where outputs.tokens is set.
  void (*run)(const Problem&, const Draws&, const Outputs&, void* workspace, int64_t begin, int64_t end);
  // Rows [begin, end); the workspace is one for a vocabulary of `length`.
  void (*select_least)(const Selection&, void* workspace, int64_t begin, int64_t end);
};

// ---- CUDA ----

ARCORE_HOST_DEVICE int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Rows of up to this many tokens lie in the shared memory of one block (99 KiB on the smallest GPUs), as many
// in that of each block of a cluster (227 KiB).
constexpr int64_t kSharedTokens = 16384, kClusterTokens = 49152;
// Tokens of a block and of a warp are a multiple of this, the last one's apart.
constexpr int kSpan = 256;
// Other rows lie in global memory. Their keys are made by a block for each slice, which leaves the lowest and
// the highest key and their number.
constexpr int64_t kSliceTokens = 8192;
constexpr int kRangeWords = 3;
ARCORE_HOST_DEVICE int64_t slices_of(int64_t vocab) {
  return (vocab + kSliceTokens - 1) / kSliceTokens;
}
ARCORE_HOST_DEVICE int64_t key_stride(int64_t vocab) {
  return round_up(vocab, 8);
}
// Tokens of each block of a cluster.
ARCORE_HOST_DEVICE int64_t slice_of_cluster(int64_t vocab, int blocks) {
  return blocks == 1 ? vocab : round_up((vocab + blocks - 1) / blocks, kSpan);
}

// Blocks for each row: 1; a cluster of 2 to `limit`, a power of two, while there are multiprocessors for them
// and tokens worth a block; 0 for rows that lie in global memory. The result of a call never depends on it.
inline int blocks_of_row(int64_t rows, int64_t vocab, int limit, int64_t multiprocessors) {
  constexpr int64_t kWorthABlock = 2048;
  auto fits = [&](int blocks) {
    return slice_of_cluster(vocab, blocks) <= (blocks == 1 ? kSharedTokens : kClusterTokens);
  };
  int blocks = 1;
  while (2 * blocks <= limit &&
         (!fits(blocks) || (rows * 2 * blocks <= multiprocessors && vocab >= 2 * blocks * kWorthABlock)))
    blocks *= 2;
  return fits(blocks) ? blocks : 0;
}

struct RunCuda {
  Problem problem;
  Draws draws;  // count 0: none
  Outputs out;
  int blocks;       // as blocks_of_row gives
  int32_t* keys;    // [rows, key_stride]; null unless blocks is 0 or a log-probability is wanted
  int32_t* ranges;  // [rows, slices, kRangeWords] where blocks is 0
  uint8_t* keep;    // [rows, vocab], Order::kJoint only
};

struct SelectCuda {
  Selection selection;
  int32_t* keys;  // [rows, key_stride], or null: shared memory
};

// blocks_of_row on the current device, or what ARCORE_SAMPLE_BLOCKS asks for: 1 to 16, or "slices".
// kNoSuchBlocks where the device or the row does not allow that.
constexpr int kNoSuchBlocks = -1;
int blocks_of_run_sm80(int64_t rows, int64_t vocab, int64_t multiprocessors);

// 0 or a cudaError_t.
int launch_run_sm80(const RunCuda&, void* stream);
int launch_select_sm80(const SelectCuda&, void* stream);

}  // namespace arcore::sample
