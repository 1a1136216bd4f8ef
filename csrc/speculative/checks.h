// The calls of torch.ops.arcore.verify_*: checks and views, the same on the CPU and on a GPU but for `run`.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/new_tensor.h"
#include "speculative/params.h"

namespace arcore::speculative {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Verified = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using VerifiedWindow = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Probabilities probabilities(const char* op, const char* name, const Tensor& t, const Problem& p,
                            int64_t rows) {
  ARCORE_CHECK(t.dim() == 3 && t.size(0) == p.batch && t.size(1) == rows && t.size(2) == p.vocab, op,
               "expected ", name, " of shape (", p.batch, ", ", rows, ", ", p.vocab, ") but got ",
               shape_of(t));
  ARCORE_CHECK(storage_type(t, op, name) == p.dtype, op, "expected ", name,
               " of target_probs' dtype but got ", torch::headeronly::toString(t.scalar_type()));
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// int64 [B], or [B, items] where items >= 0.
Integers integers(const char* op, const char* name, const Tensor& t, int64_t batch, int64_t items) {
  ARCORE_CHECK(t.scalar_type() == ScalarType::Long, op, "expected ", name, " of dtype int64 but got ",
               torch::headeronly::toString(t.scalar_type()));
  if (items < 0) {
    ARCORE_CHECK(t.dim() == 1 && t.size(0) == batch, op, "expected ", name, " of shape (", batch,
                 ") but got ", shape_of(t));
    return {static_cast<const int64_t*>(t.data_ptr()), t.stride(0), 0};
  }
  ARCORE_CHECK(t.dim() == 2 && t.size(0) == batch && t.size(1) == items, op, "expected ", name, " of shape (",
               batch, ", ", items, ") but got ", shape_of(t));
  return {static_cast<const int64_t*>(t.data_ptr()), t.stride(0), t.stride(1)};
}

// What all rules have in common. Also checks the values that the kernels use as indices.
Problem problem(const char* op, Rule rule, const Tensor& target, const Tensor& tokens,
                const OptionalTensor& parents, const OptionalTensor& draft, const OptionalTensor& lengths,
                const Tensor& seed, const Tensor& offset) {
  Problem p{};
  p.rule = rule;
  ARCORE_CHECK(target.dim() == 3 && target.size(1) >= 1 && target.size(2) >= 1, op,
               "expected target_probs of shape [B, nodes + 1, V] but got ", shape_of(target));
  p.batch = target.size(0);
  p.nodes = target.size(1) - 1;
  p.vocab = target.size(2);
  p.dtype = storage_type(target, op, "target_probs");
  p.target = probabilities(op, "target_probs", target, p, p.nodes + 1);
  if (draft.has_value()) p.draft = probabilities(op, "draft_probs", *draft, p, p.nodes);
  p.tokens = integers(op, "draft_tokens", tokens, p.batch, p.nodes);
  if (parents.has_value()) p.parents = integers(op, "parents", *parents, p.batch, p.nodes);
  if (lengths.has_value()) p.lengths = integers(op, "lengths", *lengths, p.batch, -1);
  p.seed = integers(op, "seed", seed, p.batch, -1);
  p.offset = integers(op, "offset", offset, p.batch, -1);

  for (const auto& [name, t] : {std::pair{"draft_tokens", &tokens}, {"seed", &seed}, {"offset", &offset}})
    check_device(op, name, *t, target);
  for (const auto& [name, t] :
       {std::pair{"parents", &parents}, {"draft_probs", &draft}, {"lengths", &lengths}})
    if (t->has_value()) check_device(op, name, **t, target);
  // On a GPU the kernels stay within their tensors whatever the values are; reading them here would wait for
  // it.
  for (int64_t b = 0; target.is_cpu() && b < p.batch; ++b) {
    int64_t length = p.nodes;
    if (lengths.has_value()) {
      length = p.lengths.data[b * p.lengths.batch];
      ARCORE_CHECK(length >= 0 && length <= p.nodes, op, "expected lengths from 0 to ", p.nodes, " but row ",
                   b, " has ", length);
    }
    for (int64_t i = 0; i < length; ++i) {
      const int64_t token = p.tokens.data[b * p.tokens.batch + i * p.tokens.item];
      ARCORE_CHECK(token >= -1 && token < p.vocab, op, "expected draft_tokens from 0 to ", p.vocab - 1,
                   ", or -1 for padding, but row ", b, ", node ", i, " has ", token);
      if (!parents.has_value()) continue;
      const int64_t parent = p.parents.data[b * p.parents.batch + i * p.parents.item];
      ARCORE_CHECK(parent >= -1 && parent < i, op, "expected -1 <= parents[i] < i but node ", i, " of row ",
                   b, " has parent ", parent, "; list parents before their children");
    }
  }
  return p;
}

Neighbours neighbours_of(const char* op, const Tensor& t, const Problem& p, int64_t used) {
  ARCORE_CHECK(t.dim() == 2 && t.size(0) == p.vocab, op, "expected neighbours of shape (", p.vocab,
               ", k) but got ", shape_of(t));
  ARCORE_CHECK(used >= 0 && used <= t.size(1), op, "expected k from 0 to the ", t.size(1),
               " stored neighbours but got ", used);
  Neighbours n{t.data_ptr(), t.stride(0), t.stride(1), t.size(1), used, IndexType::kInt64};
  switch (t.scalar_type()) {
    case ScalarType::Long:
      break;
    case ScalarType::Int:
      n.type = IndexType::kInt32;
      break;
    case ScalarType::UInt16:
      n.type = IndexType::kUInt16;
      break;
    default:
      fail("arcore::", op, ": expected neighbours of dtype int64, int32 or uint16 but got ",
           torch::headeronly::toString(t.scalar_type()));
  }
  return n;
}

// Where the results of a batch go.
struct __attribute__((visibility("hidden"))) ResultTensors {
  Tensor tokens, accepted, path, valid, drafts;
  Results pointers;

  ResultTensors(const Problem& p, const Tensor& like)
      : tokens(make_empty(like, {p.batch, p.nodes + 1}, ScalarType::Long)),
        accepted(make_empty(like, {p.batch}, ScalarType::Long)),
        path(make_empty(like, {p.batch, p.nodes}, ScalarType::Long)),
        valid(make_empty(like, {p.batch}, ScalarType::Bool)),
        drafts(make_empty(like, {p.rule == Rule::kJacobi ? p.batch : 0, p.nodes}, ScalarType::Long)),
        pointers{static_cast<int64_t*>(tokens.data_ptr()), static_cast<int64_t*>(accepted.data_ptr()),
                 static_cast<int64_t*>(path.data_ptr()), static_cast<bool*>(valid.data_ptr()),
                 static_cast<int64_t*>(drafts.data_ptr())} {}

  VerifiedWindow all() const { return {tokens, accepted, path, valid, drafts}; }
};

// Runs the rules on the device of `like`; each file that includes this has its own.
VerifiedWindow run(const Problem& p, const Tensor& like);

Verified without_drafts(VerifiedWindow&& all) {
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all), std::get<3>(all)};
}

