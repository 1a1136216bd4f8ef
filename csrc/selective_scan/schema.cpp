// torch.ops.arcore.selective_scan and its backward: checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/chunk_list.h"
#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/parallel.h"
#include "common/sequence_view.h"
#include "common/workspace.h"
#include "selective_scan/checks.h"
#include "selective_scan/linear_scan.h"
#include "selective_scan/params.h"

namespace arcore::selective_scan {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

// Below this many state updates (about 0.2 ms) a second thread costs more than it saves.
constexpr double kUpdatesPerThread = 5e5;

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& u, const Tensor& delta, const Tensor& A,
                                               const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                               const OptionalTensor& z, const OptionalTensor& delta_bias,
                                               const OptionalTensor& initial_state,
                                               const OptionalTensor& cu_seqlens,
                                               const OptionalTensor& seq_idx, bool delta_softplus,
                                               bool reverse, bool save_states) {
  const Call call(kOp, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, seq_idx,
                  delta_softplus, reverse);
  const Problem& p = call.problem;
  Tensor out = make_empty_like(u);
  Tensor last_state = make_empty(u, {call.rows, p.dim, p.state}, ScalarType::Float);
  Tensor states = make_empty(u, {save_states ? p.batch : 0, p.slots, p.state, p.dim}, ScalarType::Float);
  if (p.batch == 0 || p.dim == 0) {
    torch::stable::zero_(last_state);
    return {out, last_state, states};
  }
  ForwardArgs args{};
  args.problem = p;
  args.in = call.in;
  args.out = sequence_view(kOp, "out", out, reverse);
  args.last_state = static_cast<float*>(last_state.data_ptr());
  args.states = save_states ? static_cast<float*>(states.data_ptr()) : nullptr;

  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = threads_for(call.updates(), kUpdatesPerThread);
  run_with_workspace(
      u, p.batch * kernels.slices(p, call.in), threads, kernels.forward_workspace(p, call.in),
      [&](float* workspace, int64_t begin, int64_t end) { kernels.forward(args, workspace, begin, end); });
  return {out, last_state, states};
}

