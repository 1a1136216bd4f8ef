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
#include "common/parallel.h"
#include "sample/params.h"

namespace arcore::sample {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Below this many logits (about 0.2 ms) a second thread costs more than it saves.
constexpr double kTokensPerThread = 2e5;

void check_type(const char* op, const char* name, const Tensor& t, ScalarType type) {
  ARCORE_CHECK(t.scalar_type() == type, op, "expected ", name, " of dtype ",
               torch::headeronly::toString(type), " but got ", torch::headeronly::toString(t.scalar_type()));
}

View view_of(const Tensor& t, StorageType dtype = StorageType::kFloat32) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), dtype};
}

// An optional argument [outer, inner, last], last < 0: any.
View optional_view(const char* op, const char* name, const OptionalTensor& t, ScalarType type,
                   const Problem& p, int64_t last) {
  if (!t.has_value()) return {};
  check_type(op, name, *t, type);
  ARCORE_CHECK(
      t->dim() == 3 && t->size(0) == p.outer && t->size(1) == p.inner && (last < 0 || t->size(2) == last), op,
      "expected ", name, " of shape (", p.outer, ", ", p.inner, ", ", last, ") but got ", shape_of(*t));
  return view_of(*t);
}

Problem problem_of(const char* op, const std::vector<Tensor>& logits, const Tensor& settings,
                   const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& history,
                   const OptionalTensor& prompt, int64_t order) {
  Problem p{};
  const auto sources = static_cast<int64_t>(logits.size());
  ARCORE_CHECK(sources >= 1 && sources <= kMaxSources, op, "expected 1 to ", kMaxSources,
               " tensors of logits but got ", sources);
  ARCORE_CHECK(logits[0].dim() == 3, op, "expected logits of shape (outer, inner, vocab) but got ",
               shape_of(logits[0]));
  p.outer = logits[0].size(0);
  p.inner = logits[0].size(1);
  p.vocab = logits[0].size(2);
  ARCORE_CHECK(p.vocab < int64_t{1} << 31, op, "expected fewer than 2^31 tokens but got ", p.vocab);
  p.num_sources = static_cast<int>(sources);
  for (int64_t i = 0; i < sources; ++i) {
    const Tensor& t = logits[static_cast<size_t>(i)];
    ARCORE_CHECK(t.dim() == 3 && t.size(0) == p.outer && t.size(1) == p.inner && t.size(2) == p.vocab, op,
                 "expected all logits of shape ", shape_of(logits[0]), " but got ", shape_of(t));
    p.sources[i] = view_of(t, storage_type(t, op, "logits"));
  }
  const int64_t rows = p.outer * p.inner;
  check_type(op, "settings", settings, ScalarType::Double);
  ARCORE_CHECK(settings.dim() == 2 && (settings.size(0) == 1 || settings.size(0) == rows) &&
                   settings.size(1) == kWeights + sources && settings.stride(1) == 1,
               op, "expected settings of shape (1 or ", rows, ", ", kWeights + sources,
               ") with adjacent columns but got ", shape_of(settings));
  p.settings = static_cast<const double*>(settings.data_ptr());
  p.settings_stride = settings.size(0) == 1 ? 0 : settings.stride(0);
  p.bias = optional_view(op, "bias", bias, ScalarType::Float, p, p.vocab);
  p.mask_is_packed = mask.has_value() && mask->scalar_type() == ScalarType::Int;
  p.mask = p.mask_is_packed ? optional_view(op, "mask", mask, ScalarType::Int, p, (p.vocab + 31) / 32)
                            : optional_view(op, "mask", mask, ScalarType::Bool, p, p.vocab);
  p.history = optional_view(op, "history", history, ScalarType::Long, p, -1);
  p.history_length = history.has_value() ? history->size(2) : 0;
  p.prompt = optional_view(op, "prompt", prompt, ScalarType::Long, p, -1);
  p.prompt_length = prompt.has_value() ? prompt->size(2) : 0;
  ARCORE_CHECK(order >= 0 && order <= 2, op, "expected order 0, 1 or 2 but got ", order);
  p.order = static_cast<Order>(order);
  return p;
}

