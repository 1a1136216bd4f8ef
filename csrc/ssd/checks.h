// Argument checks and views that the CPU and the CUDA side of ssd share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/chunk_list.h"
#include "common/sequence_view.h"
#include "ssd/params.h"

namespace arcore::ssd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "ssd";
constexpr const char* kBackwardOp = "ssd_backward";
constexpr int64_t kMaxState = 256;
inline View view(const char* op, const char* name, const Tensor& t, bool reverse) {
  const StorageType dtype = storage_type(t, op, name);
  View v{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 0, dtype};
  if (reverse && t.size(1) > 0) {
    v.data = static_cast<char*>(v.data) + (t.size(1) - 1) * v.time * (dtype == StorageType::kFloat32 ? 4 : 2);
    v.time = -v.time;
  }
  return v;
}

// Checks the arguments and owns what the raw pointers of Args point at; the results are left to the caller.
struct __attribute__((visibility("hidden"))) Call {
  Args args{};
  std::vector<Tensor> held;
  ChunkList list;
  int64_t rows;  // of the state tensors

  Call(const char* op, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
       bool dt_softplus, double dt_low, double dt_high, bool reverse, bool with_chunks = true) {
    ARCORE_CHECK(x.dim() == 4, op, "expected x of shape (batch, length, heads, dim) but got ", shape_of(x));
    for (const auto& [name, t] : {std::pair{"dt", &dt}, {"A", &A}, {"B", &B}, {"C", &C}})
      check_device(op, name, *t, x);
    for (const auto& [name, t] : {std::pair{"D", &D},
                                  {"z", &z},
                                  {"dt_bias", &dt_bias},
                                  {"initial_state", &initial_state},
                                  {"cu_seqlens", &cu_seqlens},
                                  {"seq_idx", &seq_idx}})
      if (t->has_value()) check_device(op, name, **t, x);
    args.batch = x.size(0);
    args.length = x.size(1);
    args.heads = x.size(2);
    args.dim = x.size(3);
    check_shape(op, "dt", dt, {args.batch, args.length, args.heads});
    check_shape(op, "A", A, {args.heads});
    ARCORE_CHECK(B.dim() == 4 && B.size(2) >= 1 && B.size(3) >= 1 && B.size(3) <= kMaxState, op,
                 "expected B of shape (batch, length, groups, d_state) but got ", shape_of(B),
                 "; d_state must be 1 to ", kMaxState);
    args.groups = B.size(2);
    args.states = B.size(3);
    ARCORE_CHECK(args.heads % args.groups == 0, op, "expected B with groups that divide the ", args.heads,
                 " heads but got ", args.groups);
    check_shape(op, "B", B, {args.batch, args.length, args.groups, args.states});
    check_shape(op, "C", C, {args.batch, args.length, args.groups, args.states});
    args.A = hold(op, "A", A);
    if (D.has_value()) {
      check_shape(op, "D", *D, {args.heads, args.dim});
      args.D = hold(op, "D", *D);
    }
    if (dt_bias.has_value()) {
      check_shape(op, "dt_bias", *dt_bias, {args.heads});
      args.dt_bias = hold(op, "dt_bias", *dt_bias);
    }
    if (z.has_value()) {
      check_shape(op, "z", *z, {args.batch, args.length, args.heads, args.dim});
      args.z = view(op, "z", *z, reverse);
    }
    if (with_chunks) {
      list = chunk_list(op, args.batch, args.length, cu_seqlens, seq_idx, reverse);
      args.chunk_rows = seq_idx.has_value() ? args.batch : 1;
      args.chunks = list.chunks.data();
      args.first_chunk = list.first.data();
    } else {
      check_sequences(op, args.batch, args.length, cu_seqlens, seq_idx);
    }
    rows = cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : args.batch;
    if (initial_state.has_value()) {
      check_shape(op, "initial_state", *initial_state, {rows, args.heads, args.dim, args.states});
      args.initial_state = hold(op, "initial_state", *initial_state);
    }
    args.softplus = dt_softplus;
    args.dt_low = static_cast<float>(dt_low);
    args.dt_high = static_cast<float>(dt_high);
    args.x = view(op, "x", x, reverse);
    args.dt = view(op, "dt", dt, reverse);
    args.B = view(op, "B", B, reverse);
    args.C = view(op, "C", C, reverse);
  }

  const float* hold(const char* op, const char* name, const Tensor& t) {
    storage_type(t, op, name);
    held.push_back(as_floats(t));
    return static_cast<const float*>(held.back().data_ptr());
  }
  bool empty() const { return args.batch == 0 || args.heads == 0 || args.dim == 0; }
  double products() const {
    return static_cast<double>(args.batch) * static_cast<double>(args.length) *
           static_cast<double>(args.heads) * static_cast<double>(args.dim) * static_cast<double>(args.states);
  }
};

}  // namespace arcore::ssd
