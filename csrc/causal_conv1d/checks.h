// Argument checks and views that the CPU and the CUDA side of causal_conv1d share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "causal_conv1d/params.h"
#include "common/check.h"
#include "common/overlap.h"
#include "common/sequence_view.h"

namespace arcore::causal_conv1d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "causal_conv1d";
constexpr const char* kBackwardOp = "causal_conv1d_backward";
constexpr const char* kUpdateOp = "causal_conv1d_update";

inline Sequence view(const char* op, const char* name, const Tensor& t, bool reverse = false) {
  return sequence_view(op, name, t, reverse);
}

// [batch, dim] or [batch, dim, steps].
inline Sequence view_of_steps(const char* name, const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.dim() == 3 ? t.stride(2) : 0,
          storage_type(t, kUpdateOp, name)};
}

// The arguments of a convolution; owns what the raw pointers of Inputs point at. Masks are left to the
// caller.
struct __attribute__((visibility("hidden"))) CheckedInputs {
  Problem problem{};
  Inputs in{};
  std::vector<Tensor> held;

  CheckedInputs(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu, bool reverse,
                int64_t sequences = -1) {
    Problem& p = problem;
    ARCORE_CHECK(x.dim() == 3, op, "expected x of shape (batch, dim, length) but got ", shape_of(x));
    check_device(op, "weight", weight, x);
    for (const auto& [name, t] :
         {std::pair{"bias", &bias}, {"seq_idx", &seq_idx}, {"initial_states", &initial_states}})
      if (t->has_value()) check_device(op, name, **t, x);
    p.batch = sequences < 0 ? x.size(0) : sequences;
    p.dim = x.size(1);
    p.length = x.size(2);
    p.silu = silu;
    ARCORE_CHECK(weight.dim() == 2 && weight.size(0) == p.dim && weight.size(1) >= 1, op,
                 "expected weight of shape (dim=", p.dim, ", width) but got ", shape_of(weight));
    p.width = weight.size(1);
    in.x = view(op, "x", x, reverse);
    if (sequences >= 0) in.x.batch = 0;
    held.reserve(3);
    in.weight = hold(op, "weight", weight);
    if (bias.has_value()) {
      check_shape(op, "bias", *bias, {p.dim});
      in.bias = hold(op, "bias", *bias);
    }
    if (initial_states.has_value()) {
      check_shape(op, "initial_states", *initial_states, {p.batch, p.dim, p.width - 1});
      in.history = hold(op, "initial_states", *initial_states);
    }
    if (seq_idx.has_value()) {
      check_shape(op, "seq_idx", *seq_idx, {p.batch, p.length});
      ARCORE_CHECK(seq_idx->scalar_type() == ScalarType::Int, op, "expected seq_idx of dtype int32 but got ",
                   torch::headeronly::toString(seq_idx->scalar_type()));
    }
  }

  const float* hold(const char* op, const char* name, const Tensor& t) {
    storage_type(t, op, name);
    held.push_back(as_floats(t));
    return static_cast<const float*>(held.back().data_ptr());
  }
  bool empty() const { return problem.batch == 0 || problem.dim == 0; }
};

// The arguments of an update; rows, write_at and out are left to the caller.
struct __attribute__((visibility("hidden"))) CheckedUpdate {
  UpdateArgs args{};
  std::vector<Tensor> held;

  CheckedUpdate(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices, bool silu) {
    ARCORE_CHECK(x.dim() == 2 || x.dim() == 3, kUpdateOp,
                 "expected x of shape (batch, dim) or (batch, dim, steps) but got ", shape_of(x));
    check_device(kUpdateOp, "conv_state", conv_state, x);
    check_device(kUpdateOp, "weight", weight, x);
    for (const auto& [name, t] : {std::pair{"bias", &bias},
                                  {"cache_seqlens", &cache_seqlens},
                                  {"conv_state_indices", &conv_state_indices}})
      if (t->has_value()) check_device(kUpdateOp, name, **t, x);
    args.batch = x.size(0);
    args.dim = x.size(1);
    args.steps = x.dim() == 3 ? x.size(2) : 1;
    args.silu = silu;
    ARCORE_CHECK(weight.dim() == 2 && weight.size(0) == args.dim && weight.size(1) >= 1, kUpdateOp,
                 "expected weight of shape (dim=", args.dim, ", width) but got ", shape_of(weight));
    args.width = weight.size(1);
    ARCORE_CHECK(
        conv_state.dim() == 3 && conv_state.size(1) == args.dim && conv_state.size(2) >= args.width - 1,
        kUpdateOp, "expected conv_state of shape (rows, dim=", args.dim,
        ", at least width - 1 = ", args.width - 1, ") but got ", shape_of(conv_state));
    args.state_length = conv_state.size(2);
    ARCORE_CHECK(conv_state_indices.has_value() || conv_state.size(0) == args.batch, kUpdateOp,
                 "expected conv_state with one row per batch entry (", args.batch, ") but got ",
                 conv_state.size(0), "; give conv_state_indices to pick rows");
    held.reserve(4);
    held.push_back(as_floats(weight));
    args.weight = static_cast<const float*>(held.back().data_ptr());
    if (bias.has_value()) {
      check_shape(kUpdateOp, "bias", *bias, {args.dim});
      held.push_back(as_floats(*bias));
      args.bias = static_cast<const float*>(held.back().data_ptr());
    }
    for (const auto& [name, t] :
         {std::pair{"cache_seqlens", &cache_seqlens}, {"conv_state_indices", &conv_state_indices}}) {
      if (!t->has_value()) continue;
      check_shape(kUpdateOp, name, **t, {args.batch});
      ARCORE_CHECK((*t)->scalar_type() == ScalarType::Int || (*t)->scalar_type() == ScalarType::Long,
                   kUpdateOp, "expected ", name, " of dtype int32 or int64 but got ",
                   torch::headeronly::toString((*t)->scalar_type()));
    }
    args.x = view_of_steps("x", x);
    args.state = view(kUpdateOp, "conv_state", conv_state);
    check_written(kUpdateOp, "conv_state", conv_state);
    check_not_written(kUpdateOp, "x", x, "conv_state", conv_state);
    check_not_written(kUpdateOp, "weight", weight, "conv_state", conv_state);
    for (const auto& [name, t] : {std::pair{"bias", &bias},
                                  {"cache_seqlens", &cache_seqlens},
                                  {"conv_state_indices", &conv_state_indices}})
      if (t->has_value()) check_not_written(kUpdateOp, name, **t, "conv_state", conv_state);
  }
};

}  // namespace arcore::causal_conv1d
