// What the models of the sm_90a backward kernels share: producers and consumers of gradients on the model of
// the hardware of sm90_model.h.
#pragma once

#include "block_sparse_attention/gradient_loop_sm90.h"
#include "sm90_model.h"

namespace sm90_model {

enum Mistake {
  kNone,
  kNoEmptyOther,    // the tile producer does not wait for an empty buffer
  kNoEmptyNumbers,  // ... nor the producer of lse and delta
  kNoEmptyOwn,
  kNoFullOther,  // consumers do not wait
  kForgetsRelease,
  kEarlyRelease,
  kUnmaskedTile,
  kNoRepair,
  kMistakes,  // the numbers from here on are those of the fused kernel
};

struct Call {
  BackwardArgs args;
  CopyMap grad_out_map, q_map, k_map, v_map;
  TilePlan by_query, by_key;
  const float* delta;
  int64_t section;
  float scale_log2e;
  bool half;
  int mistake;
  std::vector<int> done;
};

template <int kDim, bool kByKey, int kOwnBuffers = kOwnStages, int kOtherBuffers = gradient_stages(kDim)>
struct Block {
  static constexpr int kStages = kOtherBuffers;
  Call& call;
  Fibers& fibers;
  std::vector<Buffer> own[2];
  std::vector<Buffer> other[2];
  // Loads of the numbers of queries, as Buffer::loads.
  std::vector<Buffer> shift, delta;
  std::vector<Barrier> own_full, own_empty, other_full, other_empty;
  std::vector<WorkItem> work{static_cast<size_t>(kOwnBuffers)};
  std::vector<int64_t> units;  // those of this block, in their order
  // From one producer to the other, where both walk the tiles.
  int64_t unit[2] = {-1, -1};
  int at_barrier = 0;
  uint64_t barriers = 0;
  std::vector<OtherTile> tile;

  Block(Call& c, Fibers& f)
      : call(c),
        fibers(f),
        shift(kStages),
        delta(kStages),
        own_full(kOwnBuffers, Barrier(1)),
        own_empty(kOwnBuffers, Barrier(kConsumerWarps)),
        other_full(kStages, Barrier(kByKey ? 2 : 1)),
        other_empty(kStages, Barrier(kConsumerWarps)),
        tile(kStages) {
    for (int which = 0; which < 2; ++which) {
      own[which].resize(kOwnBuffers);
      for (Buffer& b : own[which])
        b.data.assign(kOwnRows * kDim, kNaN);
      other[which].resize(kStages);
      for (Buffer& b : other[which])
        b.data.assign(kOtherRows * kDim, kNaN);
    }
    for (int stage = 0; stage < kStages; ++stage)
      for (Buffer* b : {&shift[static_cast<size_t>(stage)], &delta[static_cast<size_t>(stage)]})
        b->data.assign(kOtherRows, kNaN);
  }

  void wait(const Barrier& barrier, uint32_t parity) {
    fibers.wait([&barrier, parity] { return barrier.passed(parity); });
  }
  // The named barrier of the two producers.
  void meet_producer() {
    const uint64_t before = barriers;
    if (++at_barrier == 2) {
      at_barrier = 0;
      ++barriers;
      return;
    }
    fibers.wait([this, before] { return barriers != before; });
  }
  const Tensor4& tensor(bool keys, int which) const {
    const BackwardArgs& a = call.args;
    return keys ? (which == 0 ? a.k : a.v) : (which == 0 ? a.q : a.grad_out);
  }
  const CopyMap& map(bool keys, int which) const {
    return keys ? (which == 0 ? call.k_map : call.v_map) : (which == 0 ? call.q_map : call.grad_out_map);
  }
};

template <int kDim, bool kByKey, typename B = Block<kDim, kByKey>>
struct TileProducer {
  B& b;
  size_t next = 0;

