// Backward for Hopper in one pass of five products; fused_loop_sm90.h has the algorithm and the order of
// events. A kernel behind it turns the sums into dQ.
#pragma once

#include "block_sparse_attention/bwd_sm90.cuh"
#include "block_sparse_attention/fused_loop_sm90.h"

namespace arcore::block_sparse_attention::sm90 {

template <typename Element, int kDim>
struct FusedStorage : GradientStorage<Element, kDim, fused_own_stages(kDim), fused_stages(kDim)> {
  static constexpr int kSumStages = fused_sum_stages(kDim);
  alignas(1024) Element changes[kChangeStages][kOwnRows * kOtherRows];
  alignas(128) float sums[kSumStages][kOtherRows * kDim];
  uint64_t changes_full[kChangeStages];
  uint64_t sums_full[kSumStages], sums_empty[kSumStages];
  SumsTile staged[kSumStages];  // guarded as sums are

  __device__ __forceinline__ void begin_fused() {
    this->begin(2);
#pragma unroll
    for (int i = 0; i < kChangeStages; ++i)
      mbarrier_init(changes_full[i], kConsumerWarps);
#pragma unroll
    for (int i = 0; i < kSumStages; ++i) {
      mbarrier_init(sums_full[i], kConsumerWarps / kConsumers);
      mbarrier_init(sums_empty[i], 1);
    }
  }
};

template <typename Element, int kDim>
struct FusedTileProducer : TileProducer<Element, kDim, true, FusedStorage<Element, kDim>> {
  using Base = TileProducer<Element, kDim, true, FusedStorage<Element, kDim>>;
  const FusedParams& fused;

  __device__ __forceinline__ FusedTileProducer(const FusedParams& params,
                                               FusedStorage<Element, kDim>& storage)
      : Base{params.backward, storage, 0, 0}, fused(params) {
    take();
  }
  // Also the first unit comes from the counter: a ticket is only ever held by a block that runs.
  __device__ __forceinline__ void take() {
    if (threadIdx.x % 32 == 0) this->unit = atomicAdd(fused.ticket, 1);
  }
  __device__ __forceinline__ int64_t next_unit() {
    const int64_t next = __shfl_sync(0xffffffffu, this->unit, 0);
    take();
    this->tell(next);
    return next;
  }
  __device__ __forceinline__ void load_other(int stage, const WorkItem& work, OtherTile tile,
                                             const int32_t* entry) {
    if (threadIdx.x % 32 != 0) return;
    tile.visit = entry[this->p.cuda.by_key.columns];
    Base::load_other(stage, work, tile, entry);
  }
};

// One thread for each buffer of sums.
template <typename Element, int kDim>
struct SumAdder {
  const FusedParams& p;
  FusedStorage<Element, kDim>& s;

  __device__ __forceinline__ void wait_sums(int stage, uint32_t parity) {
    mbarrier_wait(s.sums_full[stage], parity);
  }
  __device__ __forceinline__ SumsTile staged(int stage) { return s.staged[stage]; }
  __device__ __forceinline__ void wait_visit(const SumsTile& tile) {
    while (load_acquire(p.visited + tile.place) != tile.visit)
      __nanosleep(32);
    fence_global_for_async();
  }
  __device__ __forceinline__ void start_sum(int stage, const SumsTile& tile) {
    constexpr uint32_t kBytes = kOtherRows * kDim * sizeof(float);
    float* to = p.sums + tile.place * (kOtherRows * kDim);
    if (tile.visit == 0)
      bulk_store(to, s.sums[stage], kBytes);  // nothing was there
    else
      bulk_add(to, s.sums[stage], kBytes);
    bulk_commit();
    bulk_wait_read();
  }
  __device__ __forceinline__ void release_sums(int stage) { mbarrier_arrive(s.sums_empty[stage]); }
  __device__ __forceinline__ void finish_sum(const SumsTile& tile) {
    bulk_wait();
    fence_global_for_async();
    store_release(p.visited + tile.place, tile.visit + 1);
  }
};

template <typename Element, int kDim>
struct FusedConsumer : GradientConsumer<Element, kDim, true, FusedStorage<Element, kDim>> {
  using Base = GradientConsumer<Element, kDim, true, FusedStorage<Element, kDim>>;
  using Base::consumer, Base::own_stage, Base::s, Base::thread, Base::work;
  using S = typename Base::S;
  using F = FusedShapes<Element, kDim>;
  static constexpr int kQueryParts = kDim / F::kQueryColumns;

