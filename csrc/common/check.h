// Argument checks of the ops: one message that names the op and the argument, what was expected and what
// came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

// ARCORE_CHECK(ok, "block_sparse_attention", "expected ... but got ", value, "; fix") throws a RuntimeError
// in Python.
#define ARCORE_CHECK(condition, op, ...)                                 \
  do {                                                                   \
    if (!(condition)) ::arcore::fail("arcore::", op, ": ", __VA_ARGS__); \
  } while (false)

namespace arcore {

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const torch::stable::Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i)
    text << (i ? ", " : "") << t.size(i);
  text << ")";
  return text.str();
}

// Tensors of one call lie on one device.
inline void check_device(const char* op, const char* name, const torch::stable::Tensor& t,
                         const torch::stable::Tensor& like) {
  ARCORE_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op,
               "expected ", name, " on the device of the other tensors but got ",
               t.is_cpu() ? "the CPU" : "a GPU", " (index ", static_cast<int>(t.get_device_index()),
               "); move it with .to(device)");
}

inline StorageType storage_type(const torch::stable::Tensor& t, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return StorageType::kFloat32;
    case ScalarType::BFloat16:
      return StorageType::kBFloat16;
    case ScalarType::Half:
      return StorageType::kFloat16;
    default:
      fail("arcore::", op, ": expected ", name, " of dtype float32, bfloat16 or float16 but got ",
           torch::headeronly::toString(t.scalar_type()), "; convert it with .float()");
  }
}

}  // namespace arcore
