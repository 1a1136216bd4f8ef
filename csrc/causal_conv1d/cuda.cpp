// CUDA side of torch.ops.arcore.causal_conv1d, its backward and causal_conv1d_update.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "causal_conv1d/checks.h"
#include "causal_conv1d/params.h"
#include "common/cuda_call.h"

namespace arcore::causal_conv1d {

namespace {

// The ids in scan order, and room for what the kernels find in them.
Ids ids_of(const OptionalTensor& seq_idx, const Problem& p, bool reverse, std::vector<Tensor>& held) {
  if (!seq_idx.has_value() || p.length == 0) return {};
  held.push_back(torch::stable::new_empty(*seq_idx, {p.batch, 2}));
  Ids ids{static_cast<const int32_t*>(seq_idx->data_ptr()), seq_idx->stride(0), seq_idx->stride(1),
          static_cast<int32_t*>(held.back().data_ptr())};
  if (reverse) {
    ids.data += (p.length - 1) * ids.time;
    ids.time = -ids.time;
  }
  return ids;
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                                        bool silu, bool reverse) {
  const CudaScope scope(x);
  Call call(kOp, x, weight, bias, seq_idx, initial_states, silu, reverse);
  const Problem& p = call.problem;
  Tensor out = torch::stable::empty_like(x);
  Tensor final_states = torch::stable::new_empty(x, {p.batch, p.dim, p.width - 1});
  if (call.empty()) return {out, final_states};
  ForwardCuda cuda{};
  cuda.args = {p, call.in, view(kOp, "out", out, reverse)};
  cuda.ids = ids_of(seq_idx, p, reverse, call.held);
  cuda.final_states = view(kOp, "final_states", final_states);
  check_launch(kOp, launch_forward_sm80(cuda, scope.stream()));
  return {out, final_states};
}

// The sum over the batch in the shape and dtype of `like`.
Tensor sum_batch(const Tensor& partial, const Tensor& like) {
  const int64_t first[] = {0};
  const Tensor total = torch::stable::sum(partial, first, false);
  return like.scalar_type() == ScalarType::Float ? total : torch::stable::to(total, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const OptionalTensor& grad_out, const OptionalTensor& grad_final_states, const Tensor& x,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seq_idx,
    const OptionalTensor& initial_states, bool silu, bool reverse) {
  const CudaScope scope(x);
  Call call(kBackwardOp, x, weight, bias, seq_idx, initial_states, silu, reverse);
  const Problem& p = call.problem;
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(x, shape, ScalarType::Float);
  };
  if (grad_out.has_value()) check_shape(kBackwardOp, "grad_out", *grad_out, {p.batch, p.dim, p.length});
  if (grad_final_states.has_value())
    check_shape(kBackwardOp, "grad_final_states", *grad_final_states, {p.batch, p.dim, p.width - 1});
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor partial_weight = floats({p.batch, p.dim, p.width}), partial_bias = floats({p.batch, p.dim});
  Tensor grad_history = initial_states.has_value() ? floats({p.batch, p.dim, p.width - 1}) : floats({0});
  if (!call.empty()) {
    BackwardCuda cuda{};
    cuda.args.problem = p;
    cuda.args.in = call.in;
    cuda.args.grad_out = sequence_view(kBackwardOp, "grad_out", grad_out, reverse);
    cuda.args.grad_x = view(kBackwardOp, "x", grad_x, reverse);
    cuda.args.partial_weight = static_cast<float*>(partial_weight.data_ptr());
    cuda.args.partial_bias = static_cast<float*>(partial_bias.data_ptr());
    cuda.args.grad_history =
        initial_states.has_value() ? static_cast<float*>(grad_history.data_ptr()) : nullptr;
    cuda.ids = ids_of(seq_idx, p, reverse, call.held);
    if (grad_final_states.has_value()) {
      call.held.push_back(as_floats(*grad_final_states));
      cuda.grad_final = static_cast<const float*>(call.held.back().data_ptr());
    }
    check_launch(kBackwardOp, launch_backward_sm80(cuda, scope.stream()));
  }
  return {grad_x, sum_batch(partial_weight, weight),
          bias.has_value() ? sum_batch(partial_bias, *bias) : floats({0}),
          initial_states.has_value() && initial_states->scalar_type() != ScalarType::Float
              ? torch::stable::to(grad_history, initial_states->scalar_type())
              : grad_history};
}

Tensor update_cuda(const Tensor& x, Tensor conv_state, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices, bool silu) {
  const CudaScope scope(x);
  const UpdateCall call(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu);
  if (call.out().numel() > 0)
    check_launch(kUpdateOp, launch_update_sm80({call.args, call.state_rows}, scope.stream()));
  return call.out();
}

}  // namespace
}  // namespace arcore::causal_conv1d

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("causal_conv1d", TORCH_BOX(&arcore::causal_conv1d::forward_cuda));
  m.impl("causal_conv1d_backward", TORCH_BOX(&arcore::causal_conv1d::backward_cuda));
  m.impl("causal_conv1d_update", TORCH_BOX(&arcore::causal_conv1d::update_cuda));
}
