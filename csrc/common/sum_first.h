// Sums of partial results on the device; for cuda.cpp files.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace arcore {

// The sum over the first dimension in the shape and dtype of `like`. PyTorch sums without atomics.
inline torch::stable::Tensor sum_first(const torch::stable::Tensor& partial,
                                       const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  const int64_t first[] = {0};
  const torch::stable::Tensor total = partial.size(0) == 1 ? torch::stable::view(partial, like.sizes())
                                                           : torch::stable::sum(partial, first, false);
  return like.scalar_type() == ScalarType::Float ? total : torch::stable::to(total, like.scalar_type());
}

}  // namespace arcore
