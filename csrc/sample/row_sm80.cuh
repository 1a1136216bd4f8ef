// A row of tokens in the hands of a block, or of a cluster of blocks: sums, thresholds, dropping.
//
// Tokens lie as int32 keys of the order of their logits; whatever else is needed of a token follows from its
// key. A warp owns a run of neighbouring tokens, and once few of them are left, a list of those. All numbers
// that decide are those of the CPU kernel, operation by operation (exact.h), and all sums are sums of
// integers, so neither the number of blocks nor their order changes a bit.
#pragma once

#include "common/sm80/device.h"
#include "sample/exact.h"
#include "sample/params.h"

namespace arcore::sample {

// Where the keys of a row are.
enum class Home {
  kShared,   // a block's shared memory
  kGlobal,   // global memory, that is, the second-level cache; one block
  kCluster,  // the shared memory of the blocks of a cluster, a slice each
};

// A threshold is looked for in this many bins at once.
constexpr int kBins = 2048;
// So few tokens of one bin are compared one with another; so few are remembered instead of being read again.
constexpr int kDirect = 128, kBoundary = 1024;
// Entries of the lists of what is left, of all warps of a block.
constexpr int kListed = 2048;
constexpr int kMostWarps = 16;

// What a block shares beside the keys.
struct alignas(16) Scratch {
  uint64_t words[4][kMostWarps];  // a number per warp
  uint64_t gathered[2][4];        // this block's numbers for the other blocks of the cluster, by turns
  uint64_t segments[kMostWarps];  // masses that warps own
  uint64_t found[2];              // the bin of a threshold: what lies above it, its number
  uint64_t direct_mass[kDirect], all_mass[kDirect];
  int32_t direct_order[kDirect], all_order[kDirect];
  uint32_t direct_count, boundary_count;
  int32_t left[kMostWarps];  // entries of a warp's list; -1: it has none
  uint32_t low[kBins], high[kBins];
  uint32_t boundary[kBoundary];
  uint32_t list[kListed];
};
constexpr int kCounters = 2 * kBins;  // low and high as counters of listed tokens

// Threads of a block for rows of up to kShortRow tokens, and for longer ones.
constexpr int64_t kShortRow = 8192;
constexpr int kShortThreads = 256, kLongThreads = 512;
// Bytes of shared memory for so many tokens.
inline int64_t shared_of(int64_t tokens) {
  return static_cast<int64_t>(sizeof(Scratch)) + round_up(tokens, 8) * 4;
}

struct Range {
  int32_t low, high;
  int64_t count;
};

// Which of kBins parts of [low, high] an order lies in; larger orders do not lie in lower parts. By value,
// which suits logits, or by bits, which ends whatever the numbers are.
struct Binning {
  int32_t low;
  int shift;  // -1: by value
  float from, times;

  ARCORE_DEVICE Binning(int32_t first, int32_t last, bool try_value)
      : low(first), shift(-1), from(value_of(first)), times(0.0f) {
    const float width = add_rounded(value_of(last), -from);
    if (try_value && width > 0x1p-100f && width < HUGE_VALF)
      times = divide_rounded(static_cast<float>(kBins - 1), width);
    else
      shift = bits_to_drop(static_cast<uint32_t>(last) - static_cast<uint32_t>(first));
  }
  static ARCORE_DEVICE int bits_to_drop(uint32_t width) {
    const int bits = 32 - leading_zeros(width);
    return bits > 11 ? bits - 11 : 0;
  }
  ARCORE_DEVICE int operator()(int32_t order) const {
    if (shift >= 0)
      return static_cast<int>((static_cast<uint32_t>(order) - static_cast<uint32_t>(low)) >> shift);
    const int bin = static_cast<int>(multiply_rounded(add_rounded(value_of(order), -from), times));
    return bin < kBins - 1 ? bin : kBins - 1;
  }
};
static_assert(kBins == 1 << 11);

// By key, or by how far a token's surprise is from the mean one, the nearest first: |-log p - entropy| is
// |log e + mean surprise|, since the logarithm of the sum cancels.
struct OrderBy {
  bool typical = false;
  float mean = 0.0f;
};

// Tokens that stay. One form for all filters: every place that drops is a copy of all its code.
struct Kept {
  enum { kOrder, kWeight, kToken, kMarked } by;
  int32_t threshold;     // kOrder: at least this; kWeight: the key of tokens that stay in any case
  float weight;          // kWeight: at least this
  uint64_t token;        // kToken: this one
  const uint8_t* marks;  // kMarked: where it is set
};

template <int kThreads, Home kHome>
struct Row {
  static constexpr int kWarps = kThreads / 32, kPerWarp = kListed / kWarps;
  static constexpr Home kKeys = kHome;
  static constexpr bool kCluster = kHome == Home::kCluster;
  static_assert(kWarps <= kMostWarps);

