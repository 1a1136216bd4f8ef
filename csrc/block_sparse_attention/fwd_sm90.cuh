// Forward for Hopper: one warp copies (TMA), two warpgroups multiply (wgmma), 64 query rows each.
//
// The order of events is produce_units and consume_units in tile_loop_sm90.h; this file says what the events
// are on the hardware. Data is guarded by mbarriers: "full" (the bytes have arrived), "empty" (every consumer
// warp is done with them). Named barriers give the consumers turns at the matrix unit; no data depends on
// them.
#pragma once

#include "block_sparse_attention/tiles_sm90.cuh"

namespace arcore::block_sparse_attention::sm90 {

constexpr int kFirstTurnBarrier = 1;  // named barriers 1 and 2: the turns of consumers 0 and 1

template <typename Element, int kDim>
struct SharedStorage {
  static constexpr int kStages = stages(kDim);
  // 1024 bytes: the period of the widest swizzle.
  alignas(1024) Element q[kQueryStages][kTileQ * kDim];
  alignas(1024) Element k[kStages][kTileK * kDim];
  alignas(1024) Element v[kStages][kTileK * kDim];
  uint64_t q_full[kQueryStages], q_empty[kQueryStages];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  WorkItem work[kQueryStages];  // guarded as q is
  int32_t entry[kStages];       // the plan's entry of a key tile, guarded as k is
};

// ---- the producer: one thread ----

template <typename Element, int kDim>
struct Producer {
  static constexpr uint32_t kTileBytes = kTileK * kDim * sizeof(Element);
  const ForwardParams& p;
  SharedStorage<Element, kDim>& s;
  int32_t group;  // query heads per kv head
  int64_t unit;   // the first one, and then all that are left, from a counter that the blocks share

  __device__ __forceinline__ int64_t next_unit() {
    const int64_t next = unit;
    if (p.counter != nullptr)
      unit = int64_t{gridDim.x} + atomicAdd(p.counter, 1);
    else
      unit = p.schedule.pairs * p.schedule.rows;
    return next;
  }
  __device__ __forceinline__ void wait_keys_empty(int stage, uint32_t parity) {
    mbarrier_wait(s.k_empty[stage], parity);
  }
  __device__ __forceinline__ void wait_values_empty(int stage, uint32_t parity) {
    mbarrier_wait(s.v_empty[stage], parity);
  }
  __device__ __forceinline__ void wait_queries_empty(int stage, uint32_t parity) {
    mbarrier_wait(s.q_empty[stage], parity);
  }

