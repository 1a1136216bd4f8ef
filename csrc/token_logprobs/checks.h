// Argument checks and views that the CPU and the CUDA side of token_logprobs share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "common/check.h"
#include "common/new_tensor.h"
#include "token_logprobs/params.h"

namespace arcore::token_logprobs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "token_logprobs";
constexpr const char* kBackwardOp = "token_logprobs_backward";
constexpr const char* kUpdateOp = "token_logprobs_update_";
constexpr const char* kFinishOp = "token_logprobs_finish";
constexpr const char* kTileBackwardOp = "token_logprobs_tile_backward_";
constexpr const char* kTallyOp = "token_logprobs_tally_";

// The rows of t, whose last dimension the kernels read as contiguous.
inline Rows rows_of(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  ARCORE_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, "expected ", name,
               " whose last dimension has stride 1 but got stride ", t.stride(last),
               "; make it contiguous first");
  Rows rows{t.data_ptr(), 0, {}, {}};
  for (int64_t d = 0; d < last; ++d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    if (rows.dims > 0 && rows.strides[rows.dims - 1] == size * stride) {
      rows.sizes[rows.dims - 1] *= size;
      rows.strides[rows.dims - 1] = stride;
      continue;
    }
    ARCORE_CHECK(rows.dims < kMaxRowDims, op, "expected ", name, " of at most ", kMaxRowDims + 1,
                 " dimensions but got ", shape_of(t));
    rows.sizes[rows.dims] = size;
    rows.strides[rows.dims] = stride;
    ++rows.dims;
  }
  return rows;
}

inline bool same_rows(const Tensor& t, const Tensor& logits) {
  bool same = t.dim() == logits.dim();
  for (int64_t d = 0; same && d + 1 < t.dim(); ++d)
    same = t.size(d) == logits.size(d);
  return same;
}

inline int64_t count_rows(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d)
    rows *= logits.size(d);
  return rows;
}

template <typename T>
T* row_values(const char* op, const char* name, const Tensor& t, int64_t rows, ScalarType dtype) {
  ARCORE_CHECK(t.scalar_type() == dtype && t.numel() == rows && t.is_contiguous(), op, "expected ", name,
               " as a contiguous tensor of ", rows, " ", torch::headeronly::toString(dtype), " but got ",
               torch::headeronly::toString(t.scalar_type()), " ", shape_of(t));
  return static_cast<T*>(t.data_ptr());
}

// The part of the arguments that every op shares; `vocab` is the number of columns that targets may name.
inline Problem check_rows(const char* op, int64_t rows, int64_t vocab, const Tensor& target,
                          const OptionalTensor& temperature_rows, double temperature, double softcap,
                          int64_t ignore_index) {
  Problem p{};
  p.rows = rows;
  p.columns = vocab;
  p.target = row_values<const int64_t>(op, "target", target, rows, ScalarType::Long);
  p.ignore_index = ignore_index;
  ARCORE_CHECK(std::isfinite(softcap) && softcap >= 0.0, op,
               "expected softcap to be positive, or 0 for none, but got ", softcap);
  p.softcap = softcap;
  ARCORE_CHECK(std::isfinite(temperature) && temperature > 0.0, op,
               "expected temperature to be positive and finite but got ", temperature);
  p.temperature = temperature;
  if (temperature_rows.has_value()) {
    p.temperature_rows =
        row_values<const float>(op, "temperature_rows", *temperature_rows, rows, ScalarType::Float);
    check_device(op, "temperature_rows", *temperature_rows, target);
    for (int64_t r = 0; temperature_rows->is_cpu() && r < rows; ++r)
      ARCORE_CHECK(std::isfinite(p.temperature_rows[r]) && p.temperature_rows[r] > 0.0f, op,
                   "expected temperature to be positive and finite but got ", p.temperature_rows[r],
                   " in row ", r);
  }
  for (int64_t r = 0; target.is_cpu() && r < rows; ++r)
    ARCORE_CHECK(p.target[r] == ignore_index || (p.target[r] >= 0 && p.target[r] < vocab), op,
                 "expected targets in [0, ", vocab, ") or ignore_index=", ignore_index, " but got ",
                 p.target[r], " in row ", r);
  return p;
}

inline void check_mask(const char* op, Problem& p, const OptionalTensor& mask, const Tensor& logits,
                       int64_t vocab) {
  if (!mask.has_value()) return;
  const bool bits = mask->scalar_type() == ScalarType::Int;
  ARCORE_CHECK(bits || mask->scalar_type() == ScalarType::Bool, op,
               "expected mask of dtype bool, or int32 with 32 columns a word, but got ",
               torch::headeronly::toString(mask->scalar_type()));
  const int64_t width = bits ? (vocab + 31) / 32 : vocab;
  check_device(op, "mask", *mask, logits);
  ARCORE_CHECK(same_rows(*mask, logits) && mask->size(mask->dim() - 1) == width, op,
               "expected mask with the rows of logits ", shape_of(logits), " and a last dimension of ", width,
               " but got ", shape_of(*mask));
  p.mask_kind = bits ? MaskKind::kBits : MaskKind::kBool;
  p.mask = rows_of(op, "mask", *mask);
}

