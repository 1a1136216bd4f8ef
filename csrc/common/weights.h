// Weights of linear layers as steps of single tokens read them, without any torch header.
#pragma once

#include <cstdint>

namespace arcore {

// Floats of a cache line: what products read is padded to whole ones.
constexpr int64_t kLineFloats = 16;
constexpr int64_t padded(int64_t floats) {
  return (floats + kLineFloats - 1) / kLineFloats * kLineFloats;
}
// Tokens that share one pass over the weights.
constexpr int64_t kMaxTokens = 64;

// How the numbers of a weight are stored: one by one, or in blocks along its rows as GGUF files have them.
enum class WeightType { kFloat32, kBFloat16, kQ8_0, kQ4_0, kQ4_1 };
// Numbers of a block; its scale and lowest number are float16. Bytes only, so blocks may begin anywhere.
constexpr int64_t kBlockValues = 32;
// values[i] * scale.
struct BlockQ8_0 {
  uint8_t scale[2];
  int8_t values[kBlockValues];
};
// (four bits - 8) * scale; byte i holds numbers i and, in its high half, i + 16.
struct BlockQ4_0 {
  uint8_t scale[2], pairs[kBlockValues / 2];
};
// four bits * scale + lowest.
struct BlockQ4_1 {
  uint8_t scale[2], lowest[2], pairs[kBlockValues / 2];
};
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20);

// A linear layer [rows, cols], contiguous; bias is null where there is none.
struct Weights {
  const void* weight;
  WeightType type;
  const float* bias;
  int64_t rows, cols;
};

}  // namespace arcore
