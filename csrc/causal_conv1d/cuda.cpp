// CUDA side of torch.ops.arcore.causal_conv1d, its backward, and causal_conv1d_update: allocation and
// launches.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "causal_conv1d/checks.h"
#include "causal_conv1d/params.h"
#include "common/cuda_call.h"
#include "common/sum_first.h"

namespace arcore::causal_conv1d {

namespace {

void check_width(const char* op, const Problem& p) {
  ARCORE_CHECK(p.width <= kMaxCudaWidth, op, "expected a width of at most ", kMaxCudaWidth,
               " on CUDA but got ", p.width, "; move the tensors to the CPU");
}

void check_whole_rows(const char* op, const OptionalTensor& cu_seqlens) {
  ARCORE_CHECK(!cu_seqlens.has_value(), op,
               "expected no cu_seqlens on CUDA, which has no kernel for it yet; give seq_idx or move the "
               "tensors to the CPU");
}

SequenceIds ids_of(const OptionalTensor& seq_idx, const Problem& p, bool reverse) {
  if (!seq_idx.has_value() || p.length == 0) return {};
  const auto* data = static_cast<const int32_t*>(seq_idx->data_ptr());
  const int64_t time = seq_idx->stride(1);
  return reverse ? SequenceIds{data + (p.length - 1) * time, seq_idx->stride(0), -time}
                 : SequenceIds{data, seq_idx->stride(0), time};
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                                        bool silu, bool reverse, const OptionalTensor& cu_seqlens) {
  check_whole_rows(kOp, cu_seqlens);
  const CudaScope scope(x);
  const CheckedInputs call(kOp, x, weight, bias, seq_idx, initial_states, silu, reverse);
  const Problem& p = call.problem;
  check_width(kOp, p);
  Tensor out = torch::stable::empty_like(x);
  Tensor final_states = torch::stable::new_empty(x, {p.batch, p.dim, p.width - 1});
  if (call.empty()) return {out, final_states};
  if (p.length == 0 && seq_idx.has_value()) {
    // There is no last sequence whose inputs could be kept.
    torch::stable::zero_(final_states);
    return {out, final_states};
  }
  const ForwardCuda cuda{{p, call.in, view(kOp, "out", out, reverse)},
                         ids_of(seq_idx, p, reverse),
                         view(kOp, "final_states", final_states)};
  check_launch(kOp, launch_forward_sm80(cuda, scope.stream()));
  return {out, final_states};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients backward_cuda(const OptionalTensor& grad_out, const OptionalTensor& grad_final_states,
                        const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu,
                        bool reverse, const OptionalTensor& cu_seqlens) {
  check_whole_rows(kBackwardOp, cu_seqlens);
  const CudaScope scope(x);
  CheckedInputs call(kBackwardOp, x, weight, bias, seq_idx, initial_states, silu, reverse);
  const Problem& p = call.problem;
  check_width(kBackwardOp, p);
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(x, shape, ScalarType::Float);
  };
  if (grad_out.has_value()) check_shape(kBackwardOp, "grad_out", *grad_out, {p.batch, p.dim, p.length});
  Tensor grad_x = torch::stable::empty_like(x);
  const int64_t rows = p.batch * std::max<int64_t>((p.length + kCudaSteps - 1) / kCudaSteps, 1);
  Tensor partial_weight = floats({rows, p.dim, p.width}), partial_bias = floats({rows, p.dim});
  Tensor grad_history = initial_states.has_value() ? floats({p.batch, p.dim, p.width - 1}) : floats({0});
  BackwardCuda cuda{};
  if (grad_final_states.has_value()) {
    check_shape(kBackwardOp, "grad_final_states", *grad_final_states, {p.batch, p.dim, p.width - 1});
    cuda.grad_final = call.hold(kBackwardOp, "grad_final_states", *grad_final_states);
  }
  if (call.empty() || (p.length == 0 && seq_idx.has_value())) {
    for (Tensor* t : {&partial_weight, &partial_bias, &grad_history})
      torch::stable::zero_(*t);
  } else {
    cuda.args.problem = p;
    cuda.args.in = call.in;
    cuda.args.grad_out = sequence_view(kBackwardOp, "grad_out", grad_out, reverse);
    cuda.args.grad_x = view(kBackwardOp, "x", grad_x, reverse);
    cuda.args.partial_weight = static_cast<float*>(partial_weight.data_ptr());
    cuda.args.partial_bias = static_cast<float*>(partial_bias.data_ptr());
    cuda.args.grad_history =
        initial_states.has_value() ? static_cast<float*>(grad_history.data_ptr()) : nullptr;
    cuda.ids = ids_of(seq_idx, p, reverse);
    check_launch(kBackwardOp, launch_backward_sm80(cuda, scope.stream()));
  }
  return {grad_x, sum_first(partial_weight, weight),
          bias.has_value() ? sum_first(partial_bias, *bias) : floats({0}),
          initial_states.has_value() && initial_states->scalar_type() != ScalarType::Float
              ? torch::stable::to(grad_history, initial_states->scalar_type())
              : grad_history};
}

Tensor update_cuda(const Tensor& x, Tensor conv_state, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices, bool silu,
                   int64_t pad_slot_id) {
  ARCORE_CHECK(pad_slot_id < 0, kUpdateOp,
               "expected a negative pad_slot_id on CUDA, where every negative index is padding, but got ",
               pad_slot_id);
  const CudaScope scope(x);
  CheckedUpdate call(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu);
  Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  const auto numbers = [&](const OptionalTensor& t) {
    if (!t.has_value()) return NamedRows{};
    call.held.push_back(torch::stable::contiguous(*t));
    return NamedRows{call.held.back().data_ptr(), t->scalar_type() == ScalarType::Int};
  };
  UpdateCuda cuda{call.args, numbers(conv_state_indices), numbers(cache_seqlens), conv_state.size(0)};
  cuda.args.out = view_of_steps("out", out);
  check_launch(kUpdateOp, launch_update_sm80(cuda, scope.stream()));
  return out;
}

}  // namespace
}  // namespace arcore::causal_conv1d

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("causal_conv1d", TORCH_BOX(&arcore::causal_conv1d::forward_cuda));
  m.impl("causal_conv1d_backward", TORCH_BOX(&arcore::causal_conv1d::backward_cuda));
  m.impl("causal_conv1d_update", TORCH_BOX(&arcore::causal_conv1d::update_cuda));
}
