// Runs the fused sm_90a backward on the CPU. Its blocks live side by side, as many at once as are `resident`,
// because they wait for each other's sums of dQ.
#include <algorithm>
#include <numeric>

#include "block_sparse_attention/fused_loop_sm90.h"
#include "sm90_backward_model.h"

namespace {

using namespace sm90_model;

enum FusedMistake {
  kNoVisitWait = kMistakes,
  kEarlyVisit,  // the next visit's turn comes before the sum lies in memory
  kNoFullChanges,
  kNoEmptySums,
  kEarlySums,      // a buffer of sums is free before it was read
  kFirstByBlock,   // a block's first unit is its own number
  kFallingTickets  // the units with the highest numbers come first
};

// What all blocks share.
struct Global {
  int64_t units, blocks, resident, ticket = 0, query_tiles = 0;
  std::vector<int64_t> starting{};  // blocks in the order in which they become resident
  size_t started = 0;
  int64_t running = 0;
  std::vector<int32_t> visited{}, arrived{};
  std::vector<float> sums{};
};

struct ChangesBuffer {
  std::vector<float> data = std::vector<float>(kOwnRows * kOtherRows, kNaN);
  uint64_t writes[kConsumers] = {};
};
struct SumsBuffer {
  std::vector<float> data;
  uint64_t writes = 0;
  SumsTile tile{};
};

template <int kDim>
struct FusedBlock : Block<kDim, true, fused_own_stages(kDim), fused_stages(kDim)> {
  using Base = Block<kDim, true, fused_own_stages(kDim), fused_stages(kDim)>;
  static constexpr int kSumStages = fused_sum_stages(kDim);
  Global& global;
  int64_t number;
  int parts = 2 + kConsumers + kSumStages;  // fibers that have not ended
  ChangesBuffer changes[kChangeStages];
  std::vector<SumsBuffer> sums{static_cast<size_t>(kSumStages)};
  std::vector<Barrier> changes_full, sums_full, sums_empty;

  FusedBlock(Call& call, Fibers& fibers, Global& g, int64_t n)
      : Base(call, fibers),
        global(g),
        number(n),
        changes_full(kChangeStages, Barrier(kConsumerWarps)),
        sums_full(kSumStages, Barrier(kConsumerWarps / kConsumers)),
        sums_empty(kSumStages, Barrier(1)) {
    for (SumsBuffer& buffer : sums)
      buffer.data.assign(kOtherRows * kDim, kNaN);
  }
  void start() {
    this->fibers.wait([this] {
      return global.started < global.starting.size() && global.starting[global.started] == number &&
             global.running < global.resident;
    });
    ++global.started;
    ++global.running;
  }
  void end_part() {
    if (--parts == 0) --global.running;
  }
};

template <int kDim>
struct FusedTileProducer : TileProducer<kDim, true, FusedBlock<kDim>> {
  using Base = TileProducer<kDim, true, FusedBlock<kDim>>;

  int64_t next_unit() {
    Global& g = this->b.global;
    this->b.fibers.maybe_switch();
    const int mistake = this->b.call.mistake;
    int64_t unit;
    if (mistake == kFirstByBlock)
      unit = this->next == 0 ? this->b.number : g.blocks + g.ticket++;
    else if (mistake == kFallingTickets)
      unit = g.ticket < g.units ? g.units - 1 - g.ticket++ : g.units;
    else
      unit = g.ticket++;
    return this->tell(unit);
  }
  void load_other(int stage, const WorkItem& work, OtherTile tile, const int32_t* entry) {
    tile.visit = entry[this->b.call.by_key.columns];
    Base::load_other(stage, work, tile, entry);
  }
};

template <int kDim>
struct SumAdder {
  FusedBlock<kDim>& b;
  bool read = false, arrived = false;