  const FusedParams& fused;
  typename F::QuerySums sums;
  typename F::OwnFactors own[2];  // keys and values, where they stay in registers

  __device__ __forceinline__ FusedConsumer(const FusedParams& params, FusedStorage<Element, kDim>& storage,
                                           int c)
      : Base(params.backward, storage, c), fused(params) {}

  __device__ __forceinline__ void begin(const WorkItem& item, int stage) {
    Base::begin(item, stage);
    if constexpr (F::kOwnInRegisters) {
      if (item.count == 0) return;  // nothing was copied
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        auto tile = cute::make_tensor(cute::make_smem_ptr(s.own[stage][which]), typename S::Own{});
        auto words = cute::recast<uint32_t>(own[which]);
#pragma unroll
        for (int i = 0; i < kDim / 4; ++i)
          words(i) = *reinterpret_cast<const uint32_t*>(&tile(fragment_row(thread) + 8 * fragment_half(2 * i),
                                                              fragment_column(thread, 2 * i), consumer));
      }
    }
  }
  __device__ __forceinline__ void issue_own(int which, int stage, typename S::Pairs& pairs) {
    using cute::_;
    if constexpr (F::kOwnInRegisters) {
      typename F::OwnProduct product;
      auto others = cute::make_tensor(cute::make_smem_ptr(s.other[which][0]), typename S::Other{});
      auto b = product.get_slice(thread).partition_fragment_B(others);
      issue<true>(product, own[which], b(_, _, _, stage), pairs);
    } else {
      Base::issue_pairs(which, stage, pairs);
    }
  }
  __device__ __forceinline__ void issue_first(int stage) { issue_own(0, stage, this->first); }
  __device__ __forceinline__ void issue_second(int stage) { issue_own(1, stage, this->second); }

  __device__ __forceinline__ void share_changes(int stage) {
    const auto words = cute::recast<uint32_t>(this->gradients);
    const uint32_t base =
        shared_address(s.changes[stage]) + static_cast<uint32_t>(change_byte(consumer * kConsumerRows, 0));
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      store_matrices(base + static_cast<uint32_t>(change_store(thread, j)), words(4 * j), words(4 * j + 1),
                     words(4 * j + 2), words(4 * j + 3));
    fence_shared_for_async();
    this->release(s.changes_full[stage]);
  }
  __device__ __forceinline__ void wait_changes(int stage, uint32_t parity) {
    mbarrier_wait(s.changes_full[stage], parity);
  }

  __device__ __forceinline__ void issue_queries_product(int stage, int part) {
    using cute::_;
    typename F::QueryProduct product;
    auto slice = product.get_slice(thread);
    auto changes = cute::make_tensor(cute::make_smem_ptr(s.changes[stage]), typename F::Changes{});
    const auto multiply = [&]<bool kFirst>(std::bool_constant<kFirst>, int c) {
      const Element* own =
          s.own[own_stage][0] + c * kConsumerRows * kDim + part * kConsumerRows * F::kQueryColumns;
      auto columns = cute::make_tensor(cute::make_smem_ptr(own), typename F::OwnColumns{});
      auto a = slice.partition_fragment_A(changes(_, _, c));
      auto b = slice.partition_fragment_B(columns);
      issue<kFirst>(product, a, b, sums);
    };
    multiply(std::true_type{}, 0);
    multiply(std::false_type{}, 1);
  }
  __device__ __forceinline__ void finish_queries() {
    wait_products<0>();
    cute::warpgroup_fence_operand(sums);
  }
  __device__ __forceinline__ void wait_sums_empty(int stage, uint32_t parity) {
    mbarrier_wait(s.sums_empty[stage], parity);
  }
  __device__ __forceinline__ void stage_sums(int stage, int part) {
    constexpr int kRegisters = F::kQueryColumns / 2;
#pragma unroll
    for (int i = 0; i < kRegisters; i += 4)
      *reinterpret_cast<float4*>(s.sums[stage] + sum_place(thread, part * kRegisters + i)) =
          make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
  }
  __device__ __forceinline__ void hand_on_sums(int stage, const OtherTile& tile) {
    if (thread == 0) {
      const int64_t pair = work.batch * fused.backward.cuda.args.problem.heads + tile.head;
      s.staged[stage] = {pair * fused.query_tiles + entry_tile(tile.entry), tile.visit};
    }
    fence_shared_for_async();
    this->release(s.sums_full[stage]);
  }
  __device__ __forceinline__ void hand_on_stop(int stage) {
    if (thread == 0) s.staged[stage] = {0, kStop};
    this->release(s.sums_full[stage]);
  }
};

