// Argument checks and views that the CPU and the CUDA side of sample share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/new_tensor.h"
#include "sample/params.h"

namespace arcore::sample {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_type(const char* op, const char* name, const Tensor& t, ScalarType type) {
  ARCORE_CHECK(t.scalar_type() == type, op, "expected ", name, " of dtype ",
               torch::headeronly::toString(type), " but got ", torch::headeronly::toString(t.scalar_type()));
}

inline View view_of(const Tensor& t, StorageType dtype = StorageType::kFloat32) {
  const int64_t dims = t.dim();
  return {t.data_ptr(), dims == 3 ? t.stride(0) : 0, dims >= 2 ? t.stride(dims - 2) : 0, t.stride(dims - 1),
          dtype};
}

// An optional argument [outer, inner, last], last < 0: any.
inline View optional_view(const char* op, const char* name, const OptionalTensor& t, ScalarType type,
                          const Problem& p, int64_t last, const Tensor& like) {
  if (!t.has_value()) return {};
  check_type(op, name, *t, type);
  check_device(op, name, *t, like);
  ARCORE_CHECK(
      t->dim() == 3 && t->size(0) == p.outer && t->size(1) == p.inner && (last < 0 || t->size(2) == last), op,
      "expected ", name, " of shape (", p.outer, ", ", p.inner, ", ", last, ") but got ", shape_of(*t));
  return view_of(*t);
}

inline Problem problem_of(const char* op, const std::vector<Tensor>& logits, const Tensor& settings,
                          const OptionalTensor& bias, const OptionalTensor& mask,
                          const OptionalTensor& history, const OptionalTensor& prompt, int64_t order) {
  Problem p{};
  const auto sources = static_cast<int64_t>(logits.size());
  ARCORE_CHECK(sources >= 1 && sources <= kMaxSources, op, "expected 1 to ", kMaxSources,
               " tensors of logits but got ", sources);
  const int64_t dims = logits[0].dim();
  ARCORE_CHECK(dims >= 1 && dims <= 3, op,
               "expected logits of shape (outer, inner, vocab), or without the first ones, but got ",
               shape_of(logits[0]));
  p.outer = dims == 3 ? logits[0].size(0) : 1;
  p.inner = dims >= 2 ? logits[0].size(dims - 2) : 1;
  p.vocab = logits[0].size(dims - 1);
  ARCORE_CHECK(p.vocab < int64_t{1} << 31, op, "expected fewer than 2^31 tokens but got ", p.vocab);
  p.num_sources = static_cast<int>(sources);
  for (int64_t i = 0; i < sources; ++i) {
    const Tensor& t = logits[static_cast<size_t>(i)];
    ARCORE_CHECK(t.dim() == dims && (dims < 3 || t.size(0) == p.outer) &&
                     (dims < 2 || t.size(dims - 2) == p.inner) && t.size(dims - 1) == p.vocab,
                 op, "expected all logits of shape ", shape_of(logits[0]), " but got ", shape_of(t));
    check_device(op, "logits", t, logits[0]);
    p.sources[i] = view_of(t, storage_type(t, op, "logits"));
  }
  const int64_t rows = p.outer * p.inner;
  check_type(op, "settings", settings, ScalarType::Double);
  check_device(op, "settings", settings, logits[0]);
  ARCORE_CHECK(settings.dim() == 2 && (settings.size(0) == 1 || settings.size(0) == rows) &&
                   settings.size(1) == kWeights + sources && settings.stride(1) == 1,
               op, "expected settings of shape (1 or ", rows, ", ", kWeights + sources,
               ") with adjacent columns but got ", shape_of(settings));
  p.settings = static_cast<const double*>(settings.data_ptr());
  p.settings_stride = settings.size(0) == 1 ? 0 : settings.stride(0);
  p.bias = optional_view(op, "bias", bias, ScalarType::Float, p, p.vocab, logits[0]);
  p.mask_is_packed = mask.has_value() && mask->scalar_type() == ScalarType::Int;
  p.mask = p.mask_is_packed
               ? optional_view(op, "mask", mask, ScalarType::Int, p, (p.vocab + 31) / 32, logits[0])
               : optional_view(op, "mask", mask, ScalarType::Bool, p, p.vocab, logits[0]);
  p.history = optional_view(op, "history", history, ScalarType::Long, p, -1, logits[0]);
  p.history_length = history.has_value() ? history->size(2) : 0;
  p.prompt = optional_view(op, "prompt", prompt, ScalarType::Long, p, -1, logits[0]);
  p.prompt_length = prompt.has_value() ? prompt->size(2) : 0;
  // Tokens are counted in 31 bits of an int32.
  ARCORE_CHECK(p.history_length < int64_t{1} << 30, op,
               "expected a history of fewer than 2^30 tokens but got ", p.history_length);
  ARCORE_CHECK(order >= 0 && order <= 2, op, "expected order 0, 1 or 2 but got ", order);
  p.order = static_cast<Order>(order);
  return p;
}

struct Keys {
  const int64_t* data;
  int64_t stride;
};

inline Keys keys_of(const char* op, const char* name, const Tensor& t, int64_t rows) {
  check_type(op, name, t, ScalarType::Long);
  ARCORE_CHECK(t.dim() == 1 && (t.size(0) == rows || t.size(0) == 1), op, "expected ", name, " of shape (",
               rows, ") or (1) but got ", shape_of(t));
  return {static_cast<const int64_t*>(t.data_ptr()), t.size(0) == 1 ? 0 : t.stride(0)};
}

// The results that are wanted; others have no element.
struct __attribute__((visibility("hidden"))) Results {
  const Tensor& like;
  int64_t rows;