  int32_t* key;      // of the block's tokens; 16-byte aligned, kKeyPad up to a multiple of 8
  int first, count;  // the block's tokens are [first, first + count) of the row
  Scratch& scratch;
  float steepness, scale;
  int warp, lane;
  int begin, end;  // the warp's tokens, counted from `first`
  int left;        // entries of its list; -1: it has none
  int turn;
  float top;
  Range range;   // of the tokens that are left, in all blocks
  uint64_t sum;  // of their masses, once weighed

  // All threads of the block together.
  ARCORE_DEVICE Row(int32_t* keys, int64_t first_token, int64_t tokens, Scratch& shared, float steep,
                    float scaled)
      : key(keys),
        first(static_cast<int>(first_token)),
        count(static_cast<int>(tokens)),
        scratch(shared),
        steepness(steep),
        scale(scaled),
        warp(warp_index()),
        lane(lane_index()),
        left(-1),
        turn(0),
        top(0.0f),
        range{},
        sum(0) {
    const int run = static_cast<int>(round_up((count + kWarps - 1) / kWarps, kSpan));
    begin = warp * run < count ? warp * run : count;
    end = begin + run < count ? begin + run : count;
    if (lane == 0) scratch.left[warp] = -1;
  }

  // ---- the warp's tokens ----

  // f(i, key) of all, dropped ones too (kKeyPad), and of what pads the last eight.
  template <typename F>
  ARCORE_DEVICE void each(const F& f) const {
    for (int i = begin + 4 * lane; i < end; i += 128) {
      const Vector16 v = *reinterpret_cast<const Vector16*>(key + i);
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j)
        f(i + j, static_cast<int32_t>(v.word[j]));
    }
  }
  // f(i, key) of those that are left.
  template <typename F>
  ARCORE_DEVICE void each_left(const F& f) const {
    if (left < 0) {
      each([&](int i, int32_t k) {
        if (k != kKeyPad) f(i, k);
      });
      return;
    }
    for (int e = lane; e < left; e += 32) {
      const int i = static_cast<int>(scratch.list[warp * kPerWarp + e]);
      const int32_t k = key[i];
      if (k != kKeyPad) f(i, k);
    }
  }

  // ---- all threads of all blocks together ----

  ARCORE_DEVICE int rank() const { return kCluster ? cluster_rank() : 0; }
  ARCORE_DEVICE int ranks() const { return kCluster ? cluster_size() : 1; }
  ARCORE_DEVICE void sync() const {
    if constexpr (kCluster)
      sync_cluster();
    else
      sync_threads();
  }

