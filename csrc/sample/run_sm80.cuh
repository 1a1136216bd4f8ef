// Sampling for GPUs from sm_80 on: a block per row, or a cluster of blocks per row (sm_90 and later), or for
// long rows without clusters a launch that makes the keys by slices and one that goes on with a block per
// row. Tokens, kept sets and probabilities are the CPU kernel's, bit for bit, whichever it is.
#pragma once

#include "common/inverse_cdf.h"
#include "common/philox.h"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "sample/filters_sm80.cuh"

namespace arcore::sample {

// Makes the keys of the block's tokens, and the range of them and of those of other blocks.
template <typename RowType>
ARCORE_DEVICE void load_row(const Problem& p, const Scalars& s, Place at, RowType& row) {
  typename RowType::Ends ends;
  const int64_t until = row.first + row.count;
  for (int i = row.begin + kEight * row.lane; i < row.end; i += 32 * kEight) {
    int32_t key[kEight];
    keys_of_eight(p, s.weights, at, row.first + i, until, key);
    ARCORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      Vector16 v;
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        v.word[j] = static_cast<uint32_t>(key[4 * h + j]);
        if (key[4 * h + j] != kKeyPad) ends.meet(key[4 * h + j]);
      }
      *reinterpret_cast<Vector16*>(row.key + i + 4 * h) = v;
    }
  }
  const int64_t listed = listed_tokens(p), of_prompt = prompt_tokens(p);
  if (listed == 0) {
    row.range = row.of_all(ends);  // a barrier
    return;
  }
  // How often tokens occur is counted for some thousand of them at a time.
  constexpr uint32_t kInPrompt = 0x80000000u;
  uint32_t* counter = row.scratch.low;
  static_assert(offsetof(Scratch, high) == offsetof(Scratch, low) + sizeof(Scratch::low));
  for (int window = 0; window < row.count; window += kCounters) {
    const int tokens = row.count - window < kCounters ? row.count - window : kCounters;
    for (int c = thread_index(); c < tokens; c += RowType::kWarps * 32)
      counter[c] = 0;
    sync_threads();
    for (int64_t i = thread_index(); i < listed; i += RowType::kWarps * 32) {
      const int64_t token = listed_token(p, at, i), own = token - row.first - window;
      if (token < 0 || token >= p.vocab || own < 0 || own >= tokens) continue;
      if (i < of_prompt)
        atomic_or(counter + own, kInPrompt);
      else
        atomic_add(counter + own, 1u);
    }
    sync_threads();
    for (int c = thread_index(); c < tokens; c += RowType::kWarps * 32) {
      const int64_t token = int64_t{row.first} + window + c;
      if (counter[c] == 0 || !is_allowed(p, at, token)) continue;
      row.key[window + c] = penalized_key(p, s, at, token, static_cast<int32_t>(counter[c] & ~kInPrompt));
    }
    sync_threads();
  }
  row.refresh();
}

// The range of a row whose keys were made by slices.
template <typename RowType>
ARCORE_DEVICE void merge_slices(const RunCuda& cuda, int64_t number, RowType& row) {
  const int64_t slices = slices_of(cuda.problem.vocab);
  row.range = {kKeyPad, kKeyPad, 0};
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int32_t* r = cuda.ranges + (number * slices + slice) * kRangeWords;
    row.range.low = slice == 0 || r[0] < row.range.low ? r[0] : row.range.low;
    row.range.high = r[1] > row.range.high ? r[1] : row.range.high;
    row.range.count += r[2];
  }
}