  void wait_sums(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    b.wait(b.sums_full[static_cast<size_t>(stage)], parity);
  }
  SumsTile staged(int stage) { return b.sums[static_cast<size_t>(stage)].tile; }
  void wait_visit(const SumsTile& tile) {
    b.fibers.maybe_switch();
    if (b.call.mistake == kNoVisitWait) return;
    b.fibers.wait([this, tile] { return b.global.visited[static_cast<size_t>(tile.place)] == tile.visit; });
  }
  void start_sum(int stage, const SumsTile& tile) {
    SumsBuffer& buffer = b.sums[static_cast<size_t>(stage)];
    read = arrived = false;
    b.fibers.later([this, &buffer, tile, writes = buffer.writes] {
      if (buffer.writes != writes) return b.fibers.fail_event("sums were written while they were read");
      read = true;
      b.fibers.later([this, tile, from = buffer.data] {
        Global& g = b.global;
        const auto place = static_cast<size_t>(tile.place);
        if (g.arrived[place]++ != tile.visit) return b.fibers.fail_event("sums arrived out of turn");
        float* to = &g.sums[place * kOtherRows * kDim];
        for (size_t i = 0; i < from.size(); ++i)
          to[i] = tile.visit == 0 ? from[i] : to[i] + from[i];
        arrived = true;
      });
    });
    if (b.call.mistake != kEarlySums) b.fibers.wait([this] { return read; });
  }
  void release_sums(int stage) {
    b.fibers.maybe_switch();
    b.sums_empty[static_cast<size_t>(stage)].arrive();
  }
  void finish_sum(const SumsTile& tile) {
    if (b.call.mistake != kEarlyVisit) b.fibers.wait([this] { return arrived; });
    b.global.visited[static_cast<size_t>(tile.place)] = tile.visit + 1;
    if (!arrived) b.fibers.wait([this] { return arrived; });
  }
};

template <int kDim>
struct FusedConsumer : Consumer<kDim, true, FusedBlock<kDim>> {
  using Base = Consumer<kDim, true, FusedBlock<kDim>>;
  using Base::b, Base::consumer, Base::threads, Base::work;
  static constexpr int kPartColumns = query_columns(kDim), kQueryParts = kDim / kPartColumns;
  std::vector<float> product = std::vector<float>(kOtherRows * kPartColumns);
  size_t stage = 0;
  int part = 0;
  uint64_t writes[kConsumers] = {};

  // Four matrix stores of each warp, lane by lane as the instruction does them.
  void share_changes(int s) {
    ChangesBuffer& buffer = b.changes[s];
    ++buffer.writes[consumer];
    const int base = change_byte(consumer * kConsumerRows, 0);
    for (int t = 0; t < Base::kThreads; ++t) {
      for (int j = 0; j < 4; ++j) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          const int row = t / 32 * 32 + matrix * 8 + t % 32 / 4;  // the lane that has its address
          const int at = base + change_store(row, j) + t % 4 * 4;
          for (int e = 0; e < 2; ++e)
            buffer.data[static_cast<size_t>(at / 2 + e)] =
                threads[static_cast<size_t>(t)].gradients[2 * (4 * j + matrix) + e];
        }
      }
    }
    b.fibers.maybe_switch();
    b.changes_full[static_cast<size_t>(s)].arrive(kConsumerWarps / kConsumers);
  }
  void wait_changes(int s, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoFullChanges) b.wait(b.changes_full[static_cast<size_t>(s)], parity);
  }
  void issue_queries_product(int s, int which) {
    if (!this->in_flight.empty()) b.fibers.fail("dQ was issued under the products before it");
    stage = static_cast<size_t>(s), part = which;
    std::copy_n(b.changes[s].writes, kConsumers, writes);
    if (writes[0] != writes[1]) b.fibers.fail("dS of a consumer was missing");
    b.fibers.maybe_switch();
  }
  void finish_queries() {
    b.fibers.maybe_switch();
    const ChangesBuffer& buffer = b.changes[stage];
    if (!std::equal(writes, writes + kConsumers, buffer.writes))
      b.fibers.fail("dS was written while a product read it");
    const std::vector<float>& keys = b.own[0][this->own_stage].data;
    std::fill(product.begin(), product.end(), 0.0f);
    for (int key = 0; key < kOwnRows; ++key) {
      for (int query = 0; query < kOtherRows; ++query) {
        const float change = buffer.data[static_cast<size_t>(change_byte(key, query) / 2)];
        for (int d = 0; d < kPartColumns; ++d)
          product[static_cast<size_t>(query * kPartColumns + d)] +=
              change * keys[static_cast<size_t>(key * kDim + part * kPartColumns + d)];
      }
    }
  }
  void wait_sums_empty(int s, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoEmptySums) b.wait(b.sums_empty[static_cast<size_t>(s)], parity);
  }
  void stage_sums(int s, int which) {
    SumsBuffer& buffer = b.sums[static_cast<size_t>(s)];
    ++buffer.writes;
    for (int t = 0; t < Base::kThreads; ++t) {
      for (int i = 0; i < kPartColumns / 2; ++i) {
        const int query = fragment_row(t) + 8 * fragment_half(i);
        buffer.data[static_cast<size_t>(sum_place(t, which * kPartColumns / 2 + i))] =
            product[static_cast<size_t>(query * kPartColumns + fragment_column(t, i))];
      }
    }
    b.fibers.maybe_switch();
  }
  void hand_on(int s, const SumsTile& tile) {
    b.sums[static_cast<size_t>(s)].tile = tile;
    b.fibers.maybe_switch();
    b.sums_full[static_cast<size_t>(s)].arrive(kConsumerWarps / kConsumers);
  }
  void hand_on_sums(int s, const OtherTile& tile) {
    const int64_t pair = work.batch * b.call.args.problem.heads + tile.head;
    hand_on(s, {pair * b.global.query_tiles + entry_tile(tile.entry), tile.visit});
  }
  void hand_on_stop(int s) { hand_on(s, {0, kStop}); }
};

