// Argument checks and views that the CPU and the CUDA side of selective_scan share.
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
#include "selective_scan/params.h"

namespace arcore::selective_scan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "selective_scan";
constexpr const char* kBackwardOp = "selective_scan_backward";
constexpr const char* kTangentOp = "selective_scan_tangent";
constexpr int64_t kMaxState = 256;
inline Coefficient coefficient(const char* op, const char* name, const Tensor& t, const Problem& p,
                               bool reverse) {
  const StorageType dtype = storage_type(t, op, name);
  if (t.dim() == 2) {
    check_shape(op, name, t, {p.dim, p.state});
    return {t.data_ptr(), 0, t.stride(0), t.stride(1), 0, 0, dtype};
  }
  const bool grouped = t.dim() == 4;
  const int64_t groups = grouped ? t.size(1) : 1;
  if (grouped)
    check_shape(op, name, t, {p.batch, groups, p.state, p.length});
  else
    check_shape(op, name, t, {p.batch, p.state, p.length});
  ARCORE_CHECK(groups > 0 && p.dim % groups == 0, op, "expected the groups of ", name,
               " to divide dim=", p.dim, " but got ", groups);
  const int64_t last = t.dim() - 1;
  Coefficient m{t.data_ptr(), t.stride(0), grouped ? t.stride(1) : 0, t.stride(last - 1), t.stride(last),
                groups,       dtype};
  if (reverse && p.length > 0) {
    m.data = static_cast<char*>(m.data) + (p.length - 1) * m.time * (dtype == StorageType::kFloat32 ? 4 : 2);
    m.time = -m.time;
  }
  return m;
}

// Owns what the raw pointers of Problem and Inputs point at.
struct __attribute__((visibility("hidden"))) Call {
  Problem problem{};
  Inputs in{};
  ChunkList list;
  int64_t rows;  // of the state tensors
  std::vector<Tensor> held;

  Call(const char* op, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
       bool delta_softplus, bool reverse, bool with_chunks = true) {
    Problem& p = problem;
    ARCORE_CHECK(u.dim() == 3, op, "expected u of shape (batch, dim, length) but got ", shape_of(u));
    p.batch = u.size(0);
    p.dim = u.size(1);
    p.length = u.size(2);
    p.delta_softplus = delta_softplus;
    ARCORE_CHECK(A.dim() == 2 && A.size(0) == p.dim && A.size(1) >= 1 && A.size(1) <= kMaxState, op,
                 "expected A of shape (dim=", p.dim, ", d_state) but got ", shape_of(A),
                 "; d_state must be 1 to ", kMaxState);
    p.state = A.size(1);
    p.slots = std::max<int64_t>((p.length + kChunk - 1) / kChunk - 1, 0);
    check_shape(op, "delta", delta, {p.batch, p.dim, p.length});
    if (z.has_value()) check_shape(op, "z", *z, {p.batch, p.dim, p.length});
    if (u.is_cpu() && with_chunks) {
      list = chunk_list(op, p.batch, p.length, cu_seqlens, seq_idx, reverse);
      p.chunk_rows = seq_idx.has_value() ? p.batch : 1;
      p.chunks = list.chunks.data();
      p.first_chunk = list.first.data();
    } else {
      check_sequences(op, p.batch, p.length, cu_seqlens, seq_idx);
    }
    rows = cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : p.batch;

    for (const auto& [name, t] : {std::pair{"delta", &delta}, {"A", &A}, {"B", &B}, {"C", &C}})
      check_device(op, name, *t, u);
    for (const auto& [name, t] : {std::pair{"D", &D},
                                  {"z", &z},
                                  {"delta_bias", &delta_bias},
                                  {"initial_state", &initial_state},
                                  {"cu_seqlens", &cu_seqlens},
                                  {"seq_idx", &seq_idx}})
      if (t->has_value()) check_device(op, name, **t, u);
    in.u = sequence_view(op, "u", u, reverse);
    in.delta = sequence_view(op, "delta", delta, reverse);
    in.z = sequence_view(op, "z", z, reverse);
    in.B = coefficient(op, "B", B, p, reverse);
    in.C = coefficient(op, "C", C, p, reverse);
    held.reserve(4);
    in.A = hold(op, "A", A);
    if (D.has_value()) {
      check_shape(op, "D", *D, {p.dim});
      in.D = hold(op, "D", *D);
    }
    if (delta_bias.has_value()) {
      check_shape(op, "delta_bias", *delta_bias, {p.dim});
      in.delta_bias = hold(op, "delta_bias", *delta_bias);
    }
    if (initial_state.has_value()) {
      check_shape(op, "initial_state", *initial_state, {rows, p.dim, p.state});
      in.initial_state = hold(op, "initial_state", *initial_state);
    }
  }

  const float* hold(const char* op, const char* name, const Tensor& t) {
    storage_type(t, op, name);
    held.push_back(as_floats(t));
    return static_cast<const float*>(held.back().data_ptr());
  }

  double updates() const {
    return static_cast<double>(problem.batch) * static_cast<double>(problem.dim) *
           static_cast<double>(problem.length) * static_cast<double>(problem.state);
  }
};

constexpr const char* kLinearOp = "linear_scan";

// What linear_scan gets on any device; `out` is for the caller to set.
inline LinearArgs check_linear(const Tensor& a, const Tensor& b, const OptionalTensor& initial,
                               bool reverse) {
  ARCORE_CHECK(a.dim() == 2 && a.is_contiguous() && b.is_contiguous(), kLinearOp,
               "expected contiguous a and b of shape (rows, length) but got ", shape_of(a), " and ",
               shape_of(b));
  const ScalarType type = a.scalar_type();
  ARCORE_CHECK(type == ScalarType::Float || type == ScalarType::Double, kLinearOp,
               "expected float32 or float64 but got ", torch::headeronly::toString(type));
  check_device(kLinearOp, "b", b, a);
  check_shape(kLinearOp, "b", b, {a.size(0), a.size(1)});
  ARCORE_CHECK(b.scalar_type() == type, kLinearOp, "expected b of a's dtype");
  if (initial.has_value()) {
    check_device(kLinearOp, "initial", *initial, a);
    check_shape(kLinearOp, "initial", *initial, {a.size(0)});
    ARCORE_CHECK(initial->scalar_type() == type && initial->is_contiguous(), kLinearOp,
                 "expected a contiguous initial of a's dtype");
  }
  return {a.data_ptr(),
          b.data_ptr(),
          initial.has_value() ? initial->data_ptr() : nullptr,
          nullptr,
          a.size(0),
          a.size(1),
          reverse,
          type == ScalarType::Double};
}

}  // namespace arcore::selective_scan