  __device__ __forceinline__ void load_keys(int stage, const WorkItem& work, int32_t entry) {
    s.entry[stage] = entry;
    mbarrier_arrive_expecting(s.k_full[stage], kTileBytes);
    copy_tile<kTileK, kDim>(p.k, s.k_full[stage], s.k[stage], halved_tile(entry) * kTileK, work.head / group,
                            work.batch);
  }
  __device__ __forceinline__ void load_values(int stage, const WorkItem& work, int32_t entry) {
    mbarrier_arrive_expecting(s.v_full[stage], kTileBytes);
    copy_tile<kTileK, kDim>(p.v, s.v_full[stage], s.v[stage], halved_tile(entry) * kTileK, work.head / group,
                            work.batch);
  }
  __device__ __forceinline__ void load_queries(int stage, const WorkItem& work) {
    s.work[stage] = work;
    if (work.count == 0) {
      mbarrier_arrive(s.q_full[stage]);
      return;
    }
    mbarrier_arrive_expecting(s.q_full[stage], kTileQ * kDim * sizeof(Element));
#pragma unroll
    for (int c = 0; c < kConsumers; ++c) {
      copy_tile<kConsumerRows, kDim>(p.q, s.q_full[stage], s.q[stage] + c * kConsumerRows * kDim,
                                     work.tile * kTileQ + c * kConsumerRows, work.head, work.batch);
    }
  }
};

// ---- a consumer: one warpgroup ----

// One row of the output from global memory, only allowed pairs multiplied: what the matrix products cannot
// say, because there 0 * NaN reaches rows that do not see the NaN. Replaces the entries that are not finite.
// All lanes of a warp take part.
template <typename Element, int kDim>
__device__ __forceinline__ void repair_row(const ForwardParams& p, int32_t batch, int32_t head, int32_t row,
                                           float largest, float sum) {
  constexpr int kPerLane = (kDim + 31) / 32;
  const Problem& problem = p.args.problem;
  const int lane = static_cast<int>(threadIdx.x % 32), dim = static_cast<int>(problem.dim);
  const int64_t kv_head = head / (problem.heads / problem.kv_heads);
  const auto at = [&](const Tensor4& t, int64_t h, int64_t n) {
    return static_cast<uint16_t*>(t.data) + batch * t.batch + h * t.head + n * t.row;
  };
  const KeyRanges ranges = row_ranges(problem.mask, batch, head, row, problem.nq, problem.nk);
  const int32_t* key_bounds = key_bounds_of(problem.mask, batch);
  const uint16_t* q = at(p.args.q, head, row);
  const float shift = softmax_shift(largest, p.scale_log2e);
  float total[kPerLane] = {};
#pragma unroll 1
  for (int range = 0; range < 2; ++range) {
    const int32_t hi = range == 0 ? ranges.hi0 : ranges.hi1;
#pragma unroll 1
    for (int32_t first = range == 0 ? ranges.lo0 : ranges.lo1; first < hi; first += 32) {
      const int32_t key = first + lane;
      const bool allowed = key < hi && (key_bounds == nullptr || key_sees_row(key_bounds, key, row));
      float weight = 0.0f;
      if (allowed) {
        const uint16_t* k = at(p.args.k, kv_head, key);
        float score = 0.0f;
#pragma unroll 1
        for (int d = 0; d < dim; ++d)
          score += to_float<Element>(q[d]) * to_float<Element>(k[d]);
        weight = softmax_weight(score, shift, p.scale_log2e);
      }
      for (uint32_t left = __ballot_sync(0xffffffffu, allowed); left != 0; left &= left - 1) {
        const int source = __ffs(static_cast<int>(left)) - 1;
        const float w = __shfl_sync(0xffffffffu, weight, source);
        const uint16_t* v = at(p.args.v, kv_head, first + source);
#pragma unroll
        for (int t = 0; t < kPerLane; ++t) {
          if (lane + 32 * t < dim) total[t] += w * to_float<Element>(v[lane + 32 * t]);
        }
      }
    }
  }
  uint16_t* out = at(p.args.out, head, row);
#pragma unroll
  for (int t = 0; t < kPerLane; ++t) {
    if (lane + 32 * t < dim && !isfinite(to_float<Element>(out[lane + 32 * t])))
      out[lane + 32 * t] = static_cast<uint16_t>(pack_pair<Element>(total[t] / sum, 0.0f));
  }
}

// Normalises and stores 64 rows of a unit.
template <typename Element, int kDim, typename Output>
__device__ __forceinline__ void store_rows(const ForwardParams& p, const WorkItem& work, int32_t row,
                                           int thread, Output& output, const float (&largest)[2],
                                           const float (&sum)[2]) {
  const Problem& problem = p.args.problem;
  const int lane = thread % 32;
  const Tensor4& out = p.args.out;
  uint16_t* base = static_cast<uint16_t*>(out.data) + work.batch * out.batch + work.head * out.head;
  float* lse = p.args.lse + (work.batch * problem.heads + work.head) * problem.nq;
  uint32_t poisoned[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t r = row + 8 * half;
    const bool exists = r < problem.nq, sees = sum[half] != 0.0f;
    if (exists && lane % 4 == 0) lse[r] = row_lse(softmax_shift(largest[half], p.scale_log2e), sum[half]);
    const float inverse = 1.0f / sum[half];
    store_row<Element, kDim>(base + r * out.row, exists, p.wide_stores, problem.dim, half, lane,
                             [&](int i) { return sees ? output[i] * inverse : 0.0f; });
    poisoned[half] = __ballot_sync(0xffffffffu, exists && sees && !row_finite<kDim / 2>(output, half));
  }
  if ((poisoned[0] | poisoned[1]) == 0) return;
  __syncwarp();  // the stores above are read back by other lanes
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
    const int source = i % 8 * 4;
    const float row_largest = __shfl_sync(0xffffffffu, i < 8 ? largest[0] : largest[1], source);
    const float row_sum = __shfl_sync(0xffffffffu, i < 8 ? sum[0] : sum[1], source);
    const int32_t r = __shfl_sync(0xffffffffu, row, 0) + i;
    if (((i < 8 ? poisoned[0] : poisoned[1]) >> source & 15) != 0)
      repair_row<Element, kDim>(p, work.batch, work.head, r, row_largest, row_sum);
  }
}

