// Checks of the weights of linear layers that ops for single tokens share, and how their products are handed
// to threads. For schema.cpp files.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/sequence_view.h"
#include "common/weights.h"

namespace arcore {

// Multiplications below which a second thread costs more than it saves.
constexpr double kProductsPerThread = 2e5;
// Rows of a weight: what is asked ahead behind a piece's last ones is read by another thread.
constexpr Pieces kWeightPieces{.unit = 16, .per_thread = 4};

inline float* floats(const torch::stable::Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

// On the CPU, of that dtype and shape.
inline void check_type(const char* op, const char* name, const torch::stable::Tensor& t,
                       torch::headeronly::ScalarType type, std::initializer_list<int64_t> shape) {
  using torch::headeronly::ScalarType;
  ARCORE_CHECK(t.is_cpu(), op, "expected ", name, " on the CPU");
  ARCORE_CHECK(t.scalar_type() == type, op, "expected ", name, " of dtype ",
               type == ScalarType::Float  ? "float32"
               : type == ScalarType::Byte ? "uint8"
                                          : "bfloat16, as x,",
               " but got ", torch::headeronly::toString(t.scalar_type()));
  check_shape(op, name, t, shape);
}

// Raises unless the dtype is one that steps work in.
inline void check_step_dtype(const char* op, const char* name, const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  ARCORE_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, op,
               "expected ", name, " of dtype float32 or bfloat16 but got ",
               torch::headeronly::toString(t.scalar_type()));
}

// Whether a weight is given as blocks: bytes [rows, blocks of a row, bytes of a block].
inline bool has_blocks(const torch::stable::Tensor& weight) {
  return weight.scalar_type() == torch::headeronly::ScalarType::Byte;
}

// The kind of blocks, told by their size.
inline WeightType block_type(const char* op, const char* name, const torch::stable::Tensor& weight) {
  const int64_t size = weight.dim() == 3 ? weight.size(2) : 0;
  ARCORE_CHECK(size == sizeof(BlockQ8_0) || size == sizeof(BlockQ4_0) || size == sizeof(BlockQ4_1), op,
               "expected ", name, " of bytes, shape (rows, columns / ", kBlockValues,
               ", bytes of a block), with blocks of ", sizeof(BlockQ8_0), " (q8_0), ", sizeof(BlockQ4_0),
               " (q4_0) or ", sizeof(BlockQ4_1), " (q4_1) bytes but got ", shape_of(weight));
  return size == sizeof(BlockQ8_0)   ? WeightType::kQ8_0
         : size == sizeof(BlockQ4_0) ? WeightType::kQ4_0
                                     : WeightType::kQ4_1;
}

// A weight of `type`, or in blocks, and its bias of the same type; `held` owns the bias as floats.
inline Weights weights(const char* op, const char* name, const torch::stable::Tensor& weight,
                       const std::optional<torch::stable::Tensor>& bias, torch::headeronly::ScalarType type,
                       int64_t rows, int64_t cols, std::vector<torch::stable::Tensor>& held) {
  using torch::headeronly::ScalarType;
  WeightType stored = type == ScalarType::Float ? WeightType::kFloat32 : WeightType::kBFloat16;
  if (has_blocks(weight)) {
    stored = block_type(op, name, weight);
    ARCORE_CHECK(cols % kBlockValues == 0, op, "expected columns of ", name, " in whole blocks of ",
                 kBlockValues, " but got ", cols);
    check_type(op, name, weight, ScalarType::Byte, {rows, cols / kBlockValues, weight.size(2)});
  } else {
    check_type(op, name, weight, type, {rows, cols});
  }
  ARCORE_CHECK(weight.is_contiguous(), op, "expected ", name, " to be contiguous");
  const float* of_bias = nullptr;
  if (bias.has_value()) {
    check_type(op, name, *bias, type, {rows});
    ARCORE_CHECK(bias->is_contiguous(), op, "expected the bias of ", name, " to be contiguous");
    held.push_back(as_floats(*bias));
    of_bias = floats(held.back());
  }
  return {weight.data_ptr(), stored, of_bias, rows, cols};
}

// How many threads the product of a weight with `batch` tokens is worth.
inline int64_t threads_of(const Weights& w, int64_t batch) {
  return threads_for(static_cast<double>(batch) * static_cast<double>(w.rows) * static_cast<double>(w.cols),
                     kProductsPerThread);
}

}  // namespace arcore