  int64_t next_unit() {
    b.fibers.maybe_switch();
    return tell(next < b.units.size() ? b.units[next] : std::numeric_limits<int64_t>::max());
  }
  int64_t tell(int64_t unit) {
    if constexpr (kByKey) {
      b.unit[next % 2] = unit;
      b.fibers.maybe_switch();
      b.meet_producer();
    }
    ++next;
    return unit;
  }
  void wait_own_empty(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoEmptyOwn) b.wait(b.own_empty[static_cast<size_t>(stage)], parity);
  }
  void wait_other_empty(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoEmptyOther) b.wait(b.other_empty[static_cast<size_t>(stage)], parity);
  }
  void load_own(int stage, const WorkItem& work) {
    const auto s = static_cast<size_t>(stage);
    b.work[s] = work;
    if (work.count == 0) {
      b.own_full[s].arrive();
      return;
    }
    b.own_full[s].arrive_expecting(2 * kOwnRows * kDim * 2);
    for (int which = 0; which < 2; ++which)
      start_copy(b.fibers, b.own[which][s], b.own_full[s], b.tensor(kByKey, which), b.map(kByKey, which),
                 work.batch, work.head, int64_t{work.tile} * kOwnRows, kOwnRows, kDim);
  }
  void load_other(int stage, const WorkItem& work, const OtherTile& tile, const int32_t*) {
    const auto s = static_cast<size_t>(stage);
    const Problem& p = b.call.args.problem;
    const int64_t head = kByKey ? tile.head : tile.head / (p.heads / p.kv_heads);
    b.tile[s] = tile;
    b.other_full[s].arrive_expecting(2 * kOtherRows * kDim * 2);
    for (int which = 0; which < 2; ++which)
      start_copy(b.fibers, b.other[which][s], b.other_full[s], b.tensor(!kByKey, which),
                 b.map(!kByKey, which), work.batch, head, int64_t{entry_tile(tile.entry)} * kOtherRows,
                 kOtherRows, kDim);
  }
};

template <typename B>
struct NumbersProducer {
  B& b;
  size_t turn = 0;

  int64_t next_unit() {
    b.meet_producer();
    b.fibers.maybe_switch();
    return b.unit[turn++ % 2];
  }
  void wait_own_empty(int, uint32_t) {}
  void load_own(int, const WorkItem&) {}
  void wait_other_empty(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoEmptyNumbers) b.wait(b.other_empty[static_cast<size_t>(stage)], parity);
  }
  void load_other(int stage, const WorkItem& work, const OtherTile& tile, const int32_t*) {
    const auto s = static_cast<size_t>(stage);
    const Problem& p = b.call.args.problem;
    const int64_t pair = work.batch * p.heads + tile.head;
    ++b.shift[s].loads;
    for (int i = 0; i < kOtherRows; ++i) {
      const int64_t query = int64_t{entry_tile(tile.entry)} * kOtherRows + i;
      const bool exists = query < p.nq;
      b.shift[s].data[static_cast<size_t>(i)] =
          exists ? weight_shift(b.call.args.lse[pair * p.nq + query]) : -kNegativeInfinity;
      b.delta[s].data[static_cast<size_t>(i)] = exists ? b.call.delta[pair * p.nq + query] : 0.0f;
    }
    b.other_full[s].arrive();
  }
};

template <int kDim, bool kByKey, typename B = Block<kDim, kByKey>>
struct Consumer {
  static constexpr int kPairs = kGradientRegisters, kColumns = kDim / 2, kThreads = 128;
  struct Thread {
    float first[kPairs], second[kPairs], weights[kPairs], gradients[kPairs];
    float by_gradient[kColumns], by_weight[kColumns];
    float shift[2], delta[2];
    int32_t row;
    uint32_t forbidden;
  };
  enum Kind { kFirst, kSecond, kWeights, kGradients };
  struct Product {
    Kind kind;
    size_t stage;
    uint64_t loads, own_loads;
  };

  B& b;
  int consumer;
  std::vector<Thread> threads{kThreads};
  std::vector<Product> in_flight{};
  WorkItem work{};
  size_t own_stage = 0;

