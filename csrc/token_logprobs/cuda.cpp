// CUDA side of torch.ops.arcore.token_logprobs, its backward and the pieces of linear_logprobs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "common/cuda_call.h"
#include "token_logprobs/checks.h"
#include "token_logprobs/params.h"

namespace arcore::token_logprobs {

namespace {

struct Outputs {
  Tensor logp, logsumexp, entropy;
  FinishArgs args;

  Outputs(const Problem& p, const Tensor& target, bool want_entropy)
      : logp(torch::stable::new_empty(target, target.sizes(), ScalarType::Float)),
        logsumexp(torch::stable::new_empty(target, target.sizes(), ScalarType::Float)),
        entropy(want_entropy ? torch::stable::new_empty(target, target.sizes(), ScalarType::Float)
                             : torch::stable::new_empty(target, {0}, ScalarType::Float)),
        args{p, nullptr, static_cast<float*>(logp.data_ptr()), static_cast<float*>(logsumexp.data_ptr()),
             want_entropy ? static_cast<float*>(entropy.data_ptr()) : nullptr} {}
};

void run_update(const char* op, UpdateCuda& cuda, const Tensor& like, void* stream) {
  const Problem& p = cuda.args.problem;
  if (p.rows == 0) return;
  cuda.slices = row_slices_sm80(p.columns);
  Tensor partial = like;
  if (cuda.slices > 1) {
    partial = torch::stable::new_empty(like, {p.rows * cuda.slices * kStateDoubles}, ScalarType::Double);
    cuda.partial = static_cast<RowState*>(partial.data_ptr());
  }
  check_launch(op, launch_update_sm80(cuda, stream));
}

// The kernels hold scores as float32, which numbers beyond these leave. In a tensor they make their rows NaN.
const Problem& in_range(const char* op, const Problem& p) {
  ARCORE_CHECK(p.softcap == 0.0 || (p.softcap >= 1e-30 && p.softcap <= 1e30), op,
               "expected softcap from 1e-30 to 1e30 on a GPU but got ", p.softcap,
               "; leave it out where it is so large that it changes nothing");
  ARCORE_CHECK(p.temperature_rows != nullptr || (p.temperature >= 1e-30 && p.temperature <= 1e30), op,
               "expected temperature from 1e-30 to 1e30 on a GPU but got ", p.temperature,
               "; compute on the CPU, which takes any");
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& logits, const Tensor& target,
                                                        const OptionalTensor& temperature_rows,
                                                        const OptionalTensor& mask, double temperature,
                                                        double softcap, int64_t ignore_index, bool entropy) {
  const CudaScope scope(logits);
  const Problem p = in_range(
      kOp, check_logits(kOp, logits, target, temperature_rows, mask, temperature, softcap, ignore_index));
  Tensor state = torch::stable::new_empty(logits, {p.rows, kStateDoubles}, ScalarType::Double);
  const Outputs out(p, target, entropy);
  UpdateCuda cuda{{p, rows_of(kOp, "logits", logits), static_cast<RowState*>(state.data_ptr()), entropy},
                  out.args,
                  1,
                  nullptr};
  run_update(kOp, cuda, logits, scope.stream());
  return {out.logp, out.logsumexp, out.entropy, state};
}

// The mean of a row has no CUDA kernel yet.
void refuse_mean(const char* op, const OptionalTensor& grad_mean, const OptionalTensor& tally) {
  ARCORE_CHECK(
      !grad_mean.has_value() && !tally.has_value(), op,
      "expected no grad_mean and no tally on a GPU, where label smoothing has no kernel, but got one");
}

void set_grads(const char* op, BackwardArgs& args, const OptionalTensor& grad_logp,
               const OptionalTensor& grad_logsumexp, const OptionalTensor& grad_entropy) {
  const RowGrads grads = check_grads(op, grad_logp, grad_logsumexp, grad_entropy, args.problem.rows);
  args.grad_logp = grads.logp;
  args.grad_logsumexp = grads.logsumexp;
  args.grad_entropy = grads.entropy;
}

std::tuple<Tensor, Tensor> backward_cuda(const OptionalTensor& grad_logp,
                                         const OptionalTensor& grad_logsumexp,
                                         const OptionalTensor& grad_entropy, const Tensor& logits,
                                         const Tensor& target, const OptionalTensor& temperature_rows,
                                         const OptionalTensor& mask, const Tensor& state, double temperature,
                                         double softcap, int64_t ignore_index,
                                         const OptionalTensor& grad_mean, const OptionalTensor& tally) {
  const CudaScope scope(logits);
  refuse_mean(kBackwardOp, grad_mean, tally);
  BackwardArgs args{};
  args.problem =
      check_logits(kBackwardOp, logits, target, temperature_rows, mask, temperature, softcap, ignore_index);
  in_range(kBackwardOp, args.problem);
  const Problem& p = args.problem;
  args.state = state_of(kBackwardOp, state, p.rows);
  set_grads(kBackwardOp, args, grad_logp, grad_logsumexp, grad_entropy);
  Tensor grad = gradient_like(logits);
  Tensor grad_temperature =
      torch::stable::new_empty(logits, {temperature_rows.has_value() ? p.rows : 0}, ScalarType::Float);
  if (temperature_rows.has_value()) args.grad_temperature = static_cast<float*>(grad_temperature.data_ptr());
  if (p.rows > 0) {
    args.logits = rows_of(kBackwardOp, "logits", logits);
    args.grad = rows_of(kBackwardOp, "the gradient", grad);
    check_launch(kBackwardOp, launch_backward_sm80(args, scope.stream()));
  }
  return {grad, grad_temperature};
}

void update_cuda(const Tensor& tile, const Tensor& target, const OptionalTensor& temperature_rows,
                 const OptionalTensor& mask, double temperature, double softcap, int64_t ignore_index,
                 int64_t first_column, int64_t vocab, bool entropy, Tensor state) {
  const CudaScope scope(tile);
  const Problem p = check_tile(kUpdateOp, tile, target, temperature_rows, mask, temperature, softcap,
                               ignore_index, first_column, vocab);
  in_range(kUpdateOp, p);
  UpdateCuda cuda{
      {p, rows_of(kUpdateOp, "tile", tile), state_of(kUpdateOp, state, p.rows), entropy}, {}, 1, nullptr};
  run_update(kUpdateOp, cuda, tile, scope.stream());
}

std::tuple<Tensor, Tensor, Tensor> finish_cuda(const Tensor& state, const Tensor& target,
                                               const OptionalTensor& temperature_rows, double temperature,
                                               int64_t ignore_index, int64_t vocab, bool entropy) {
  const CudaScope scope(state);
  const Problem p =
      check_rows(kFinishOp, target.numel(), vocab, target, temperature_rows, temperature, 0.0, ignore_index);
  in_range(kFinishOp, p);
  Outputs out(p, target, entropy);
  out.args.state = state_of(kFinishOp, state, p.rows);
  check_launch(kFinishOp, launch_finish_sm80(out.args, scope.stream()));
  return {out.logp, out.logsumexp, out.entropy};
}

Tensor tile_backward_cuda(const OptionalTensor& grad_logp, const OptionalTensor& grad_logsumexp,
                          const OptionalTensor& grad_entropy, Tensor tile, const Tensor& target,
                          const OptionalTensor& temperature_rows, const OptionalTensor& mask,
                          const Tensor& state, double temperature, double softcap, int64_t ignore_index,
                          int64_t first_column, int64_t vocab, bool need_temperature,
                          const OptionalTensor& grad_mean, const OptionalTensor& tally) {
  const CudaScope scope(tile);
  refuse_mean(kTileBackwardOp, grad_mean, tally);
  BackwardArgs args{};
  args.problem = check_tile(kTileBackwardOp, tile, target, temperature_rows, mask, temperature, softcap,
                            ignore_index, first_column, vocab);
  in_range(kTileBackwardOp, args.problem);
  args.state = state_of(kTileBackwardOp, state, args.problem.rows);
  check_no_overlap(kTileBackwardOp, "tile", tile);
  for (const auto& [name, t] : {std::pair{"target", &target}, {"state", &state}})
    check_apart(kTileBackwardOp, "tile", tile, name, *t);
  for (const auto& [name, t] : {std::pair{"mask", &mask},
                                {"temperature_rows", &temperature_rows},
                                {"grad_logp", &grad_logp},
                                {"grad_logsumexp", &grad_logsumexp},
                                {"grad_entropy", &grad_entropy}})
    check_apart(kTileBackwardOp, "tile", tile, name, *t);
  set_grads(kTileBackwardOp, args, grad_logp, grad_logsumexp, grad_entropy);
  Tensor grad_temperature =
      torch::stable::new_empty(state, {need_temperature ? args.problem.rows : 0}, ScalarType::Float);
  if (need_temperature) args.grad_temperature = static_cast<float*>(grad_temperature.data_ptr());
  if (args.problem.rows > 0) {
    args.logits = args.grad = rows_of(kTileBackwardOp, "tile", tile);
    check_launch(kTileBackwardOp, launch_backward_sm80(args, scope.stream()));
  }
  return grad_temperature;
}

}  // namespace
}  // namespace arcore::token_logprobs

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("token_logprobs", TORCH_BOX(&arcore::token_logprobs::forward_cuda));
  m.impl("token_logprobs_backward", TORCH_BOX(&arcore::token_logprobs::backward_cuda));
  m.impl("token_logprobs_update_", TORCH_BOX(&arcore::token_logprobs::update_cuda));
  m.impl("token_logprobs_finish", TORCH_BOX(&arcore::token_logprobs::finish_cuda));
  m.impl("token_logprobs_tile_backward_", TORCH_BOX(&arcore::token_logprobs::tile_backward_cuda));
}