// What the last kernel does: the sums of a query tile become rows of grad_q.
template <int kDim>
void store_queries(Call& call, Global& global) {
  const Problem& p = call.args.problem;
  Fibers none(0);
  Block<kDim, false> block(call, none);
  call.done.assign(static_cast<size_t>(p.batch * p.heads * ((p.nq + kOwnRows - 1) / kOwnRows)), 0);
  for (size_t place = 0; place < global.visited.size(); ++place) {
    const auto pair = static_cast<int64_t>(place) / global.query_tiles,
               tile = static_cast<int64_t>(place) % global.query_tiles;
    Consumer<kDim, false> rows{block, static_cast<int>(tile % 2)};
    rows.work = {static_cast<int32_t>(pair / p.heads), static_cast<int32_t>(pair % p.heads),
                 static_cast<int32_t>(tile / 2), 0};
    for (int t = 0; t < 128; ++t) {
      auto& thread = rows.threads[static_cast<size_t>(t)];
      thread.row = static_cast<int32_t>(tile * kOtherRows + fragment_row(t));
      for (int i = 0; i < kDim / 2; ++i) {
        thread.by_gradient[i] =
            global.visited[place] == 0
                ? 0.0f
                : global.sums[place * kOtherRows * kDim + static_cast<size_t>(sum_place(t, i))];
        thread.by_weight[i] = 0.0f;
      }
    }
    rows.store();
  }
}

template <int kDim>
std::string run_fused(Call& call, const Given& given) {
  constexpr int kStages = fused_stages(kDim), kOwnBuffers = fused_own_stages(kDim),
                kSumStages = fused_sum_stages(kDim);
  const Problem& p = call.args.problem;
  const TilePlan& plan = call.by_key;
  const int64_t pairs = p.batch * p.kv_heads;
  const Schedule schedule{pairs, plan.rows, std::min(call.section, pairs)};
  Global global{pairs * plan.rows, given.blocks, given.resident};
  global.query_tiles = plan.columns;
  global.starting.resize(static_cast<size_t>(given.blocks));
  std::iota(global.starting.begin(), global.starting.end(), 0);
  std::mt19937_64 random(given.seed);
  std::shuffle(global.starting.begin(), global.starting.end(), random);

  const int64_t tiles = p.batch * p.heads * plan.columns;
  global.visited.assign(static_cast<size_t>(tiles), 0);
  global.arrived.assign(static_cast<size_t>(tiles), 0);
  global.sums.assign(static_cast<size_t>(tiles) * kOtherRows * kDim, kNaN);

  call.done.assign(static_cast<size_t>(global.units), 0);
  Fibers fibers(given.seed);
  std::vector<std::unique_ptr<FusedBlock<kDim>>> blocks;
  for (int64_t n = 0; n < given.blocks; ++n) {
    blocks.push_back(std::make_unique<FusedBlock<kDim>>(call, fibers, global, n));
    FusedBlock<kDim>& block = *blocks.back();
    fibers.add([&] {
      block.start();
      FusedTileProducer<kDim> tiles_of{{block}};
      produce_fused_units<kStages, kOwnBuffers>(tiles_of, p, plan, schedule);
      block.end_part();
    });
    fibers.add([&] {
      NumbersProducer<FusedBlock<kDim>> numbers{block};
      produce_fused_units<kStages, kOwnBuffers>(numbers, p, plan, schedule);
      block.end_part();
    });
    for (int c = 0; c < kConsumers; ++c)
      fibers.add([&, c] {
        FusedConsumer<kDim> consumer{{block, c}};
        consume_fused_units<kStages, kOwnBuffers, kSumStages>(consumer, c);
        block.end_part();
      });
    for (int s = 0; s < kSumStages; ++s)
      fibers.add([&, s] {
        SumAdder<kDim> adder{block};
        add_sums(adder, s);
        block.end_part();
      });
  }
  const std::string failure = fibers.run();
  if (!failure.empty()) return failure;
  for (int times : call.done)
    if (times != kConsumers) return "a unit was not stored exactly once by each consumer";
  store_queries<kDim>(call, global);
  return "";
}

}  // namespace

extern "C" void arcore_model_fused_sm90(const Given* given, char* message, int64_t capacity) {
  Call call = call_of(*given);
  const std::string failure =
      run_padded(call, [&](auto dim) { return run_fused<decltype(dim)::value>(call, *given); });
  std::strncpy(message, failure.c_str(), static_cast<size_t>(capacity) - 1);
}