struct Keys {
  const int64_t* data;
  int64_t stride;
};

Keys keys_of(const char* op, const char* name, const Tensor& t, int64_t rows) {
  check_type(op, name, t, ScalarType::Long);
  ARCORE_CHECK(t.dim() == 1 && (t.size(0) == rows || t.size(0) == 1), op, "expected ", name, " of shape (",
               rows, ") or (1) but got ", shape_of(t));
  return {static_cast<const int64_t*>(t.data_ptr()), t.size(0) == 1 ? 0 : t.stride(0)};
}

template <typename Run>
void run_with_workspace(const Tensor& like, int64_t rows, int64_t vocab, const Run& run) {
  if (rows == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const double work = static_cast<double>(rows) * static_cast<double>(vocab);
  const int64_t threads = std::min(rows, threads_for(work, kTokensPerThread));
  const int64_t bytes = kernels.workspace_bytes(vocab);
  // One cache line more, so that every thread's part starts on one.
  Tensor workspace = torch::stable::new_empty(like, {threads * bytes + 64}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(workspace.data_ptr());
  char* aligned = reinterpret_cast<char*>((address + 63) / 64 * 64);
  run_shares(rows, threads, [&](int64_t share, int64_t begin, int64_t end) {
    run(kernels, aligned + share * bytes, begin, end);
  });
}

// The results that are wanted; others have no element.
struct Results {
  const Tensor& like;
  int64_t rows;

  Tensor make(bool wanted, std::initializer_list<int64_t> shape, ScalarType type) const {
    if (!wanted) return torch::stable::new_empty(like, {0}, type);
    return torch::stable::new_empty(like, shape, type);
  }
};

template <typename T>
T* pointer(const Tensor& t, bool wanted) {
  return wanted ? static_cast<T*>(t.data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_cpu(
    std::vector<Tensor> logits, const Tensor& settings, const OptionalTensor& bias,
    const OptionalTensor& mask, const OptionalTensor& history, const OptionalTensor& prompt,
    const Tensor& seed, const Tensor& offset, int64_t num_samples, int64_t order, int64_t mode,
    bool want_prob, bool want_logprob, bool want_raw, bool want_entropy, bool want_kept) {
  constexpr const char* kOp = "sample";
  const Problem p = problem_of(kOp, logits, settings, bias, mask, history, prompt, order);
  ARCORE_CHECK(mode >= 0 && mode <= 2, kOp, "expected mode 0, 1 or 2 but got ", mode);
  ARCORE_CHECK(num_samples >= 0, kOp, "expected num_samples >= 0 but got ", num_samples);
  const int64_t rows = p.outer * p.inner, words = (p.vocab + 31) / 32;
  const Keys seeds = keys_of(kOp, "seed", seed, rows), offsets = keys_of(kOp, "offset", offset, rows);
  const Draws draws{static_cast<Mode>(mode), num_samples, seeds.data, offsets.data, seeds.stride,
                    offsets.stride};
  const Results results{logits[0], rows};
  Tensor tokens = results.make(true, {rows, num_samples}, ScalarType::Long);
  Tensor prob = results.make(want_prob, {rows, num_samples}, ScalarType::Float);
  Tensor logprob = results.make(want_logprob, {rows, num_samples}, ScalarType::Float);
  Tensor raw_logprob = results.make(want_raw, {rows, num_samples}, ScalarType::Float);
  Tensor entropy = results.make(want_entropy, {rows}, ScalarType::Float);
  Tensor valid = results.make(true, {rows}, ScalarType::Bool);
  Tensor kept = results.make(want_kept, {rows, words}, ScalarType::Int);
  Outputs out{};
  out.valid = pointer<uint8_t>(valid, true);
  out.entropy = pointer<float>(entropy, want_entropy);
  out.kept = pointer<int32_t>(kept, want_kept);
  out.tokens = pointer<int64_t>(tokens, true);
  out.prob = pointer<float>(prob, want_prob);
  out.logprob = pointer<float>(logprob, want_logprob);
  out.raw_logprob = pointer<float>(raw_logprob, want_raw);
  run_with_workspace(logits[0], rows, p.vocab,
                     [&](const CpuKernels& kernels, void* workspace, int64_t begin, int64_t end) {
                       kernels.run(p, draws, out, workspace, begin, end);
                     });
  return {tokens, prob, logprob, raw_logprob, entropy, valid, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> filter_probs_cpu(
    std::vector<Tensor> logits, const Tensor& settings, const OptionalTensor& bias,
    const OptionalTensor& mask, const OptionalTensor& history, const OptionalTensor& prompt, int64_t order,
    bool want_entropy, bool want_kept) {
  constexpr const char* kOp = "filter_probs";
  const Problem p = problem_of(kOp, logits, settings, bias, mask, history, prompt, order);
  const int64_t rows = p.outer * p.inner, words = (p.vocab + 31) / 32;
  const Results results{logits[0], rows};
  Tensor probs = results.make(true, {rows, p.vocab}, ScalarType::Float);
  Tensor entropy = results.make(want_entropy, {rows}, ScalarType::Float);
  Tensor valid = results.make(true, {rows}, ScalarType::Bool);
  Tensor kept = results.make(want_kept, {rows, words}, ScalarType::Int);
  Outputs out{};
  out.valid = pointer<uint8_t>(valid, true);
  out.entropy = pointer<float>(entropy, want_entropy);
  out.kept = pointer<int32_t>(kept, want_kept);
  out.probs = pointer<float>(probs, true);
  run_with_workspace(logits[0], rows, p.vocab,
                     [&](const CpuKernels& kernels, void* workspace, int64_t begin, int64_t end) {
                       kernels.run(p, Draws{}, out, workspace, begin, end);
                     });
  return {probs, entropy, valid, kept};
}

Tensor confidence_mask_cpu(const Tensor& confidence, const OptionalTensor& candidates, const Tensor& count,
                           const Tensor& seed, const Tensor& offset, double temperature, int64_t ties) {
  constexpr const char* kOp = "confidence_mask";
  check_type(kOp, "confidence", confidence, ScalarType::Float);
  ARCORE_CHECK(confidence.dim() == 2, kOp, "expected confidence of shape (rows, length) but got ",
               shape_of(confidence));
  const int64_t rows = confidence.size(0), length = confidence.size(1);
  if (candidates.has_value()) {
    check_type(kOp, "candidates", *candidates, ScalarType::Bool);
    ARCORE_CHECK(candidates->dim() == 2 && candidates->size(0) == rows && candidates->size(1) == length, kOp,
                 "expected candidates of shape ", shape_of(confidence), " but got ", shape_of(*candidates));
  }
  ARCORE_CHECK(ties >= 0 && ties <= 2, kOp, "expected ties 0, 1 or 2 but got ", ties);
  // Rows of a few hundred numbers: copies of strided ones cost nothing.
  const Tensor dense = torch::stable::contiguous(confidence);
  const OptionalTensor dense_candidates =
      candidates.has_value() ? OptionalTensor(torch::stable::contiguous(*candidates)) : std::nullopt;
  Tensor chosen = torch::stable::new_empty(confidence, {rows, length}, ScalarType::Bool);
  const Keys counts = keys_of(kOp, "count", count, rows), seeds = keys_of(kOp, "seed", seed, rows),
             offsets = keys_of(kOp, "offset", offset, rows);
  Selection sel{};
  sel.confidence = static_cast<const float*>(dense.data_ptr());
  if (dense_candidates.has_value())
    sel.candidates = static_cast<const uint8_t*>(dense_candidates->data_ptr());
  sel.rows = rows;
  sel.length = length;
  sel.count = counts.data;
  sel.count_stride = counts.stride;
  sel.temperature = temperature;
  sel.seeds = seeds.data;
  sel.offsets = offsets.data;
  sel.seed_stride = seeds.stride;
  sel.offset_stride = offsets.stride;
  sel.ties = static_cast<Ties>(ties);
  sel.chosen = static_cast<uint8_t*>(chosen.data_ptr());
  run_with_workspace(confidence, rows, length,
                     [&](const CpuKernels& kernels, void* workspace, int64_t begin, int64_t end) {
                       kernels.select_least(sel, workspace, begin, end);
                     });
  return chosen;
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
