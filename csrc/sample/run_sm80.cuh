// Sampling for GPUs from sm_80 on: a block per row. The row lies as int32 keys in shared memory (long rows:
// in global memory, that is, in the second-level cache); whatever else is needed of a token follows from its
// key.
//
// All numbers that decide are those of the CPU kernel, operation by operation (exact.h; products and sums are
// rounded one by one), and all sums are sums of integers: the same seed gives the same token.
#pragma once

#include "common/inverse_cdf.h"
#include "common/philox.h"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "common/sm80/row_sums.cuh"
#include "common/sm80/sequence.cuh"
#include "sample/exact.h"
#include "sample/params.h"

namespace arcore::sample {

constexpr int kPivots = 7;

struct Scalars {
  double temperature, top_p, min_p, typical_p, epsilon, eta;
  int64_t top_k;
  float steepness, repetition, presence, frequency;
  bool greedy, valid;
  const double* weights;
};

ARCORE_DEVICE Scalars scalars_of(const Problem& p, int64_t row) {
  const double* s = p.settings + row * p.settings_stride;
  Scalars out;
  out.temperature = s[kTemperature];
  out.greedy = out.temperature < kLowestTemperature;
  out.valid = settings_hold(s, p.num_sources);
  out.steepness = steepness_of(out.greedy ? 1.0 : out.temperature);
  out.top_k = s[kTopK] >= 1.0 && s[kTopK] < static_cast<double>(p.vocab) ? static_cast<int64_t>(s[kTopK]) : 0;
  out.top_p = s[kTopP];
  out.min_p = s[kMinP];
  out.typical_p = s[kTypicalP];
  out.epsilon = s[kEpsilon];
  out.eta = s[kEta];
  out.repetition = static_cast<float>(s[kRepetition]);
  out.presence = static_cast<float>(s[kPresence]);
  out.frequency = static_cast<float>(s[kFrequency]);
  out.weights = s + kWeights;
  return out;
}

struct Place {
  int64_t outer, inner;
};

ARCORE_DEVICE int64_t row_start(const View& view, Place at) {
  return at.outer * view.outer + at.inner * view.inner;
}
ARCORE_DEVICE float source_at(const View& view, Place at, int64_t token) {
  return load_any(view.data, view.dtype, row_start(view, at) + token * view.last);
}

// A token that source 0 forbids stays forbidden; one that a source of negative weight forbids gets source 0's
// logit in its place.
ARCORE_DEVICE float mixed_logit(const Problem& p, const double* weights, Place at, int64_t token) {
  const float first = source_at(p.sources[0], at, token), w0 = static_cast<float>(weights[0]);
  bool changed = w0 != 1.0f;
  for (int s = 1; s < p.num_sources; ++s)
    changed |= weights[s] != 0.0;
  if (!changed) return first;
  float mixed = multiply_rounded(w0, first);
  for (int s = 1; s < p.num_sources; ++s) {
    const float w = static_cast<float>(weights[s]);
    if (w == 0.0f) continue;
    const float x = source_at(p.sources[s], at, token);
    mixed = fused_multiply_add(w, w < 0.0f && x == -HUGE_VALF ? first : x, mixed);
  }
  return first == -HUGE_VALF ? -HUGE_VALF : mixed;
}

ARCORE_DEVICE float bias_of(const Problem& p, Place at, int64_t token) {
  return p.bias.data == nullptr
             ? 0.0f
             : static_cast<const float*>(p.bias.data)[row_start(p.bias, at) + token * p.bias.last];
}
ARCORE_DEVICE float biased_logit(const Problem& p, const double* weights, Place at, int64_t token) {
  const float x = mixed_logit(p, weights, at, token);
  return p.bias.data == nullptr ? x : add_rounded(x, bias_of(p, at, token));
}

ARCORE_DEVICE bool is_allowed(const Problem& p, Place at, int64_t token) {
  if (p.mask.data == nullptr) return true;
  if (!p.mask_is_packed)
    return static_cast<const uint8_t*>(p.mask.data)[row_start(p.mask, at) + token * p.mask.last] != 0;
  return (static_cast<const uint32_t*>(p.mask.data)[row_start(p.mask, at) + token / 32 * p.mask.last] >>
              (token % 32) &
          1u) != 0u;
}

// Position i of prompt and history, one after the other; -1 for padding.
ARCORE_DEVICE int64_t listed_token(const Problem& p, Place at, int64_t i) {
  const bool of_prompt = i < p.prompt_length;
  const View& view = of_prompt ? p.prompt : p.history;
  const int64_t place = of_prompt ? i : i - p.prompt_length;
  const int64_t token = static_cast<const int64_t*>(view.data)[row_start(view, at) + place * view.last];
  return token >= 0 && token < p.vocab ? token : -1;
}

// What a block shares beside the keys.
struct Scratch {
  uint64_t words[2 * kPivots][32];  // a number per warp
  uint64_t segments[32];            // masses that warps own
};

struct Range {
  int32_t low, high;
  int64_t count;
};

// A row in the hands of a block of kThreads. Tokens that were dropped have the key kKeyPad.
template <int kThreads>
struct RowOfBlock {
  static constexpr int kWarps = kThreads / 32;