  // values[j] of all threads, combined by f(j, a, b).
  template <int kCount, typename F>
  ARCORE_DEVICE void combine_block(uint64_t (&values)[kCount], const F& f) const {
    ARCORE_UNROLL
    for (int j = 0; j < kCount; ++j)
      for (int mask = 16; mask > 0; mask >>= 1)
        values[j] = f(j, values[j], shuffle_xor(values[j], mask));
    if (lane == 0) ARCORE_UNROLL
    for (int j = 0; j < kCount; ++j)
      scratch.words[j][warp] = values[j];
    sync_threads();
    ARCORE_UNROLL
    for (int j = 0; j < kCount; ++j) {
      values[j] = scratch.words[j][lane % kWarps];
      for (int mask = kWarps / 2; mask > 0; mask >>= 1)
        values[j] = f(j, values[j], shuffle_xor(values[j], mask));
    }
  }
  // The block's numbers, which are equal in all its threads, for other blocks to load_cluster; where they
  // are. What was given before the last time is no longer there.
  template <int kCount>
  ARCORE_DEVICE const uint64_t* give(const uint64_t (&values)[kCount]) {
    turn ^= 1;
    if (thread_index() == 0) ARCORE_UNROLL
    for (int j = 0; j < kCount; ++j)
      scratch.gathered[turn][j] = values[j];
    sync();
    return scratch.gathered[turn];
  }
  template <int kCount, typename F>
  ARCORE_DEVICE void combine(uint64_t (&values)[kCount], const F& f) {
    combine_block(values, f);
    if constexpr (!kCluster) {
      sync_threads();
      return;
    }
    const uint64_t* given = give(values);
    ARCORE_UNROLL
    for (int j = 0; j < kCount; ++j) {
      uint64_t total = load_cluster(given + j, 0);
      for (int r = 1; r < ranks(); ++r)
        total = f(j, total, load_cluster(given + j, r));
      values[j] = total;
    }
  }
  ARCORE_DEVICE uint64_t add_all(uint64_t value) {
    uint64_t values[1] = {value};
    combine(values, [](int, uint64_t a, uint64_t b) { return a + b; });
    return values[0];
  }
  ARCORE_DEVICE uint64_t least_of_all(uint64_t value) {
    uint64_t values[1] = {value};
    combine(values, [](int, uint64_t a, uint64_t b) { return a < b ? a : b; });
    return values[0];
  }

  // Smallest and largest of numbers that threads meet, and how many.
  struct Ends {
    uint64_t values[3] = {0, 0, 0};  // complements for the smallest, so that the largest is wanted of both

    ARCORE_DEVICE void meet(int32_t order) {
      const uint32_t biased = static_cast<uint32_t>(order) ^ 0x80000000u;
      values[0] = values[0] > 0xffffffffu - biased ? values[0] : 0xffffffffu - biased;
      values[1] = values[1] > biased ? values[1] : biased;
      ++values[2];
    }
  };
  ARCORE_DEVICE Range of_all(Ends& ends) {
    combine(ends.values, [](int j, uint64_t a, uint64_t b) { return j == 2 ? a + b : a > b ? a : b; });
    return {static_cast<int32_t>((0xffffffffu - static_cast<uint32_t>(ends.values[0])) ^ 0x80000000u),
            static_cast<int32_t>(static_cast<uint32_t>(ends.values[1]) ^ 0x80000000u),
            static_cast<int64_t>(ends.values[2])};
  }
  ARCORE_DEVICE Range find_range(const OrderBy& order) {
    Ends ends;
    each_left([&](int, int32_t k) { ends.meet(order_of(order, k)); });
    return of_all(ends);
  }
  ARCORE_DEVICE void refresh() { range = find_range({}); }

  // ---- weights ----

