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
#include "common/parallel.h"
#include "common/sequence_view.h"
#include "common/workspace.h"
#include "selective_scan/params.h"

namespace arcore::selective_scan {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "selective_scan";
constexpr const char* kBackwardOp = "selective_scan_backward";
constexpr int64_t kMaxState = 256;
// Below this many state updates (about 0.2 ms) a second thread costs more than it saves.
constexpr double kUpdatesPerThread = 5e5;

Coefficient coefficient(const char* op, const char* name, const Tensor& t, const Problem& p, bool reverse) {
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
struct Call {
  Problem problem{};
  Inputs in{};
  ChunkList list;
  int64_t rows;  // of the state tensors
  std::vector<Tensor> held;

  Call(const char* op, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
       bool delta_softplus, bool reverse) {
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
    list = chunk_list(op, p.batch, p.length, cu_seqlens, seq_idx, reverse);
    p.chunk_rows = seq_idx.has_value() ? p.batch : 1;
    p.chunks = list.chunks.data();
    p.first_chunk = list.first.data();
    rows = cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : p.batch;

    in.u = sequence_view(op, "u", u, reverse);
    in.delta = sequence_view(op, "delta", delta, reverse);
    in.z = sequence_view(op, "z", z, reverse);
    in.B = coefficient(op, "B", B, p, reverse);
    in.C = coefficient(op, "C", C, p, reverse);
    storage_type(A, op, "A");
    in.A = hold(A);
    if (D.has_value()) {
      check_shape(op, "D", *D, {p.dim});
      in.D = hold(*D);
    }
    if (delta_bias.has_value()) {
      check_shape(op, "delta_bias", *delta_bias, {p.dim});
      in.delta_bias = hold(*delta_bias);
    }
    if (initial_state.has_value()) {
      check_shape(op, "initial_state", *initial_state, {rows, p.dim, p.state});
      in.initial_state = hold(*initial_state);
    }
  }

  const float* hold(const Tensor& t) {
    held.push_back(as_floats(t));
    return static_cast<const float*>(held.back().data_ptr());
  }

  double updates() const {
    return static_cast<double>(problem.batch) * static_cast<double>(problem.dim) *
           static_cast<double>(problem.length) * static_cast<double>(problem.state);
  }
};

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
  Tensor out = torch::stable::empty_like(u);
  Tensor last_state = torch::stable::new_empty(u, {call.rows, p.dim, p.state}, ScalarType::Float);
  Tensor states =
      torch::stable::new_empty(u, {save_states ? p.batch : 0, p.slots, p.state, p.dim}, ScalarType::Float);
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
  check_shape(kBackwardOp, "states", states, {p.batch, p.slots, p.state, p.dim});
  const auto none = [&] { return torch::stable::new_empty(u, {0}, ScalarType::Float); };
  Tensor grad_u = torch::stable::empty_like(u), grad_delta = torch::stable::empty_like(delta);
  Tensor grad_z = z.has_value() ? torch::stable::empty_like(*z) : none();
  Tensor grad_initial = initial_state.has_value()
                            ? torch::stable::new_empty(u, initial_state->sizes(), ScalarType::Float)
                            : none();
  const auto empty_varying = [&](const Tensor& m) {
    return m.dim() == 2 ? none() : torch::stable::empty_like(m);
  };
  Tensor grad_B = empty_varying(B), grad_C = empty_varying(C);
  const CpuKernels& kernels = cpu_kernels();
  const bool empty = p.batch == 0 || p.dim == 0;
  const int64_t slices = empty ? 0 : kernels.slices(p, call.in);
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(u, shape, ScalarType::Float);
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

}  // namespace
}  // namespace arcore::selective_scan

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
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
}
