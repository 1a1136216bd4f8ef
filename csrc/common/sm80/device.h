// The only door from kernels to the hardware. A kernel that uses nothing but this header and plain C++
// compiles with nvcc, for GPUs, and with g++ (-DARCORE_CUDA_HOST), for the executor of tests/cuda_host, which
// gives every function below an exact meaning on the CPU and checks how it is used.
//
// Rules for kernels, which the executor enforces:
//   - blocks have one dimension, a multiple of 32 threads; shared memory is dynamic (shared_memory());
//   - shuffles, votes, warp_index, sync_warp, sync_group, ldmatrix and mma are executed by all 32 lanes of a
//     warp together;
//   - block barriers are reached by all threads of the block, which have not returned before;
//   - blocks do not wait for each other, but for those of one cluster at sync_cluster, which all of their
//     threads reach; nobody reads the shared memory of a block of the cluster that has returned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace arcore {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

struct alignas(16) Vector16 {  // 16 bytes, what one thread loads or stores at once
  uint32_t word[4];
};
struct alignas(8) Vector8 {
  uint32_t word[2];
};

}  // namespace arcore

#if defined(ARCORE_CUDA_HOST)

#include "cuda_host/device.h"

#else

#define ARCORE_DEVICE __device__ __forceinline__
#define ARCORE_KERNEL static __global__ void
#define ARCORE_KERNEL_ARGS const __grid_constant__
#define ARCORE_LAUNCH_BOUNDS(threads, blocks_per_multiprocessor) \
  __launch_bounds__(threads, blocks_per_multiprocessor)
#define ARCORE_UNROLL _Pragma("unroll")
#define ARCORE_NO_UNROLL _Pragma("unroll 1")

namespace arcore {

// ---- where am I ----

ARCORE_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
ARCORE_DEVICE int block_threads() {
  return static_cast<int>(blockDim.x);
}
ARCORE_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x & 31);
}
// The same number in all lanes, and the compiler knows. A shuffle: all 32 lanes execute it together.
ARCORE_DEVICE int warp_index() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x >> 5), 0);
}
ARCORE_DEVICE int64_t block_x() {
  return blockIdx.x;
}
ARCORE_DEVICE int64_t block_y() {
  return blockIdx.y;
}
ARCORE_DEVICE int64_t block_z() {
  return blockIdx.z;
}
ARCORE_DEVICE int64_t grid_x() {
  return gridDim.x;
}
ARCORE_DEVICE int64_t grid_y() {
  return gridDim.y;
}

// The block's dynamic shared memory, aligned to 128 bytes.
ARCORE_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char arcore_shared_memory[];
  return arcore_shared_memory;
}

// ---- barriers ----

ARCORE_DEVICE void sync_threads() {
  __syncthreads();
}
ARCORE_DEVICE bool sync_threads_or(bool value) {
  return __syncthreads_or(value) != 0;
}
ARCORE_DEVICE int sync_threads_count(bool value) {
  return __syncthreads_count(value);
}
ARCORE_DEVICE void sync_warp() {
  __syncwarp();
}
// Barrier `id` (1 to 15) of `threads` threads, whole warps.
ARCORE_DEVICE void sync_group(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters: neighbouring blocks that run at once (sm_90 and later, launched as such) ----

// Elsewhere a block is a cluster of its own.
ARCORE_DEVICE int cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}
ARCORE_DEVICE int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
// All threads of all blocks of the cluster meet, and see what was written before, to shared memory too.
ARCORE_DEVICE void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// What stands at `p`, an address in this block's shared memory, in the block `rank` of the cluster. T has 4
// or 8 bytes.
template <typename T>
ARCORE_DEVICE T load_cluster(const T* p, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  T out;
  if constexpr (sizeof(T) == 8) {
    uint64_t word;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(word) : "r"(there) : "memory");
    memcpy(&out, &word, 8);
  } else {
    static_assert(sizeof(T) == 4);
    uint32_t word;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(there) : "memory");
    memcpy(&out, &word, 4);
  }
  return out;
#else
  return *p;
#endif
}