  void release(Barrier& barrier) {
    b.fibers.maybe_switch();
    barrier.arrive(kConsumerWarps / kConsumers);
  }
  void release_own(int stage) {
    require_idle(kFirst), require_idle(kSecond);
    release(b.own_empty[static_cast<size_t>(stage)]);
  }
  void release_other(int stage) {
    if (b.call.mistake == kForgetsRelease && consumer == 1) return;
    if (b.call.mistake == kEarlyRelease && consumer == 0) return;
    release(b.other_empty[static_cast<size_t>(stage)]);
  }
  void wait_own(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    b.wait(b.own_full[static_cast<size_t>(stage)], parity);
  }
  void wait_other(int stage, uint32_t parity) {
    b.fibers.maybe_switch();
    if (b.call.mistake != kNoFullOther) b.wait(b.other_full[static_cast<size_t>(stage)], parity);
  }
  WorkItem announced(int stage) { return b.work[static_cast<size_t>(stage)]; }
  OtherTile other(int stage) { return b.tile[static_cast<size_t>(stage)]; }
  void require_idle(Kind kind) {
    for (const Product& p : in_flight)
      if (p.kind == kind) b.fibers.fail("registers used under a product");
  }

  void begin(const WorkItem& item, int stage) {
    own_stage = static_cast<size_t>(stage);
    const Problem& p = b.call.args.problem;
    if (!in_flight.empty()) b.fibers.fail("a unit begins under a product");
    work = item;
    for (int t = 0; t < kThreads; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      for (float* x : {thread.first, thread.second, thread.weights, thread.gradients})
        std::fill_n(x, kPairs, kNaN);
      std::fill_n(thread.by_gradient, kColumns, 0.0f);
      std::fill_n(thread.by_weight, kColumns, 0.0f);
      thread.row = work.tile * kOwnRows + consumer * kConsumerRows + fragment_row(t);
      for (int half = 0; half < 2 && !kByKey; ++half) {
        const int64_t row = thread.row + 8 * half, at = (work.batch * p.heads + work.head) * p.nq + row;
        thread.shift[half] = row < p.nq ? weight_shift(b.call.args.lse[at]) : -kNegativeInfinity;
        thread.delta[half] = row < p.nq ? b.call.delta[at] : 0.0f;
      }
    }
  }
  void find_forbidden(const OtherTile& tile) {
    const Problem& p = b.call.args.problem;
    const int32_t start = entry_tile(tile.entry) * kOtherRows;
    const bool masked = !entry_full(tile.entry) || (!kByKey && start + kOtherRows > p.nk);
    for (int t = 0; t < kThreads; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      thread.forbidden = 0;
      if (masked && b.call.mistake != kUnmaskedTile)
        thread.forbidden =
            forbidden_pairs<kByKey>(p, work.batch, tile.head, thread.row, start + fragment_column(t, 0));
    }
  }

  void issue(Kind kind, int which, int stage) {
    const auto s = static_cast<size_t>(stage);
    const bool pairs = kind == kFirst || kind == kSecond;
    if (!b.other[which][s].arrived || (pairs && !b.own[which][own_stage].arrived))
      b.fibers.fail("a product issued before its operands arrived");
    in_flight.push_back({kind, s, b.other[which][s].loads, pairs ? b.own[which][own_stage].loads : 0});
    if (kind == kFirst && b.call.mistake == kEarlyRelease && consumer == 0) release(b.other_empty[s]);
    b.fibers.maybe_switch();
  }
  void issue_first(int stage) { issue(kFirst, 0, stage); }
  void issue_second(int stage) { issue(kSecond, 1, stage); }
  void issue_weights_product(int stage) { issue(kWeights, 1, stage); }
  void issue_gradients_product(int stage) { issue(kGradients, 0, stage); }
  void finish_first() { finish(1); }
  void finish_second() { finish(0); }
  void finish_all() { finish(0); }

