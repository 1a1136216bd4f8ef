// Runs the sm_90a forward on the CPU: the kernel's own order of events (produce_units, consume_units), masks,
// softmax and register coordinates, with a model of the hardware around them. A product reads its operands
// when it is waited for; every misuse of a buffer or a register that the hardware would not notice is an
// error here.
#include "sm90_model.h"

namespace {

using namespace sm90_model;

// Mistakes that the tests plant to see that the model notices them.
enum Mistake {
  kNone,
  kNoEmptyKeys,     // the producer does not wait for an empty key buffer
  kNoEmptyValues,   // ... value buffer
  kNoEmptyQueries,  // ... query buffer
  kNoFullKeys,      // consumers do not wait for keys
  kNoFullValues,    // ... values
  kForgetsRelease,  // consumer 1 does not release a value buffer
  kEarlyRelease,    // consumer 0 releases a key buffer before its product is done
  kUnmaskedTile,    // partial tiles are taken for full ones
  kNoRepair,        // 0 * NaN stays
};

struct Call {
  ForwardArgs args;
  CopyMap q_map, k_map, v_map;
  TilePlan plan;
  Schedule schedule;
  float scale_log2e;
  bool half;
  Mistake mistake;
  std::vector<int> done;  // times that a unit was stored
};

template <int kDim>
struct Block {
  static constexpr int kStages = stages(kDim);
  Call& call;
  Fibers& fibers;
  std::vector<Buffer> q, k, v;
  std::vector<Barrier> q_full, q_empty, k_full, k_empty, v_full, v_empty;
  std::vector<WorkItem> work{kQueryStages};
  std::vector<int32_t> entries;
  std::vector<int64_t> units;  // those of this block, in their order
  size_t next = 0;
  int turn_arrivals[2] = {0, 0};
  uint64_t turns[2] = {0, 0};

  Block(Call& c, Fibers& f)
      : call(c),
        fibers(f),
        q(kQueryStages),
        k(kStages),
        v(kStages),
        q_full(kQueryStages, Barrier(1)),
        q_empty(kQueryStages, Barrier(kConsumerWarps)),
        k_full(kStages, Barrier(1)),
        k_empty(kStages, Barrier(kConsumerWarps)),
        v_full(kStages, Barrier(1)),
        v_empty(kStages, Barrier(kConsumerWarps)),
        entries(kStages, -1) {
    for (Buffer& b : q)
      b.data.assign(kTileQ * kDim, kNaN);
    for (auto* buffers : {&k, &v})
      for (Buffer& b : *buffers)
        b.data.assign(kTileK * kDim, kNaN);
  }

  void wait(const Barrier& barrier, uint32_t parity) {
    fibers.wait([&barrier, parity] { return barrier.passed(parity); });
  }
  void copy(Buffer& to, Barrier& full, const Tensor4& from, const CopyMap& map, int64_t batch, int64_t head,
            int64_t first) {
    full.arrive_expecting(128 * kDim * 2);
    start_copy(fibers, to, full, from, map, batch, head, first, 128, kDim);
  }
  void arrive_turn(int which) {
    turn_arrivals[which] += 128;
    if (turn_arrivals[which] == 256) {
      turn_arrivals[which] = 0;
      ++turns[which];
    }
    if (turn_arrivals[which] > 256) fibers.fail("too many threads at a named barrier");
  }
};

template <int kDim>
struct ModelProducer {
  Block<kDim>& b;