template <typename Element, int kDim>
struct Consumer {
  using S = Shapes<Element, kDim>;
  static constexpr int kScores = kTileK / 2, kOutputs = kDim / 2;  // registers of a thread
  // An accumulator's registers in their own order are the left operand of the next product, 8 per 16 keys.
  using Weights = decltype(cute::make_tensor<Element>(
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<kTileK / 16>>{}));

  const ForwardParams& p;
  SharedStorage<Element, kDim>& s;
  int consumer, thread, q_stage;
  typename S::Scores scores;
  typename S::Output output;
  Weights weights;
  WorkItem work;
  int32_t row;  // the upper of this thread's two rows
  KeyRanges upper, lower;
  const int32_t* key_bounds;
  float largest[2], sum[2], rescale[2];

  __device__ __forceinline__ Consumer(const ForwardParams& params, SharedStorage<Element, kDim>& storage,
                                      int c)
      : p(params), s(storage), consumer(c), thread(static_cast<int>(threadIdx.x % 128)) {}

  // Every warp reports for itself: its own products have been waited for, its own reads are done.
  __device__ __forceinline__ void release(uint64_t& barrier) {
    __syncwarp();
    if (thread % 32 == 0) mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void release_queries(int stage) { release(s.q_empty[stage]); }
  __device__ __forceinline__ void release_keys(int stage) { release(s.k_empty[stage]); }
  __device__ __forceinline__ void release_values(int stage) { release(s.v_empty[stage]); }
  __device__ __forceinline__ void wait_queries(int stage, uint32_t parity) {
    mbarrier_wait(s.q_full[stage], parity);
  }
  __device__ __forceinline__ void wait_keys(int stage, uint32_t parity) {
    mbarrier_wait(s.k_full[stage], parity);
  }
  __device__ __forceinline__ void wait_values(int stage, uint32_t parity) {
    mbarrier_wait(s.v_full[stage], parity);
  }
  __device__ __forceinline__ void take_turn() { named_barrier_sync(kFirstTurnBarrier + consumer, 256); }
  __device__ __forceinline__ void pass_turn() { named_barrier_arrive(kFirstTurnBarrier + 1 - consumer, 256); }
  __device__ __forceinline__ WorkItem announced(int stage) { return s.work[stage]; }
  __device__ __forceinline__ int32_t entry(int stage) { return s.entry[stage]; }

  __device__ __forceinline__ void begin(const WorkItem& item, int stage) {
    const Problem& problem = p.args.problem;
    work = item;
    q_stage = stage;
    row = work.tile * kTileQ + consumer * kConsumerRows + fragment_row(thread);
    largest[0] = largest[1] = kNegativeInfinity;
    sum[0] = sum[1] = 0.0f;
    cute::clear(output);
    if (work.count == 0) return;
    upper = row_ranges(problem.mask, work.batch, work.head, row, problem.nq, problem.nk);
    lower = row_ranges(problem.mask, work.batch, work.head, row + 8, problem.nq, problem.nk);
    key_bounds = key_bounds_of(problem.mask, work.batch);
  }

  __device__ __forceinline__ void issue_scores(int stage) {
    using cute::_;
    typename S::ScoreProduct product;
    auto slice = product.get_slice(thread);
    auto queries = cute::make_tensor(cute::make_smem_ptr(s.q[q_stage]), typename S::Queries{});
    auto keys = cute::make_tensor(cute::make_smem_ptr(s.k[0]), typename S::Keys{});
    auto a = slice.partition_fragment_A(queries(_, _, consumer));
    auto b = slice.partition_fragment_B(keys);
    issue<true>(product, a, b(_, _, _, stage), scores);
  }
  __device__ __forceinline__ void issue_output(int stage) {
    using cute::_;
    typename S::OutputProduct product;
    auto values = cute::make_tensor(cute::make_smem_ptr(s.v[0]), typename S::ValuesTransposed{});
    auto b = product.get_slice(thread).partition_fragment_B(values);
    issue<false>(product, weights, b(_, _, _, stage), output);
  }
  // Waits until at most kInFlight of the products issued last are unfinished.
  template <int kInFlight>
  __device__ __forceinline__ void finish_scores() {
    wait_products<kInFlight>();
    cute::warpgroup_fence_operand(scores);
  }
  __device__ __forceinline__ void finish_output() {
    hold_until(sum[0] + sum[1]);
    wait_products<0>();
    cute::warpgroup_fence_operand(output);
  }

  // Scores become weights; what was accumulated before is to be multiplied by `rescale`.
  __device__ __forceinline__ void softmax(int32_t entry) {
    const int32_t first_key = halved_tile(entry) * kTileK, nk = static_cast<int32_t>(p.args.problem.nk);
    if (!entry_full(entry) || first_key + kTileK > nk)
      mask_scores<kScores>(scores, upper, lower, key_bounds, row, first_key + fragment_column(thread, 0), nk);
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = largest[half];
      largest[half] = quad_max(largest_score<kScores>(scores, half, before));
      shift[half] = softmax_shift(largest[half], p.scale_log2e);
      rescale[half] = softmax_rescale(before, softmax_shift(before, p.scale_log2e), shift[half]);
      sum[half] *= rescale[half];
    }
    weigh_scores<kScores>(scores, shift, p.scale_log2e, sum);
  }
  __device__ __forceinline__ void rescale_output() { scale_rows<kOutputs>(output, rescale); }
  __device__ __forceinline__ void pack_weights() {
    auto words = cute::recast<uint32_t>(weights);
#pragma unroll
    for (int i = 0; i < kScores; i += 2)
      words(i / 2) = pack_pair<Element>(scores[i], scores[i + 1]);
  }
  __device__ __forceinline__ void store() {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      sum[half] = quad_sum(sum[half]);
    store_rows<Element, kDim>(p, work, row, thread, output, largest, sum);
  }
};