  void finish(size_t left) {
    b.fibers.maybe_switch();
    while (in_flight.size() > left) {
      const Product p = in_flight.front();
      in_flight.erase(in_flight.begin());
      const bool pairs = p.kind == kFirst || p.kind == kSecond;
      const int which = p.kind == kFirst || p.kind == kGradients ? 0 : 1;
      if (b.other[which][p.stage].loads != p.loads || (pairs && b.own[which][own_stage].loads != p.own_loads))
        b.fibers.fail("a buffer was written while a product read it");
      if (pairs)
        multiply_pairs(b.own[which][own_stage], b.other[which][p.stage], p.kind);
      else
        multiply_columns(b.other[which][p.stage], p.kind);
    }
  }
  void multiply_pairs(const Buffer& own, const Buffer& others, Kind kind) {
    for (int t = 0; t < kThreads; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      for (int i = 0; i < kPairs; ++i) {
        const int row = consumer * kConsumerRows + fragment_row(t) + 8 * fragment_half(i);
        const float *x = &own.data[static_cast<size_t>(row * kDim)],
                    *y = &others.data[static_cast<size_t>(fragment_column(t, i) * kDim)];
        float total = 0.0f;
        for (int d = 0; d < kDim; ++d)
          total += x[d] * y[d];
        (kind == kFirst ? thread.first : thread.second)[i] = total;
      }
    }
  }
  void multiply_columns(const Buffer& others, Kind kind) {
    std::vector<float> a(kConsumerRows * kOtherRows), product(kConsumerRows * kDim, 0.0f);
    for (int t = 0; t < kThreads; ++t) {
      const Thread& thread = threads[static_cast<size_t>(t)];
      for (int i = 0; i < kPairs; ++i) {
        const int at = (fragment_row(t) + 8 * fragment_half(i)) * kOtherRows + fragment_column(t, i);
        a[static_cast<size_t>(at)] = (kind == kWeights ? thread.weights : thread.gradients)[i];
      }
    }
    for (size_t r = 0; r < kConsumerRows; ++r)
      for (size_t j = 0; j < kOtherRows; ++j)
        for (size_t d = 0; d < kDim; ++d)
          product[r * kDim + d] += a[r * kOtherRows + j] * others.data[j * kDim + d];
    for (int t = 0; t < kThreads; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      for (int i = 0; i < kColumns; ++i) {
        const int at = (fragment_row(t) + 8 * fragment_half(i)) * kDim + fragment_column(t, i);
        (kind == kWeights ? thread.by_weight : thread.by_gradient)[i] += product[static_cast<size_t>(at)];
      }
    }
  }

  void weigh(int stage) {
    require_idle(kFirst);
    const auto s = static_cast<size_t>(stage);
    for (int t = 0; t < kThreads; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      for (int i = 0; i < kPairs; ++i) {
        const float by = kByKey ? b.shift[s].data[static_cast<size_t>(fragment_column(t, i))]
                                : thread.shift[fragment_half(i)];
        const float weight = gradient_weight(thread.first[i], b.call.scale_log2e, by);
        thread.first[i] = (thread.forbidden >> i & 1u) != 0 ? 0.0f : weight;
      }
    }
    numbers_loads = b.shift[s].loads;
  }
  uint64_t numbers_loads = 0;
  void differentiate(int stage) {
    require_idle(kSecond);
    const auto s = static_cast<size_t>(stage);
    if (b.shift[s].loads != numbers_loads) b.fibers.fail("lse and delta were written while they were read");
    for (int t = 0; t < kThreads; ++t) {
      Thread& thread = threads[static_cast<size_t>(t)];
      for (int i = 0; i < kPairs; ++i) {
        const float by = kByKey ? b.delta[s].data[static_cast<size_t>(fragment_column(t, i))]
                                : thread.delta[fragment_half(i)];
        thread.second[i] =
            (thread.forbidden >> i & 1u) != 0 ? 0.0f : thread.first[i] * (thread.second[i] - by);
      }
    }
  }
  void pack() {
    require_idle(kWeights), require_idle(kGradients);
    for (Thread& thread : threads) {
      for (int i = 0; i < kPairs; ++i) {
        thread.weights[i] = round_to(b.call.half, thread.first[i]);
        thread.gradients[i] = round_to(b.call.half, thread.second[i]);
      }
    }
  }