  void wait_keys_empty(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoEmptyKeys) b.wait(b.k_empty[static_cast<size_t>(stage)], parity);
  }
  void wait_values_empty(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoEmptyValues) b.wait(b.v_empty[static_cast<size_t>(stage)], parity);
  }
  void wait_queries_empty(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoEmptyQueries) b.wait(b.q_empty[static_cast<size_t>(stage)], parity);
  }
  int64_t next_unit() {
    b.fibers.maybe_switch();
    return b.next < b.units.size() ? b.units[b.next++] : b.call.schedule.pairs * b.call.schedule.rows;
  }
  int64_t kv_head(const WorkItem& work) const {
    const Problem& p = b.call.args.problem;
    return work.head / (p.heads / p.kv_heads);
  }
  void load_keys(int stage, const WorkItem& work, int32_t entry) {
    const auto s = static_cast<size_t>(stage);
    b.entries[s] = entry;
    b.copy(b.k[s], b.k_full[s], b.call.args.k, b.call.k_map, work.batch, kv_head(work),
           int64_t{halved_tile(entry)} * kTileK);
  }
  void load_values(int stage, const WorkItem& work, int32_t entry) {
    const auto s = static_cast<size_t>(stage);
    b.copy(b.v[s], b.v_full[s], b.call.args.v, b.call.v_map, work.batch, kv_head(work),
           int64_t{halved_tile(entry)} * kTileK);
  }
  void load_queries(int stage, const WorkItem& work) {
    const auto s = static_cast<size_t>(stage);
    b.work[s] = work;
    if (work.count == 0) {
      b.q_full[s].arrive();
      return;
    }
    b.copy(b.q[s], b.q_full[s], b.call.args.q, b.call.q_map, work.batch, work.head,
           int64_t{work.tile} * kTileQ);
  }
};

template <int kDim>
struct ModelConsumer {
  static constexpr int kScores = kTileK / 2, kOutputs = kDim / 2, kThreads = 128;
  struct Thread {
    float scores[kScores], weights[kScores], output[kOutputs];
    float largest[2], sum[2], rescale[2];
    int32_t row;
    KeyRanges upper, lower;
  };
  // A product in flight, and what its operands were when it was issued.
  struct Product {
    bool scores;
    size_t stage;
    uint64_t loads, query_loads;
  };

  Block<kDim>& b;
  int consumer;
  std::vector<Thread> threads{kThreads};
  std::vector<Product> in_flight{};
  WorkItem work{};
  size_t q_stage = 0;

