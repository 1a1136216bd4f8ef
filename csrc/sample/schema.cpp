// torch.ops.arcore.sample, filter_probs and confidence_mask: checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/parallel.h"
#include "sample/checks.h"
#include "sample/params.h"

namespace arcore::sample {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

// Below this many logits (about 0.2 ms) a second thread costs more than it saves.
constexpr double kTokensPerThread = 2e5;

template <typename Run>
void run_with_workspace(const Tensor& like, int64_t rows, int64_t vocab, const Run& run) {
  if (rows == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const double work = static_cast<double>(rows) * static_cast<double>(vocab);
  const int64_t threads = std::min(rows, threads_for(work, kTokensPerThread));
  const int64_t bytes = kernels.workspace_bytes(vocab);
  // One cache line more, so that every thread's part starts on one.
  Tensor workspace = make_empty(like, {threads * bytes + 64}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(workspace.data_ptr());
  char* aligned = reinterpret_cast<char*>((address + 63) / 64 * 64);
  run_shares(rows, threads, [&](int64_t share, int64_t begin, int64_t end) {
    run(kernels, aligned + share * bytes, begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_cpu(
    std::vector<Tensor> logits, const Tensor& settings, const OptionalTensor& bias,
    const OptionalTensor& mask, const OptionalTensor& history, const OptionalTensor& prompt,
    const Tensor& seed, const Tensor& offset, int64_t num_samples, int64_t order, int64_t mode,
    bool want_prob, bool want_logprob, bool want_raw, bool want_entropy, bool want_kept) {
  const SampleCall call(logits, settings, bias, mask, history, prompt, seed, offset, num_samples, order, mode,
                        want_prob, want_logprob, want_raw, want_entropy, want_kept);
  const Problem& p = call.problem;
  run_with_workspace(logits[0], p.outer * p.inner, p.vocab,
                     [&](const CpuKernels& kernels, void* workspace, int64_t begin, int64_t end) {
                       kernels.run(p, call.draws, call.out, workspace, begin, end);
                     });
  return {call.tokens, call.prob, call.logprob, call.raw_logprob, call.entropy, call.valid, call.kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> filter_probs_cpu(
    std::vector<Tensor> logits, const Tensor& settings, const OptionalTensor& bias,
    const OptionalTensor& mask, const OptionalTensor& history, const OptionalTensor& prompt, int64_t order,
    bool want_entropy, bool want_kept) {
  const FilterCall call(logits, settings, bias, mask, history, prompt, order, want_entropy, want_kept);
  const Problem& p = call.problem;
  run_with_workspace(logits[0], p.outer * p.inner, p.vocab,
                     [&](const CpuKernels& kernels, void* workspace, int64_t begin, int64_t end) {
                       kernels.run(p, Draws{}, call.out, workspace, begin, end);
                     });
  return {call.probs, call.entropy, call.valid, call.kept};
}

Tensor confidence_mask_cpu(const Tensor& confidence, const OptionalTensor& candidates, const Tensor& count,
                           const Tensor& seed, const Tensor& offset, double temperature, int64_t ties) {
  const SelectionCall call(confidence, candidates, count, seed, offset, temperature, ties);
  run_with_workspace(confidence, call.sel.rows, call.sel.length,
                     [&](const CpuKernels& kernels, void* workspace, int64_t begin, int64_t end) {
                       kernels.select_least(call.sel, workspace, begin, end);
                     });
  return call.chosen;
}

}  // namespace
}  // namespace arcore::sample

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "sample(Tensor[] logits, Tensor settings, Tensor? bias, Tensor? mask, Tensor? history, Tensor? prompt, "
      "Tensor seed, Tensor offset, int num_samples, int order, int mode, bool want_prob, bool want_logprob, "
      "bool want_raw_logprob, bool want_entropy, bool want_kept) -> (Tensor tokens, Tensor prob, "
      "Tensor logprob, Tensor raw_logprob, Tensor entropy, Tensor valid, Tensor kept)");
  m.def(
      "filter_probs(Tensor[] logits, Tensor settings, Tensor? bias, Tensor? mask, Tensor? history, "
      "Tensor? prompt, int order, bool want_entropy, bool want_kept) -> (Tensor probs, Tensor entropy, "
      "Tensor valid, Tensor kept)");
  m.def(
      "confidence_mask(Tensor confidence, Tensor? candidates, Tensor count, Tensor seed, Tensor offset, "
      "float temperature, int ties) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("sample", TORCH_BOX(&arcore::sample::sample_cpu));
  m.impl("filter_probs", TORCH_BOX(&arcore::sample::filter_probs_cpu));
  m.impl("confidence_mask", TORCH_BOX(&arcore::sample::confidence_mask_cpu));
}