inline Problem check_logits(const char* op, const Tensor& logits, const Tensor& target,
                            const OptionalTensor& temperature_rows, const OptionalTensor& mask,
                            double temperature, double softcap, int64_t ignore_index) {
  ARCORE_CHECK(logits.dim() >= 1, op, "expected logits of shape [..., V] but got ", shape_of(logits));
  check_device(op, "target", target, logits);
  const int64_t vocab = logits.size(logits.dim() - 1);
  Problem p =
      check_rows(op, count_rows(logits), vocab, target, temperature_rows, temperature, softcap, ignore_index);
  p.dtype = storage_type(logits, op, "logits");
  check_mask(op, p, mask, logits, vocab);
  return p;
}

// As check_logits, for columns [first_column, first_column + tile.size(1)) of rows that are `vocab` wide.
inline Problem check_tile(const char* op, const Tensor& tile, const Tensor& target,
                          const OptionalTensor& temperature_rows, const OptionalTensor& mask,
                          double temperature, double softcap, int64_t ignore_index, int64_t first_column,
                          int64_t vocab) {
  // As a difference: the sum could overflow.
  ARCORE_CHECK(
      tile.dim() == 2 && vocab >= 0 && first_column >= 0 && first_column % 32 == 0 && first_column <= vocab &&
          tile.size(1) <= vocab - first_column,
      op, "expected a tile [rows, columns] that starts at a multiple of 32 columns and ends by vocab=", vocab,
      " but got ", shape_of(tile), " from column ", first_column);
  check_device(op, "target", target, tile);
  Problem p =
      check_rows(op, tile.size(0), vocab, target, temperature_rows, temperature, softcap, ignore_index);
  p.dtype = storage_type(tile, op, "tile");
  check_mask(op, p, mask, tile, vocab);
  p.first_column = first_column;
  p.columns = tile.size(1);
  return p;
}

// What an op that writes into `written` asks of its other arguments.
inline void check_apart(const char* op, const char* written_name, const Tensor& written, const char* name,
                        const Tensor& t) {
  auto bytes_of = [](const Tensor& x) {
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d)
      last += (x.size(d) - 1) * x.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
    const int64_t elements = x.numel() == 0 ? 0 : last + 1;
    return std::pair(begin, begin + static_cast<uintptr_t>(elements) * x.element_size());
  };
  const auto [begin, end] = bytes_of(written);
  const auto [other_begin, other_end] = bytes_of(t);
  ARCORE_CHECK(begin == end || other_begin == other_end || end <= other_begin || other_end <= begin, op,
               "expected ", name, " apart from ", written_name,
               ", which is written in place, but their memory overlaps; pass ", name, ".clone()");
}

inline void check_apart(const char* op, const char* written_name, const Tensor& written, const char* name,
                        const OptionalTensor& t) {
  if (t.has_value()) check_apart(op, written_name, written, name, *t);
}

inline void check_no_overlap(const char* op, const char* name, const Tensor& tile) {
  ARCORE_CHECK(tile.size(0) <= 1 || tile.stride(0) >= tile.size(1), op, "expected ", name,
               " whose rows do not overlap, since it is written in place, but got row stride ",
               tile.stride(0), " for ", tile.size(1), " columns; pass ", name, ".contiguous()");
}

// Where the gradient goes: laid out as the logits, unless these overlap or their rows are no vectors.
inline Tensor gradient_like(const Tensor& logits) {
  Tensor grad = make_empty_like(logits);
  const int64_t last = logits.dim() - 1;
  if (grad.size(last) <= 1 || grad.stride(last) == 1) return grad;
  return make_empty(logits, logits.sizes());
}

inline RowState* state_of(const char* op, const Tensor& state, int64_t rows) {
  return reinterpret_cast<RowState*>(
      row_values<double>(op, "state", state, rows * kStateDoubles, ScalarType::Double));
}

inline Tally* tally_of(const char* op, const Tensor& tally, int64_t rows) {
  return reinterpret_cast<Tally*>(
      row_values<double>(op, "tally", tally, rows * kTallyDoubles, ScalarType::Double));
}

// The gradient of the mean and what it needs, into `args`.
inline void set_grad_mean(const char* op, BackwardArgs& args, const OptionalTensor& grad_mean,
                          const OptionalTensor& tally) {
  if (!grad_mean.has_value()) return;
  ARCORE_CHECK(tally.has_value(), op, "expected tally together with grad_mean but got none");
  args.grad_mean = row_values<const float>(op, "grad_mean", *grad_mean, args.problem.rows, ScalarType::Float);
  args.tally = tally_of(op, *tally, args.problem.rows);
}

struct RowGrads {
  const float *logp = nullptr, *logsumexp = nullptr, *entropy = nullptr;
};

inline RowGrads check_grads(const char* op, const OptionalTensor& logp, const OptionalTensor& logsumexp,
                            const OptionalTensor& entropy, int64_t rows) {
  RowGrads grads;
  if (logp.has_value()) grads.logp = row_values<const float>(op, "grad_logp", *logp, rows, ScalarType::Float);
  if (logsumexp.has_value())
    grads.logsumexp = row_values<const float>(op, "grad_logsumexp", *logsumexp, rows, ScalarType::Float);
  if (entropy.has_value())
    grads.entropy = row_values<const float>(op, "grad_entropy", *entropy, rows, ScalarType::Float);
  return grads;
}

}  // namespace arcore::token_logprobs
