// torch.ops.arcore.token_logprobs, its backward, and the pieces of both that linear_logprobs runs on one tile
// of columns at a time: schema, checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/parallel.h"
#include "token_logprobs/checks.h"
#include "token_logprobs/params.h"

namespace arcore::token_logprobs {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

// Below this many elements a second thread costs more than it saves.
constexpr double kElementsPerThread = 1e5;

int64_t threads_of(const Problem& p) {
  return threads_for(static_cast<double>(p.rows) * static_cast<double>(p.columns), kElementsPerThread);
}

void run_update(const UpdateArgs& args) {
  const CpuKernels& kernels = cpu_kernels();
  run_tasks(args.problem.rows, threads_of(args.problem),
            [&](int64_t begin, int64_t end) { kernels.update(args, begin, end); });
}

void run_backward(const BackwardArgs& args) {
  const CpuKernels& kernels = cpu_kernels();
  run_tasks(args.problem.rows, threads_of(args.problem),
            [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

struct Outputs {
  Tensor logp, logsumexp, entropy;
};

Outputs run_finish(const Problem& p, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                   const RowState* state, bool entropy) {
  auto rows = [&] { return make_empty(like, shape, ScalarType::Float); };
  Outputs out{rows(), rows(), entropy ? rows() : make_empty(like, {0}, ScalarType::Float)};
  const FinishArgs args{p, state, static_cast<float*>(out.logp.data_ptr()),
                        static_cast<float*>(out.logsumexp.data_ptr()),
                        entropy ? static_cast<float*>(out.entropy.data_ptr()) : nullptr};
  cpu_kernels().finish(args, 0, p.rows);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& logits, const Tensor& target,
                                                       const OptionalTensor& temperature_rows,
                                                       const OptionalTensor& mask, double temperature,
                                                       double softcap, int64_t ignore_index, bool entropy) {
  const Problem p =
      check_logits(kOp, logits, target, temperature_rows, mask, temperature, softcap, ignore_index);
  Tensor state = make_empty(logits, {p.rows, kStateDoubles}, ScalarType::Double);
  RowState* states = static_cast<RowState*>(state.data_ptr());
  if (p.rows > 0) run_update({p, rows_of(kOp, "logits", logits), states, entropy});
  Outputs out = run_finish(p, logits, target.sizes(), states, entropy);
  return {out.logp, out.logsumexp, out.entropy, state};
}

std::tuple<Tensor, Tensor> backward_cpu(const OptionalTensor& grad_logp, const OptionalTensor& grad_logsumexp,
                                        const OptionalTensor& grad_entropy, const Tensor& logits,
                                        const Tensor& target, const OptionalTensor& temperature_rows,
                                        const OptionalTensor& mask, const Tensor& state, double temperature,
                                        double softcap, int64_t ignore_index, const OptionalTensor& grad_mean,
                                        const OptionalTensor& tally) {
  BackwardArgs args{};
  args.problem =
      check_logits(kBackwardOp, logits, target, temperature_rows, mask, temperature, softcap, ignore_index);
  const Problem& p = args.problem;
  args.state = state_of(kBackwardOp, state, p.rows);
  const RowGrads grads = check_grads(kBackwardOp, grad_logp, grad_logsumexp, grad_entropy, p.rows);
  args.grad_logp = grads.logp;
  args.grad_logsumexp = grads.logsumexp;
  args.grad_entropy = grads.entropy;
  set_grad_mean(kBackwardOp, args, grad_mean, tally);
  Tensor grad = gradient_like(logits);
  Tensor grad_temperature =
      make_empty(logits, {temperature_rows.has_value() ? p.rows : 0}, ScalarType::Float);
  if (temperature_rows.has_value()) args.grad_temperature = static_cast<float*>(grad_temperature.data_ptr());
  if (p.rows > 0) {
    args.logits = rows_of(kBackwardOp, "logits", logits);
    args.grad = rows_of(kBackwardOp, "the gradient", grad);
    run_backward(args);
  }
  return {grad, grad_temperature};
}

void update_cpu(const Tensor& tile, const Tensor& target, const OptionalTensor& temperature_rows,
                const OptionalTensor& mask, double temperature, double softcap, int64_t ignore_index,
                int64_t first_column, int64_t vocab, bool entropy, Tensor state) {
  const Problem p = check_tile(kUpdateOp, tile, target, temperature_rows, mask, temperature, softcap,
                               ignore_index, first_column, vocab);
  RowState* states = state_of(kUpdateOp, state, p.rows);
  for (const auto& [name, t] : {std::pair{"tile", &tile}, {"target", &target}})
    check_apart(kUpdateOp, "state", state, name, *t);
  check_apart(kUpdateOp, "state", state, "mask", mask);
  check_apart(kUpdateOp, "state", state, "temperature_rows", temperature_rows);
  if (p.rows > 0) run_update({p, rows_of(kUpdateOp, "tile", tile), states, entropy});
}

void tally_cpu(const Tensor& tile, const Tensor& target, const OptionalTensor& mask, double softcap,
               int64_t ignore_index, int64_t first_column, int64_t vocab, Tensor tally) {
  // Whole rows may have any leading dimensions.
  const bool whole = first_column == 0 && tile.dim() >= 1 && tile.size(tile.dim() - 1) == vocab;
  const Problem p = whole
                        ? check_logits(kTallyOp, tile, target, std::nullopt, mask, 1.0, softcap, ignore_index)
                        : check_tile(kTallyOp, tile, target, std::nullopt, mask, 1.0, softcap, ignore_index,
                                     first_column, vocab);
  TallyArgs args{p, {}, tally_of(kTallyOp, tally, p.rows)};
  for (const auto& [name, t] : {std::pair{"tile", &tile}, {"target", &target}})
    check_apart(kTallyOp, "tally", tally, name, *t);
  check_apart(kTallyOp, "tally", tally, "mask", mask);
  if (p.rows == 0) return;
  args.logits = rows_of(kTallyOp, "tile", tile);
  const CpuKernels& kernels = cpu_kernels();
  run_tasks(p.rows, threads_of(p), [&](int64_t begin, int64_t end) { kernels.tally(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> finish_cpu(const Tensor& state, const Tensor& target,
                                              const OptionalTensor& temperature_rows, double temperature,
                                              int64_t ignore_index, int64_t vocab, bool entropy) {
  const Problem p =
      check_rows(kFinishOp, target.numel(), vocab, target, temperature_rows, temperature, 0.0, ignore_index);
  Outputs out = run_finish(p, state, target.sizes(), state_of(kFinishOp, state, p.rows), entropy);
  return {out.logp, out.logsumexp, out.entropy};
}

Tensor tile_backward_cpu(const OptionalTensor& grad_logp, const OptionalTensor& grad_logsumexp,
                         const OptionalTensor& grad_entropy, Tensor tile, const Tensor& target,
                         const OptionalTensor& temperature_rows, const OptionalTensor& mask,
                         const Tensor& state, double temperature, double softcap, int64_t ignore_index,
                         int64_t first_column, int64_t vocab, bool need_temperature,
                         const OptionalTensor& grad_mean, const OptionalTensor& tally) {
  BackwardArgs args{};
  args.problem = check_tile(kTileBackwardOp, tile, target, temperature_rows, mask, temperature, softcap,
                            ignore_index, first_column, vocab);
  args.state = state_of(kTileBackwardOp, state, args.problem.rows);
  check_no_overlap(kTileBackwardOp, "tile", tile);
  for (const auto& [name, t] : {std::pair{"target", &target}, {"state", &state}})
    check_apart(kTileBackwardOp, "tile", tile, name, *t);
  for (const auto& [name, t] : {std::pair{"mask", &mask},
                                {"temperature_rows", &temperature_rows},
                                {"grad_logp", &grad_logp},
                                {"grad_logsumexp", &grad_logsumexp},
                                {"grad_entropy", &grad_entropy},
                                {"grad_mean", &grad_mean},
                                {"tally", &tally}})
    check_apart(kTileBackwardOp, "tile", tile, name, *t);
  const RowGrads grads =
      check_grads(kTileBackwardOp, grad_logp, grad_logsumexp, grad_entropy, args.problem.rows);
  args.grad_logp = grads.logp;
  args.grad_logsumexp = grads.logsumexp;
  args.grad_entropy = grads.entropy;
  set_grad_mean(kTileBackwardOp, args, grad_mean, tally);
  Tensor grad_temperature = make_empty(state, {need_temperature ? args.problem.rows : 0}, ScalarType::Float);
  if (need_temperature) args.grad_temperature = static_cast<float*>(grad_temperature.data_ptr());
  if (args.problem.rows > 0) {
    args.logits = args.grad = rows_of(kTileBackwardOp, "tile", tile);
    run_backward(args);
  }
  return grad_temperature;
}

}  // namespace
}  // namespace arcore::token_logprobs

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "token_logprobs(Tensor logits, Tensor target, Tensor? temperature_rows, Tensor? mask, float "
      "temperature, "
      "float softcap, int ignore_index, bool entropy)"
      " -> (Tensor logp, Tensor logsumexp, Tensor entropy, Tensor state)");
  m.def(
      "token_logprobs_backward(Tensor? grad_logp, Tensor? grad_logsumexp, Tensor? grad_entropy, Tensor "
      "logits, "
      "Tensor target, Tensor? temperature_rows, Tensor? mask, Tensor state, float temperature, float "
      "softcap, "
      "int ignore_index, Tensor? grad_mean=None, Tensor? tally=None) -> (Tensor grad_logits, Tensor "
      "grad_temperature_rows)");
  m.def(
      "token_logprobs_update_(Tensor tile, Tensor target, Tensor? temperature_rows, Tensor? mask, "
      "float temperature, float softcap, int ignore_index, int first_column, int vocab, bool entropy, "
      "Tensor(a!) state) -> ()");
  m.def(
      "token_logprobs_finish(Tensor state, Tensor target, Tensor? temperature_rows, float temperature, "
      "int ignore_index, int vocab, bool entropy) -> (Tensor logp, Tensor logsumexp, Tensor entropy)");
  m.def(
      "token_logprobs_tile_backward_(Tensor? grad_logp, Tensor? grad_logsumexp, Tensor? grad_entropy, "
      "Tensor(a!) tile, Tensor target, Tensor? temperature_rows, Tensor? mask, Tensor state, float "
      "temperature, "
      "float softcap, int ignore_index, int first_column, int vocab, bool need_temperature, "
      "Tensor? grad_mean=None, Tensor? tally=None) -> Tensor");
  m.def(
      "token_logprobs_tally_(Tensor tile, Tensor target, Tensor? mask, float softcap, int ignore_index, "
      "int first_column, int vocab, Tensor(a!) tally) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&arcore::token_logprobs::forward_cpu));
  m.impl("token_logprobs_backward", TORCH_BOX(&arcore::token_logprobs::backward_cpu));
  m.impl("token_logprobs_update_", TORCH_BOX(&arcore::token_logprobs::update_cpu));
  m.impl("token_logprobs_tally_", TORCH_BOX(&arcore::token_logprobs::tally_cpu));
  m.impl("token_logprobs_finish", TORCH_BOX(&arcore::token_logprobs::finish_cpu));
  m.impl("token_logprobs_tile_backward_", TORCH_BOX(&arcore::token_logprobs::tile_backward_cpu));
}