// Everything of a row but the log-probabilities. False: it has no distribution.
template <typename RowType>
ARCORE_DEVICE bool process_row(const RunCuda& cuda, const Scalars& s, Place at, int64_t number, RowType& row,
                               uint64_t& surprises) {
  const Problem& p = cuda.problem;
  if (!s.valid || p.vocab == 0) return false;
  if (cuda.ranges != nullptr)
    merge_slices(cuda, number, row);
  else
    load_row(p, s, at, row);
  if (row.range.high > kKeyPosInf || row.range.low < kKeyNegInf || row.range.high == kKeyNegInf) return false;
  if (row.range.high == kKeyPosInf) {
    // The limit of ever larger logits: those that are infinite share the mass.
    row.each_left([&](int i, int32_t k) { row.key[i] = k == kKeyPosInf ? kKeyZero : kKeyNegInf; });
    sync_warp();
    row.refresh();
  }
  const int32_t high = row.range.high;
  uint64_t greedy = 0;
  if (s.greedy) {
    uint64_t best = ~uint64_t{0};
    row.each_left([&](int i, int32_t k) {
      const auto token = static_cast<uint64_t>(row.first + i);
      if (k == high && token < best) best = token;
    });
    best = row.least_of_all(best);
    greedy = best;
  }
  uint8_t* keep = cuda.keep == nullptr ? nullptr : cuda.keep + number * p.vocab + row.first;
  surprises = Filters<RowType>{row, p, s, keep, greedy}.run(cuda.out.entropy != nullptr);
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

template <typename RowType>
ARCORE_DEVICE void write_distribution(const RunCuda& cuda, RowType& row, float norm, uint64_t summed,
                                      int64_t number) {
  const Problem& p = cuda.problem;
  const Outputs& out = cuda.out;
  const bool once = row.rank() == 0 && thread_index() == 0;
  if (once) out.valid[number] = 1;
  if (out.entropy && once) {
    const double total = static_cast<double>(row.sum) / static_cast<double>(row.scale);
    const double surprises = static_cast<double>(summed) / static_cast<double>(row.scale);
    out.entropy[number] = static_cast<float>(log(total) + surprises / total);
  }
  if (out.kept) {
    auto* words = reinterpret_cast<uint32_t*>(out.kept) + number * ((p.vocab + 31) / 32);
    for (int base = row.begin; base < row.end; base += 32) {
      const int i = base + row.lane;
      const uint32_t word = ballot(i < row.end && row.key[i < row.end ? i : 0] != kKeyPad);
      if (row.lane == 0) words[(row.first + base) / 32] = word;
    }
  }
  if (out.probs) {
    float* to = out.probs + number * p.vocab + row.first;
    for (int i = row.begin + row.lane; i < row.end; i += 32)
      to[i] = row.key[i] == kKeyPad ? 0.0f : multiply_rounded(row.weight(row.key[i]), norm);
  }
  if (RowType::kKeys != Home::kGlobal && cuda.keys != nullptr) {
    int32_t* to = cuda.keys + number * key_stride(p.vocab) + row.first;
    for (int i = row.begin + row.lane; i < row.end; i += 32)
      to[i] = row.key[i];
  }
}

template <typename RowType>
ARCORE_DEVICE void draw_inverse_cdf(const RunCuda& cuda, RowType& row, int64_t seed, int64_t offset,
                                    const auto& prob_of, const auto& write) {
  constexpr int kWarps = RowType::kWarps;
  const int lane = row.lane;
  uint64_t total = 0;
  row.each_left([&](int, int32_t k) { total += fixed_point(prob_of(k)); });
  total = warp_sum(total);
  if (lane == 0) row.scratch.segments[row.warp] = total;
  sync_threads();
  uint64_t own[1] = {0}, below = 0;  // the levels [below, below + own) are the block's
  for (int w = 0; w < kWarps; ++w)
    own[0] += row.scratch.segments[w];
  total = own[0];
  if constexpr (RowType::kCluster) {
    const uint64_t* given = row.give(own);
    total = 0;
    for (int r = 0; r < row.ranks(); ++r) {
      const uint64_t other = load_cluster(given, r);
      below += r < row.rank() ? other : 0;
      total += other;
    }
  }
  // A warp makes every kWarps-th draw of those that fall to the block.
  for (int64_t d = row.warp; d < cuda.draws.count; d += kWarps) {
    uint64_t level = level_of(random_bits(seed, offset, Stream::kSample, d), total);
    if (level < below || level - below >= own[0]) continue;
    level -= below;
    int w = 0;
    while (w < kWarps - 1 && row.scratch.segments[w] <= level)
      level -= row.scratch.segments[w++];
    // The tokens of warp w, or its list.
    const int run = static_cast<int>(round_up((row.count + kWarps - 1) / kWarps, kSpan));
    const int listed = row.scratch.left[w];
    const int from = listed >= 0 ? 0 : w * run;
    const int until = listed >= 0 ? listed : from + run < row.count ? from + run : row.count;
    for (int base = from; base < until; base += 32) {
      const int e = base + lane;
      int i = e;
      if (listed >= 0 && e < until) i = static_cast<int>(row.scratch.list[w * RowType::kPerWarp + e]);
      const int32_t k = e < until ? row.key[i] : kKeyPad;
      const uint64_t mine = fixed_point(prob_of(k));
      uint64_t upto = mine;  // of this lane and those before it
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
}

template <typename RowType>
ARCORE_DEVICE void write_draws(const RunCuda& cuda, RowType& row, float norm, int64_t number) {
  const Problem& p = cuda.problem;
  const Draws& draws = cuda.draws;
  const Outputs& out = cuda.out;
  const int64_t seed = draws.seeds[number * draws.seed_stride],
                offset = draws.offsets[number * draws.offset_stride];
  auto prob_of = [&](int32_t k) { return k == kKeyPad ? 0.0f : multiply_rounded(row.weight(k), norm); };
  auto write = [&](int64_t d, int i) {
    const int64_t place = number * draws.count + d;
    out.tokens[place] = int64_t{row.first} + i;
    if (out.prob) out.prob[place] = prob_of(row.key[i]);
  };
  if (draws.mode == Mode::kInverseCdf) return draw_inverse_cdf(cuda, row, seed, offset, prob_of, write);
  for (int64_t d = 0; d < draws.count; ++d) {
    uint64_t best = ~uint64_t{0};
    auto take_lower = [&](int i) {
      const auto token = static_cast<uint64_t>(row.first + i);
      if (token < best) best = token;
    };
    if (draws.mode == Mode::kGreedy) {
      row.each_left([&](int i, int32_t k) {
        if (k == row.range.high) take_lower(i);
      });
      best = row.least_of_all(best);
    } else {
      // The first of exponential waiting times of rates p, the lowest token of equal ones.
      double shortest = HUGE_VAL;
      row.each_left([&](int i, int32_t k) {
        const double prob = static_cast<double>(prob_of(k));
        if (prob == 0.0) return;
        const int64_t token = int64_t{row.first} + i;
        const double time =
            -log(uniform_open(random_bits(seed, offset, Stream::kGumbel, d * p.vocab + token))) / prob;
        if (time < shortest) {
          shortest = time;
          best = static_cast<uint64_t>(token);
        }
      });
      // Waiting times are positive: their bits have their order.
      uint64_t bits;
      memcpy(&bits, &shortest, 8);
      const uint64_t least = row.least_of_all(bits);
      best = row.least_of_all(bits == least ? best : ~uint64_t{0});
      // As the CPU: where no time is finite, the first token that is left.
      if (best == ~uint64_t{0}) {
        row.each_left([&](int i, int32_t) { take_lower(i); });
        best = row.least_of_all(best);
      }
    }
    const int64_t i = static_cast<int64_t>(best) - row.first;
    if (thread_index() == 0 && i >= 0 && i < row.count) write(d, static_cast<int>(i));
  }
}

// A row by a block, or by the blocks of a cluster.
template <int kThreads, Home kWhere>
ARCORE_DEVICE void run_row(const RunCuda& cuda) {
  const Problem& p = cuda.problem;
  auto* scratch = reinterpret_cast<Scratch*>(shared_memory());
  const int ranks = kWhere == Home::kCluster ? cluster_size() : 1,
            rank = kWhere == Home::kCluster ? cluster_rank() : 0;
  const int64_t number = block_x() / ranks, slice = slice_of_cluster(p.vocab, ranks);
  const int64_t first = rank * slice < p.vocab ? rank * slice : p.vocab;
  const Place at{number / p.inner, number % p.inner};
  const Scalars s = scalars_of(p, number);
  int32_t* keys = reinterpret_cast<int32_t*>(scratch + 1);
  if constexpr (kWhere == Home::kGlobal) keys = cuda.keys + number * key_stride(p.vocab);
  Row<kThreads, kWhere> row(keys, first, first + slice < p.vocab ? slice : p.vocab - first, *scratch,
                            s.steepness,
                            static_cast<float>(static_cast<double>(int64_t{1} << mass_bits(p.vocab))));
  uint64_t surprises = 0;
  if (process_row(cuda, s, at, number, row, surprises)) {
    const float norm = static_cast<float>(static_cast<double>(row.scale) / static_cast<double>(row.sum));
    write_distribution(cuda, row, norm, surprises, number);
    if (cuda.out.tokens != nullptr && cuda.draws.count > 0) write_draws(cuda, row, norm, number);
  } else if (rank == 0) {
    write_invalid<kThreads>(p, cuda.draws, cuda.out, number);
  }
  // Nobody returns while its shared memory is read.
  if constexpr (kWhere == Home::kCluster) sync_cluster();
}

// A file for each, for the time that nvcc takes.
int most_blocks_of_a_row_sm80();
int launch_short_rows_sm80(const RunCuda&, void* stream);
int launch_cluster_rows_sm80(const RunCuda&, void* stream);
int launch_sliced_rows_sm80(const RunCuda&, void* stream);

}  // namespace arcore::sample
