// What the fused sm_90a backward does apart from hardware, as gradient_loop_sm90.h for the two kernels: one
// pass over the pairs with five products instead of seven. A block owns 128 keys and walks tiles of 64
// queries as the kernel of dK and dV does; dS goes through shared memory to a fifth product, dS K, whose
// 64 x D sums a further warp adds to float32 sums in global memory.
//
// Sums of one query tile are added in the order in which units are numbered: the plan says before how many
// key tiles have visited a query tile when this one does, and a counter per query tile how many have. Blocks
// take units with rising numbers from one ticket counter and work on them in that order, so a visit waits
// for units with lower tickets only, all of which have a block that runs. Of the units that are not finished
// the one with the lowest ticket waits for nothing: there is no deadlock, whichever blocks are resident.
//
// Query tiles come from the last to the first. Key tiles of one head that are worked on side by side differ
// in the first query tile that sees them, seldom in the last, so walking down they follow each other closely:
// in a simulation waiting costs a third of what it does walking up.
#pragma once

#include <cstdint>

#include "block_sparse_attention/gradient_loop_sm90.h"
#include "block_sparse_attention/params.h"
#include "block_sparse_attention/tile_loop_sm90.h"
#include "common/stage_clock.h"

namespace arcore::block_sparse_attention::sm90 {

// Buffers of the fused kernel: tiles of queries and of gradients, own tiles, sums of dQ on their way out.
constexpr int fused_stages(int padded) {
  return padded <= 64 ? 4 : 3;
}
constexpr int fused_own_stages(int padded) {
  return padded <= 96 ? 2 : 1;
}
constexpr int fused_sum_stages(int padded) {
  return padded <= 64 ? 2 : 1;
}
// Of dS, one for each consumer: they take turns at the product dS K, query tile by query tile.
constexpr int kChangeStages = kConsumers;

// Columns of dQ that a consumer computes at once, for which it has registers beside dK and dV.
constexpr int query_columns(int padded) {
  return padded <= 96 ? padded : 64;
}

// The copying side, for both producers.
template <int kStages, int kOwnBuffers, typename Machine>
ARCORE_CONTROL_SM90 void produce_fused_units(Machine& machine, const Problem& problem, const TilePlan& plan,
                                             const Schedule& schedule) {
  produce_gradient_units<kStages, true, kOwnBuffers, /*kFused=*/true>(machine, problem, plan, schedule);
}

// ---- coordinates ----

// Byte of dS for one key of the block and one query of the tile: rows of 64 queries, swizzled as wgmma's
// widest layout wants, which also spreads a warp's 16-byte stores over all banks.
ARCORE_HOST_DEVICE int change_byte(int key, int query) {
  return key * kOtherRows * 2 + ((query / 8 ^ key % 8) * 16 | query % 8 * 2);
}
// The 16 bytes that a lane gives to the j-th of four matrix stores of its warp's 16 keys.
ARCORE_HOST_DEVICE int change_store(int thread, int j) {
  const int lane = thread % 32, key = thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
  return change_byte(key, (2 * j + lane / 16) * 8);
}
// Where register i of a thread lies in sums of dQ, in floats: 16 bytes of one thread beside those of the
// next.
ARCORE_HOST_DEVICE int sum_place(int thread, int i) {
  return (i / 4 * 128 + thread) * 4 + i % 4;
}

// ---- who waits for whom ----

// Sums of one query tile, as a consumer hands them on: which of all query tiles, and which visit.
struct SumsTile {
  int64_t place;
  int32_t visit;  // kStop after the last
};

// The computing side. A consumer multiplies dS K for every second query tile, over the keys of both. The
// other's dS of a tile also says that the other's product of the tile before has been read: so two buffers of
// dS, one for each consumer's product, need no barrier that says they are empty.
template <int kStages, int kOwnBuffers, int kSumStages, typename Machine>
ARCORE_CONTROL_SM90 void consume_fused_units(Machine& machine, int consumer) {
  StageClock clock = consumer_clock(), own_clock = consumer_clock();
  uint32_t to_read = 0;  // parity of this consumer's buffer of dS
  // This consumer's buffer of sums. Where there is one for both, its phases go on with every query tile; none
  // can be missed, because dS of a tile comes from the other consumer after its sums of the tile before.
  const int sums_stage = kSumStages == 1 ? 0 : consumer;
  uint32_t sums_parity = producer_clock().parity;
  int turn = 0;
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
      machine.find_forbidden(machine.other(clock.stage));
      machine.issue_first(clock.stage);
      machine.issue_second(clock.stage);
      machine.finish_first();
      machine.weigh(clock.stage);
      machine.finish_second();
      machine.differentiate(clock.stage);
      machine.pack();
      machine.issue_weights_product(clock.stage);
      machine.issue_gradients_product(clock.stage);
      machine.share_changes(turn);
      machine.finish_all();
      const OtherTile tile = machine.other(clock.stage);  // read again: registers were short until here
      machine.release_other(clock.stage);
      advance<kStages>(clock);
      if (turn == consumer) {
        machine.wait_changes(consumer, to_read);
        to_read ^= 1;
        ARCORE_UNROLL_SM90
        for (int part = 0; part < Machine::kQueryParts; ++part) {
          machine.issue_queries_product(consumer, part);
          machine.finish_queries();
          if (part == 0) machine.wait_sums_empty(sums_stage, sums_parity);
          machine.stage_sums(sums_stage, part);
        }
        machine.hand_on_sums(sums_stage, tile);
      }
      if (kSumStages == 1 || turn == consumer) sums_parity ^= 1;
      turn ^= 1;
    }
    machine.release_own(own_clock.stage);
    advance<kOwnBuffers>(own_clock);
    machine.store();
  }
  // The consumer that used a buffer last knows its phase.
  if (kSumStages > 1 || turn != consumer) {
    machine.wait_sums_empty(sums_stage, sums_parity);
    machine.hand_on_stop(sums_stage);
  }
}

// The adding side, one thread for each buffer of sums. Its visit waits for those before it; the buffer is
// free when it has been read, the next visit's turn comes when the sum lies in memory.
template <typename Machine>
ARCORE_CONTROL_SM90 void add_sums(Machine& machine, int stage) {
  for (uint32_t parity = 0;; parity ^= 1) {
    machine.wait_sums(stage, parity);
    const SumsTile tile = machine.staged(stage);
    if (tile.visit == kStop) return;
    machine.wait_visit(tile);
    machine.start_sum(stage, tile);
    machine.release_sums(stage);
    machine.finish_sum(tile);
  }
}

}  // namespace arcore::block_sparse_attention::sm90
