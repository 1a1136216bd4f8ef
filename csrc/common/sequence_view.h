// Views of tensors as common/sequence.h; for schema.cpp files.
#pragma once

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/sequence.h"

namespace arcore {

// The scan direction is a sign: with reverse, the first step is the last one in memory.
inline Sequence sequence_view(const char* op, const char* name, const std::optional<torch::stable::Tensor>& t,
                              bool reverse) {
  if (!t.has_value()) return {};
  const StorageType dtype = storage_type(*t, op, name);
  const int64_t bytes = dtype == StorageType::kFloat32 ? 4 : 2;
  Sequence s{t->data_ptr(), t->stride(0), t->stride(1), t->stride(2), dtype};
  if (reverse && t->size(2) > 0) {
    s.data = static_cast<char*>(s.data) + (t->size(2) - 1) * s.time * bytes;
    s.time = -s.time;
  }
  return s;
}

inline void check_shape(const char* op, const char* name, const torch::stable::Tensor& t,
                        std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape)
    fits = fits && t.size(i++) == size;
  if (fits) return;  // a stream takes as long as a small kernel
  std::ostringstream wanted;
  for (const int64_t size : shape)
    wanted << (wanted.tellp() > 0 ? ", " : "") << size;
  fail("arcore::", op, ": expected ", name, " of shape (", wanted.str(), ") but got ", shape_of(t));
}

// How many of `steps` new tokens count in each row; `held` owns the numbers.
inline const int64_t* step_counts(const char* op, const torch::stable::Tensor& num_steps, int64_t batch,
                                  int64_t steps, std::vector<torch::stable::Tensor>* held) {
  using torch::headeronly::ScalarType;
  check_shape(op, "num_steps", num_steps, {batch});
  ARCORE_CHECK(num_steps.scalar_type() == ScalarType::Int || num_steps.scalar_type() == ScalarType::Long, op,
               "expected num_steps of dtype int32 or int64 but got ",
               torch::headeronly::toString(num_steps.scalar_type()));
  held->push_back(torch::stable::contiguous(torch::stable::to(num_steps, ScalarType::Long)));
  const auto* counts = static_cast<const int64_t*>(held->back().data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    ARCORE_CHECK(counts[b] >= 0 && counts[b] <= steps, op, "expected num_steps from 0 to the ", steps,
                 " steps of x but got ", counts[b]);
  return counts;
}

// float32, contiguous; for small tensors only.
inline torch::stable::Tensor as_floats(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  if (t.scalar_type() == ScalarType::Float && t.is_contiguous()) return t;  // a dispatched call costs 2 us
  return torch::stable::contiguous(
      t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

}  // namespace arcore
