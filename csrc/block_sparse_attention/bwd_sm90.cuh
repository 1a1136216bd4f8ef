// Backward for Hopper, in two kernels without atomics: dK and dV by key tile, dQ by query tile. Both are the
// same code, with "own" and "other" side swapped; gradient_loop_sm90.h has the algorithm and the order of
// events.
#pragma once

#include "block_sparse_attention/gradient_loop_sm90.h"
#include "block_sparse_attention/tiles_sm90.cuh"

namespace arcore::block_sparse_attention::sm90 {

// 128 * 56 + 256 * 224 = 384 * 168 again: the second producer needs more than the forward's.
constexpr int kGradientProducerRegisters = 56, kGradientConsumerRegisters = 224;

template <typename Element, int kDim, int kOwnBuffers = kOwnStages, int kOtherBuffers = gradient_stages(kDim)>
struct GradientStorage {
  static constexpr int kStages = kOtherBuffers;
  alignas(1024) Element own[kOwnBuffers][2][kOwnRows * kDim];
  alignas(1024) Element other[2][kStages][kOtherRows * kDim];
  // Where the other side are queries: their lse, as weight_shift() of it, and delta.
  float shift[kStages][kOtherRows], delta[kStages][kOtherRows];
  uint64_t own_full[kOwnBuffers], own_empty[kOwnBuffers], other_full[kStages], other_empty[kStages];
  WorkItem work[kOwnBuffers];  // guarded as own is
  OtherTile tile[kStages];     // guarded as other is
  int64_t unit[2];             // from one producer to the other, in turns

  // One thread, before a barrier of the block. `arrivals` is of a full buffer of the other side.
  __device__ __forceinline__ void begin(uint32_t arrivals) {
#pragma unroll
    for (int i = 0; i < kOwnBuffers; ++i) {
      mbarrier_init(own_full[i], 1);
      mbarrier_init(own_empty[i], kConsumerWarps);
    }
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(other_full[i], arrivals);
      mbarrier_init(other_empty[i], kConsumerWarps);
    }
  }
};

// ---- the producers ----

template <bool kByKey>
struct Sides {
  // The operands of the own and the other side, first and second product.
  __device__ __forceinline__ static const Operand& own(const BackwardParams& p, int which) {
    return kByKey ? (which == 0 ? p.k : p.v) : (which == 0 ? p.q : p.grad_out);
  }
  __device__ __forceinline__ static const Operand& other(const BackwardParams& p, int which) {
    return kByKey ? (which == 0 ? p.q : p.grad_out) : (which == 0 ? p.k : p.v);
  }
};

constexpr int kUnitBarrier = 1;  // named barrier of the two producer warps

// One warp, whose first lane copies tiles. It takes the units from a counter that the blocks share.
template <typename Element, int kDim, bool kByKey, typename Storage = GradientStorage<Element, kDim>>
struct TileProducer {
  const BackwardParams& p;
  Storage& s;
  int32_t group;
  int64_t unit;
  int turn = 0;

  __device__ __forceinline__ int64_t next_unit() {
    const int64_t next = __shfl_sync(0xffffffffu, unit, 0);
    if (threadIdx.x % 32 == 0) unit = int64_t{gridDim.x} + atomicAdd(p.counters + (kByKey ? 0 : 1), 1);
    tell(next);
    return next;
  }
  __device__ __forceinline__ void tell(int64_t next) {
    const bool leads = threadIdx.x % 32 == 0;
    if constexpr (kByKey) {
      // The other producer has read what lay here two turns ago: it came to the barrier since.
      if (leads) s.unit[turn] = next;
      turn ^= 1;
      __syncwarp();
      named_barrier_sync(kUnitBarrier, 64);
    }
  }
  __device__ __forceinline__ void wait_own_empty(int stage, uint32_t parity) {
    mbarrier_wait(s.own_empty[stage], parity);
  }
  __device__ __forceinline__ void wait_other_empty(int stage, uint32_t parity) {
    mbarrier_wait(s.other_empty[stage], parity);
  }
  __device__ __forceinline__ void load_own(int stage, const WorkItem& work) {
    if (threadIdx.x % 32 != 0) return;
    s.work[stage] = work;
    if (work.count == 0) {
      mbarrier_arrive(s.own_full[stage]);
      return;
    }
    mbarrier_arrive_expecting(s.own_full[stage], 2 * kOwnRows * kDim * sizeof(Element));
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int c = 0; c < kConsumers; ++c) {
        copy_tile<kConsumerRows, kDim>(Sides<kByKey>::own(p, which), s.own_full[stage],
                                       s.own[stage][which] + c * kConsumerRows * kDim,
                                       work.tile * kOwnRows + c * kConsumerRows, work.head, work.batch);
      }
    }
  }
  __device__ __forceinline__ void load_other(int stage, const WorkItem& work, const OtherTile& tile,
                                             const int32_t*) {
    if (threadIdx.x % 32 != 0) return;
    s.tile[stage] = tile;
    mbarrier_arrive_expecting(s.other_full[stage], 2 * kOtherRows * kDim * sizeof(Element));
    const int32_t head = kByKey ? tile.head : tile.head / group;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      copy_tile<kOtherRows, kDim>(Sides<kByKey>::other(p, which), s.other_full[stage], s.other[which][stage],
                                  entry_tile(tile.entry) * kOtherRows, head, work.batch);
    }
  }
};