// What this thread wrote to global memory is visible to all blocks before anything that it writes later.
ARCORE_DEVICE void fence_device() {
  __threadfence();
}

// The same number, of which the compiler knows nothing: what follows from it is computed where it stands, and
// not kept in registers from one place to the next.
ARCORE_DEVICE int hide(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- lanes of a warp; T has 4 or 8 bytes ----

template <typename T>
ARCORE_DEVICE T shuffle(T value, int source_lane) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}
template <typename T>
ARCORE_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
// Lanes below `delta` keep their own value.
template <typename T>
ARCORE_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
// The last `delta` lanes keep their own value.
template <typename T>
ARCORE_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
ARCORE_DEVICE uint32_t ballot(bool value) {
  return __ballot_sync(0xffffffffu, value);
}
ARCORE_DEVICE bool any_lane(bool value) {
  return __any_sync(0xffffffffu, value) != 0;
}
ARCORE_DEVICE bool all_lanes(bool value) {
  return __all_sync(0xffffffffu, value) != 0;
}
ARCORE_DEVICE int count_bits(uint32_t word) {
  return __popc(word);
}
ARCORE_DEVICE int count_bits64(uint64_t word) {
  return __popcll(static_cast<unsigned long long>(word));
}
// The index of the lowest set bit; word is not 0.
ARCORE_DEVICE int lowest_bit(uint32_t word) {
  return __ffs(static_cast<int>(word)) - 1;
}
ARCORE_DEVICE int lowest_bit64(uint64_t word) {
  return __ffsll(static_cast<long long>(word)) - 1;
}
ARCORE_DEVICE int leading_zeros(uint32_t word) {
  return __clz(static_cast<int>(word));
}
ARCORE_DEVICE int leading_zeros64(uint64_t word) {
  return __clzll(static_cast<long long>(word));
}

// ---- memory; addresses are multiples of the size of T ----

template <typename T>
ARCORE_DEVICE T load_global(const T* p) {
  return *p;
}
// For data that nobody writes while the kernel runs.
template <typename T>
ARCORE_DEVICE T load_readonly(const T* p) {
  if constexpr (sizeof(T) == 16) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    T out;
    memcpy(&out, &v, 16);
    return out;
  } else if constexpr (sizeof(T) == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    T out;
    memcpy(&out, &v, 8);
    return out;
  } else if constexpr (sizeof(T) == 4) {
    const unsigned v = __ldg(reinterpret_cast<const unsigned*>(p));
    T out;
    memcpy(&out, &v, 4);
    return out;
  } else {
    static_assert(sizeof(T) == 2);
    const unsigned short v = __ldg(reinterpret_cast<const unsigned short*>(p));
    T out;
    memcpy(&out, &v, 2);
    return out;
  }
}
template <typename T>
ARCORE_DEVICE void store_global(T* p, T value) {
  *p = value;
}
template <typename T>
ARCORE_DEVICE T load_shared(const T* p) {
  return *p;
}
template <typename T>
ARCORE_DEVICE void store_shared(T* p, T value) {
  *p = value;
}

// Asks for the 128 bytes around `p`, which will be read, to come near.
ARCORE_DEVICE void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// ---- asynchronous copies from global to shared memory: 4, 8 or 16 bytes; zeros where !valid ----

template <int kBytes>
ARCORE_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
}
ARCORE_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `kPending` of this thread's newest groups are under way. Other threads see the data
// after a barrier.
template <int kPending>
ARCORE_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrices ----

// Four 8x8 matrices of 16-bit numbers; lane 8 m + r gives the address of row r of matrix m (16 bytes,
// aligned). out[m]: lane l gets the numbers (l / 4, 2 (l % 4)) and the next one of matrix m.
ARCORE_DEVICE void load_matrix4(uint32_t (&out)[4], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}
// The same of the transposed matrices: lane l gets (2 (l % 4), l / 4) and the one below.
ARCORE_DEVICE void load_matrix4_transposed(uint32_t (&out)[4], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8], T = bfloat16 or float16, sums in float32. With g = lane / 4, t = lane % 4:
// a[0] = (g, 2t..), a[1] = (g + 8, 2t..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t + 8..); b[0] = (2t.., g),
// b[1] = (2t + 8.., g); c[0], c[1] = (g, 2t), (g, 2t + 1); c[2], c[3] = the same 8 rows below.
template <typename T>
ARCORE_DEVICE void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic ----

