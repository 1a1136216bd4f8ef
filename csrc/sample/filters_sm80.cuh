// The filters of a row, for kernels.
#pragma once

#include "sample/problem_sm80.cuh"
#include "sample/row_sm80.cuh"

namespace arcore::sample {

// The weight that a nucleus of share p reaches: the first integer not below p * sum, at least 1.
ARCORE_DEVICE uint64_t limit_of(double p, uint64_t sum) {
  const double wanted = ceil(multiply_rounded(p, static_cast<double>(sum)));
  return wanted > 1.0 ? static_cast<uint64_t>(wanted) : 1;
}

template <typename RowType>
struct Filters {
  RowType& row;
  const Problem& p;
  const Scalars& s;
  uint8_t* keep;    // Order::kJoint: of the block's tokens
  uint64_t greedy;  // with s.greedy: the token that stays

  enum Step { kFirst, kMinPFirst, kTopK, kTopP, kMinP, kTypical, kEpsilon, kEta, kLast };

  ARCORE_DEVICE bool wanted(int step) const {
    const bool min_p_first = p.order == Order::kVllm;
    switch (step) {
      case kFirst:
        return s.greedy || row.range.low == kKeyNegInf;
      case kMinPFirst:
      case kMinP:
        return !s.greedy && s.min_p > 0.0 && min_p_first == (step == kMinPFirst);
      case kTopK:
        return !s.greedy && s.top_k > 0 && s.top_k < row.range.count;
      case kTopP:
        return !s.greedy && s.top_p < 1.0;
      case kTypical:
        return !s.greedy && s.typical_p < 1.0;
      case kEpsilon:
        return !s.greedy && s.epsilon > 0.0;
      case kEta:
        return !s.greedy && s.eta > 0.0;
      default:
        return !s.greedy && p.order == Order::kJoint;
    }
  }

  // The smallest weight that a filter by size lets pass.
  ARCORE_DEVICE double least_weight(int step, uint64_t surprises) const {
    const double total = static_cast<double>(row.sum) / static_cast<double>(row.scale);
    if (step == kEpsilon) return multiply_rounded(s.epsilon, total);
    if (step != kEta) return s.min_p;
    const float mean = row.mean_of(surprises);
    const double flat = multiply_rounded(sqrt(s.eta), static_cast<double>(exp_of(-mean)) / total);
    return multiply_rounded(flat < s.eta ? flat : s.eta, total);
  }

  // One loop, so that the code of each pass over the row is there once. Afterwards the row is weighed;
  // returns the masses of e * -log(e) if they are asked for.
  ARCORE_DEVICE uint64_t run(bool entropy) {
    const bool joint = !s.greedy && p.order == Order::kJoint;
    bool marking = false;
    ARCORE_NO_UNROLL
    for (int step = kFirst;; ++step) {
      const bool end = step > kLast;
      if (!end && !wanted(step)) continue;
      const bool by_weight = step == kMinPFirst || step == kMinP || step == kEpsilon || step == kEta;
      uint64_t surprises = 0;
      if (end || step == kTypical || step == kEpsilon || step == kEta)
        surprises = row.weigh(end ? entropy : step != kEpsilon);
      if (end) return surprises;
      row.set_top();
      OrderBy order{};
      Kept kept{Kept::kOrder, 0, 0.0f, 0, nullptr};
      if (step == kFirst) {
        // Tokens at -inf are not left, whatever the filters say.
        kept.threshold = kKeyNegInf + 1;
        if (s.greedy) kept = {Kept::kToken, 0, 0.0f, greedy, nullptr};
      } else if (by_weight) {
        // Keeps e >= threshold, and the likeliest tokens in any case.
        const double least = least_weight(step, surprises);
        float at_least = static_cast<float>(least);
        if (static_cast<double>(at_least) < least) at_least = nextafterf(at_least, HUGE_VALF);
        kept = {Kept::kWeight, row.range.high, at_least, 0, nullptr};
      } else if (step == kLast) {
        if (!marking) continue;
        sync_warp();
        uint64_t any = 0;
        row.each_left([&](int i, int32_t) { any |= keep[i]; });
        // Filters that are tested apart may have no token in common; then the likeliest stay.
        kept.threshold = row.range.high;
        if (row.add_all(any) != 0) kept = {Kept::kMarked, 0, 0.0f, 0, keep};
      } else {
        Range range = row.range;
        if (step == kTypical) {
          order = {true, row.mean_of(surprises)};
          range = row.find_range(order);
        }
        auto limit = [&](uint64_t sum) {
          return step == kTopK ? static_cast<uint64_t>(s.top_k)
                               : limit_of(step == kTopP ? s.top_p : s.typical_p, sum);
        };
        kept.threshold = row.find_threshold(range, limit, step != kTopK, order);
      }
      if (!joint || step == kFirst || step == kLast) {
        row.keep_only(kept, order);
        continue;
      }
      row.each_left([&](int i, int32_t k) {
        const bool good = row.stays(kept, order, i, k);
        keep[i] = good && (!marking || keep[i] != 0) ? 1 : 0;
      });
      marking = true;
    }
  }
};

}  // namespace arcore::sample