// One warp, which walks the same tiles and brings the numbers of each query. The copy engine cannot: a row of
// lse starts anywhere.
template <typename Storage>
struct NumbersProducer {
  const BackwardParams& p;
  Storage& s;
  int turn = 0;

  __device__ __forceinline__ int64_t next_unit() {
    named_barrier_sync(kUnitBarrier, 64);
    const int64_t next = s.unit[turn];
    turn ^= 1;
    return next;
  }
  __device__ __forceinline__ void wait_own_empty(int, uint32_t) {}
  __device__ __forceinline__ void load_own(int, const WorkItem&) {}
  __device__ __forceinline__ void wait_other_empty(int stage, uint32_t parity) {
    mbarrier_wait(s.other_empty[stage], parity);
  }
  __device__ __forceinline__ void load_other(int stage, const WorkItem& work, const OtherTile& tile,
                                             const int32_t*) {
    const Problem& problem = p.cuda.args.problem;
    const int64_t pair = work.batch * problem.heads + tile.head;
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = lane; i < kOtherRows; i += 32) {
      const int64_t query = int64_t{entry_tile(tile.entry)} * kOtherRows + i;
      const bool exists = query < problem.nq;
      s.shift[stage][i] =
          exists ? weight_shift(p.cuda.args.lse[pair * problem.nq + query]) : -kNegativeInfinity;
      s.delta[stage][i] = exists ? p.cuda.delta[pair * problem.nq + query] : 0.0f;
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(s.other_full[stage]);
  }
};

// ---- a consumer: one warpgroup ----

// One own row from global memory, only allowed pairs multiplied; see repair_row of the forward. Replaces the
// entries that are not finite.
template <typename Element, int kDim, bool kByKey>
__device__ __forceinline__ void repair_gradient_row(const BackwardParams& p, const WorkItem& work,
                                                    int32_t row) {
  constexpr int kPerLane = kDim / 32;
  const BackwardArgs& a = p.cuda.args;
  const Problem& problem = a.problem;
  const int lane = static_cast<int>(threadIdx.x % 32), dim = static_cast<int>(problem.dim);
  const int32_t group = static_cast<int32_t>(problem.heads / problem.kv_heads);
  const int32_t* key_bounds = key_bounds_of(problem.mask, work.batch);
  const auto at = [&](const Tensor4& t, int64_t h, int64_t n) {
    return static_cast<uint16_t*>(t.data) + work.batch * t.batch + h * t.head + n * t.row;
  };
  const int32_t first_head = kByKey ? work.head * group : work.head, heads = kByKey ? group : 1;
  const int32_t others = static_cast<int32_t>(kByKey ? problem.nq : problem.nk);
  float by_gradient[kPerLane] = {}, by_weight[kPerLane] = {};
#pragma unroll 1
  for (int32_t head = first_head; head < first_head + heads; ++head) {
    const int32_t kv_head = head / group;
#pragma unroll 1
    for (int32_t first = 0; first < others; first += 32) {
      const int32_t other = first + lane, query = kByKey ? other : row, key = kByKey ? row : other;
      const bool allowed =
          other < others &&
          in_ranges(row_ranges(problem.mask, work.batch, head, query, problem.nq, problem.nk), key) &&
          (key_bounds == nullptr || key_sees_row(key_bounds, key, query));
      float weight = 0.0f, gradient = 0.0f;
      if (allowed) {
        const uint16_t *q = at(a.q, head, query), *k = at(a.k, kv_head, key), *v = at(a.v, kv_head, key),
                       *grad_out = at(a.grad_out, head, query);
        float score = 0.0f, grad_weight = 0.0f;
#pragma unroll 1
        for (int d = 0; d < dim; ++d) {
          score += to_float<Element>(q[d]) * to_float<Element>(k[d]);
          grad_weight += to_float<Element>(grad_out[d]) * to_float<Element>(v[d]);
        }
        const int64_t number = (work.batch * problem.heads + head) * problem.nq + query;
        weight = gradient_weight(score, p.scale_log2e, weight_shift(a.lse[number]));
        gradient = weight * (grad_weight - p.cuda.delta[number]);
      }
      for (uint32_t left = __ballot_sync(0xffffffffu, allowed); left != 0; left &= left - 1) {
        const int source = __ffs(static_cast<int>(left)) - 1;
        const float w = __shfl_sync(0xffffffffu, weight, source);
        const float g = __shfl_sync(0xffffffffu, gradient, source);
        const uint16_t* factor = kByKey ? at(a.q, head, first + source) : at(a.k, kv_head, first + source);
#pragma unroll
        for (int t = 0; t < kPerLane; ++t) {
          const int d = lane + 32 * t;
          if (d >= dim) continue;
          by_gradient[t] += g * to_float<Element>(factor[d]);
          if constexpr (kByKey)
            by_weight[t] += w * to_float<Element>(at(a.grad_out, head, first + source)[d]);
        }
      }
    }
  }
  const auto replace = [&](const Tensor4& t, const float (&values)[kPerLane], float scale) {
    uint16_t* to = at(t, work.head, row);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + 32 * i;
      if (d < dim && !isfinite(to_float<Element>(to[d])))
        to[d] = static_cast<uint16_t>(pack_pair<Element>(values[i] * scale, 0.0f));
    }
  };
  if constexpr (kByKey) {
    replace(a.grad_k, by_gradient, problem.scale);
    replace(a.grad_v, by_weight, 1.0f);
  } else {
    replace(a.grad_q, by_gradient, problem.scale);
  }
}

