// Argument checks and views that the CPU and the CUDA side of selective_state_update share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/overlap.h"
#include "common/sequence_view.h"
#include "selective_state_update/params.h"

namespace arcore::selective_state_update {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "selective_state_update";

// [batch, last] or [batch, heads, last]; with steps, [batch, steps, last] or [batch, steps, heads, last].
inline View view(const char* name, const Tensor& t, bool stepped = false) {
  const int64_t first = stepped ? 2 : 1;
  const bool headed = t.dim() == first + 2;
  return {t.data_ptr(),
          t.stride(0),
          stepped ? t.stride(1) : 0,
          headed ? t.stride(first) : 0,
          t.stride(t.dim() - 1),
          storage_type(t, kOp, name)};
}

// Owns what the raw pointers of Args point at. The rows of the state and the output are left to the caller.
struct __attribute__((visibility("hidden"))) Call {
  Args args{};
  std::vector<Tensor> held;

  Call(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
       bool dt_softplus, const OptionalTensor& state_batch_indices, int64_t pad_slot_id,
       bool stepped = false) {
    const bool headed = state.dim() == 4;
    ARCORE_CHECK(state.dim() == 3 || headed, kOp,
                 "expected state of shape (rows, dim, d_state) or (rows, heads, dim, d_state) but got ",
                 shape_of(state));
    for (const auto& [name, t] : {std::pair{"x", &x}, {"dt", &dt}, {"A", &A}, {"B", &B}, {"C", &C}})
      check_device(kOp, name, *t, state);
    for (const auto& [name, t] : {std::pair{"D", &D},
                                  {"z", &z},
                                  {"dt_bias", &dt_bias},
                                  {"state_batch_indices", &state_batch_indices}})
      if (t->has_value()) check_device(kOp, name, **t, state);
    args.heads = headed ? state.size(1) : 1;
    args.dim = state.size(headed ? 2 : 1);
    args.states = state.size(headed ? 3 : 2);
    ARCORE_CHECK(args.states >= 1 && args.states <= 256, kOp, "expected a d_state of 1 to 256 but got ",
                 args.states);
    args.batch = x.dim() > 0 ? x.size(0) : 0;
    args.steps = stepped && x.dim() > 1 ? x.size(1) : 1;
    const auto check = [&](const char* name, const Tensor& t, int64_t first, int64_t last) {
      if (stepped)
        headed ? check_shape(kOp, name, t, {first, args.steps, args.heads, last})
               : check_shape(kOp, name, t, {first, args.steps, last});
      else
        headed ? check_shape(kOp, name, t, {first, args.heads, last})
               : check_shape(kOp, name, t, {first, last});
    };
    const auto check_parameter = [&](const char* name, const Tensor& t) {
      headed ? check_shape(kOp, name, t, {args.heads, args.dim}) : check_shape(kOp, name, t, {args.dim});
    };
    check("x", x, args.batch, args.dim);
    check("dt", dt, args.batch, args.dim);
    if (headed)
      check_shape(kOp, "A", A, {args.heads, args.dim, args.states});
    else
      check_shape(kOp, "A", A, {args.dim, args.states});
    const int64_t group_dim = stepped ? 2 : 1;
    args.groups = headed && B.dim() == group_dim + 2 ? B.size(group_dim) : 1;
    for (const auto& [name, t] : {std::pair{"B", &B}, std::pair{"C", &C}}) {
      if (stepped)
        headed ? check_shape(kOp, name, *t, {args.batch, args.steps, args.groups, args.states})
               : check_shape(kOp, name, *t, {args.batch, args.steps, args.states});
      else
        headed ? check_shape(kOp, name, *t, {args.batch, args.groups, args.states})
               : check_shape(kOp, name, *t, {args.batch, args.states});
    }
    ARCORE_CHECK(args.groups > 0 && args.heads % args.groups == 0, kOp,
                 "expected B with groups that divide the ", args.heads, " heads but got ", args.groups);

    held.reserve(4);
    const auto hold = [&](const char* name, const Tensor& t) {
      storage_type(t, kOp, name);
      held.push_back(as_floats(t));
      return static_cast<const float*>(held.back().data_ptr());
    };
    // Mamba-2 expands one number per head.
    args.tied = headed && A.stride(1) == 0 && A.stride(2) == 0;
    args.A = hold("A", args.tied ? torch::stable::select(torch::stable::select(A, 2, 0), 1, 0) : A);
    if (D.has_value()) {
      check_parameter("D", *D);
      args.D = hold("D", *D);
    }
    if (dt_bias.has_value()) {
      check_parameter("dt_bias", *dt_bias);
      args.dt_bias = hold("dt_bias", *dt_bias);
    }
    if (z.has_value()) {
      check("z", *z, args.batch, args.dim);
      args.z = view("z", *z, stepped);
    }
    if (state_batch_indices.has_value()) {
      check_shape(kOp, "state_batch_indices", *state_batch_indices, {args.batch});
      ARCORE_CHECK(state_batch_indices->scalar_type() == ScalarType::Int ||
                       state_batch_indices->scalar_type() == ScalarType::Long,
                   kOp, "expected state_batch_indices of dtype int32 or int64 but got ",
                   torch::headeronly::toString(state_batch_indices->scalar_type()));
    } else {
      ARCORE_CHECK(state.size(0) == args.batch, kOp, "expected state with one row per row of x (", args.batch,
                   ") but got ", state.size(0), "; give state_batch_indices to pick rows");
    }
    args.pad = pad_slot_id;
    args.softplus = dt_softplus;

    args.state = {state.data_ptr(),
                  state.stride(0),
                  headed ? state.stride(1) : 0,
                  state.stride(headed ? 2 : 1),
                  state.stride(headed ? 3 : 2),
                  storage_type(state, kOp, "state")};
    args.x = view("x", x, stepped);
    args.dt = view("dt", dt, stepped);
    args.B = view("B", B, stepped);
    args.C = view("C", C, stepped);
    check_written(kOp, "state", state);
    for (const auto& [name, t] : {std::pair{"x", &x}, {"dt", &dt}, {"A", &A}, {"B", &B}, {"C", &C}})
      check_not_written(kOp, name, *t, "state", state);
    for (const auto& [name, t] : {std::pair{"D", &D},
                                  {"z", &z},
                                  {"dt_bias", &dt_bias},
                                  {"state_batch_indices", &state_batch_indices}})
      if (t->has_value()) check_not_written(kOp, name, **t, "state", state);
  }
};

}  // namespace arcore::selective_state_update