// 2^x to about 2 ulp; results below 2^-126 are 0.
ARCORE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x) to about 1 ulp away from 1, to 2^-22 absolutely near it.
ARCORE_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x to about 1 ulp.
ARCORE_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Rounded once each, and never contracted to a fused multiply-add.
ARCORE_DEVICE float multiply_rounded(float a, float b) {
  return __fmul_rn(a, b);
}
ARCORE_DEVICE float add_rounded(float a, float b) {
  return __fadd_rn(a, b);
}
ARCORE_DEVICE float divide_rounded(float a, float b) {
  return __fdiv_rn(a, b);
}
ARCORE_DEVICE double multiply_rounded(double a, double b) {
  return __dmul_rn(a, b);
}
ARCORE_DEVICE double add_rounded(double a, double b) {
  return __dadd_rn(a, b);
}
ARCORE_DEVICE float fused_multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
ARCORE_DEVICE double fused_multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
ARCORE_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}
ARCORE_DEVICE float bits_float(uint32_t x) {
  return __uint_as_float(x);
}
ARCORE_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
  return __umul64hi(a, b);
}

// ---- atomics, integers only: sums of floats would depend on their order. Return the old value. ----

ARCORE_DEVICE int atomic_add(int* p, int value) {
  return atomicAdd(p, value);
}
ARCORE_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value) {
  return atomicAdd(p, value);
}
ARCORE_DEVICE uint64_t atomic_add(uint64_t* p, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}
// A 64-bit number in shared memory as two words, each an atomic of its own: the hardware adds 64-bit numbers
// there in a loop of exchanges. It is whole again after a barrier.
ARCORE_DEVICE void atomic_add_words(uint32_t* low, uint32_t* high, uint64_t value) {
  const auto part = static_cast<uint32_t>(value);
  const uint32_t old = atomicAdd(low, part);
  const uint32_t rest = static_cast<uint32_t>(value >> 32) + (old + part < old ? 1u : 0u);
  if (rest != 0u) atomicAdd(high, rest);
}
ARCORE_DEVICE int atomic_max(int* p, int value) {
  return atomicMax(p, value);
}
ARCORE_DEVICE int atomic_min(int* p, int value) {
  return atomicMin(p, value);
}
ARCORE_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t value) {
  return atomicMax(p, value);
}
ARCORE_DEVICE uint32_t atomic_min(uint32_t* p, uint32_t value) {
  return atomicMin(p, value);
}
ARCORE_DEVICE uint64_t atomic_max(uint64_t* p, uint64_t value) {
  return atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}
ARCORE_DEVICE uint32_t atomic_or(uint32_t* p, uint32_t value) {
  return atomicOr(p, value);
}

}  // namespace arcore

#endif

namespace arcore {

// ---- storage types ----

template <typename T>
ARCORE_DEVICE float to_float(T x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, bfloat16>)
    return __bfloat162float(x);
  else
    return __half2float(x);
}
template <typename T>
ARCORE_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}
// Two 16-bit numbers in a register, `low` at the lower address.
template <typename T>
ARCORE_DEVICE uint32_t pack2(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}
template <typename T>
ARCORE_DEVICE void unpack2(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    low = bits_float(word << 16);
    high = bits_float(word & 0xffff0000u);
  } else {
    __half2 pair;
    memcpy(&pair, &word, 4);
    const float2 both = __half22float2(pair);
    low = both.x;
    high = both.y;
  }
}

// ---- reductions over the 32 lanes; every lane gets the result, in one fixed order ----

template <typename T>
ARCORE_DEVICE T warp_sum(T value) {
  for (int mask = 16; mask > 0; mask >>= 1)
    value += shuffle_xor(value, mask);
  return value;
}
template <typename T>
ARCORE_DEVICE T warp_max(T value) {
  for (int mask = 16; mask > 0; mask >>= 1) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace arcore