  ARCORE_DEVICE float distance(int32_t k) const {
    return multiply_rounded(add_rounded(kQuarter * value_of(k), -kQuarter * top), steepness);
  }
  ARCORE_DEVICE float weight(int32_t k) const { return exp_of(distance(k)); }
  ARCORE_DEVICE uint64_t mass(float e) const {
    return static_cast<uint64_t>(static_cast<int64_t>(multiply_rounded(e, scale)));
  }
  // Weights count from the likeliest token that is left.
  ARCORE_DEVICE void set_top() { top = value_of(range.high); }
  // -log(e), up to rounding.
  ARCORE_DEVICE float surprise(int32_t k) const { return fminf(-distance(k), 88.0f); }
  // Also the masses of e * -log(e), which are returned.
  ARCORE_DEVICE uint64_t weigh(bool surprises) {
    set_top();
    uint64_t totals[2] = {0, 0};
    each_left([&](int, int32_t k) {
      const float e = weight(k);
      totals[0] += mass(e);
      if (surprises) totals[1] += mass(multiply_rounded(e, surprise(k)));
    });
    combine(totals, [](int, uint64_t a, uint64_t b) { return a + b; });
    sum = totals[0];
    return totals[1];
  }
  ARCORE_DEVICE float mean_of(uint64_t surprises) const {
    return static_cast<float>(static_cast<double>(surprises) / static_cast<double>(sum));
  }

  // What tokens are ordered by.
  ARCORE_DEVICE int32_t order_of(const OrderBy& order, int32_t k) const {
    return order.typical ? -bits_of(fabsf(add_rounded(distance(k), order.mean))) : k;
  }

  // ---- thresholds ----

  // Where a bin is counted: so that the lanes of a warp find theirs in different banks in find_bin.
  static ARCORE_DEVICE int place_of(int bin) {
    constexpr int kEach = kCluster ? 1 : kBins / kThreads;
    return bin % kEach * (kBins / kEach) + bin / kEach;
  }
  // A bin's weight in all blocks.
  ARCORE_DEVICE uint64_t bin_weight(int bin, bool masses) const {
    const int place = place_of(bin);
    uint64_t total = 0;
    ARCORE_NO_UNROLL
    for (int r = 0; r < ranks(); ++r) {
      const uint32_t low = kCluster ? load_cluster(scratch.low + place, r) : scratch.low[place];
      total += low;
      if (masses) {
        const uint32_t high = kCluster ? load_cluster(scratch.high + place, r) : scratch.high[place];
        total += static_cast<uint64_t>(high) << 32;
      }
    }
    return total;
  }

