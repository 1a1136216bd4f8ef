// Scratch of threads and sums of partial results; for schema.cpp files.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <exception>

#include "common/check.h"
#include "common/new_tensor.h"
#include "common/parallel.h"

namespace arcore {

// `count` floats of scratch, or an error that says how much was wanted.
inline torch::stable::Tensor scratch_floats(const char* op, const torch::stable::Tensor& like,
                                            int64_t count) {
  try {
    return make_empty(like, {count}, torch::headeronly::ScalarType::Float);
  } catch (const std::exception&) {
    // What torch says here is where in its sources the call failed.
  }
  fail("arcore::", op, ": could not allocate ", (count * 4 + (1 << 20) - 1) >> 20,
       " MiB of scratch; free memory, or split the batch");
}

// Runs run(workspace, begin, end) over the tasks; every thread gets `floats` of scratch of its own, on cache
// lines.
template <typename Run>
void run_with_workspace(const torch::stable::Tensor& like, int64_t tasks, int64_t threads, int64_t floats,
                        const Run& run, Pieces cut = {}) {
  const int64_t stride = (floats + 15) / 16 * 16;
  torch::stable::Tensor workspace =
      make_empty(like, {std::max<int64_t>(std::min(tasks, threads), 1) * stride + 16},
                 torch::headeronly::ScalarType::Float);
  const auto address = reinterpret_cast<uintptr_t>(workspace.data_ptr());
  float* aligned = reinterpret_cast<float*>((address + 63) / 64 * 64);
  const auto share_of = [&](int64_t share, int64_t begin, int64_t end) {
    run(aligned + share * stride, begin, end);
  };
  run_shares(tasks, threads, share_of, cut);
}

// Sum of float partial results over their first dimension, in row order, in the shape and dtype of `like`.
inline torch::stable::Tensor sum_rows(const torch::stable::Tensor& partial,
                                      const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  const int64_t rows = partial.size(0), size = like.numel();
  torch::stable::Tensor total = make_empty(partial, like.sizes(), ScalarType::Float);
  const float* src = static_cast<const float*>(partial.data_ptr());
  float* dst = static_cast<float*>(total.data_ptr());
  for (int64_t i = 0; i < size; ++i) {
    float sum = 0.0f;
    for (int64_t r = 0; r < rows; ++r)
      sum += src[r * size + i];
    dst[i] = sum;
  }
  return like.scalar_type() == ScalarType::Float ? total : torch::stable::to(total, like.scalar_type());
}

}  // namespace arcore