  int32_t* key;
  int64_t vocab;
  Scratch& scratch;
  float steepness, scale;
  float top;
  Range range;   // of the tokens that are left
  uint64_t sum;  // of their masses, once weighed

  // ---- over all threads; each has tokens thread, thread + kThreads, ... ----

  template <typename F>
  ARCORE_DEVICE void each(const F& f) const {
    for (int64_t i = thread_index(); i < vocab; i += kThreads)
      f(i);
  }
  template <typename F>
  ARCORE_DEVICE void each_left(const F& f) const {
    each([&](int64_t i) {
      const int32_t k = key[i];
      if (k != kKeyPad) f(i, k);
    });
  }
  template <int kCount, typename F>
  ARCORE_DEVICE void combine(uint64_t (&values)[kCount], const F& f) const {
    ARCORE_UNROLL
    for (int j = 0; j < kCount; ++j)
      for (int mask = 16; mask > 0; mask >>= 1)
        values[j] = f(values[j], shuffle_xor(values[j], mask));
    const int warp = warp_index();
    if (lane_index() == 0) ARCORE_UNROLL
    for (int j = 0; j < kCount; ++j)
      scratch.words[j][warp] = values[j];
    sync_threads();
    ARCORE_UNROLL
    for (int j = 0; j < kCount; ++j) {
      uint64_t total = scratch.words[j][0];
      for (int w = 1; w < kWarps; ++w)
        total = f(total, scratch.words[j][w]);
      values[j] = total;
    }
    sync_threads();
  }
  ARCORE_DEVICE uint64_t add_all(uint64_t value) const {
    uint64_t values[1] = {value};
    combine(values, [](uint64_t a, uint64_t b) { return a + b; });
    return values[0];
  }
  ARCORE_DEVICE uint64_t least_of_all(uint64_t value) const {
    uint64_t values[1] = {value};
    combine(values, [](uint64_t a, uint64_t b) { return a < b ? a : b; });
    return values[0];
  }

