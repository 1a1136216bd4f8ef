// What the sm_90a kernels share on the device: conversions, copies of tiles, matrix products, stores of rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <cute/tensor.hpp>
#include <type_traits>

#include "block_sparse_attention/launch_sm90.h"
#include "block_sparse_attention/layouts_sm90.h"
#include "block_sparse_attention/tile_loop_sm90.h"
#include "common/allow_shared.h"
#include "common/sm90/device.h"

namespace arcore::block_sparse_attention::sm90 {

constexpr int kThreads = 128 * (1 + kConsumers);
// 64 K registers: 128 * 40 + 256 * 232 = 384 * 168, what the block was started with.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <typename Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}
template <typename Element>
__device__ __forceinline__ float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    return __half2float(__ushort_as_half(bits));
  }
}

// `rows` rows from `row` on; out-of-range rows and columns arrive as zeros and count as bytes.
template <int kRows, int kDim, typename Element>
__device__ __forceinline__ void copy_tile(const Operand& from, uint64_t& barrier, Element* to, int32_t row,
                                          int32_t head, int32_t batch) {
  constexpr int kBlock = block_columns(kDim);
#pragma unroll
  for (int b = 0; b < kDim / kBlock; ++b) {
    cute::SM90_TMA_LOAD_4D::copy(
        &from.map, &barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
        to + b * kRows * kBlock, b * kBlock, row, head * from.head_step, batch * from.batch_step);
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Waits until at most kInFlight of the products issued last are unfinished. The lanes come together first:
// after a barrier or a mask they may not be.
template <int kInFlight>
__device__ __forceinline__ void wait_products() {
  __syncwarp();
  cute::warpgroup_wait<kInFlight>();
}

// Keeps a wait behind the arithmetic that `value` comes from: ptxas moves wgmma.wait_group ahead of what does
// not use the product, and then the exponentials run behind the product that they are there to hide. It does
// not move it over a loop, which this is as far as it can tell: `value` is never below -1.
__device__ __forceinline__ void hold_until(float value) {
#pragma unroll 1
  while (__any_sync(0xffffffffu, value < -1.0f)) {
    __nanosleep(20);
    value += 1.0f;
  }
}

// Issues C += A B (or C = A B); the caller waits.
template <bool kZero, typename Product, typename A, typename B, typename C>
__device__ __forceinline__ void issue(Product& product, const A& a, const B& b, C& c) {
  constexpr bool kFromShared = std::is_base_of_v<cute::GMMA::DescriptorIterator, typename Product::FrgTypeA>;
  if constexpr (!kFromShared) cute::warpgroup_fence_operand(const_cast<A&>(a));
  __syncwarp();
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_arrive();
  product.accumulate_ = kZero ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
  CUTE_UNROLL
  for (int step = 0; step < cute::size<2>(A{}.layout()); ++step) {
    cute::gemm(product, a(cute::_, cute::_, step), b(cute::_, cute::_, step), c);
    product.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(c);
}

// Columns of one row of an accumulator, of which four lanes hold the parts: value(i) is register i. Each lane
// stores pieces of 16 bytes. All lanes of the warp take part, whether their row exists or not.
template <typename Element, int kDim, typename Value>
__device__ __forceinline__ void store_row(uint16_t* row, bool exists, bool wide, int64_t dim, int half,
                                          int lane, const Value& value) {
#pragma unroll
  for (int first = 0; first < kDim / 8; first += 4) {
    uint32_t words[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int i = 4 * (first + g) + 2 * half;
      words[g] = pack_pair<Element>(value(i), value(i + 1));
    }
    transpose_words(words, lane % 4,
                    [](uint32_t word, int mask) { return __shfl_xor_sync(0xffffffffu, word, mask); });
    const int column = 8 * (first + lane % 4);
    if (!exists || column >= dim) continue;
    uint16_t* to = row + column;
    if (wide) {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        to[k] = static_cast<uint16_t>(words[k / 2] >> (16 * (k % 2)));
    }
  }
}

// Whether all registers of one of the two rows are finite.
template <int kRegisters, typename Fragment>
__device__ __forceinline__ bool row_finite(const Fragment& fragment, int half) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if (fragment_half(i) == half) finite &= isfinite(fragment[i]);
  }
  return finite;
}

}  // namespace arcore::block_sparse_attention::sm90