Verified verify_chain(const Tensor& target, const Tensor& tokens, const OptionalTensor& draft,
                      const OptionalTensor& lengths, const Tensor& seed, const Tensor& offset, bool block) {
  ARCORE_CHECK(!block || draft.has_value(), "verify_chain", "expected draft_probs for block verification");
  const Problem p = problem("verify_chain", block ? Rule::kBlock : Rule::kTokens, target, tokens,
                            std::nullopt, draft, lengths, seed, offset);
  return without_drafts(run(p, target));
}

Verified verify_tree(const Tensor& target, const Tensor& tokens, const Tensor& parents,
                     const OptionalTensor& draft, const OptionalTensor& lengths, const Tensor& seed,
                     const Tensor& offset, bool replacement) {
  Problem p = problem("verify_tree", Rule::kTokens, target, tokens, parents, draft, lengths, seed, offset);
  p.replacement = replacement;
  return without_drafts(run(p, target));
}

Verified verify_typical(const Tensor& target, const Tensor& tokens, const OptionalTensor& parents,
                        const OptionalTensor& lengths, const Tensor& seed, const Tensor& offset,
                        double epsilon, double delta, bool greedy_bonus) {
  Problem p =
      problem("verify_typical", Rule::kTypical, target, tokens, parents, std::nullopt, lengths, seed, offset);
  ARCORE_CHECK(epsilon >= 0.0 && delta >= 0.0, "verify_typical",
               "expected epsilon >= 0 and delta >= 0 but got ", epsilon, " and ", delta);
  p.epsilon = epsilon;
  p.delta = delta;
  p.greedy_bonus = greedy_bonus;
  return without_drafts(run(p, target));
}

Verified verify_relaxed(const Tensor& target, const Tensor& tokens, const Tensor& neighbours,
                        const OptionalTensor& parents, const OptionalTensor& draft,
                        const OptionalTensor& lengths, const Tensor& seed, const Tensor& offset, double delta,
                        int64_t k, bool multiplicative, bool coarse, bool replacement) {
  const char* op = "verify_relaxed";
  Problem p = problem(op, coarse ? Rule::kRelaxedCoarse : Rule::kRelaxed, target, tokens, parents, draft,
                      lengths, seed, offset);
  ARCORE_CHECK(delta >= 0.0, op, "expected delta >= 0 but got ", delta);
  ARCORE_CHECK(!coarse || !draft.has_value(), op,
               "expected no draft_probs with the released residual, which treats proposals as chosen");
  check_device(op, "neighbours", neighbours, target);
  p.neighbours = neighbours_of(op, neighbours, p, k);
  p.delta = delta;
  p.multiplicative = multiplicative;
  p.replacement = replacement;
  return without_drafts(run(p, target));
}

VerifiedWindow verify_jacobi(const Tensor& target, const Tensor& tokens, const OptionalTensor& draft,
                             const OptionalTensor& lengths, const Tensor& seed, const Tensor& offset) {
  return run(
      problem("verify_jacobi", Rule::kJacobi, target, tokens, std::nullopt, draft, lengths, seed, offset),
      target);
}

}  // namespace
}  // namespace arcore::speculative
