// CUDA side of torch.ops.arcore.selective_scan, its backward and linear_scan: marks of packed rows,
// allocation, launches.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <tuple>

#include "common/cuda_call.h"
#include "common/mark_rows.h"
#include "common/sum_first.h"
#include "selective_scan/checks.h"
#include "selective_scan/params.h"

namespace arcore::selective_scan {

namespace {

// Channels that share B and C lie together in cells.
CudaLayout layout_of(const Call& call) {
  const Problem& p = call.problem;
  const int64_t by_B = call.in.B.groups == 0 ? p.dim : p.dim / call.in.B.groups;
  const int64_t by_C = call.in.C.groups == 0 ? p.dim : p.dim / call.in.C.groups;
  CudaLayout layout{};
  layout.cell = std::gcd(by_B, by_C);
  layout.cells = p.dim / layout.cell;
  layout.blocks = blocks_per_row_sm80(p.state, layout.cells, layout.cell);
  const int64_t chunks = (p.length + kCudaChunk - 1) / kCudaChunk;
  layout.segment_chunks = segment_chunks_of(p.length, layout.blocks);
  layout.segments = chunks == 0 ? 1 : (chunks + layout.segment_chunks - 1) / layout.segment_chunks;
  return layout;
}

// Room for what leaves the segments; `held` keeps it.
void make_ends(const Tensor& like, const Problem& p, CudaLayout& layout, std::vector<Tensor>& held) {
  if (layout.segments == 1) return;
  const auto floats = [&](int64_t rows) {
    held.push_back(
        torch::stable::new_empty(like, {p.batch, layout.segments, rows, p.dim}, ScalarType::Float));
    return static_cast<float*>(held.back().data_ptr());
  };
  layout.ends = floats(p.state);
  layout.passes = floats(2);
}

void mark(const char* op, const Tensor& u, const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
          bool reverse, CudaLayout& layout, std::vector<Tensor>& held, void* stream) {
  const MarkedRows rows =
      mark_rows(op, u, u.size(2), cu_seqlens, seq_idx, reverse, held, stream, launch_marks_sm80);
  layout.marks = rows.marks;
  layout.packed = rows.packed;
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                const OptionalTensor& z, const OptionalTensor& delta_bias,
                                                const OptionalTensor& initial_state,
                                                const OptionalTensor& cu_seqlens,
                                                const OptionalTensor& seq_idx, bool delta_softplus,
                                                bool reverse, bool save_states) {
  Call call(kOp, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, seq_idx, delta_softplus,
            reverse, false);
  Problem& p = call.problem;
  p.slots = std::max<int64_t>((p.length + kCudaChunk - 1) / kCudaChunk - 1, 0);
  const CudaScope scope(u);
  Tensor out = torch::stable::empty_like(u);
  Tensor last_state = torch::stable::new_empty(u, {call.rows, p.dim, p.state}, ScalarType::Float);
  Tensor states =
      torch::stable::new_empty(u, {save_states ? p.batch : 0, p.slots, p.state, p.dim}, ScalarType::Float);
  ForwardCuda cuda{};
  cuda.args.problem = p;
  cuda.args.in = call.in;
  cuda.args.last_state = static_cast<float*>(last_state.data_ptr());
  // Sequences without steps end as they start.
  check_launch(kOp, launch_carry_sm80({call.in.initial_state, cuda.args.last_state, last_state.numel()},
                                      scope.stream()));
  if (u.numel() == 0) return {out, last_state, states};
  cuda.layout = layout_of(call);
  make_ends(u, p, cuda.layout, call.held);
  mark(kOp, u, cu_seqlens, seq_idx, reverse, cuda.layout, call.held, scope.stream());
  cuda.args.out = sequence_view(kOp, "out", out, reverse);
  cuda.args.states = save_states ? static_cast<float*>(states.data_ptr()) : nullptr;
  check_launch(kOp, launch_forward_sm80(cuda, scope.stream()));
  return {out, last_state, states};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward_cuda(const OptionalTensor& grad_out, const OptionalTensor& grad_last_state,
                        const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                        const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                        const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                        const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx, const Tensor& states,
                        bool delta_softplus, bool reverse) {
  Call call(kBackwardOp, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, seq_idx,
            delta_softplus, reverse, false);
  Problem& p = call.problem;
  p.slots = std::max<int64_t>((p.length + kCudaChunk - 1) / kCudaChunk - 1, 0);
  if (grad_out.has_value()) check_shape(kBackwardOp, "grad_out", *grad_out, {p.batch, p.dim, p.length});
  check_shape(kBackwardOp, "states", states, {p.batch, p.slots, p.state, p.dim});
  const CudaScope scope(u);
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(u, shape, ScalarType::Float);
  };
  const auto none = [&] { return floats({0}); };
  Tensor grad_u = torch::stable::empty_like(u), grad_delta = torch::stable::empty_like(delta);
  Tensor grad_z = z.has_value() ? torch::stable::empty_like(*z) : none();
  Tensor grad_initial = initial_state.has_value()
                            ? torch::stable::new_empty(u, initial_state->sizes(), ScalarType::Float)
                            : none();
  const auto varying = [&](const Tensor& m) { return m.dim() == 2 ? none() : torch::stable::empty_like(m); };
  Tensor grad_B = varying(B), grad_C = varying(C);

  BackwardCuda cuda{};
  BackwardArgs& args = cuda.args;
  Tensor grad_last = none();
  if (grad_last_state.has_value()) {
    check_shape(kBackwardOp, "grad_last_state", *grad_last_state, {call.rows, p.dim, p.state});
    grad_last = as_floats(*grad_last_state);
    args.grad_last_state = static_cast<const float*>(grad_last.data_ptr());
  }
  if (initial_state.has_value()) {
    args.grad_initial_state = static_cast<float*>(grad_initial.data_ptr());
    check_launch(kBackwardOp,
                 launch_carry_sm80({args.grad_last_state, args.grad_initial_state, grad_initial.numel()},
                                   scope.stream()));
  }
  CudaLayout layout{};
  if (u.numel() > 0) layout = layout_of(call);
  const int64_t parts = u.numel() > 0 ? p.batch * layout.segments : p.batch;
  Tensor partial_B = none(), partial_C = none(), partial_A = floats({parts, p.dim, p.state});
  Tensor partial_D = floats({parts, p.dim}), partial_bias = floats({parts, p.dim});
  if (u.numel() == 0) {
    for (Tensor* t : {&grad_B, &grad_C, &partial_A, &partial_D, &partial_bias})
      torch::stable::zero_(*t);
    partial_B = partial_C = partial_A;
  } else {
    args.problem = p;
    args.in = call.in;
    cuda.layout = layout;
    make_ends(u, p, cuda.layout, call.held);
    mark(kBackwardOp, u, cu_seqlens, seq_idx, reverse, cuda.layout, call.held, scope.stream());
    const auto partial = [&](const Tensor& m) {
      return m.dim() == 2 ? floats({parts, p.dim, p.state})
                          : floats({p.batch, cuda.layout.blocks, p.length, p.state});
    };
    partial_B = partial(B);
    partial_C = partial(C);
    args.grad_out = sequence_view(kBackwardOp, "grad_out", grad_out, reverse);
    args.states = static_cast<const float*>(states.data_ptr());
    args.grad_u = sequence_view(kBackwardOp, "u", grad_u, reverse);
    args.grad_delta = sequence_view(kBackwardOp, "delta", grad_delta, reverse);
    if (z.has_value()) args.grad_z = sequence_view(kBackwardOp, "z", grad_z, reverse);
    args.partial_A = static_cast<float*>(partial_A.data_ptr());
    args.partial_B = static_cast<float*>(partial_B.data_ptr());
    args.partial_C = static_cast<float*>(partial_C.data_ptr());
    args.partial_D = static_cast<float*>(partial_D.data_ptr());
    args.partial_delta_bias = static_cast<float*>(partial_bias.data_ptr());
    if (B.dim() != 2) args.grad_B = coefficient(kBackwardOp, "B", grad_B, p, reverse);
    if (C.dim() != 2) args.grad_C = coefficient(kBackwardOp, "C", grad_C, p, reverse);
    check_launch(kBackwardOp, launch_backward_sm80(cuda, scope.stream()));
  }
  return {grad_u,
          grad_delta,
          sum_first(partial_A, A),
          B.dim() == 2 ? sum_first(partial_B, B) : grad_B,
          C.dim() == 2 ? sum_first(partial_C, C) : grad_C,
          D.has_value() ? sum_first(partial_D, *D) : none(),
          grad_z,
          delta_bias.has_value() ? sum_first(partial_bias, *delta_bias) : none(),
          initial_state.has_value() && initial_state->scalar_type() != ScalarType::Float
              ? torch::stable::to(grad_initial, initial_state->scalar_type())
              : grad_initial};
}

Tensor linear_scan_cuda(const Tensor& a, const Tensor& b, const OptionalTensor& initial, bool reverse) {
  LinearArgs args = check_linear(a, b, initial, reverse);
  const CudaScope scope(a);
  Tensor out = torch::stable::new_empty(a, {args.rows, args.length});
  args.out = out.data_ptr();
  check_launch(kLinearOp, launch_linear_sm80(args, scope.stream()));
  return out;
}

}  // namespace
}  // namespace arcore::selective_scan

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("selective_scan", TORCH_BOX(&arcore::selective_scan::forward_cuda));
  m.impl("selective_scan_backward", TORCH_BOX(&arcore::selective_scan::backward_cuda));
  m.impl("linear_scan", TORCH_BOX(&arcore::selective_scan::linear_scan_cuda));
}