  Tensor make(bool wanted, std::initializer_list<int64_t> shape, ScalarType type) const {
    if (!wanted) return make_empty(like, {0}, type);
    return make_empty(like, shape, type);
  }
};

template <typename T>
T* pointer(const Tensor& t, bool wanted) {
  return wanted ? static_cast<T*>(t.data_ptr()) : nullptr;
}

// A checked call of sample: what the kernels receive, and the results they write.
struct __attribute__((visibility("hidden"))) SampleCall {
  Problem problem;
  Draws draws;
  Tensor tokens, prob, logprob, raw_logprob, entropy, valid, kept;
  Outputs out{};

  SampleCall(const std::vector<Tensor>& logits, const Tensor& settings, const OptionalTensor& bias,
             const OptionalTensor& mask, const OptionalTensor& history, const OptionalTensor& prompt,
             const Tensor& seed, const Tensor& offset, int64_t num_samples, int64_t order, int64_t mode,
             bool want_prob, bool want_logprob, bool want_raw, bool want_entropy, bool want_kept)
      : problem(problem_of("sample", logits, settings, bias, mask, history, prompt, order)),
        tokens(logits[0]),
        prob(logits[0]),
        logprob(logits[0]),
        raw_logprob(logits[0]),
        entropy(logits[0]),
        valid(logits[0]),
        kept(logits[0]) {
    constexpr const char* kOp = "sample";
    ARCORE_CHECK(mode >= 0 && mode <= 2, kOp, "expected mode 0, 1 or 2 but got ", mode);
    ARCORE_CHECK(num_samples >= 0, kOp, "expected num_samples >= 0 but got ", num_samples);
    const int64_t rows = problem.outer * problem.inner, words = (problem.vocab + 31) / 32;
    check_device(kOp, "seed", seed, logits[0]);
    check_device(kOp, "offset", offset, logits[0]);
    const Keys seeds = keys_of(kOp, "seed", seed, rows), offsets = keys_of(kOp, "offset", offset, rows);
    draws = {static_cast<Mode>(mode), num_samples, seeds.data, offsets.data, seeds.stride, offsets.stride};
    const Results results{logits[0], rows};
    tokens = results.make(true, {rows, num_samples}, ScalarType::Long);
    prob = results.make(want_prob, {rows, num_samples}, ScalarType::Float);
    logprob = results.make(want_logprob, {rows, num_samples}, ScalarType::Float);
    raw_logprob = results.make(want_raw, {rows, num_samples}, ScalarType::Float);
    entropy = results.make(want_entropy, {rows}, ScalarType::Float);
    valid = results.make(true, {rows}, ScalarType::Bool);
    kept = results.make(want_kept, {rows, words}, ScalarType::Int);
    out.valid = pointer<uint8_t>(valid, true);
    out.entropy = pointer<float>(entropy, want_entropy);
    out.kept = pointer<int32_t>(kept, want_kept);
    out.tokens = pointer<int64_t>(tokens, true);
    out.prob = pointer<float>(prob, want_prob);
    out.logprob = pointer<float>(logprob, want_logprob);
    out.raw_logprob = pointer<float>(raw_logprob, want_raw);
  }
};

// A checked call of filter_probs.
struct __attribute__((visibility("hidden"))) FilterCall {
  Problem problem;
  Tensor probs, entropy, valid, kept;
  Outputs out{};