  struct Bin {
    int bin;         // -1: all together weigh less than the limit
    uint64_t limit;  // what is asked for
    uint64_t above;  // the weight of the bins above
  };
  // The bin in which the weight from above reaches limit_of(weight of all). A thread looks at neighbouring
  // bins, the first thread of the first block at the highest.
  template <typename Limit>
  ARCORE_DEVICE Bin find_bin(const Limit& limit_of, bool masses) {
    const int share = kBins / ranks(), each_thread = share > kThreads ? share / kThreads : 1;
    const int highest = kBins - 1 - rank() * share - thread_index() * each_thread;
    const bool some = thread_index() * each_thread < share;
    uint64_t own = 0;
    ARCORE_NO_UNROLL
    for (int b = 0; some && b < each_thread; ++b)
      own += bin_weight(highest - b, masses);
    uint64_t upto = own;  // of this lane and those before it
    for (int delta = 1; delta < 32; delta *= 2) {
      const uint64_t before = shuffle_up(upto, delta);
      if (lane >= delta) upto += before;
    }
    if (lane == 31) scratch.words[0][warp] = upto;
    sync_threads();
    uint64_t block[1] = {0}, above = upto - own;
    ARCORE_NO_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      above += w < warp ? scratch.words[0][w] : 0;
      block[0] += scratch.words[0][w];
    }
    uint64_t total = block[0];
    const uint64_t* given = nullptr;
    if constexpr (kCluster) {
      given = give(block);
      total = 0;
      for (int r = 0; r < ranks(); ++r) {
        const uint64_t other = load_cluster(given, r);
        above += r < rank() ? other : 0;
        total += other;
      }
    }
    const uint64_t limit = limit_of(total);
    if (total < limit) {
      sync_threads();
      return {-1, limit, 0};
    }
    if (some && above < limit && limit - above <= own) {
      int bin = highest;
      for (uint64_t weight; above + (weight = bin_weight(bin, masses)) < limit; --bin)
        above += weight;
      scratch.found[0] = above;
      scratch.found[1] = static_cast<uint64_t>(bin);
    }
    sync();
    if constexpr (!kCluster) return {static_cast<int>(scratch.found[1]), limit, scratch.found[0]};
    int finder = 0;
    uint64_t until = 0;
    for (int r = 0; r < ranks(); ++r) {
      until += load_cluster(given, r);
      finder += until < limit;
    }
    return {static_cast<int>(load_cluster(scratch.found + 1, finder)), limit,
            load_cluster(scratch.found, finder)};
  }

  // Of few tokens, all in `direct`: the smallest order above which less than `limit` lies.
  ARCORE_DEVICE int32_t find_among_few(int tokens, uint64_t limit) {
    const int thread = thread_index();
    const int32_t* order = scratch.direct_order;
    const uint64_t* masses = scratch.direct_mass;
    if constexpr (kCluster) {
      if (thread < tokens) {
        int r = 0, i = thread;
        for (int there; i >= (there = static_cast<int>(load_cluster(&scratch.direct_count, r))); ++r)
          i -= there;
        scratch.all_order[thread] = load_cluster(scratch.direct_order + i, r);
        scratch.all_mass[thread] = load_cluster(scratch.direct_mass + i, r);
      }
      sync_threads();
      order = scratch.all_order;
      masses = scratch.all_mass;
    }
    uint64_t least[1] = {~uint64_t{0}};
    if (thread < tokens) {
      const int32_t own = order[thread];
      uint64_t above = 0;
      ARCORE_NO_UNROLL
      for (int i = 0; i < tokens; ++i)
        above += order[i] > own ? masses[i] : 0;
      if (above < limit) least[0] = static_cast<uint32_t>(own) ^ 0x80000000u;
    }
    combine_block(least, [](int, uint64_t a, uint64_t b) { return a < b ? a : b; });
    sync_threads();
    return static_cast<int32_t>(static_cast<uint32_t>(least[0]) ^ 0x80000000u);
  }

  // The smallest t, or an equivalent one, such that the tokens of an order above t weigh less than
  // limit_of(weight of all): their masses, or their number. A histogram finds the bin of t; its tokens are
  // remembered, and compared one with another once they are few.
  template <typename Limit>
  ARCORE_DEVICE int32_t find_threshold(Range in, const Limit& limit_of, bool masses, const OrderBy& by) {
    int32_t low = in.low, high = in.high;
    uint64_t limit = 0;  // of what is looked at, from the second round on
    bool remembered = false;
    if (low == high) return low;
    ARCORE_NO_UNROLL
    for (int round = 0;; ++round) {
      const Binning bin_of(low, high, round < 2);
      auto candidates = [&](const auto& f) {
        auto look = [&](int i, int32_t k) {
          const int32_t order = order_of(by, k);
          if (order >= low && order <= high) f(i, k, order);
        };
        if (!remembered) return each_left(look);
        for (int e = thread_index(); e < static_cast<int>(scratch.boundary_count); e += kThreads) {
          const int i = static_cast<int>(scratch.boundary[e]);
          look(i, key[i]);
        }
      };
      for (int b = thread_index(); b < kBins; b += kThreads)
        scratch.low[b] = scratch.high[b] = 0;
      sync_threads();
      candidates([&](int, int32_t k, int32_t order) {
        const int place = place_of(bin_of(order));
        const uint64_t m = masses ? mass(weight(k)) : 1;
        if (m != 0) atomic_add_words(scratch.low + place, scratch.high + place, m);
      });
      sync();
      if (thread_index() == 0) {
        // Nobody looks at these of the round before any more.
        scratch.direct_count = 0;
        if (!remembered) scratch.boundary_count = 0;
      }
      const Bin found =
          find_bin([&](uint64_t total) { return round == 0 ? limit_of(total) : limit; }, masses);
      if (found.bin < 0) return in.low;
      limit = found.limit - found.above;
      Ends ends;
      candidates([&](int i, int32_t k, int32_t order) {
        if (bin_of(order) != found.bin) return;
        ends.meet(order);
        const uint32_t at = atomic_add(&scratch.direct_count, 1u);
        if (at < kDirect) {
          scratch.direct_order[at] = order;
          scratch.direct_mass[at] = masses ? mass(weight(k)) : 1;
        }
        if (remembered) return;
        const uint32_t place = atomic_add(&scratch.boundary_count, 1u);
        if (place < kBoundary) scratch.boundary[place] = static_cast<uint32_t>(i);
      });
      const Range there = of_all(ends);
      if (there.low == there.high) return there.low;
      if (there.count <= kDirect) return find_among_few(static_cast<int>(there.count), limit);
      remembered = remembered || scratch.boundary_count <= kBoundary;
      low = there.low;
      high = there.high;
    }
  }

  // ---- dropping ----

  ARCORE_DEVICE bool stays(const Kept& kept, const OrderBy& order, int i, int32_t k) const {
    if (kept.by == Kept::kOrder) return order_of(order, k) >= kept.threshold;
    if (kept.by == Kept::kWeight) return k == kept.threshold || weight(k) >= kept.weight;
    if (kept.by == Kept::kToken) return static_cast<uint64_t>(first + i) == kept.token;
    return kept.marks[i] != 0;
  }
  // Drops all others, and lists the warp's tokens once they are few.
  ARCORE_DEVICE void keep_only(const Kept& those, const OrderBy& order) {
    Ends ends;
    uint32_t* list = scratch.list + warp * kPerWarp;
    int kept = 0;
    if (left >= 0) {
      for (int e = 0; e < left; e += 32) {
        const bool mine = e + lane < left;
        const int i = mine ? static_cast<int>(list[e + lane]) : 0;
        const int32_t k = mine ? key[i] : kKeyPad;
        const bool good = k != kKeyPad && stays(those, order, i, k);
        if (good) ends.meet(k);
        if (k != kKeyPad && !good) key[i] = kKeyPad;
        const uint32_t stay = ballot(good);
        if (good) list[kept + count_bits(stay & ((1u << lane) - 1u))] = static_cast<uint32_t>(i);
        kept += count_bits(stay);
      }
      left = kept;
    } else {
      for (int base = begin; base < end; base += 128) {
        const int i = base + 4 * lane;
        int32_t k[4] = {kKeyPad, kKeyPad, kKeyPad, kKeyPad};
        if (i < end) {
          const Vector16 v = *reinterpret_cast<const Vector16*>(key + i);
          ARCORE_UNROLL
          for (int j = 0; j < 4; ++j)
            k[j] = static_cast<int32_t>(v.word[j]);
        }
        uint32_t before = 0, all = 0;  // kept tokens of lower lanes, of all lanes
        bool good[4];
        ARCORE_UNROLL
        for (int j = 0; j < 4; ++j) {
          good[j] = k[j] != kKeyPad && stays(those, order, i + j, k[j]);
          if (good[j]) ends.meet(k[j]);
          if (k[j] != kKeyPad && !good[j]) key[i + j] = kKeyPad;
          const uint32_t stay = ballot(good[j]);
          before += static_cast<uint32_t>(count_bits(stay & ((1u << lane) - 1u)));
          all += static_cast<uint32_t>(count_bits(stay));
        }
        if (kept + static_cast<int>(all) <= kPerWarp) {
          int at = kept + static_cast<int>(before);
          ARCORE_UNROLL
          for (int j = 0; j < 4; ++j)
            if (good[j]) list[at++] = static_cast<uint32_t>(i + j);
        }
        kept += static_cast<int>(all);
      }
      if (kept <= kPerWarp) left = kept;
    }
    if (lane == 0) scratch.left[warp] = left;
    range = of_all(ends);
  }
};

}  // namespace arcore::sample