// This thread's part of 64 rows of a gradient, of which it holds `row` and 8 below it. `poisoned` gathers the
// lanes whose rows hold numbers that are not finite.
template <typename Element, int kDim, typename Gradient>
__device__ __forceinline__ void store_gradient(const WorkItem& work, const Tensor4& to, bool wide,
                                               int64_t rows, int64_t dim, int32_t row,
                                               const Gradient& gradient, float scale,
                                               uint32_t (&poisoned)[2]) {
  uint16_t* base = static_cast<uint16_t*>(to.data) + work.batch * to.batch + work.head * to.head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t r = row + 8 * half;
    store_row<Element, kDim>(base + r * to.row, r < rows, wide, dim, half, threadIdx.x % 32,
                             [&](int i) { return gradient[i] * scale; });
    poisoned[half] |= __ballot_sync(0xffffffffu, r < rows && !row_finite<kDim / 2>(gradient, half));
  }
}

// Computes the warp's poisoned rows again; after store_gradient, by all lanes.
template <typename Element, int kDim, bool kByKey>
__device__ __forceinline__ void repair_rows(const BackwardParams& p, const WorkItem& work, int32_t row,
                                            const uint32_t (&poisoned)[2]) {
  if ((poisoned[0] | poisoned[1]) == 0) return;
  __syncwarp();  // what was stored is read back by other lanes
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
    const int32_t r = __shfl_sync(0xffffffffu, row, 0) + i;
    if (((i < 8 ? poisoned[0] : poisoned[1]) >> (i % 8 * 4) & 15) != 0)
      repair_gradient_row<Element, kDim, kByKey>(p, work, r);
  }
}

template <typename Element, int kDim, bool kByKey, typename Storage = GradientStorage<Element, kDim>>
struct GradientConsumer {
  using S = GradientShapes<Element, kDim>;
  static constexpr int kPairs = kGradientRegisters;  // registers of a thread
  using Factors = decltype(cute::make_tensor<Element>(
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<kOtherRows / 16>>{}));

  const BackwardParams& p;
  Storage& s;
  int consumer, thread, own_stage;
  typename S::Pairs first, second;  // scores, then weights; then dP, then dS
  Factors weights, gradients;
  typename S::Gradient by_gradient, by_weight;  // dQ or dK; dV
  WorkItem work;
  int32_t row;  // the upper of this thread's two own rows
  uint32_t forbidden;
  float shift[2], delta[2];  // of own rows, where those are queries

  __device__ __forceinline__ GradientConsumer(const BackwardParams& params, Storage& storage, int c)
      : p(params), s(storage), consumer(c), thread(static_cast<int>(threadIdx.x % 128)) {}