  // Smallest and largest of numbers get(i, key) of the tokens that are left.
  template <typename Get>
  ARCORE_DEVICE Range find_range(const Get& get) const {
    // As numbers of which the largest is wanted.
    uint64_t ends[2] = {0, 0}, count[1] = {0};
    each_left([&](int64_t i, int32_t k) {
      const auto biased = static_cast<uint32_t>(get(i, k)) ^ 0x80000000u;
      ends[0] = ends[0] > 0xffffffffu - biased ? ends[0] : 0xffffffffu - biased;
      ends[1] = ends[1] > biased ? ends[1] : biased;
      ++count[0];
    });
    combine(ends, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
    combine(count, [](uint64_t a, uint64_t b) { return a + b; });
    return {static_cast<int32_t>((0xffffffffu - static_cast<uint32_t>(ends[0])) ^ 0x80000000u),
            static_cast<int32_t>(static_cast<uint32_t>(ends[1]) ^ 0x80000000u),
            static_cast<int64_t>(count[0])};
  }
  ARCORE_DEVICE void refresh() {
    range = find_range([](int64_t, int32_t k) { return k; });
  }

  // ---- weights ----

  ARCORE_DEVICE float distance(int32_t k) const {
    return multiply_rounded(add_rounded(kQuarter * value_of(k), -kQuarter * top), steepness);
  }
  ARCORE_DEVICE float weight(int32_t k) const { return exp_of(distance(k)); }
  ARCORE_DEVICE uint64_t mass(float e) const {
    return static_cast<uint64_t>(static_cast<int64_t>(multiply_rounded(e, scale)));
  }
  ARCORE_DEVICE void weigh() {
    top = value_of(range.high);
    uint64_t total = 0;
    each_left([&](int64_t, int32_t k) { total += mass(weight(k)); });
    sum = add_all(total);
  }
  // -log(e), up to rounding.
  ARCORE_DEVICE float surprise(int32_t k) const { return fminf(-distance(k), 88.0f); }
  ARCORE_DEVICE uint64_t sum_surprises() const {
    uint64_t total = 0;
    each_left([&](int64_t, int32_t k) { total += mass(multiply_rounded(weight(k), surprise(k))); });
    return add_all(total);
  }
  ARCORE_DEVICE float mean_surprise() const {
    return static_cast<float>(static_cast<double>(sum_surprises()) / static_cast<double>(sum));
  }

  // ---- thresholds ----

  // The smallest t, or an equivalent one, such that the tokens with get(i, key) > t weigh less than `limit`:
  // their masses with kMass, else their number. Eight parts a pass: by value while that narrows the range
  // fast, then by bits.
  template <bool kMass, typename Get>
  ARCORE_DEVICE int32_t find_threshold(Range in, uint64_t limit, const Get& get) const {
    int32_t low = in.low, high = in.high;
    int64_t from_low = in.count, above_high = 0;
    for (int round = 0; low < high; ++round) {
      int32_t pivot[kPivots];
      const float x = value_of(low), width = add_rounded(value_of(high), -x);
      const bool by_value = round < 2 && width > 0.0f && width < HUGE_VALF;
      ARCORE_UNROLL
      for (int j = 0; j < kPivots; ++j) {
        const float part = 0.125f * static_cast<float>(j + 1);
        const int64_t bits = low + (static_cast<int64_t>(high) - low) * (j + 1) / (kPivots + 1);
        int64_t wanted = by_value ? key_of(x + width * part) : bits;
        wanted = wanted < low ? low : wanted;
        pivot[j] = static_cast<int32_t>(wanted < high ? wanted : int64_t{high} - 1);
      }
      uint64_t counts[kPivots] = {}, masses[kPivots] = {};
      each_left([&](int64_t i, int32_t k) {
        const int32_t order = get(i, k);
        const uint64_t m = kMass ? mass(weight(k)) : 0;
        ARCORE_UNROLL
        for (int j = 0; j < kPivots; ++j) {
          if (order <= pivot[j]) continue;
          ++counts[j];
          if (kMass) masses[j] += m;
        }
      });
      auto add = [](uint64_t a, uint64_t b) { return a + b; };
      combine(counts, add);
      if (kMass) combine(masses, add);
      // Pivots rise, so what lies above them falls.
      ARCORE_UNROLL
      for (int j = 0; j < kPivots; ++j) {
        if ((kMass ? masses[j] : counts[j]) >= limit) {
          low = pivot[j] + 1;
          from_low = static_cast<int64_t>(counts[j]);
        }
      }
      ARCORE_UNROLL
      for (int j = kPivots - 1; j >= 0; --j) {
        if ((kMass ? masses[j] : counts[j]) < limit) {
          high = pivot[j];
          above_high = static_cast<int64_t>(counts[j]);
        }
      }
      // What is above `high` weighs less than the limit, so one token inside is in.
      if (from_low - above_high <= 1) return low;
    }
    return low;
  }

  // ---- dropping ----

  template <typename Keep>
  ARCORE_DEVICE void drop(const Keep& keep) {
    each_left([&](int64_t i, int32_t k) {
      if (!keep(i, k)) key[i] = kKeyPad;
    });
    refresh();
  }
};

// The weight that a nucleus of share p reaches: the first integer not below p * sum, at least 1.
ARCORE_DEVICE uint64_t limit_of(double p, uint64_t sum) {
  const double wanted = ceil(multiply_rounded(p, static_cast<double>(sum)));
  return wanted > 1.0 ? static_cast<uint64_t>(wanted) : 1;
}

template <int kThreads>
struct Filters {
  RowOfBlock<kThreads>& row;
  const Problem& p;
  const Scalars& s;
  uint8_t* keep;  // Order::kJoint