  float* row_of(const Tensor4& t, int64_t row) const {
    return static_cast<float*>(t.data) + work.batch * t.batch + work.head * t.head + row * t.row;
  }
  void store() {
    if (!in_flight.empty()) b.fibers.fail("gradients stored under a product");
    const BackwardArgs& a = b.call.args;
    const Problem& p = a.problem;
    const int64_t rows = kByKey ? p.nk : p.nq, heads = kByKey ? p.kv_heads : p.heads;
    const int64_t tiles = (rows + kOwnRows - 1) / kOwnRows;
    b.call.done[static_cast<size_t>((work.batch * heads + work.head) * tiles + work.tile)] += 1;
    std::vector<bool> finite(kConsumerRows, true);
    for (int t = 0; t < kThreads; ++t) {
      const Thread& thread = threads[static_cast<size_t>(t)];
      for (int i = 0; i < kColumns; ++i) {
        const int64_t row = thread.row + 8 * fragment_half(i);
        const int column = fragment_column(t, i);
        if (row >= rows || column >= p.dim) continue;
        row_of(kByKey ? a.grad_k : a.grad_q, row)[column] =
            round_to(b.call.half, thread.by_gradient[i] * p.scale);
        if (kByKey) row_of(a.grad_v, row)[column] = round_to(b.call.half, thread.by_weight[i]);
        if (!std::isfinite(thread.by_gradient[i]) || !std::isfinite(thread.by_weight[i]))
          finite[static_cast<size_t>(fragment_row(t) + 8 * fragment_half(i))] = false;
      }
    }
    for (int r = 0; r < kConsumerRows && b.call.mistake != kNoRepair; ++r)
      if (!finite[static_cast<size_t>(r)]) repair(work.tile * kOwnRows + consumer * kConsumerRows + r);
  }
  void repair(int32_t row) {
    const BackwardArgs& a = b.call.args;
    const Problem& p = a.problem;
    const int32_t group = static_cast<int32_t>(p.heads / p.kv_heads);
    const int32_t first_head = kByKey ? work.head * group : work.head, heads = kByKey ? group : 1;
    const int32_t* key_bounds = key_bounds_of(p.mask, work.batch);
    const auto at = [&](const Tensor4& t, int64_t h, int64_t n) {
      return static_cast<const float*>(t.data) + work.batch * t.batch + h * t.head + n * t.row;
    };
    std::vector<float> by_gradient(static_cast<size_t>(p.dim), 0.0f), by_weight(by_gradient);
    for (int32_t head = first_head; head < first_head + heads; ++head) {
      for (int32_t other = 0; other < (kByKey ? p.nq : p.nk); ++other) {
        const int32_t query = kByKey ? other : row, key = kByKey ? row : other;
        if (!in_ranges(row_ranges(p.mask, work.batch, head, query, p.nq, p.nk), key)) continue;
        if (key_bounds != nullptr && !key_sees_row(key_bounds, key, query)) continue;
        const float *q = at(a.q, head, query), *k = at(a.k, head / group, key),
                    *v = at(a.v, head / group, key), *grad_out = at(a.grad_out, head, query);
        float score = 0.0f, grad_weight = 0.0f;
        for (int64_t d = 0; d < p.dim; ++d) {
          score += q[d] * k[d];
          grad_weight += grad_out[d] * v[d];
        }
        const int64_t number = (work.batch * p.heads + head) * p.nq + query;
        const float weight = gradient_weight(score, b.call.scale_log2e, weight_shift(a.lse[number]));
        const float gradient = weight * (grad_weight - b.call.delta[number]);
        for (int64_t d = 0; d < p.dim; ++d) {
          by_gradient[static_cast<size_t>(d)] += gradient * (kByKey ? q : k)[d];
          by_weight[static_cast<size_t>(d)] += weight * grad_out[d];
        }
      }
    }
    const auto replace = [&](const Tensor4& t, const std::vector<float>& values, float scale) {
      for (int64_t d = 0; d < p.dim; ++d)
        if (!std::isfinite(row_of(t, row)[d]))
          row_of(t, row)[d] = round_to(b.call.half, values[static_cast<size_t>(d)] * scale);
    };
    replace(kByKey ? a.grad_k : a.grad_q, by_gradient, p.scale);
    if (kByKey) replace(a.grad_v, by_weight, 1.0f);
  }
};

