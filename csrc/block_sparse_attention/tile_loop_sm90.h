// What the sm_90a kernel does apart from hardware: which work a block does and in which order, who waits for
// whom, which row and column an accumulator register holds, the mask, the online softmax. Plain C++ for nvcc
// and g++: the CPU tests run the kernel's own functions, with a model in the place of the hardware.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "block_sparse_attention/params.h"
#include "common/host_device.h"
#include "common/stage_clock.h"

#if defined(__CUDACC__)
#define ARCORE_UNROLL_SM90 _Pragma("unroll")
#define ARCORE_CONTROL_SM90 static __device__ __forceinline__
#else
#define ARCORE_UNROLL_SM90
#define ARCORE_CONTROL_SM90 static inline
#endif

namespace arcore::block_sparse_attention::sm90 {

constexpr int kTileQ = kTileQSm90, kTileK = kTileKSm90;
constexpr int kConsumers = 2;                       // warpgroups that compute
constexpr int kConsumerRows = kTileQ / kConsumers;  // 64: the rows of one wgmma
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Head dims are padded with zeros, by the copy engine, to one of these.
constexpr int padded_dim(int64_t dim) {
  return dim <= 64 ? 64 : dim <= 96 ? 96 : 128;
}
// Columns of one copy, which is one row of a block in shared memory: the widest swizzle, in bytes 128 or 64,
// that divides the padded head dim.
constexpr int block_columns(int padded) {
  return padded % 64 == 0 ? 64 : 32;
}
// Buffers for query tiles: the next unit's queries arrive while this one's are in use.
constexpr int kQueryStages = 2;
// Buffers for key tiles, and as many for value tiles: what fits beside the queries, 4 at most.
constexpr int stages(int padded) {
  return padded <= 64 ? 4 : padded <= 96 ? 3 : 2;
}

// ---- which work, in which order ----

// A unit is one query tile of one (batch, head). Units are numbered so that the longest come first, within
// sections of consecutive heads whose keys and values stay in the second-level cache together.
struct Schedule {
  int64_t pairs;    // batch * heads
  int64_t rows;     // query tiles per pair
  int64_t section;  // pairs per section
};

struct Unit {
  int64_t pair;  // batch * heads + head
  int64_t rank;  // position in the pair's longest-first order
};

// Heads per section for keys and values of `bytes` per kv head, shared by `group` query heads.
ARCORE_HOST_DEVICE int64_t section_pairs(int64_t bytes, int64_t group, int64_t pairs) {
  constexpr int64_t kCacheBytes = int64_t{24} << 20;  // half of the second-level cache
  const int64_t kv_heads = bytes > 0 ? kCacheBytes / bytes : pairs;
  const int64_t section = (kv_heads > 1 ? kv_heads : 1) * group;
  return section < pairs ? section : pairs;
}

ARCORE_HOST_DEVICE Unit unit_at(const Schedule& s, int64_t index) {
  const int64_t first = index / (s.section * s.rows) * s.section;
  const int64_t rest = index - first * s.rows;
  const int64_t width = s.pairs - first < s.section ? s.pairs - first : s.section;
  return {first + rest % width, rest / width};
}

// ---- tensors as the copy engine sees them ----

// Sizes in elements and strides in bytes of [D, N, H, B]; a copy starts at (column, row, head * head_step,
// batch * batch_step).
struct CopyMap {
  uint64_t sizes[4], strides[3];
  int32_t head_step, batch_step;
};

// False if the copy engine cannot address a 16-bit tensor of these strides: it wants multiples of 16 bytes
// below 2^40, and rows that do not overlap.
ARCORE_HOST_DEVICE bool map_tensor(CopyMap& map, const Tensor4& t, int64_t dim, int64_t rows, int64_t heads,
                                   int64_t batch) {
  constexpr int64_t kElementBytes = 2, kAlign = 16 / kElementBytes, kLimit = int64_t{1} << 40;
  if (rows > 1 && t.row < dim) return false;
  // A dimension that stays at one place in memory becomes one of size 1, read at coordinate 0; so does one of
  // size 1, whose stride may be anything.
  const int64_t sizes[3] = {rows, heads, batch}, strides[3] = {t.row, t.head, t.batch};
  map.sizes[0] = static_cast<uint64_t>(dim);
  for (int i = 0; i < 3; ++i) {
    const bool moves = sizes[i] > 1 && strides[i] != 0;
    const int64_t stride = moves ? strides[i] : kAlign;
    if (stride < 0 || stride % kAlign != 0 || stride >= kLimit / kElementBytes) return false;
    map.sizes[i + 1] = moves ? static_cast<uint64_t>(sizes[i]) : 1;
    map.strides[i] = static_cast<uint64_t>(stride * kElementBytes);
  }
  map.head_step = map.sizes[2] > 1 ? 1 : 0;
  map.batch_step = map.sizes[3] > 1 ? 1 : 0;
  return true;
}

// ---- the tile plan ----

ARCORE_HOST_DEVICE int32_t entry_tile(int32_t entry) {
  return entry >> 1;
}
// Every key of the tile that exists may be seen from every query of the tile that exists.
ARCORE_HOST_DEVICE bool entry_full(int32_t entry) {
  return (entry & 1) != 0;
}
// Of a plan with halves: the tile, and whether the consumer's half of the queries sees one of its keys.
ARCORE_HOST_DEVICE int32_t halved_tile(int32_t entry) {
  return entry >> 3;
}
ARCORE_HOST_DEVICE bool half_seen(int32_t entry, int consumer) {
  return (entry >> 1 >> consumer & 1) != 0;
}

// The list of query tile `row`, and which tile is the `rank`-th longest; `grid` is tile_grid().
struct TileList {
  int32_t count;
  const int32_t* entries;
};

ARCORE_HOST_DEVICE const int32_t* tile_grid(const TilePlan& plan, int64_t batch, int64_t head) {
  return plan.data + batch * plan.batch + head * plan.head;
}
ARCORE_HOST_DEVICE int32_t ranked_tile(const TilePlan& plan, const int32_t* grid, int64_t rank) {
  return grid[rank * plan.pitch + 1];
}
ARCORE_HOST_DEVICE TileList tile_list(const TilePlan& plan, const int32_t* grid, int64_t row) {
  const int32_t* at = grid + row * plan.pitch;
  return {at[0], at + 2};
}

// ---- the mask of a row ----

// Two disjoint half-open ranges within [0, nk), either may be empty.
struct KeyRanges {
  int32_t lo0, hi0, lo1, hi1;
};

ARCORE_HOST_DEVICE void clamp_range(int32_t& lo, int32_t& hi, int32_t nk) {
  lo = lo < 0 ? 0 : lo;
  hi = hi > nk ? nk : hi;
  if (lo >= hi) lo = hi = 0;
}

ARCORE_HOST_DEVICE KeyRanges row_ranges(const MaskBounds& mask, int64_t batch, int64_t head, int64_t row,
                                        int64_t nq, int64_t nk) {
  KeyRanges r{0, 0, 0, 0};
  if (row >= nq) return r;
  const int32_t* bounds = mask.bounds + batch * mask.batch + head * mask.head + row * 2 * mask.intervals;
  r.lo0 = bounds[0];
  r.hi0 = bounds[1];
  if (mask.intervals > 1) {
    r.lo1 = bounds[2];
    r.hi1 = bounds[3];
  }
  clamp_range(r.lo0, r.hi0, static_cast<int32_t>(nk));
  clamp_range(r.lo1, r.hi1, static_cast<int32_t>(nk));
  if (r.lo1 < r.lo0) r = {r.lo1, r.hi1, r.lo0, r.hi0};
  r.lo1 = r.lo1 < r.hi0 ? r.hi0 : r.lo1;
  r.hi1 = r.hi1 < r.lo1 ? r.lo1 : r.hi1;
  return r;
}

ARCORE_HOST_DEVICE bool in_ranges(const KeyRanges& r, int32_t key) {
  // One comparison per range: below `lo` the difference wraps to a large number.
  const bool first = static_cast<uint32_t>(key - r.lo0) < static_cast<uint32_t>(r.hi0 - r.lo0);
  const bool second = static_cast<uint32_t>(key - r.lo1) < static_cast<uint32_t>(r.hi1 - r.lo1);
  return first || second;
}

// The (query -> key) half of the mask that belongs to the keys, or null.
ARCORE_HOST_DEVICE const int32_t* key_bounds_of(const MaskBounds& mask, int64_t batch) {
  return mask.key_bounds == nullptr ? nullptr : mask.key_bounds + batch * mask.key_batch;
}
ARCORE_HOST_DEVICE bool key_sees_row(const int32_t* key_bounds, int32_t key, int32_t row) {
  return key_bounds[2 * int64_t{key}] <= row && row < key_bounds[2 * int64_t{key} + 1];
}

// ---- registers of a wgmma accumulator, 64 x columns, over the 128 threads of a warpgroup ----

// A thread holds two rows, `fragment_row` and 8 below it; register i belongs to the upper one if `half` is 0.
ARCORE_HOST_DEVICE int fragment_row(int thread) {
  return thread / 32 * 16 + thread % 32 / 4;
}
ARCORE_HOST_DEVICE constexpr int fragment_half(int i) {
  return i / 2 % 2;
}
// Registers 4 g to 4 g + 3 hold columns of the g-th group of 8.
ARCORE_HOST_DEVICE int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// Logits of forbidden pairs become -inf, NaN or not. `row` and `first_key` are those of register 0.
template <int kRegisters, typename Fragment>
ARCORE_HOST_DEVICE void mask_scores(Fragment& scores, const KeyRanges& upper, const KeyRanges& lower,
                                    const int32_t* key_bounds, int32_t row, int32_t first_key, int32_t nk) {
  ARCORE_UNROLL_SM90
  for (int i = 0; i < kRegisters; ++i) {
    const int32_t key = first_key + i / 4 * 8 + i % 2;
    if (!in_ranges(fragment_half(i) == 0 ? upper : lower, key)) scores[i] = kNegativeInfinity;
  }
  if (key_bounds == nullptr) return;
  ARCORE_UNROLL_SM90
  for (int i = 0; i < kRegisters; ++i) {
    const int32_t key = first_key + i / 4 * 8 + i % 2;
    if (key < nk && !key_sees_row(key_bounds, key, row + 8 * fragment_half(i))) scores[i] = kNegativeInfinity;
  }
}

// ---- online softmax ----

#if defined(__CUDA_ARCH__)
ARCORE_HOST_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
ARCORE_HOST_DEVICE float power_of_two(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
#endif

// The largest of `start` and this thread's scores of one row; NaN is passed over (its weight will be NaN).
template <int kRegisters, typename Fragment>
ARCORE_HOST_DEVICE float largest_score(const Fragment& scores, int half, float start) {
  float largest = start;
  ARCORE_UNROLL_SM90
  for (int i = 0; i < kRegisters; ++i) {
    if (fragment_half(i) == half) largest = fmaxf(largest, scores[i]);
  }
  return largest;
}

// What is subtracted in the exponent, scale * log2(e) of the largest score; 0 for a row that has seen no key,
// so that -inf - (-inf) never arises. factor = scale * log2(e).
ARCORE_HOST_DEVICE float softmax_shift(float largest, float factor) {
  return largest == kNegativeInfinity ? 0.0f : largest * factor;
}

// 2^(score * factor - shift): one fused multiply-add. What `shift` was rounded by is common to all weights of
// a row and to its lse, which is taken from the same shift, so it cancels.
ARCORE_HOST_DEVICE float softmax_weight(float score, float shift, float factor) {
  return power_of_two(fmaf(score, factor, -shift));
}

// What weights under the shift `before` are multiplied by when `now` takes its place; 0 where `largest` says
// that there were none.
ARCORE_HOST_DEVICE float softmax_rescale(float largest, float before, float now) {
  return largest == kNegativeInfinity ? 0.0f : power_of_two(before - now);
}

// Scores become weights; this thread's part of the two rows' sums grows by them.
template <int kRegisters, typename Fragment>
ARCORE_HOST_DEVICE void weigh_scores(Fragment& scores, const float (&shift)[2], float factor,
                                     float (&sum)[2]) {
  ARCORE_UNROLL_SM90
  for (int i = 0; i < kRegisters; ++i) {
    scores[i] = softmax_weight(scores[i], shift[fragment_half(i)], factor);
    sum[fragment_half(i)] += scores[i];
  }
}

template <int kRegisters, typename Fragment>
ARCORE_HOST_DEVICE void scale_rows(Fragment& values, const float (&by)[2]) {
  ARCORE_UNROLL_SM90
  for (int i = 0; i < kRegisters; ++i)
    values[i] *= by[fragment_half(i)];
}

// No weight at all: no key allowed, or every logit -inf.
ARCORE_HOST_DEVICE float row_lse(float shift, float sum) {
  return sum == 0.0f ? kNegativeInfinity : fmaf(shift, 0.693147181f, logf(sum));
}

// ---- four lanes that share a row exchange words, so that each stores 16 contiguous bytes ----

// Lane c of four holds words[k] = the c-th word of group k; afterwards words[k] = the k-th word of group c.
// exchange(word, m) gives the word that lane c ^ m passed.
template <typename Exchange>
ARCORE_HOST_DEVICE void transpose_words(uint32_t (&words)[4], int lane, const Exchange& exchange) {
  ARCORE_UNROLL_SM90
  for (int step = 1; step <= 2; ++step) {
    const bool high = (lane & step) != 0;
    ARCORE_UNROLL_SM90
    for (int k = 0; k < 4; ++k) {
      if ((k & step) != 0) continue;
      const uint32_t received = exchange(high ? words[k] : words[k + step], step);
      if (high)
        words[k] = received;
      else
        words[k + step] = received;
    }
  }
}

// ---- who waits for whom ----

// A unit as the producer announces it; the tile is kStop after the last one.
struct WorkItem {
  int32_t batch, head, tile, count;
};
constexpr int32_t kStop = -1;

// The copying side of a block. Machine says which unit is next (any order that gives each unit to one block
// will do), waits for buffers to be empty and starts copies; load_queries also announces the unit, and copies
// nothing if it has no key tiles.
template <int kStages, typename Machine>
ARCORE_CONTROL_SM90 void produce_units(Machine& machine, const Problem& problem, const TilePlan& plan,
                                       const Schedule& schedule) {
  const int64_t units = schedule.pairs * schedule.rows;
  StageClock k_clock = producer_clock(), v_clock = producer_clock(), q_clock = producer_clock();
  const auto load_queries = [&](const WorkItem& work) {
    machine.wait_queries_empty(q_clock.stage, q_clock.parity);
    machine.load_queries(q_clock.stage, work);
    advance<kQueryStages>(q_clock);
  };
  const auto load_keys = [&](const WorkItem& work, int32_t entry) {
    machine.wait_keys_empty(k_clock.stage, k_clock.parity);
    machine.load_keys(k_clock.stage, work, entry);
    advance<kStages>(k_clock);
  };
  const auto load_values = [&](const WorkItem& work, int32_t entry) {
    machine.wait_values_empty(v_clock.stage, v_clock.parity);
    machine.load_values(v_clock.stage, work, entry);
    advance<kStages>(v_clock);
  };

  for (int64_t index = machine.next_unit(); index < units; index = machine.next_unit()) {
    const Unit unit = unit_at(schedule, index);
    WorkItem work;
    work.batch = static_cast<int32_t>(unit.pair / problem.heads);
    work.head = static_cast<int32_t>(unit.pair % problem.heads);
    const int32_t* grid = tile_grid(plan, work.batch, work.head);
    work.tile = ranked_tile(plan, grid, unit.rank);
    const TileList list = tile_list(plan, grid, work.tile);
    work.count = list.count;
    load_queries(work);
    int32_t entry = 0;
    for (int32_t i = 0; i < work.count; ++i) {
      const int32_t next = list.entries[i];
      load_keys(work, next);
      if (i > 0) load_values(work, entry);
      entry = next;
    }
    if (work.count > 0) load_values(work, entry);
  }
  load_queries({0, 0, kStop, 0});
}

// The computing side: one of kConsumers. S(i) = Q K(i) is issued before O += P(i - 1) V(i - 1), so that the
// softmax of tile i runs while the second product does; between take_turn and pass_turn this consumer alone
// issues products, so that its softmax runs beside the other's products. Each consumer takes one turn for
// every tile, also for one that it passes over because none of its rows sees a key of it.
template <int kStages, typename Machine>
ARCORE_CONTROL_SM90 void consume_units(Machine& machine, int consumer) {
  StageClock k_clock = consumer_clock(), v_clock = consumer_clock(), q_clock = consumer_clock();
  if (consumer == 1) machine.pass_turn();  // consumer 0 goes first

  while (true) {
    machine.wait_queries(q_clock.stage, q_clock.parity);
    const WorkItem work = machine.announced(q_clock.stage);
    if (work.tile == kStop) break;
    machine.begin(work, q_clock.stage);
    bool pending = false;  // weights wait for their product with the values
    const auto finish_pending = [&] {
      machine.wait_values(v_clock.stage, v_clock.parity);
      machine.issue_output(v_clock.stage);
      machine.finish_output();
      machine.release_values(v_clock.stage);
      advance<kStages>(v_clock);
      pending = false;
    };

#if defined(__CUDACC__)
#pragma unroll 1
#endif
    for (int32_t i = 0; i < work.count; ++i) {
      machine.wait_keys(k_clock.stage, k_clock.parity);
      const int32_t entry = machine.entry(k_clock.stage);
      machine.take_turn();
      if (!half_seen(entry, consumer)) {
        machine.pass_turn();
        machine.release_keys(k_clock.stage);
        advance<kStages>(k_clock);
        // The buffers are a ring: what this consumer still holds must go before it can wait for the next.
        if (pending) finish_pending();
        machine.wait_values(v_clock.stage, v_clock.parity);
        machine.release_values(v_clock.stage);
        advance<kStages>(v_clock);
      } else if (!pending) {
        machine.issue_scores(k_clock.stage);
        machine.pass_turn();
        machine.template finish_scores<0>();
        machine.release_keys(k_clock.stage);
        advance<kStages>(k_clock);
        machine.softmax(entry);
        machine.rescale_output();
        machine.pack_weights();
        pending = true;
      } else {
        machine.issue_scores(k_clock.stage);
        machine.wait_values(v_clock.stage, v_clock.parity);
        machine.issue_output(v_clock.stage);
        machine.pass_turn();
        machine.template finish_scores<1>();
        machine.release_keys(k_clock.stage);
        advance<kStages>(k_clock);
        machine.softmax(entry);
        machine.finish_output();
        machine.release_values(v_clock.stage);
        advance<kStages>(v_clock);
        machine.rescale_output();
        machine.pack_weights();
      }
    }
    machine.release_queries(q_clock.stage);
    advance<kQueryStages>(q_clock);
    if (pending) finish_pending();
    machine.store();
  }
  if (consumer == 0) machine.take_turn();  // the turn that consumer 1 passed last: barriers end as they began
}

}  // namespace arcore::block_sparse_attention::sm90