  __device__ __forceinline__ void release(uint64_t& barrier) {
    __syncwarp();
    if (thread % 32 == 0) mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void release_own(int stage) { release(s.own_empty[stage]); }
  __device__ __forceinline__ void release_other(int stage) { release(s.other_empty[stage]); }
  __device__ __forceinline__ void wait_own(int stage, uint32_t parity) {
    mbarrier_wait(s.own_full[stage], parity);
  }
  __device__ __forceinline__ void wait_other(int stage, uint32_t parity) {
    mbarrier_wait(s.other_full[stage], parity);
  }
  __device__ __forceinline__ WorkItem announced(int stage) { return s.work[stage]; }
  __device__ __forceinline__ OtherTile other(int stage) { return s.tile[stage]; }

  __device__ __forceinline__ void begin(const WorkItem& item, int stage) {
    const Problem& problem = p.cuda.args.problem;
    work = item;
    own_stage = stage;
    row = work.tile * kOwnRows + consumer * kConsumerRows + fragment_row(thread);
    cute::clear(by_gradient);
    if constexpr (kByKey) {
      cute::clear(by_weight);
    } else {
      const int64_t pair = work.batch * problem.heads + work.head;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool exists = row + 8 * half < problem.nq;
        const int64_t at = pair * problem.nq + row + 8 * half;
        shift[half] = exists ? weight_shift(p.cuda.args.lse[at]) : -kNegativeInfinity;
        delta[half] = exists ? p.cuda.delta[at] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void issue_pairs(int which, int stage, typename S::Pairs& pairs) {
    using cute::_;
    typename S::PairProduct product;
    auto slice = product.get_slice(thread);
    auto own = cute::make_tensor(cute::make_smem_ptr(s.own[own_stage][which]), typename S::Own{});
    auto others = cute::make_tensor(cute::make_smem_ptr(s.other[which][0]), typename S::Other{});
    auto a = slice.partition_fragment_A(own(_, _, consumer));
    auto b = slice.partition_fragment_B(others);
    issue<true>(product, a, b(_, _, _, stage), pairs);
  }
  __device__ __forceinline__ void issue_first(int stage) { issue_pairs(0, stage, first); }
  __device__ __forceinline__ void issue_second(int stage) { issue_pairs(1, stage, second); }

  __device__ __forceinline__ void issue_columns(int which, int stage, Factors& factors,
                                                typename S::Gradient& gradient) {
    using cute::_;
    typename S::GradientProduct product;
    auto others = cute::make_tensor(cute::make_smem_ptr(s.other[which][0]), typename S::OtherTransposed{});
    auto b = product.get_slice(thread).partition_fragment_B(others);
    issue<false>(product, factors, b(_, _, _, stage), gradient);
  }
  __device__ __forceinline__ void issue_weights_product(int stage) {
    issue_columns(1, stage, weights, by_weight);
  }
  __device__ __forceinline__ void issue_gradients_product(int stage) {
    issue_columns(0, stage, gradients, by_gradient);
  }

  // Products finish in the order of their issue.
  __device__ __forceinline__ void finish_first() {
    wait_products<1>();
    cute::warpgroup_fence_operand(first);
  }
  __device__ __forceinline__ void finish_second() {
    float sum = 0.0f;  // of some weights: the others are computed between them
#pragma unroll
    for (int i = 0; i < kPairs; i += 4)
      sum += first[i];
    hold_until(sum);
    wait_products<0>();
    cute::warpgroup_fence_operand(second);
  }
  __device__ __forceinline__ void finish_all() {
    wait_products<0>();
    cute::warpgroup_fence_operand(by_gradient);
    if constexpr (kByKey) cute::warpgroup_fence_operand(by_weight);
  }

  __device__ __forceinline__ void find_forbidden(const OtherTile& tile) {
    const Problem& problem = p.cuda.args.problem;
    const int32_t start = entry_tile(tile.entry) * kOtherRows;
    forbidden = 0;
    if (!entry_full(tile.entry) || (!kByKey && start + kOtherRows > problem.nk))
      forbidden =
          forbidden_pairs<kByKey>(problem, work.batch, tile.head, row, start + fragment_column(thread, 0));
  }
  __device__ __forceinline__ void weigh(int stage) {
    const float factor = p.scale_log2e;
    const int column = fragment_column(thread, 0);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float by = kByKey ? s.shift[stage][column + i / 4 * 8 + i % 2] : shift[fragment_half(i)];
      const float weight = gradient_weight(first[i], factor, by);
      first[i] = (forbidden >> i & 1u) != 0 ? 0.0f : weight;
    }
  }
  __device__ __forceinline__ void differentiate(int stage) {
    const int column = fragment_column(thread, 0);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float by = kByKey ? s.delta[stage][column + i / 4 * 8 + i % 2] : delta[fragment_half(i)];
      // 0 times a dP that is not finite would be NaN.
      second[i] = (forbidden >> i & 1u) != 0 ? 0.0f : first[i] * (second[i] - by);
    }
  }
  __device__ __forceinline__ static void pack_pairs(Factors& factors, const typename S::Pairs& pairs) {
    auto words = cute::recast<uint32_t>(factors);
#pragma unroll
    for (int i = 0; i < kPairs; i += 2)
      words(i / 2) = pack_pair<Element>(pairs[i], pairs[i + 1]);
  }
  __device__ __forceinline__ void pack() {
    if constexpr (kByKey) pack_pairs(weights, first);
    pack_pairs(gradients, second);
  }

  __device__ __forceinline__ void store() {
    const BackwardArgs& a = p.cuda.args;
    uint32_t poisoned[2] = {0, 0};
    if constexpr (kByKey) {
      store_gradient<Element, kDim>(work, a.grad_k, p.wide_grad_k, a.problem.nk, a.problem.dim, row,
                                    by_gradient, a.problem.scale, poisoned);
      store_gradient<Element, kDim>(work, a.grad_v, p.wide_grad_v, a.problem.nk, a.problem.dim, row,
                                    by_weight, 1.0f, poisoned);
    } else {
      store_gradient<Element, kDim>(work, a.grad_q, p.wide_grad_q, a.problem.nq, a.problem.dim, row,
                                    by_gradient, a.problem.scale, poisoned);
    }
    repair_rows<Element, kDim, kByKey>(p, work, row, poisoned);
  }
};

template <typename Element, int kDim, bool kByKey>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ BackwardParams p) {
  using Storage = GradientStorage<Element, kDim>;
  constexpr int kStages = Storage::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];
  Storage& s = *reinterpret_cast<Storage*>(shared);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);

  if (threadIdx.x == 0) {
    if (shared_address(shared) % 1024 != 0) __trap();  // as in the forward
    s.begin(kByKey ? 2 : 1);
    mbarrier_fence();
  }
  __syncthreads();

  const Problem& problem = p.cuda.args.problem;
  const TilePlan& plan = kByKey ? p.cuda.by_key : p.cuda.by_query;
  const Schedule& schedule = kByKey ? p.by_key : p.by_query;
  if (warp < 4) {
    lower_registers<kGradientProducerRegisters>();
    if (warp == 0) {
      TileProducer<Element, kDim, kByKey> producer{
          p, s, static_cast<int32_t>(problem.heads / problem.kv_heads), blockIdx.x};
      produce_gradient_units<kStages, kByKey>(producer, problem, plan, schedule);
    }
    if (kByKey && warp == 1) {
      NumbersProducer<Storage> producer{p, s};
      produce_gradient_units<kStages, kByKey>(producer, problem, plan, schedule);
    }
  } else {
    raise_registers<kGradientConsumerRegisters>();
    GradientConsumer<Element, kDim, kByKey> consumer(p, s, warp / 4 - 1);
    consume_gradient_units<kStages, kByKey>(consumer);
  }
}