// The call of a test. `tensors`: grad_out, q, k, v, grad_q, grad_k, grad_v with their strides. Plans by query
// and by key have the grids of `plan_shapes`, four numbers each.
struct Given {
  const int64_t* shape;  // batch, heads, kv_heads, nq, nk, dim, intervals, grids of the bounds, of key_bounds
  float scale;
  int half;
  const int32_t *bounds, *key_bounds, *by_query, *by_key;
  const int64_t *plan_shapes, *strides;
  float* const* tensors;
  const float *lse, *delta;
  int64_t section, blocks, resident;
  uint64_t seed;
  int mistake;
};

inline Call call_of(const Given& given) {
  Call call{};
  BackwardArgs& a = call.args;
  Problem& p = a.problem;
  p.batch = given.shape[0], p.heads = given.shape[1], p.kv_heads = given.shape[2], p.nq = given.shape[3],
  p.nk = given.shape[4], p.dim = given.shape[5];
  p.scale = given.scale;
  const int64_t intervals = given.shape[6];
  p.mask.intervals = static_cast<int>(intervals);
  p.mask.bounds = given.bounds;
  p.mask.head = given.shape[8] == 1 ? 0 : p.nq * 2 * intervals;
  p.mask.batch = given.shape[7] == 1 ? 0 : given.shape[8] * p.nq * 2 * intervals;
  p.mask.key_bounds = given.key_bounds;
  p.mask.key_batch = given.shape[9] == 1 ? 0 : p.nk * 2;
  const auto plan = [](const int32_t* data, const int64_t* s, int64_t columns) {
    return TilePlan{data, s[0] == 1 ? 0 : s[1] * s[2] * s[3], s[1] == 1 ? 0 : s[2] * s[3], s[2], columns,
                    s[3]};
  };
  call.by_query = plan(given.by_query, given.plan_shapes, given.plan_shapes[3] - 2);
  call.by_key = plan(given.by_key, given.plan_shapes + 4, (given.plan_shapes[7] - 2) / 2);  // with visits
  Tensor4* const all[] = {&a.grad_out, &a.q, &a.k, &a.v, &a.grad_q, &a.grad_k, &a.grad_v};
  for (int i = 0; i < 7; ++i)
    *all[i] = {given.tensors[i], given.strides[3 * i], given.strides[3 * i + 1], given.strides[3 * i + 2]};
  a.lse = given.lse;
  call.delta = given.delta;
  call.section = given.section;
  call.scale_log2e = static_cast<float>(static_cast<double>(given.scale) * 1.4426950408889634074);
  call.half = given.half != 0;
  call.mistake = given.mistake;
  return call;
}

// `run` for the padded head dim, on a call whose tensors the copy engine can address.
template <typename Run>
std::string run_padded(Call& call, const Run& run) {
  const BackwardArgs& a = call.args;
  const Problem& p = a.problem;
  if (!map_tensor(call.grad_out_map, a.grad_out, p.dim, p.nq, p.heads, p.batch) ||
      !map_tensor(call.q_map, a.q, p.dim, p.nq, p.heads, p.batch) ||
      !map_tensor(call.k_map, a.k, p.dim, p.nk, p.kv_heads, p.batch) ||
      !map_tensor(call.v_map, a.v, p.dim, p.nk, p.kv_heads, p.batch))
    return "unsupported strides";
  switch (padded_dim(p.dim)) {
    case 64:
      return run(std::integral_constant<int, 64>{});
    case 96:
      return run(std::integral_constant<int, 96>{});
    default:
      return run(std::integral_constant<int, 128>{});
  }
}

}  // namespace sm90_model
