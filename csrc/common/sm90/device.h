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