  ARCORE_DEVICE bool joint() const { return p.order == Order::kJoint; }

  template <typename Get>
  ARCORE_DEVICE void require_key(const Get& get, int32_t threshold) {
    if (!joint()) return row.drop([&](int64_t i, int32_t k) { return get(i, k) >= threshold; });
    row.each_left([&](int64_t i, int32_t k) {
      if (get(i, k) < threshold) keep[i] = 0;
    });
  }
  // Keeps e >= threshold, and the likeliest tokens in any case.
  ARCORE_DEVICE void require_weight(double threshold) {
    float at_least = static_cast<float>(threshold);
    if (static_cast<double>(at_least) < threshold) at_least = nextafterf(at_least, HUGE_VALF);
    const int32_t high = row.range.high;
    auto good = [&](int32_t k) { return row.weight(k) >= at_least || k == high; };
    if (!joint()) return row.drop([&](int64_t, int32_t k) { return good(k); });
    row.each_left([&](int64_t i, int32_t k) {
      if (!good(k)) keep[i] = 0;
    });
  }

  ARCORE_DEVICE void top_k() {
    if (s.top_k >= row.range.count) return;
    auto own = [](int64_t, int32_t k) { return k; };
    require_key(own, row.template find_threshold<false>(row.range, static_cast<uint64_t>(s.top_k), own));
  }
  ARCORE_DEVICE void top_p() {
    row.weigh();
    auto own = [](int64_t, int32_t k) { return k; };
    require_key(own, row.template find_threshold<true>(row.range, limit_of(s.top_p, row.sum), own));
  }
  ARCORE_DEVICE void min_p() {
    row.weigh();
    require_weight(s.min_p);
  }
  // |-log p - entropy| is |log e + mean surprise|: the logarithm of the sum cancels.
  ARCORE_DEVICE void typical() {
    row.weigh();
    const float mean = row.mean_surprise();
    auto order = [&row = row, mean](int64_t, int32_t k) {
      return -bits_of(fabsf(add_rounded(row.distance(k), mean)));
    };
    const Range range = row.find_range(order);
    require_key(order, row.template find_threshold<true>(range, limit_of(s.typical_p, row.sum), order));
  }
  ARCORE_DEVICE void epsilon() {
    row.weigh();
    require_weight(
        multiply_rounded(s.epsilon, static_cast<double>(row.sum) / static_cast<double>(row.scale)));
  }
  ARCORE_DEVICE void eta() {
    row.weigh();
    const double total = static_cast<double>(row.sum) / static_cast<double>(row.scale);
    const float mean = row.mean_surprise();
    const double flat = multiply_rounded(sqrt(s.eta), static_cast<double>(exp_of(-mean)) / total);
    require_weight(multiply_rounded(flat < s.eta ? flat : s.eta, total));
  }