  FilterCall(const std::vector<Tensor>& logits, const Tensor& settings, const OptionalTensor& bias,
             const OptionalTensor& mask, const OptionalTensor& history, const OptionalTensor& prompt,
             int64_t order, bool want_entropy, bool want_kept)
      : problem(problem_of("filter_probs", logits, settings, bias, mask, history, prompt, order)),
        probs(logits[0]),
        entropy(logits[0]),
        valid(logits[0]),
        kept(logits[0]) {
    const int64_t rows = problem.outer * problem.inner, words = (problem.vocab + 31) / 32;
    const Results results{logits[0], rows};
    probs = results.make(true, {rows, problem.vocab}, ScalarType::Float);
    entropy = results.make(want_entropy, {rows}, ScalarType::Float);
    valid = results.make(true, {rows}, ScalarType::Bool);
    kept = results.make(want_kept, {rows, words}, ScalarType::Int);
    out.valid = pointer<uint8_t>(valid, true);
    out.entropy = pointer<float>(entropy, want_entropy);
    out.kept = pointer<int32_t>(kept, want_kept);
    out.probs = pointer<float>(probs, true);
  }
};

// A checked call of confidence_mask.
struct __attribute__((visibility("hidden"))) SelectionCall {
  Selection sel{};
  Tensor dense, chosen;
  OptionalTensor dense_candidates;

  SelectionCall(const Tensor& confidence, const OptionalTensor& candidates, const Tensor& count,
                const Tensor& seed, const Tensor& offset, double temperature, int64_t ties)
      : dense(confidence), chosen(confidence) {
    check_device("confidence_mask", "count", count, confidence);
    check_device("confidence_mask", "seed", seed, confidence);
    check_device("confidence_mask", "offset", offset, confidence);
    if (candidates.has_value()) check_device("confidence_mask", "candidates", *candidates, confidence);
    constexpr const char* kOp = "confidence_mask";
    check_type(kOp, "confidence", confidence, ScalarType::Float);
    ARCORE_CHECK(confidence.dim() == 2, kOp, "expected confidence of shape (rows, length) but got ",
                 shape_of(confidence));
    const int64_t rows = confidence.size(0), length = confidence.size(1);
    if (candidates.has_value()) {
      check_type(kOp, "candidates", *candidates, ScalarType::Bool);
      ARCORE_CHECK(candidates->dim() == 2 && candidates->size(0) == rows && candidates->size(1) == length,
                   kOp, "expected candidates of shape ", shape_of(confidence), " but got ",
                   shape_of(*candidates));
    }
    ARCORE_CHECK(ties >= 0 && ties <= 2, kOp, "expected ties 0, 1 or 2 but got ", ties);
    // Rows of a few hundred numbers: copies of strided ones cost nothing.
    dense = torch::stable::contiguous(confidence);
    dense_candidates =
        candidates.has_value() ? OptionalTensor(torch::stable::contiguous(*candidates)) : std::nullopt;
    chosen = make_empty(confidence, {rows, length}, ScalarType::Bool);
    const Keys counts = keys_of(kOp, "count", count, rows), seeds = keys_of(kOp, "seed", seed, rows),
               offsets = keys_of(kOp, "offset", offset, rows);
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
  }
};

}  // namespace arcore::sample
