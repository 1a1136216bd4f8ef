// Kernels with one planted mistake each: what the executor must find.
#include <cstdint>
#include <cstring>
#include <exception>

#include "common/sm80/device.h"
#include "common/sm80/launch.h"

namespace arcore::cuda_host_probe {

struct Args {
  float* out;
  const float* in;
  int64_t n;
  int mistake;
};

enum Mistake {
  kNone,
  kIndexPastShared,
  kIndexFarOutside,
  kMissingBarrier,
  kMissingBarrierBeforeReuse,
  kUnwaitedCopy,
  kWaitWithoutBarrier,
  kReturnWithCopy,
  kLaneOutOfRange,
  kDivergentShuffle,
  kDifferentBarriers,
  kThreadMissesBarrier,
  kReadsUnwritten,
  kMisaligned,
  kReadsUnwrittenLocal,
  kExitedLane,
  kIndexPastBuffer,
  kWarpIndexOfOneLane,
  kGroupBarrierOfHalfWarps,
  kStoresReadonly,
  kMissingClusterBarrier,
  kReturnsWhileRead,
  kRankOutsideCluster,
};

// out[i] = in[n - 1 - i] in pieces of the block, twice through shared memory; n is a multiple of the block.
ARCORE_KERNEL reverse(ARCORE_KERNEL_ARGS Args args) {
  float* buffer = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index(), threads = block_threads();
  for (int64_t begin = block_x() * threads; begin < args.n; begin += grid_x() * threads) {
    if (args.mistake == kReturnWithCopy) {
      copy_async<4>(buffer + thread, args.in + begin + thread);
      copy_async_commit();
      return;
    }
    copy_async<4>(buffer + thread, args.in + begin + thread);
    copy_async_commit();
    if (args.mistake != kUnwaitedCopy) copy_async_wait<0>();
    if (args.mistake != kMissingBarrier && args.mistake != kUnwaitedCopy &&
        args.mistake != kWaitWithoutBarrier)
      sync_threads();
    const float value = buffer[threads - 1 - thread];
    if (args.mistake == kUnwaitedCopy) copy_async_wait<0>();
    args.out[args.n - begin - threads + thread] = value;
    if (args.mistake != kMissingBarrierBeforeReuse) sync_threads();
  }
}

ARCORE_KERNEL misuse(ARCORE_KERNEL_ARGS Args args) {
  float* buffer = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index(), lane = lane_index();
  float value = static_cast<float>(thread);
  switch (args.mistake) {
    case kIndexPastShared:
      if (thread < 100) buffer[thread + args.n] = value;
      break;
    case kIndexPastBuffer:
      args.out[thread + args.n] = value;
      break;
    case kIndexFarOutside:
      value = args.in[int64_t{1} << 40];
      break;
    case kLaneOutOfRange:
      value = shuffle(value, lane + 1);
      break;
    case kDivergentShuffle:
      if (lane < 16)
        value = shuffle_xor(value, 1);
      else
        value = shuffle_xor(value, 2);
      break;
    case kDifferentBarriers:
      if (thread < 32)
        sync_threads();
      else
        sync_threads();
      break;
    case kThreadMissesBarrier:
      if (thread != 5) sync_threads();
      break;
    case kReadsUnwritten:
      value = buffer[thread];
      break;
    case kMisaligned:
      value = static_cast<float>(load_readonly(reinterpret_cast<const Vector16*>(args.in + 1)).word[0]);
      break;
    case kReadsUnwrittenLocal: {
      volatile float local[4];
      if (args.n < 0) local[thread % 4] = 1.0f;
      value = local[thread % 4];
      break;
    }
    case kWarpIndexOfOneLane:
      if (lane == 0) value = static_cast<float>(warp_index());
      break;
    case kGroupBarrierOfHalfWarps:
      if (lane < 16)
        sync_group(1, 128);
      else
        sync_group(1, 128);
      break;
    case kStoresReadonly:
      value = load_readonly(args.out + (thread + 32) % block_threads());
      store_global(args.out + thread, value);
      break;
    case kExitedLane:
      if (lane == 31) return;
      value = shuffle_xor(value, 1);
      break;
    default:
      break;
  }
  args.out[thread] = value;
}

// out[i] = the sum of what the blocks of the cluster hold at thread i: in[block * threads + thread].
ARCORE_KERNEL sum_cluster(ARCORE_KERNEL_ARGS Args args) {
  float* own = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index();
  own[thread] = args.in[block_x() * block_threads() + thread];
  if (args.mistake != kMissingClusterBarrier) sync_cluster();
  float sum = 0.0f;
  for (int rank = 0; rank < cluster_size(); ++rank)
    sum += load_cluster(own + thread, args.mistake == kRankOutsideCluster ? rank + 1 : rank);
  args.out[block_x() * block_threads() + thread] = sum;
  if (args.mistake != kReturnsWhileRead) sync_cluster();
}

// One product of matrices through shared memory: out[16, 8] = a[16, 16] b[8, 16]^T of bfloat16 numbers; row
// pitch `n` in elements of 2 bytes.
ARCORE_KERNEL product(ARCORE_KERNEL_ARGS Args args) {
  auto* a = reinterpret_cast<bfloat16*>(shared_memory());
  bfloat16* b = a + 16 * args.n;
  const int lane = lane_index();
  for (int i = lane; i < 16 * 16; i += 32)
    a[i / 16 * args.n + i % 16] = from_float<bfloat16>(args.in[i]);
  for (int i = lane; i < 8 * 16; i += 32)
    b[i / 16 * args.n + i % 16] = from_float<bfloat16>(args.in[256 + i]);
  sync_warp();
  uint32_t ra[4], rb[4];
  load_matrix4(ra, a + (lane % 16) * args.n + lane / 16 * 8);
  load_matrix4(rb, b + (lane % 8) * args.n + lane / 8 % 2 * 8);
  float c[4] = {};
  mma_16816<bfloat16>(c, ra, rb[0], rb[1]);
  const int g = lane / 4, t = lane % 4;
  args.out[g * 8 + 2 * t] = c[0];
  args.out[g * 8 + 2 * t + 1] = c[1];
  args.out[(g + 8) * 8 + 2 * t] = c[2];
  args.out[(g + 8) * 8 + 2 * t + 1] = c[3];
}

}  // namespace arcore::cuda_host_probe

namespace {

using arcore::cuda_host_probe::Args;

// 0, or 1 with the message of what went wrong in `message`.
int guarded(void (*kernel)(Args), int64_t blocks, int threads, int64_t shared, int cluster, const Args& args,
            char* message, int64_t room) {
  try {
    return arcore::launch(kernel, {blocks, 1, 1, threads, shared, cluster}, nullptr, args);
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), static_cast<size_t>(room) - 1);
    return 1;
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int probe(int which, float* out, const float* in, int64_t n,
                                                            int mistake, int64_t blocks, int threads,
                                                            int64_t shared, int cluster, char* message,
                                                            int64_t room) {
  void (*const kernels[])(Args) = {arcore::cuda_host_probe::reverse, arcore::cuda_host_probe::misuse,
                                   arcore::cuda_host_probe::product, arcore::cuda_host_probe::sum_cluster};
  return guarded(kernels[which], blocks, threads, shared, cluster, {out, in, n, mistake}, message, room);
}
