// What the two sm_90a backward kernels do apart from hardware, as tile_loop_sm90.h for the forward. Both are
// one algorithm seen from two sides: a block owns 128 rows, queries (dQ) or keys (dK, dV), and walks tiles of
// 64 of the other side.
//
//             own operands    other operands   first product   second product   accumulated
//   dQ        Q, dO           K, V             S   = Q K^T     dP   = dO V^T    dQ += dS K
//   dK, dV    K, V            Q, dO            S^T = K Q^T     dP^T = V dO^T    dV += P^T dO, dK += dS^T Q
#pragma once

#include <cmath>
#include <cstdint>

#include "block_sparse_attention/params.h"
#include "block_sparse_attention/tile_loop_sm90.h"
#include "common/host_device.h"
#include "common/stage_clock.h"

namespace arcore::block_sparse_attention::sm90 {

constexpr int kOwnRows = 128, kOtherRows = 64;
static_assert(kOwnRows == kConsumers * kConsumerRows);
static_assert(kOwnRows == kForwardTileQ && kOtherRows == kForwardTileK, "dQ walks the sm_80 plan by query");
static_assert(kOwnRows == kBackwardTileK && kOtherRows == kBackwardTileQ, "dK, dV walk the plan by key");

// Buffers for pairs of tiles of the other side.
constexpr int gradient_stages(int padded) {
  return padded <= 96 ? 4 : 3;
}

// A tile of the other side: of query head `head`, whichever side is whose.
struct OtherTile {
  int32_t head, entry;
  int32_t visit;  // of the fused kernel, else unused
};

// Buffers for own tiles: the next unit's arrive while this one's are in use.
constexpr int kOwnStages = 2;

// The copying side. A unit is an own tile of one query head, or (kByKey) of one kv head with the other sides
// of all its query heads; `machine` is called as in produce_units. load_other also gets the tile's place in
// the plan. kFused: a head's tiles come from the last to the first, and units in the order of the mask's head
// 0, which the plan's visits are numbered by.
template <int kStages, bool kByKey, int kOwnBuffers = kOwnStages, bool kFused = false, typename Machine>
ARCORE_CONTROL_SM90 void produce_gradient_units(Machine& machine, const Problem& problem,
                                                const TilePlan& plan, const Schedule& schedule) {
  const int64_t units = schedule.pairs * schedule.rows;
  const int64_t own_heads = kByKey ? problem.kv_heads : problem.heads;
  const int32_t group = kByKey ? static_cast<int32_t>(problem.heads / problem.kv_heads) : 1;
  StageClock clock = producer_clock(), own_clock = producer_clock();
  const auto load_own = [&](const WorkItem& work) {
    machine.wait_own_empty(own_clock.stage, own_clock.parity);
    machine.load_own(own_clock.stage, work);
    advance<kOwnBuffers>(own_clock);
  };

  for (int64_t index = machine.next_unit(); index < units; index = machine.next_unit()) {
    const Unit unit = unit_at(schedule, index);
    WorkItem work;
    work.batch = static_cast<int32_t>(unit.pair / own_heads);
    work.head = static_cast<int32_t>(unit.pair % own_heads);
    const int32_t first_head = work.head * group;
    work.tile = ranked_tile(plan, tile_grid(plan, work.batch, kFused ? 0 : first_head), unit.rank);
    work.count = 0;
    for (int32_t h = first_head; h < first_head + group; ++h)
      work.count += tile_list(plan, tile_grid(plan, work.batch, h), work.tile).count;
    load_own(work);
    for (int32_t h = first_head; h < first_head + group; ++h) {
      const TileList list = tile_list(plan, tile_grid(plan, work.batch, h), work.tile);
      for (int32_t i = 0; i < list.count; ++i) {
        const int32_t* entry = list.entries + (kFused ? list.count - 1 - i : i);
        machine.wait_other_empty(clock.stage, clock.parity);
        machine.load_other(clock.stage, work, OtherTile{h, *entry, 0}, entry);
        advance<kStages>(clock);
      }
    }
  }
  load_own({0, 0, kStop, 0});
}

// The computing side. The weights are computed while the second product runs; the two consumers are not
// synchronised and fill each other's gaps.
template <int kStages, bool kByKey, typename Machine>
ARCORE_CONTROL_SM90 void consume_gradient_units(Machine& machine) {
  StageClock clock = consumer_clock(), own_clock = consumer_clock();
  while (true) {
    machine.wait_own(own_clock.stage, own_clock.parity);
    const WorkItem work = machine.announced(own_clock.stage);
    if (work.tile == kStop) break;
    machine.begin(work, own_clock.stage);
#if defined(__CUDACC__)
#pragma unroll 1
#endif
    for (int32_t i = 0; i < work.count; ++i) {
      machine.wait_other(clock.stage, clock.parity);
      const OtherTile tile = machine.other(clock.stage);
      machine.find_forbidden(tile);  // before the products: they stay asynchronous over straight code only
      machine.issue_first(clock.stage);
      machine.issue_second(clock.stage);
      machine.finish_first();
      machine.weigh(clock.stage);
      machine.finish_second();
      machine.differentiate(clock.stage);
      machine.pack();
      if constexpr (kByKey) machine.issue_weights_product(clock.stage);
      machine.issue_gradients_product(clock.stage);
      machine.finish_all();
      machine.release_other(clock.stage);
      advance<kStages>(clock);
    }
    machine.release_own(own_clock.stage);
    advance<kOwnStages>(own_clock);
    machine.store();
  }
}

// ---- one thread's part of a 64 x 64 product ----

constexpr int kGradientRegisters = kConsumerRows * kOtherRows / 128;
static_assert(kGradientRegisters == 32, "a bit per register");

// Bit i is set if register i holds a forbidden pair. `row` and `first` are the own row and the other side's
// column of register 0, `head` a query head.
template <bool kByKey>
ARCORE_HOST_DEVICE uint32_t forbidden_pairs(const Problem& problem, int64_t batch, int64_t head, int32_t row,
                                            int32_t first) {
  const int32_t* key_bounds = key_bounds_of(problem.mask, batch);
  const int32_t nk = static_cast<int32_t>(problem.nk);
  uint32_t forbidden = 0;
  KeyRanges own[2];
  if constexpr (!kByKey) {
    own[0] = row_ranges(problem.mask, batch, head, row, problem.nq, problem.nk);
    own[1] = row_ranges(problem.mask, batch, head, row + 8, problem.nq, problem.nk);
  }
  ARCORE_UNROLL_SM90
  for (int column = 0; column < kGradientRegisters / 2; ++column) {
    const int32_t other = first + column / 2 * 8 + column % 2;
    KeyRanges ranges{0, 0, 0, 0};
    if constexpr (kByKey) ranges = row_ranges(problem.mask, batch, head, other, problem.nq, problem.nk);
    ARCORE_UNROLL_SM90
    for (int half = 0; half < 2; ++half) {
      const int32_t mine = row + 8 * half, query = kByKey ? other : mine, key = kByKey ? mine : other;
      bool allowed = in_ranges(kByKey ? ranges : own[half], key);
      if (allowed && key_bounds != nullptr) allowed = key < nk && key_sees_row(key_bounds, key, query);
      if (!allowed) forbidden |= 1u << (column / 2 * 4 + half * 2 + column % 2);
    }
  }
  return forbidden;
}

// What is subtracted in the exponent: the lse in powers of two, or +inf where all weights are 0.
ARCORE_HOST_DEVICE float weight_shift(float lse) {
  return lse == kNegativeInfinity ? -kNegativeInfinity : lse * 1.44269504f;
}

// exp(score * scale - lse), factor = scale * log2(e): one fused multiply-add. What the shift was rounded by,
// 2^-24 of the lse, is common to all weights of a row.
ARCORE_HOST_DEVICE float gradient_weight(float score, float factor, float shift) {
  return power_of_two(fmaf(score, factor, -shift));
}

}  // namespace arcore::block_sparse_attention::sm90