// Absent optional inputs get an empty gradient.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward_cpu(const OptionalTensor& grad_out, const OptionalTensor& grad_last_state, const Tensor& u,
                       const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                       const OptionalTensor& seq_idx, const Tensor& states, bool delta_softplus,
                       bool reverse) {
  const Call call(kBackwardOp, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, seq_idx,
                  delta_softplus, reverse);
  const Problem& p = call.problem;
  if (grad_out.has_value()) check_shape(kBackwardOp, "grad_out", *grad_out, {p.batch, p.dim, p.length});
  check_device(kBackwardOp, "states", states, u);
  check_shape(kBackwardOp, "states", states, {p.batch, p.slots, p.state, p.dim});
  ARCORE_CHECK(states.scalar_type() == ScalarType::Float && states.is_contiguous(), kBackwardOp,
               "expected states as the forward returned them, float32 and contiguous, but got ",
               torch::headeronly::toString(states.scalar_type()),
               states.is_contiguous() ? "" : " with gaps or another order of dimensions");
  const auto none = [&] { return make_empty(u, {0}, ScalarType::Float); };
  Tensor grad_u = make_empty_like(u), grad_delta = make_empty_like(delta);
  Tensor grad_z = z.has_value() ? make_empty_like(*z) : none();
  Tensor grad_initial =
      initial_state.has_value() ? make_empty(u, initial_state->sizes(), ScalarType::Float) : none();
  const auto empty_varying = [&](const Tensor& m) { return m.dim() == 2 ? none() : make_empty_like(m); };
  Tensor grad_B = empty_varying(B), grad_C = empty_varying(C);
  const CpuKernels& kernels = cpu_kernels();
  const bool empty = p.batch == 0 || p.dim == 0;
  const int64_t slices = empty ? 0 : kernels.slices(p, call.in);
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return make_empty(u, shape, ScalarType::Float);
  };
  const auto partial = [&](const Tensor& m) {
    return m.dim() == 2 ? floats({p.batch, p.dim, p.state}) : floats({p.batch, slices, p.length, p.state});
  };
  Tensor partial_B = partial(B), partial_C = partial(C), partial_A = floats({p.batch, p.dim, p.state});
  Tensor partial_D = floats({p.batch, p.dim}), partial_bias = floats({p.batch, p.dim});

  if (empty) {
    torch::stable::zero_(grad_B);
    torch::stable::zero_(grad_C);
    torch::stable::zero_(grad_initial);
  } else {
    BackwardArgs args{};
    args.problem = p;
    args.in = call.in;
    args.grad_out = sequence_view(kBackwardOp, "grad_out", grad_out, reverse);
    Tensor grad_last = none();
    if (grad_last_state.has_value()) {
      check_shape(kBackwardOp, "grad_last_state", *grad_last_state, {call.rows, p.dim, p.state});
      grad_last = as_floats(*grad_last_state);
      args.grad_last_state = static_cast<const float*>(grad_last.data_ptr());
    }
    args.states = static_cast<const float*>(states.data_ptr());
    args.grad_u = sequence_view(kBackwardOp, "u", grad_u, reverse);
    args.grad_delta = sequence_view(kBackwardOp, "delta", grad_delta, reverse);
    if (z.has_value()) args.grad_z = sequence_view(kBackwardOp, "z", grad_z, reverse);
    args.grad_initial_state =
        initial_state.has_value() ? static_cast<float*>(grad_initial.data_ptr()) : nullptr;
    args.partial_A = static_cast<float*>(partial_A.data_ptr());
    args.partial_B = static_cast<float*>(partial_B.data_ptr());
    args.partial_C = static_cast<float*>(partial_C.data_ptr());
    args.partial_D = static_cast<float*>(partial_D.data_ptr());
    args.partial_delta_bias = static_cast<float*>(partial_bias.data_ptr());
    // Partial sums are kept in scan order, as the gradients are written.
    if (B.dim() != 2) args.grad_B = coefficient(kBackwardOp, "B", grad_B, p, reverse);
    if (C.dim() != 2) args.grad_C = coefficient(kBackwardOp, "C", grad_C, p, reverse);

    const int64_t threads = threads_for(call.updates(), kUpdatesPerThread);
    run_with_workspace(
        u, p.batch * slices, threads, kernels.backward_workspace(p, call.in),
        [&](float* workspace, int64_t begin, int64_t end) { kernels.backward(args, workspace, begin, end); });
    run_tasks(p.batch * std::max(call.in.B.groups, call.in.C.groups), threads,
              [&](int64_t begin, int64_t end) { kernels.backward_reduce(args, begin, end); });
  }
  return {grad_u,
          grad_delta,
          sum_rows(partial_A, A),
          B.dim() == 2 ? sum_rows(partial_B, B) : grad_B,
          C.dim() == 2 ? sum_rows(partial_C, C) : grad_C,
          D.has_value() ? sum_rows(partial_D, *D) : none(),
          grad_z,
          delta_bias.has_value() ? sum_rows(partial_bias, *delta_bias) : none(),
          initial_state.has_value() && initial_state->scalar_type() != ScalarType::Float
              ? torch::stable::to(grad_initial, initial_state->scalar_type())
              : grad_initial};
}

