// Log-probabilities of drawn tokens, by the rule of token_logprobs: the same sums in the same order.
#pragma once

#include "common/sm80/launch.h"
#include "sample/problem_sm80.cuh"

namespace arcore::sample {

ARCORE_LAUNCH_BOUNDS(kRowThreads, 2)
ARCORE_KERNEL score_draws(ARCORE_KERNEL_ARGS RunCuda cuda) {
  const Problem& p = cuda.problem;
  const Outputs& out = cuda.out;
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t number = block_x();
  if (out.valid[number] == 0) return;
  const Place at{number / p.inner, number % p.inner};
  const Scalars s = scalars_of(p, number);
  const int32_t* key = cuda.keys + number * key_stride(p.vocab);
  auto sum_of = [&](const auto& y, double inverse_temperature) {
    const int64_t slices = row_slices(p.vocab);
    RowState state = empty_row();
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t begin = slices == 1 ? 0 : slice * kRowSlice;
      const int64_t end = slices == 1 || begin + kRowSlice > p.vocab ? p.vocab : begin + kRowSlice;
      auto each = [&](const auto& f) { for_each_own_column(begin, end, [&](int64_t i) { f(y(i)); }); };
      const RowState part = sum_row(each, static_cast<float>(inverse_temperature), false, scratch);
      state = slices == 1 ? part : merge_rows(state, part, inverse_temperature);
    }
    return state;
  };
  auto score = [&](RowState state, const auto& y, double inverse_temperature, float* to) {
    for (int64_t d = thread_index(); d < cuda.draws.count; d += kRowThreads) {
      const int64_t place = number * cuda.draws.count + d;
      state.target = static_cast<double>(y(out.tokens[place]));
      to[place] = static_cast<float>(log_prob(state, inverse_temperature));
    }
  };
  if (out.raw_logprob != nullptr) {
    auto y = [&](int64_t i) { return mixed_logit(p, s.weights, at, i); };
    score(sum_of(y, 1.0), y, 1.0, out.raw_logprob);
  }
  if (out.logprob == nullptr) return;
  // Tokens that share all the mass, whatever their logits are: one, or those that were infinite.
  uint64_t left = 0;
  bool infinite = false;
  for (int64_t i = thread_index(); i < p.vocab; i += kRowThreads) {
    left += key[i] != kKeyPad;
    infinite |= key[i] == kKeyZero && biased_logit(p, s.weights, at, i) == HUGE_VALF;
  }
  auto add = [](double a, double b) { return a + b; };
  const double count = combine_block(static_cast<double>(left), scratch, add);
  if (s.greedy || sync_threads_or(infinite)) {
    for (int64_t d = thread_index(); d < cuda.draws.count; d += kRowThreads)
      out.logprob[number * cuda.draws.count + d] = static_cast<float>(log(1.0 / count));
    return;
  }
  auto y = [&](int64_t i) { return key[i] == kKeyPad ? -HUGE_VALF : value_of(key[i]); };
  const double inverse_temperature = 1.0 / s.temperature;
  score(sum_of(y, inverse_temperature), y, inverse_temperature, out.logprob);
}

}  // namespace arcore::sample
