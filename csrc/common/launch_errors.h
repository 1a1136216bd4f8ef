// What a launch that was not even tried answers, beside the cudaError_t of one that failed.
#pragma once

#include <cstdint>

namespace arcore {

constexpr int kGridTooLarge = -2, kSharedTooLarge = -3;

// Blocks that a grid can have in its first dimension, and in each of the others.
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1, kMostBlocksYZ = 65535;

}  // namespace arcore