template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ ForwardParams p) {
  using Storage = SharedStorage<Element, kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  Storage& s = *reinterpret_cast<Storage*>(shared);
  // The same number in all threads of a warp, and the compiler knows.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);

  if (threadIdx.x == 0) {
    // Swizzles are functions of the address: a base that is not aligned would give wrong results, not a
    // fault.
    if (shared_address(shared) % 1024 != 0) __trap();
#pragma unroll
    for (int i = 0; i < kQueryStages; ++i) {
      mbarrier_init(s.q_full[i], 1);
      mbarrier_init(s.q_empty[i], kConsumerWarps);
    }
#pragma unroll
    for (int i = 0; i < Storage::kStages; ++i) {
      mbarrier_init(s.k_full[i], 1);
      mbarrier_init(s.k_empty[i], kConsumerWarps);
      mbarrier_init(s.v_full[i], 1);
      mbarrier_init(s.v_empty[i], kConsumerWarps);
    }
    mbarrier_fence();
  }
  __syncthreads();

  if (group == 0) {
    lower_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      const Problem& problem = p.args.problem;
      Producer<Element, kDim> producer{p, s, static_cast<int32_t>(problem.heads / problem.kv_heads),
                                       blockIdx.x};
      produce_units<Storage::kStages>(producer, problem, p.plan, p.schedule);
    }
  } else {
    raise_registers<kConsumerRegisters>();
    Consumer<Element, kDim> consumer(p, s, group - 1);
    consume_units<Storage::kStages>(consumer, group - 1);
  }
}

template <typename Element, int kDim>
int start(const ForwardParams& params, unsigned blocks, void* stream) {
  constexpr int kBytes = static_cast<int>(sizeof(SharedStorage<Element, kDim>));
  static_assert(kBytes <= 227 * 1024);
  const auto kernel = forward_kernel<Element, kDim>;
  if (const int error = allow_shared(reinterpret_cast<const void*>(kernel), kBytes); error != 0) return error;
  kernel<<<blocks, kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(params);
  return static_cast<int>(cudaGetLastError());
}

template <int kDim>
int start_forward(const ForwardParams& params, unsigned blocks, void* stream) {
  return params.args.problem.dtype == StorageType::kBFloat16
             ? start<cutlass::bfloat16_t, kDim>(params, blocks, stream)
             : start<cutlass::half_t, kDim>(params, blocks, stream);
}

}  // namespace arcore::block_sparse_attention::sm90