  ARCORE_DEVICE void run() {
    const bool min_p_first = p.order == Order::kVllm;
    if (joint()) row.each([&](int64_t i) { keep[i] = 1; });
    if (min_p_first && s.min_p > 0.0) min_p();
    if (s.top_k > 0) top_k();
    if (s.top_p < 1.0) top_p();
    if (!min_p_first && s.min_p > 0.0) min_p();
    if (s.typical_p < 1.0) typical();
    if (s.epsilon > 0.0) epsilon();
    if (s.eta > 0.0) eta();
    if (!joint()) return;
    uint64_t any = 0;
    row.each_left([&](int64_t i, int32_t) { any |= keep[i]; });
    // Filters that are tested apart may have no token in common; then the likeliest stay.
    const bool some = row.add_all(any) != 0;
    const int32_t high = row.range.high;
    row.drop([&](int64_t i, int32_t k) { return some ? keep[i] != 0 : k == high; });
  }
};

template <int kThreads>
ARCORE_DEVICE void load_row(const Problem& p, const Scalars& s, Place at, RowOfBlock<kThreads>& row) {
  row.each([&](int64_t i) {
    row.key[i] = is_allowed(p, at, i) ? key_of(biased_logit(p, s.weights, at, i)) : kKeyNegInf;
  });
  const int64_t listed = (p.prompt.data == nullptr ? 0 : p.prompt_length) + p.history_length;
  if (listed > 0) {
    sync_threads();
    // Each token that occurs belongs to the first of its places.
    for (int64_t i = thread_index(); i < listed; i += kThreads) {
      const int64_t token = listed_token(p, at, i);
      if (token < 0 || !is_allowed(p, at, token)) continue;
      bool first = true;
      for (int64_t j = 0; j < i && first; ++j)
        first = listed_token(p, at, j) != token;
      if (!first) continue;
      int32_t times = 0;
      for (int64_t j = p.prompt_length; j < listed; ++j)
        times += listed_token(p, at, j) == token;
      float x = add_rounded(mixed_logit(p, s.weights, at, token), bias_of(p, at, token));
      x = x < 0.0f ? multiply_rounded(x, s.repetition) : divide_rounded(x, s.repetition);
      x = add_rounded(x, -multiply_rounded(s.frequency, static_cast<float>(times)));
      x = add_rounded(x, -(times > 0 ? s.presence : 0.0f));
      row.key[token] = key_of(x);
    }
  }
  sync_threads();
}

// Everything of a row but the log-probabilities. False: it has no distribution.
template <int kThreads>
ARCORE_DEVICE bool process_row(const Problem& p, const Scalars& s, Place at, uint8_t* keep,
                               RowOfBlock<kThreads>& row) {
  if (!s.valid || p.vocab == 0) return false;
  load_row(p, s, at, row);
  row.refresh();
  if (row.range.high > kKeyPosInf || row.range.low < kKeyNegInf || row.range.high == kKeyNegInf) return false;
  if (row.range.high == kKeyPosInf) {
    // The limit of ever larger logits: those that are infinite share the mass.
    row.each([&](int64_t i) { row.key[i] = row.key[i] == kKeyPosInf ? kKeyZero : kKeyNegInf; });
    row.refresh();
  }
  const int32_t high = row.range.high;
  if (s.greedy) {
    uint64_t best = ~uint64_t{0};
    row.each_left([&](int64_t i, int32_t k) {
      if (k == high && static_cast<uint64_t>(i) < best) best = static_cast<uint64_t>(i);
    });
    best = row.least_of_all(best);
    row.drop([&](int64_t i, int32_t) { return static_cast<uint64_t>(i) == best; });
  } else {
    if (row.range.low == kKeyNegInf) row.drop([](int64_t, int32_t k) { return k != kKeyNegInf; });
    Filters<kThreads>{row, p, s, keep}.run();
  }
  row.weigh();
  return true;
}

template <int kThreads>
ARCORE_DEVICE void write_invalid(const Problem& p, const Draws& draws, const Outputs& out, int64_t number) {
  const int64_t words = (p.vocab + 31) / 32;
  const float nan = bits_float(0x7fc00000u);
  if (thread_index() == 0) {
    out.valid[number] = 0;
    if (out.entropy) out.entropy[number] = nan;
  }
  if (out.kept)
    for (int64_t i = thread_index(); i < words; i += kThreads)
      out.kept[number * words + i] = 0;
  if (out.probs)
    for (int64_t i = thread_index(); i < p.vocab; i += kThreads)
      out.probs[number * p.vocab + i] = 0.0f;
  for (int64_t d = thread_index(); d < draws.count; d += kThreads) {
    const int64_t at = number * draws.count + d;
    if (out.tokens) out.tokens[at] = -1;
    if (out.prob) out.prob[at] = nan;
    if (out.logprob) out.logprob[at] = nan;
    if (out.raw_logprob) out.raw_logprob[at] = nan;
  }
}

template <int kThreads>
ARCORE_DEVICE void write_distribution(const Problem& p, const Outputs& out, const RowOfBlock<kThreads>& row,
                                      float norm, int64_t number) {
  if (thread_index() == 0) out.valid[number] = 1;
  if (out.entropy) {
    const double total = static_cast<double>(row.sum) / static_cast<double>(row.scale);
    const double surprises = static_cast<double>(row.sum_surprises()) / static_cast<double>(row.scale);
    if (thread_index() == 0) out.entropy[number] = static_cast<float>(log(total) + surprises / total);
  }
  if (out.kept) {
    const int64_t words = (p.vocab + 31) / 32;
    for (int64_t w = warp_index(); w < words; w += kThreads / 32) {
      const int64_t i = w * 32 + lane_index();
      const uint32_t word = ballot(i < p.vocab && row.key[i < p.vocab ? i : 0] != kKeyPad);
      if (lane_index() == 0) reinterpret_cast<uint32_t*>(out.kept)[number * words + w] = word;
    }
  }
  if (out.probs)
    row.each([&](int64_t i) {
      out.probs[number * p.vocab + i] =
          row.key[i] == kKeyPad ? 0.0f : multiply_rounded(row.weight(row.key[i]), norm);
    });
}

template <int kThreads>
ARCORE_DEVICE void write_draws(const Problem& p, const Scalars& s, const Draws& draws, const Outputs& out,
                               const RowOfBlock<kThreads>& row, float norm, int64_t number) {
  constexpr int kWarps = kThreads / 32;
  const int64_t seed = draws.seeds[number * draws.seed_stride],
                offset = draws.offsets[number * draws.offset_stride];
  const int lane = lane_index(), warp = warp_index();
  auto prob_of = [&](int64_t i) {
    return row.key[i] == kKeyPad ? 0.0f : multiply_rounded(row.weight(row.key[i]), norm);
  };
  auto write = [&](int64_t d, int64_t token) {
    const int64_t place = number * draws.count + d;
    out.tokens[place] = token;
    if (out.prob) out.prob[place] = prob_of(token);
  };
  if (draws.mode == Mode::kInverseCdf) {
    // A warp sums a run of neighbouring tokens; then it makes every kWarps-th draw.
    const int64_t run = ((p.vocab + kWarps - 1) / kWarps + 31) / 32 * 32;
    uint64_t total = 0;
    for (int64_t i = warp * run + lane; i < (warp + 1) * run && i < p.vocab; i += 32)
      total += fixed_point(prob_of(i));
    total = warp_sum(total);
    if (lane == 0) row.scratch.segments[warp] = total;
    sync_threads();
    total = 0;
    for (int w = 0; w < kWarps; ++w)
      total += row.scratch.segments[w];
    for (int64_t d = warp; d < draws.count; d += kWarps) {
      uint64_t level = level_of(random_bits(seed, offset, Stream::kSample, d), total);
      int w = 0;
      while (w < kWarps - 1 && row.scratch.segments[w] <= level)
        level -= row.scratch.segments[w++];
      for (int64_t begin = w * run; begin < p.vocab; begin += 32) {
        const int64_t i = begin + lane;
        const uint64_t own = i < p.vocab ? fixed_point(prob_of(i)) : 0;
        uint64_t upto = own;  // of this lane and those before it
        for (int delta = 1; delta < 32; delta *= 2) {
          const uint64_t before = shuffle_up(upto, delta);
          if (lane >= delta) upto += before;
        }
        const uint32_t found = ballot(upto > level);
        if (found == 0u) {
          level -= shuffle(upto, 31);
          continue;
        }
        if (lane == lowest_bit(found)) write(d, i);
        break;
      }
    }
    return;
  }
  for (int64_t d = 0; d < draws.count; ++d) {
    uint64_t best = ~uint64_t{0};
    if (draws.mode == Mode::kGreedy) {
      row.each_left([&](int64_t i, int32_t k) {
        if (k == row.range.high && static_cast<uint64_t>(i) < best) best = static_cast<uint64_t>(i);
      });
      best = row.least_of_all(best);
    } else {
      // The first of exponential waiting times of rates p, the lowest token of equal ones.
      double shortest = HUGE_VAL;
      row.each_left([&](int64_t i, int32_t) {
        const double prob = static_cast<double>(prob_of(i));
        if (prob == 0.0) return;
        const double time =
            -log(uniform_open(random_bits(seed, offset, Stream::kGumbel, d * p.vocab + i))) / prob;
        if (time < shortest) {
          shortest = time;
          best = static_cast<uint64_t>(i);
        }
      });
      // Waiting times are positive: their bits have their order.
      uint64_t bits;
      memcpy(&bits, &shortest, 8);
      const uint64_t least = row.least_of_all(bits);
      best = row.least_of_all(bits == least ? best : ~uint64_t{0});
      // As the CPU: where no time is finite, the first token that is left.
      if (best == ~uint64_t{0}) {
        row.each_left([&](int64_t i, int32_t) {
          if (static_cast<uint64_t>(i) < best) best = static_cast<uint64_t>(i);
        });
        best = row.least_of_all(best);
      }
    }
    if (thread_index() == 0) write(d, static_cast<int64_t>(best));
  }
}

template <int kThreads>
ARCORE_LAUNCH_BOUNDS(kThreads, 1)  // two blocks of 256 threads a multiprocessor would spill 72 bytes
ARCORE_KERNEL run_rows(ARCORE_KERNEL_ARGS RunCuda cuda) {
  const Problem& p = cuda.problem;
  auto* scratch = reinterpret_cast<Scratch*>(shared_memory());
  const int64_t number = block_x();
  const Place at{number / p.inner, number % p.inner};
  const Scalars s = scalars_of(p, number);
  RowOfBlock<kThreads> row{
      cuda.keys == nullptr ? reinterpret_cast<int32_t*>(scratch + 1) : cuda.keys + number * p.vocab,
      p.vocab,
      *scratch,
      s.steepness,
      static_cast<float>(static_cast<double>(int64_t{1} << mass_bits(p.vocab))),
      0.0f,
      {},
      0};
  if (!process_row(p, s, at, cuda.keep == nullptr ? nullptr : cuda.keep + number * p.vocab, row)) {
    write_invalid<kThreads>(p, cuda.draws, cuda.out, number);
    return;
  }
  const float norm = static_cast<float>(static_cast<double>(row.scale) / static_cast<double>(row.sum));
  write_distribution(p, cuda.out, row, norm, number);
  if (cuda.out.tokens != nullptr && cuda.draws.count > 0)
    write_draws(p, s, cuda.draws, cuda.out, row, norm, number);
}

// Log-probabilities of drawn tokens, by the rule of token_logprobs: the same sums in the same order.
ARCORE_LAUNCH_BOUNDS(kRowThreads, 2)
ARCORE_KERNEL score_draws(ARCORE_KERNEL_ARGS RunCuda cuda) {
  const Problem& p = cuda.problem;
  const Outputs& out = cuda.out;
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t number = block_x();
  if (out.valid[number] == 0) return;
  const Place at{number / p.inner, number % p.inner};
  const Scalars s = scalars_of(p, number);
  const int32_t* key = cuda.keys + number * p.vocab;
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

// The least confident positions. Keys are complements, so that the least confident has the largest.
template <int kThreads>
ARCORE_LAUNCH_BOUNDS(kThreads, 1)
ARCORE_KERNEL select_rows(ARCORE_KERNEL_ARGS SelectCuda cuda) {
  const Selection& sel = cuda.selection;
  auto* scratch = reinterpret_cast<Scratch*>(shared_memory());
  const int64_t number = block_x();
  const float* confidence = sel.confidence + number * sel.length;
  uint8_t* chosen = sel.chosen + number * sel.length;
  RowOfBlock<kThreads> row{
      cuda.keys == nullptr ? reinterpret_cast<int32_t*>(scratch + 1) : cuda.keys + number * sel.length,
      sel.length,
      *scratch,
      1.0f,
      1.0f,
      0.0f,
      {},
      0};
  row.each([&](int64_t i) {
    chosen[i] = 0;
    float x = confidence[i];
    if (sel.temperature != 0.0) {
      const uint64_t bits = random_bits(sel.seeds[number * sel.seed_stride],
                                        sel.offsets[number * sel.offset_stride], Stream::kConfidence, i);
      x = static_cast<float>(add_rounded(static_cast<double>(x),
                                         -multiply_rounded(sel.temperature, log(-log(uniform_open(bits))))));
    }
    const bool candidate = sel.candidates == nullptr || sel.candidates[number * sel.length + i] != 0;
    // NaN is the least confident of all.
    row.key[i] = candidate ? ~(x != x ? kKeyPad + 1 : key_of(x)) : kKeyPad;
  });
  sync_threads();
  row.refresh();
  const int64_t asked = sel.count[number * sel.count_stride];
  const int64_t wanted = asked < 0 ? 0 : asked < row.range.count ? asked : row.range.count;
  if (wanted == 0) return;
  auto own = [](int64_t, int32_t k) { return k; };
  // An equivalent threshold need not be a key; the cut is the smallest key that reaches it.
  const int32_t reached = row.template find_threshold<false>(row.range, static_cast<uint64_t>(wanted), own);
  uint64_t least = ~uint64_t{0};
  row.each_left([&](int64_t, int32_t k) {
    const uint64_t biased = static_cast<uint32_t>(k) ^ 0x80000000u;
    if (k >= reached && biased < least) least = biased;
  });
  const int32_t cut = static_cast<int32_t>(static_cast<uint32_t>(row.least_of_all(least)) ^ 0x80000000u);
  uint64_t parts[2] = {0, 0};
  row.each_left([&](int64_t, int32_t k) {
    parts[0] += k > cut;
    parts[1] += k == cut;
  });
  row.combine(parts, [](uint64_t a, uint64_t b) { return a + b; });
  const int64_t tied = static_cast<int64_t>(parts[1]);
  int64_t of_tied = wanted - static_cast<int64_t>(parts[0]);
  if (sel.ties == Ties::kAll) of_tied = tied;
  if (sel.ties == Ties::kNone && of_tied < tied) of_tied = 0;
  if (warp_index() != 0) return;
  for (int64_t begin = 0; begin < sel.length; begin += 32) {
    const int64_t i = begin + lane_index();
    const int32_t k = i < sel.length ? row.key[i] : kKeyPad;
    const uint32_t ties = ballot(k != kKeyPad && k == cut);
    const int before = count_bits(ties & ((1u << lane_index()) - 1u));
    if (i < sel.length && k != kKeyPad && (k > cut || (k == cut && before < of_tied))) chosen[i] = 1;
    of_tied -= count_bits(ties);
  }
}

// Threads of a block: so that each has some tokens, and a lone long row has many.
inline int threads_for_row(int64_t vocab) {
  return vocab <= 8192 ? 256 : 384;
}

}  // namespace arcore::sample
