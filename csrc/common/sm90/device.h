// What sm_90a kernels need from the hardware beside CuTe's copies and matrix products: transaction barriers,
// named barriers, register budgets. Every wrapper orders memory for the compiler too, because kernels pass
// plain data (tile entries, work items) through shared memory under the same barriers.
#pragma once

#include <cstdint>

namespace arcore {

#define ARCORE_SM90_DEVICE __device__ __forceinline__

ARCORE_SM90_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One thread initialises; mbarrier_fence() and a block barrier come before the first use.
ARCORE_SM90_DEVICE void mbarrier_init(uint64_t& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}
// Initialised barriers become visible to the copy engine as well as to the block's threads.
ARCORE_SM90_DEVICE void mbarrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
ARCORE_SM90_DEVICE void mbarrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives; the phase ends only after `bytes` more have been copied.
ARCORE_SM90_DEVICE void mbarrier_arrive_expecting(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}
// Returns once the phase of this parity has ended. On a fresh barrier parity 1 counts as ended.
ARCORE_SM90_DEVICE void mbarrier_wait(uint64_t& barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

// Named barrier `id` (1 to 15) of `threads` threads: sync waits for the others, arrive does not.
ARCORE_SM90_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ARCORE_SM90_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Bytes that this thread wrote to shared memory become visible to the copy engine and the matrix unit, once
// their user has met a barrier after it.
ARCORE_SM90_DEVICE void fence_shared_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Orders what this thread knows of global memory with its bulk copies, in both directions.
ARCORE_SM90_DEVICE void fence_global_for_async() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Contiguous bytes from shared to global memory, written or added as float32; 16-byte addresses and sizes.
// One thread starts, commits and waits.
ARCORE_SM90_DEVICE void bulk_store(float* to, const float* from, uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}
ARCORE_SM90_DEVICE void bulk_add(float* to, const float* from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
ARCORE_SM90_DEVICE void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// All of this thread's bulk copies have read their source; have arrived.
ARCORE_SM90_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
ARCORE_SM90_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// A number that blocks hand on to each other, with all that its writer knew when it wrote.
ARCORE_SM90_DEVICE int32_t load_acquire(const int32_t* p) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return value;
}
ARCORE_SM90_DEVICE void store_release(int32_t* p, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers, a fragment each; lane l gives the address of row l % 8 of matrix
// l / 8.
ARCORE_SM90_DEVICE void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Executed by all warps of a warpgroup; a multiple of 8 from 24 to 256.
template <int kRegisters>
ARCORE_SM90_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ARCORE_SM90_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace arcore