  void release(Barrier& barrier) {
    b.fibers.maybe_switch();
    barrier.arrive(kConsumerWarps / kConsumers);
  }
  void release_queries(int stage) {
    require_idle(true, "queries released under a product");
    release(b.q_empty[static_cast<size_t>(stage)]);
  }
  void release_keys(int stage) {
    if (b.call.mistake != kEarlyRelease || consumer != 0) release(b.k_empty[static_cast<size_t>(stage)]);
  }
  void release_values(int stage) {
    if (b.call.mistake != kForgetsRelease || consumer != 1) release(b.v_empty[static_cast<size_t>(stage)]);
  }
  void wait_queries(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    b.wait(b.q_full[static_cast<size_t>(stage)], parity);
  }
  void wait_keys(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoFullKeys) b.wait(b.k_full[static_cast<size_t>(stage)], parity);
  }
  void wait_values(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoFullValues) b.wait(b.v_full[static_cast<size_t>(stage)], parity);
  }
  void take_turn() {
    const uint64_t turn = b.turns[consumer];
    b.arrive_turn(consumer);
    b.fibers.wait([this, turn] { return b.turns[consumer] != turn; });
  }
  void pass_turn() { b.arrive_turn(1 - consumer); }
  WorkItem announced(int stage) { return b.work[static_cast<size_t>(stage)]; }
  int32_t entry(int stage) { return b.entries[static_cast<size_t>(stage)]; }

  // No product that uses the registers of scores, or of weights and output, may be in flight.
  void require_idle(bool scores, const char* what) {
    for (const Product& p : in_flight)
      if (p.scores == scores) b.fibers.fail(what);
  }

  void begin(const WorkItem& item, int stage) {
    q_stage = static_cast<size_t>(stage);
    require_idle(true, "a unit begins under a product");
    require_idle(false, "a unit begins under a product");
    const Problem& p = b.call.args.problem;
    work = item;
    for (int t = 0; t < kThreads; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      std::fill_n(thread.scores, kScores, kNaN);
      std::fill_n(thread.weights, kScores, kNaN);
      std::fill_n(thread.output, kOutputs, 0.0f);
      thread.row = work.tile * kTileQ + consumer * kConsumerRows + fragment_row(t);
      thread.upper = row_ranges(p.mask, work.batch, work.head, thread.row, p.nq, p.nk);
      thread.lower = row_ranges(p.mask, work.batch, work.head, thread.row + 8, p.nq, p.nk);
      for (int half = 0; half < 2; ++half) {
        thread.largest[half] = kNegativeInfinity;
        thread.sum[half] = 0.0f;
      }
    }
  }

  void issue_scores(int stage) {
    const auto s = static_cast<size_t>(stage);
    if (!b.k[s].arrived || !b.q[q_stage].arrived)
      b.fibers.fail("scores issued before keys or queries arrived");
    in_flight.push_back({true, s, b.k[s].loads, b.q[q_stage].loads});
    if (b.call.mistake == kEarlyRelease && consumer == 0) release(b.k_empty[s]);
    b.fibers.maybe_switch();
  }
  void issue_output(int stage) {
    const auto s = static_cast<size_t>(stage);
    if (!b.v[s].arrived) b.fibers.fail("an output product issued before its values arrived");
    in_flight.push_back({false, s, b.v[s].loads, 0});
    b.fibers.maybe_switch();
  }
  template <int kInFlight>
  void finish_scores() {
    finish(kInFlight);
  }
  void finish_output() { finish(0); }

  void finish(size_t left) {
    b.fibers.maybe_switch();
    while (in_flight.size() > left) {
      const Product p = in_flight.front();
      in_flight.erase(in_flight.begin());
      const Buffer& buffer = p.scores ? b.k[p.stage] : b.v[p.stage];
      if (buffer.loads != p.loads || (p.scores && b.q[q_stage].loads != p.query_loads))
        b.fibers.fail("a buffer was written while a product read it");
      if (p.scores)
        multiply_scores(buffer);
      else
        multiply_output(buffer);
    }
  }
  void multiply_scores(const Buffer& keys) {
    for (int t = 0; t < kThreads; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      for (int i = 0; i < kScores; ++i) {
        const int row = consumer * kConsumerRows + fragment_row(t) + 8 * fragment_half(i);
        const float *x = &b.q[q_stage].data[static_cast<size_t>(row * kDim)],
                    *y = &keys.data[static_cast<size_t>(fragment_column(t, i) * kDim)];
        float total = 0.0f;
        for (int d = 0; d < kDim; ++d)
          total += x[d] * y[d];
        thread.scores[i] = total;
      }
    }
  }
  void multiply_output(const Buffer& values) {
    std::vector<float> p(kConsumerRows * kTileK), product(kConsumerRows * kDim, 0.0f);
    for (int t = 0; t < kThreads; ++t)
      for (int i = 0; i < kScores; ++i)
        p[static_cast<size_t>((fragment_row(t) + 8 * fragment_half(i)) * kTileK + fragment_column(t, i))] =
            threads[static_cast<size_t>(t)].weights[i];
    for (size_t r = 0; r < kConsumerRows; ++r)
      for (size_t j = 0; j < kTileK; ++j)
        for (size_t d = 0; d < kDim; ++d)
          product[r * kDim + d] += p[r * kTileK + j] * values.data[j * kDim + d];
    for (int t = 0; t < kThreads; ++t)
      for (int i = 0; i < kOutputs; ++i)
        threads[static_cast<size_t>(t)].output[i] += product[static_cast<size_t>(
            (fragment_row(t) + 8 * fragment_half(i)) * kDim + fragment_column(t, i))];
  }

  void softmax(int32_t entry) {
    require_idle(true, "scores read under a product");
    const Problem& p = b.call.args.problem;
    const int32_t first_key = halved_tile(entry) * kTileK, nk = static_cast<int32_t>(p.nk);
    const bool masked = !entry_full(entry) || first_key + kTileK > nk;
    for (int t = 0; t < kThreads && masked && b.call.mistake != kUnmaskedTile; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      mask_scores<kScores>(thread.scores, thread.upper, thread.lower, key_bounds_of(p.mask, work.batch),
                           thread.row, first_key + fragment_column(t, 0), nk);
    }
    for (int quad = 0; quad < kThreads; quad += 4) {
      for (int half = 0; half < 2; ++half) {
        float largest = kNegativeInfinity;
        for (int t = quad; t < quad + 4; ++t) {
          const Thread& thread = threads[static_cast<size_t>(t)];
          largest = std::fmax(largest, largest_score<kScores>(thread.scores, half, thread.largest[half]));
        }
        for (int t = quad; t < quad + 4; ++t) {
          Thread& thread = threads[static_cast<size_t>(t)];
          thread.rescale[half] =
              softmax_rescale(thread.largest[half], softmax_shift(thread.largest[half], b.call.scale_log2e),
                              softmax_shift(largest, b.call.scale_log2e));
          thread.largest[half] = largest;
          thread.sum[half] *= thread.rescale[half];
        }
      }
    }
    for (Thread& thread : threads) {
      const float shift[2] = {softmax_shift(thread.largest[0], b.call.scale_log2e),
                              softmax_shift(thread.largest[1], b.call.scale_log2e)};
      weigh_scores<kScores>(thread.scores, shift, b.call.scale_log2e, thread.sum);
    }
  }
  void rescale_output() {
    require_idle(false, "the output rescaled under a product");
    for (Thread& thread : threads)
      scale_rows<kOutputs>(thread.output, thread.rescale);
  }
  void pack_weights() {
    require_idle(false, "weights written under the product that reads them");
    for (Thread& thread : threads)
      for (int i = 0; i < kScores; ++i)
        thread.weights[i] = round_to(b.call.half, thread.scores[i]);
  }

  float* out_row(int64_t row) const {
    const Tensor4& out = b.call.args.out;
    return static_cast<float*>(out.data) + work.batch * out.batch + work.head * out.head + row * out.row;
  }

  void store() {
    require_idle(false, "the output stored under a product");
    const Problem& p = b.call.args.problem;
    b.call.done[static_cast<size_t>((work.batch * p.heads + work.head) * b.call.schedule.rows + work.tile)] +=
        1;
    for (int quad = 0; quad < kThreads; quad += 4) {
      for (int half = 0; half < 2; ++half) {
        Thread* lanes = &threads[static_cast<size_t>(quad)];
        const int64_t row = lanes[0].row + 8 * half;
        float sum = 0.0f;
        for (int t = 0; t < 4; ++t)
          sum += lanes[t].sum[half];
        if (row >= p.nq) continue;
        const float largest = lanes[0].largest[half];
        b.call.args.lse[(work.batch * p.heads + work.head) * p.nq + row] =
            row_lse(softmax_shift(largest, b.call.scale_log2e), sum);
        store_row(lanes, half, row, sum);
        bool finite = true;
        for (int t = 0; t < 4; ++t)
          for (int i = 0; i < kOutputs; ++i)
            finite &= fragment_half(i) != half || std::isfinite(lanes[t].output[i]);
        if (sum != 0.0f && !finite && b.call.mistake != kNoRepair) repair(row, largest, sum);
      }
    }
  }
  // As the kernel: pairs become words, four lanes exchange them, each stores 8 contiguous columns.
  void store_row(const Thread* lanes, int half, int64_t row, float sum) {
    for (int first = 0; first < kDim / 8; first += 4) {
      uint32_t original[4][4], words[4][4], sent[4][4] = {};
      for (int lane = 0; lane < 4; ++lane)
        for (int g = 0; g < 4; ++g)
          original[lane][g] =
              static_cast<uint32_t>(4 * (first + g) + 2 * half) << 8 | static_cast<uint32_t>(lane);
      // Every pass gets one more exchange right: what the others send depends on what they received.
      for (int pass = 0; pass < 5; ++pass) {
        uint32_t before[4][4];
        std::memcpy(before, sent, sizeof(sent));
        for (int lane = 0; lane < 4; ++lane) {
          std::memcpy(words[lane], original[lane], sizeof(words[lane]));
          int call = 0;
          transpose_words(words[lane], lane, [&](uint32_t word, int mask) {
            sent[lane][call] = word;
            return before[lane ^ mask][call++];
          });
        }
      }
      for (int lane = 0; lane < 4; ++lane) {
        for (int word = 0; word < 4; ++word) {
          for (int e = 0; e < 2; ++e) {
            const int column = 8 * (first + lane) + 2 * word + e;
            if (column >= b.call.args.problem.dim) continue;
            const uint32_t from = words[lane][word];
            const float value = lanes[from & 255].output[(from >> 8) + static_cast<uint32_t>(e)];
            out_row(row)[column] = sum != 0.0f ? round_to(b.call.half, value * (1.0f / sum)) : 0.0f;
          }
        }
      }
    }
  }
  void repair(int64_t row, float largest, float sum) {
    const ForwardArgs& args = b.call.args;
    const Problem& p = args.problem;
    const int64_t kv_head = work.head / (p.heads / p.kv_heads);
    const auto at = [&](const Tensor4& t, int64_t h, int64_t n) {
      return static_cast<const float*>(t.data) + work.batch * t.batch + h * t.head + n * t.row;
    };
    const KeyRanges ranges = row_ranges(p.mask, work.batch, work.head, row, p.nq, p.nk);
    const int32_t* key_bounds = key_bounds_of(p.mask, work.batch);
    std::vector<float> total(static_cast<size_t>(p.dim), 0.0f);
    for (int32_t key = 0; key < p.nk; ++key) {
      if (!in_ranges(ranges, key)) continue;
      if (key_bounds != nullptr && !key_sees_row(key_bounds, key, static_cast<int32_t>(row))) continue;
      float score = 0.0f;
      for (int64_t d = 0; d < p.dim; ++d)
        score += at(args.q, work.head, row)[d] * at(args.k, kv_head, key)[d];
      const float weight =
          softmax_weight(score, softmax_shift(largest, b.call.scale_log2e), b.call.scale_log2e);
      for (int64_t d = 0; d < p.dim; ++d)
        total[static_cast<size_t>(d)] += weight * at(args.v, kv_head, key)[d];
    }
    for (int64_t d = 0; d < p.dim; ++d)
      if (!std::isfinite(out_row(row)[d]))
        out_row(row)[d] = round_to(b.call.half, total[static_cast<size_t>(d)] / sum);
  }
};