template <typename Element, int kDim>
__global__ void __launch_bounds__(kThreads, 1) fused_kernel(const __grid_constant__ FusedParams p) {
  using Storage = FusedStorage<Element, kDim>;
  constexpr int kStages = Storage::kStages, kOwnBuffers = fused_own_stages(kDim),
                kSumStages = Storage::kSumStages;
  extern __shared__ __align__(1024) unsigned char shared[];
  Storage& s = *reinterpret_cast<Storage*>(shared);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);

  if (threadIdx.x == 0) {
    if (shared_address(shared) % 1024 != 0) __trap();  // as in the forward
    s.begin_fused();
    mbarrier_fence();
  }
  __syncthreads();

  const BackwardCuda& cuda = p.backward.cuda;
  const Problem& problem = cuda.args.problem;
  if (warp < 4) {
    lower_registers<kGradientProducerRegisters>();
    if (warp == 0) {
      FusedTileProducer<Element, kDim> producer(p, s);
      produce_fused_units<kStages, kOwnBuffers>(producer, problem, cuda.by_key, p.backward.by_key);
    } else if (warp == 1) {
      NumbersProducer<Storage> producer{p.backward, s};
      produce_fused_units<kStages, kOwnBuffers>(producer, problem, cuda.by_key, p.backward.by_key);
    } else if (warp - 2 < kSumStages && threadIdx.x % 32 == 0) {
      SumAdder<Element, kDim> adder{p, s};
      add_sums(adder, warp - 2);
    }
  } else {
    raise_registers<kGradientConsumerRegisters>();
    FusedConsumer<Element, kDim> consumer(p, s, warp / 4 - 1);
    consume_fused_units<kStages, kOwnBuffers, kSumStages>(consumer, warp / 4 - 1);
  }
}

// A block per query tile: sums become dQ, tiles that no key tile visited 0.
template <typename Element, int kDim>
__global__ void __launch_bounds__(128) query_gradients_kernel(const __grid_constant__ FusedParams p) {
  const BackwardArgs& a = p.backward.cuda.args;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t place = blockIdx.x, pair = place / p.query_tiles;
  WorkItem work;
  work.batch = static_cast<int32_t>(pair / a.problem.heads);
  work.head = static_cast<int32_t>(pair % a.problem.heads);
  work.tile = static_cast<int32_t>(place % p.query_tiles);
  work.count = p.visited[place];
  const float* sums = p.sums + place * (kOtherRows * kDim);
  float gradient[kDim / 2];
#pragma unroll
  for (int i = 0; i < kDim / 2; i += 4) {
    const float4 four = work.count > 0 ? *reinterpret_cast<const float4*>(sums + sum_place(thread, i))
                                       : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    gradient[i] = four.x, gradient[i + 1] = four.y, gradient[i + 2] = four.z, gradient[i + 3] = four.w;
  }
  const int32_t row = work.tile * kOtherRows + fragment_row(thread);
  uint32_t poisoned[2] = {0, 0};
  store_gradient<Element, kDim>(work, a.grad_q, p.backward.wide_grad_q, a.problem.nq, a.problem.dim, row,
                                gradient, a.problem.scale, poisoned);
  repair_rows<Element, kDim, false>(p.backward, work, row, poisoned);
}

template <int kDim>
int start_fused(const FusedParams& params, int64_t multiprocessors, void* stream) {
  const auto all = [&]<typename Element>(Element) {
    constexpr int kBytes = static_cast<int>(sizeof(FusedStorage<Element, kDim>));
    static_assert(kBytes <= 227 * 1024);
    const Schedule& schedule = params.backward.by_key;
    const Problem& problem = params.backward.cuda.args.problem;
    const int64_t units = schedule.pairs * schedule.rows,
                  tiles = problem.batch * problem.heads * params.query_tiles;
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto kernel = fused_kernel<Element, kDim>;
    const unsigned blocks = static_cast<unsigned>(units < multiprocessors ? units : multiprocessors);
    if (const int error = allow_shared(reinterpret_cast<const void*>(kernel), kBytes); error != 0)
      return error;
    kernel<<<blocks, kThreads, kBytes, queue>>>(params);
    query_gradients_kernel<Element, kDim><<<static_cast<unsigned>(tiles), 128, 0, queue>>>(params);
    return static_cast<int>(cudaGetLastError());
  };
  return params.backward.cuda.args.problem.dtype == StorageType::kBFloat16 ? all(cutlass::bfloat16_t{})
                                                                           : all(cutlass::half_t{});
}

}  // namespace arcore::block_sparse_attention::sm90