// The tangents come in the order of the inputs.
std::tuple<Tensor, Tensor> tangent_cpu(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                       const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                                       const OptionalTensor& u_t, const OptionalTensor& delta_t,
                                       const OptionalTensor& A_t, const OptionalTensor& B_t,
                                       const OptionalTensor& C_t, const OptionalTensor& D_t,
                                       const OptionalTensor& z_t, const OptionalTensor& delta_bias_t,
                                       const OptionalTensor& initial_state_t,
                                       const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
                                       bool delta_softplus, bool reverse) {
  Call call(kTangentOp, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, seq_idx,
            delta_softplus, reverse);
  const Problem& p = call.problem;
  TangentArgs args{};
  args.problem = p;
  args.in = call.in;
  const auto check = [&](const char* name, const OptionalTensor& t, const Tensor& of) {
    check_device(kTangentOp, name, *t, u);
    bool fits = t->dim() == of.dim();
    for (int64_t i = 0; fits && i < of.dim(); ++i)
      fits = t->size(i) == of.size(i);
    ARCORE_CHECK(fits, kTangentOp, "expected a tangent of ", name, " of shape ", shape_of(of), " but got ",
                 shape_of(*t));
  };
  const auto sequence = [&](const char* name, const OptionalTensor& t) {
    if (t.has_value()) check(name, t, u);
    return sequence_view(kTangentOp, name, t, reverse);
  };
  args.along.u = sequence("u", u_t);
  args.along.delta = sequence("delta", delta_t);
  if (z.has_value()) args.along.z = sequence("z", z_t);
  const auto matrix = [&](const char* name, const OptionalTensor& t, const Tensor& of) {
    if (!t.has_value()) return Coefficient{};
    check(name, t, of);
    return coefficient(kTangentOp, name, *t, p, reverse);
  };
  args.along.B = matrix("B", B_t, B);
  args.along.C = matrix("C", C_t, C);
  const auto floats = [&](const char* name, const OptionalTensor& t, const OptionalTensor& of) {
    if (!t.has_value() || !of.has_value()) return static_cast<const float*>(nullptr);
    check(name, t, *of);
    return call.hold(kTangentOp, name, *t);
  };
  args.along.A = floats("A", A_t, A);
  args.along.D = floats("D", D_t, D);
  args.along.delta_bias = floats("delta_bias", delta_bias_t, delta_bias);
  args.along.initial_state = floats("initial_state", initial_state_t, initial_state);

  Tensor out = make_empty_like(u);
  Tensor last_state = make_empty(u, {call.rows, p.dim, p.state}, ScalarType::Float);
  if (p.batch == 0 || p.dim == 0) {
    torch::stable::zero_(last_state);
    return {out, last_state};
  }
  args.out = sequence_view(kTangentOp, "out", out, reverse);
  args.last_state = static_cast<float*>(last_state.data_ptr());
  const CpuKernels& kernels = cpu_kernels();
  run_with_workspace(
      u, p.batch * kernels.slices(p, call.in), threads_for(call.updates(), kUpdatesPerThread),
      kernels.tangent_workspace(p, call.in),
      [&](float* workspace, int64_t begin, int64_t end) { kernels.tangent(args, workspace, begin, end); });
  return {out, last_state};
}

Tensor linear_scan_cpu(const Tensor& a, const Tensor& b, const OptionalTensor& initial, bool reverse) {
  LinearArgs args = check_linear(a, b, initial, reverse);
  Tensor out = make_empty(a, {args.rows, args.length}, a.scalar_type());
  args.out = out.data_ptr();
  const double updates = static_cast<double>(args.rows) * static_cast<double>(args.length);
  const auto scan = [&](auto kind) {
    using T = decltype(kind);
    run_tasks(args.rows, threads_for(updates, kUpdatesPerThread), [&](int64_t begin, int64_t end) {
      scan_rows<T>(static_cast<const T*>(args.a), static_cast<const T*>(args.b),
                   static_cast<const T*>(args.initial), static_cast<T*>(args.out), args.length, reverse,
                   begin, end);
    });
  };
  if (args.wide)
    scan(double{});
  else
    scan(float{});
  return out;
}

}  // namespace
}  // namespace arcore::selective_scan

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def("linear_scan(Tensor a, Tensor b, Tensor? initial, bool reverse) -> Tensor");
  m.def(
      "selective_scan_tangent(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? u_t, Tensor? delta_t, Tensor? A_t, Tensor? B_t, "
      "Tensor? C_t, Tensor? D_t, Tensor? z_t, Tensor? delta_bias_t, Tensor? initial_state_t, "
      "Tensor? cu_seqlens, Tensor? seq_idx, bool delta_softplus, bool reverse) "
      "-> (Tensor out, Tensor last_state)");
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor? seq_idx, bool delta_softplus, "
      "bool reverse, bool save_states) -> (Tensor out, Tensor last_state, Tensor states)");
  m.def(
      "selective_scan_backward(Tensor? grad_out, Tensor? grad_last_state, Tensor u, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor? seq_idx, Tensor states, bool delta_softplus, bool reverse) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&arcore::selective_scan::forward_cpu));
  m.impl("selective_scan_backward", TORCH_BOX(&arcore::selective_scan::backward_cpu));
  m.impl("selective_scan_tangent", TORCH_BOX(&arcore::selective_scan::tangent_cpu));
  m.impl("linear_scan", TORCH_BOX(&arcore::selective_scan::linear_scan_cpu));
}
