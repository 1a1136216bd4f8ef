// Views of tensors as common/sequence.h; for schema.cpp files.
#pragma once

#include <optional>

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
  std::ostringstream wanted;
  for (const int64_t size : shape)
    wanted << (wanted.tellp() > 0 ? ", " : "") << size;
  ARCORE_CHECK(fits, op, "expected ", name, " of shape (", wanted.str(), ") but got ", shape_of(t));
}

// float32, contiguous; for small tensors only.
inline torch::stable::Tensor as_floats(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  if (t.scalar_type() == ScalarType::Float && t.is_contiguous()) return t;  // a dispatched call costs 2 us
  return torch::stable::contiguous(
      t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

}  // namespace arcore