template <int kDim>
std::string run(Call& call, int64_t blocks, uint64_t seed) {
  const auto shares = share_units(call.schedule.pairs * call.schedule.rows, blocks, seed);
  for (int64_t block = 0; block < blocks; ++block) {
    Fibers fibers(seed + static_cast<uint64_t>(block));
    Block<kDim> shared(call, fibers);
    shared.units = shares[static_cast<size_t>(block)];
    ModelProducer<kDim> producer{shared};
    ModelConsumer<kDim> first{shared, 0}, second{shared, 1};
    fibers.add([&] { produce_units<stages(kDim)>(producer, call.args.problem, call.plan, call.schedule); });
    fibers.add([&] { consume_units<stages(kDim)>(first, 0); });
    fibers.add([&] { consume_units<stages(kDim)>(second, 1); });
    const std::string failure = fibers.run();
    if (!failure.empty()) return failure;
    if (shared.turn_arrivals[0] != 0 || shared.turn_arrivals[1] != 0)
      return "a named barrier is left with arrivals";
  }
  for (int times : call.done)
    if (times != kConsumers) return "a unit was not stored exactly once by each consumer";
  return "";
}

}  // namespace

extern "C" {

// q, k, v hold values of the 16-bit type as floats; `strides` has batch, head and row of q, k, v and out, in
// elements. Other arrays are contiguous. `shape`: batch, heads, kv_heads,
// nq, nk, dim, intervals, batch entries, heads of bounds, batch entries of key bounds. The plan has the grids
// of the bounds. Writes the failure into `message`, empty if there was none.
void arcore_model_forward_sm90(const int64_t* shape, float scale, int half, const int32_t* bounds,
                               const int32_t* key_bounds, const int32_t* plan, const int64_t* plan_shape,
                               const int64_t* strides, float* q, float* k, float* v, float* out, float* lse,
                               int64_t section, int64_t blocks, uint64_t seed, int mistake, char* message,
                               int64_t capacity) {
  Call call{};
  Problem& p = call.args.problem;
  p.batch = shape[0], p.heads = shape[1], p.kv_heads = shape[2], p.nq = shape[3], p.nk = shape[4],
  p.dim = shape[5];
  p.scale = scale;
  const int64_t intervals = shape[6];
  p.mask.intervals = static_cast<int>(intervals);
  p.mask.bounds = bounds;
  p.mask.head = shape[8] == 1 ? 0 : p.nq * 2 * intervals;
  p.mask.batch = shape[7] == 1 ? 0 : shape[8] * p.nq * 2 * intervals;
  p.mask.key_bounds = key_bounds;
  p.mask.key_batch = shape[9] == 1 ? 0 : p.nk * 2;
  const int64_t rows = plan_shape[2], columns = plan_shape[3] - 2;
  call.plan.data = plan;
  call.plan.head = plan_shape[1] == 1 ? 0 : rows * (2 + columns);
  call.plan.batch = plan_shape[0] == 1 ? 0 : plan_shape[1] * rows * (2 + columns);
  call.plan.rows = rows, call.plan.columns = columns, call.plan.pitch = 2 + columns;
  const auto tensor = [&](float* data, int i) {
    return Tensor4{data, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  call.args.q = tensor(q, 0);
  call.args.k = tensor(k, 1);
  call.args.v = tensor(v, 2);
  call.args.out = tensor(out, 3);
  if (!map_tensor(call.q_map, call.args.q, p.dim, p.nq, p.heads, p.batch) ||
      !map_tensor(call.k_map, call.args.k, p.dim, p.nk, p.kv_heads, p.batch) ||
      !map_tensor(call.v_map, call.args.v, p.dim, p.nk, p.kv_heads, p.batch)) {
    std::strncpy(message, "unsupported strides", static_cast<size_t>(capacity) - 1);
    return;
  }
  call.args.lse = lse;
  call.schedule = {p.batch * p.heads, rows, section};
  call.scale_log2e = static_cast<float>(static_cast<double>(scale) * 1.4426950408889634074);
  call.half = half != 0;
  call.mistake = static_cast<Mistake>(mistake);
  call.done.assign(static_cast<size_t>(call.schedule.pairs * rows), 0);
  std::string failure;
  switch (padded_dim(p.dim)) {
    case 64:
      failure = run<64>(call, blocks, seed);
      break;
    case 96:
      failure = run<96>(call, blocks, seed);
      break;
    default:
      failure = run<128>(call, blocks, seed);
  }
  std::strncpy(message, failure.c_str(), static_cast<size_t>(capacity) - 1);
}

int64_t arcore_model_section_pairs(int64_t bytes, int64_t group, int64_t pairs) {
  return section_pairs(bytes, group, pairs);
}

}  // extern "C"