template <typename Element, int kDim, bool kByKey>
int start_gradient(const BackwardParams& params, int64_t multiprocessors, void* stream) {
  constexpr int kBytes = static_cast<int>(sizeof(GradientStorage<Element, kDim>));
  static_assert(kBytes <= 227 * 1024);
  const Schedule& schedule = kByKey ? params.by_key : params.by_query;
  const int64_t units = schedule.pairs * schedule.rows;
  if (units == 0) return 0;
  const auto kernel = backward_kernel<Element, kDim, kByKey>;
  const unsigned blocks = static_cast<unsigned>(units < multiprocessors ? units : multiprocessors);
  if (const int error = allow_shared(reinterpret_cast<const void*>(kernel), kBytes); error != 0) return error;
  kernel<<<blocks, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(params);
  return static_cast<int>(cudaGetLastError());
}

template <int kDim>
int start_backward(const BackwardParams& params, int64_t multiprocessors, void* stream) {
  const auto both = [&]<typename Element>(Element) {
    const int error = start_gradient<Element, kDim, true>(params, multiprocessors, stream);
    return error != 0 ? error : start_gradient<Element, kDim, false>(params, multiprocessors, stream);
  };
  return params.cuda.args.problem.dtype == StorageType::kBFloat16 ? both(cutlass::bfloat16_t{})
                                                                  : both(cutlass::half_t{});
}

}  // namespace arcore::block_sparse_attention::sm90
