// One step of the selective scan for GPUs from sm_80 on: a block per (batch row, head, tile of channels).
#pragma once

#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "common/sm80/named_rows.cuh"
#include "common/sm80/sequence.cuh"
#include "selective_state_update/params.h"

namespace arcore::selective_state_update {

constexpr int kUpdateThreads = 128;
constexpr float kUpdateLog2E = 1.4426950408889634f;

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// kLanes neighbouring lanes share a channel, kStates states each, four side by side at a time.
template <int kLanesOfChannel, int kStatesOfLane>
struct Shape {
  static constexpr int kLanes = kLanesOfChannel, kStates = kStatesOfLane;
  static constexpr int kChannels = kUpdateThreads / kLanes;
};

// Four elements from `at` on, `stride` apart, of which `count` (or more) are there; zeros for the others.
template <typename T>
ARCORE_DEVICE void load_four(const T* at, int64_t stride, int64_t count, float (&to)[4]) {
  if (stride == 1 && count >= 4 && reinterpret_cast<uintptr_t>(at) % sizeof(Four<T>) == 0) {
    const Four<T> four = load_global(reinterpret_cast<const Four<T>*>(at));
    ARCORE_UNROLL
    for (int k = 0; k < 4; ++k)
      to[k] = to_float(four.x[k]);
    return;
  }
  ARCORE_UNROLL
  for (int k = 0; k < 4; ++k)
    to[k] = k < count ? to_float(load_global(at + k * stride)) : 0.0f;
}
template <typename T>
ARCORE_DEVICE void store_four(T* at, int64_t stride, int64_t count, const float (&from)[4]) {
  if (stride == 1 && count >= 4 && reinterpret_cast<uintptr_t>(at) % sizeof(Four<T>) == 0) {
    Four<T> four;
    ARCORE_UNROLL
    for (int k = 0; k < 4; ++k)
      four.x[k] = from_float<T>(from[k]);
    store_global(reinterpret_cast<Four<T>*>(at), four);
    return;
  }
  ARCORE_UNROLL
  for (int k = 0; k < 4; ++k)
    if (k < count) store_global(at + k * stride, from_float<T>(from[k]));
}
ARCORE_DEVICE void load_four(const View& v, int64_t batch, int64_t head, int64_t first, int64_t count,
                             float (&to)[4]) {
  const int64_t at = batch * v.batch + head * v.head + first * v.last;
  switch (v.dtype) {
    case StorageType::kBFloat16:
      return load_four(static_cast<const bfloat16*>(v.data) + at, v.last, count, to);
    case StorageType::kFloat16:
      return load_four(static_cast<const float16*>(v.data) + at, v.last, count, to);
    default:
      return load_four(static_cast<const float*>(v.data) + at, v.last, count, to);
  }
}

ARCORE_DEVICE int64_t element_at(const View& v, int64_t batch, int64_t head, int64_t channel) {
  return batch * v.batch + head * v.head + channel * v.last;
}

// Brings the states of one channel one step on and returns this lane's part of sum_n C h.
template <typename T, typename S>
ARCORE_DEVICE float advance(const Args& a, int64_t batch, int64_t head, int64_t channel, int lane, T* state,
                            float dt, float input) {
  const int64_t group = head / (a.heads / a.groups);
  const float tied = a.tied ? exp2_approx(dt * (load_readonly(a.A + head) * kUpdateLog2E)) : 0.0f;
  float sum = 0.0f;
  ARCORE_UNROLL
  for (int part = 0; part < S::kStates; part += 4) {
    // Lanes take turns, so that a warp reads and writes whole lines.
    const int64_t n = (part / 4 * S::kLanes + lane) * 4, count = a.states - n;
    if (count <= 0) break;
    float h[4], B[4], C[4], A[4] = {};
    T* at = state + n * a.state.state;
    load_four(at, a.state.state, count, h);
    load_four(a.B, batch, group, n, count, B);
    load_four(a.C, batch, group, n, count, C);
    if (!a.tied) load_four(a.A + (head * a.dim + channel) * a.states + n, 1, count, A);
    ARCORE_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float decay = a.tied ? tied : exp2_approx(dt * (A[k] * kUpdateLog2E));
      h[k] = fused_multiply_add(decay, h[k], input * B[k]);
      sum = fused_multiply_add(C[k], h[k], sum);
    }
    store_four(at, a.state.state, count, h);
  }
  return sum;
}

template <typename T, typename S>
ARCORE_LAUNCH_BOUNDS(kUpdateThreads, S::kStates > 4 ? 6 : 8)
ARCORE_KERNEL update_rows(ARCORE_KERNEL_ARGS UpdateCuda cuda) {
  const Args& a = cuda.args;
  const int64_t tiles = (a.dim + S::kChannels - 1) / S::kChannels;
  const int64_t head = block_x() / tiles % a.heads;
  const int thread = thread_index(), lane = thread % S::kLanes;
  const int64_t channel = block_x() % tiles * S::kChannels + thread / S::kLanes;
  const bool real = channel < a.dim;
  int64_t batch = block_x() / tiles / a.heads;
  const int64_t row = named_row(cuda.rows, batch);
  if (cuda.rows.data != nullptr) {
    const bool inside = row >= 0 && row < cuda.state_rows;
    if (row == a.pad || !inside) {
      // An index that is neither padding nor a row cannot be refused without asking the device: it shows.
      if (real && lane == 0)
        store_any(a.out.data, a.out.dtype, element_at(a.out, batch, head, channel),
                  row == a.pad || row < 0 ? 0.0f : bits_float(0x7fc00000u));
      return;
    }
    if (named_before(cuda.rows, batch, row)) return;
  }
  while (batch >= 0) {
    float sum = 0.0f, x = 0.0f;
    if (real) {
      float dt = load_any(a.dt.data, a.dt.dtype, element_at(a.dt, batch, head, channel));
      x = load_any(a.x.data, a.x.dtype, element_at(a.x, batch, head, channel));
      if (a.dt_bias != nullptr) dt += load_readonly(a.dt_bias + head * a.dim + channel);
      if (a.softplus) dt = softplus(dt);
      T* state =
          static_cast<T*>(a.state.data) + row * a.state.row + head * a.state.head + channel * a.state.channel;
      sum = advance<T, S>(a, batch, head, channel, lane, state, dt, dt * x);
    }
    ARCORE_UNROLL
    for (int mask = S::kLanes / 2; mask > 0; mask >>= 1)
      sum += shuffle_xor(sum, mask);
    if (real && lane == 0) {
      if (a.D != nullptr) sum += load_readonly(a.D + head * a.dim + channel) * x;
      if (a.z.data != nullptr) {
        const float z = load_any(a.z.data, a.z.dtype, element_at(a.z, batch, head, channel));
        sum *= z * sigmoid(z);
      }
      store_any(a.out.data, a.out.dtype, element_at(a.out, batch, head, channel), sum);
    }
    batch = next_to_name(cuda.rows, batch, a.batch, row, reinterpret_cast<uint32_t*>(shared_memory()));
  }
}

template <typename T, typename S>
int launch_shape(const UpdateCuda& cuda, void* stream) {
  const Args& a = cuda.args;
  const int64_t tiles = (a.dim + S::kChannels - 1) / S::kChannels;
  return launch(update_rows<T, S>, {a.batch * a.heads * tiles, 1, 1, kUpdateThreads, 16}, stream, cuda);
}

template <typename T>
int launch_update(const UpdateCuda& cuda, void* stream) {
  const int64_t states = cuda.args.states;
  if (states <= 4) return launch_shape<T, Shape<1, 4>>(cuda, stream);
  if (states <= 8) return launch_shape<T, Shape<2, 4>>(cuda, stream);
  if (states <= 16) return launch_shape<T, Shape<4, 4>>(cuda, stream);
  if (states <= 32) return launch_shape<T, Shape<8, 4>>(cuda, stream);
  if (states <= 64) return launch_shape<T, Shape<16, 4>>(cuda, stream);
  if (states <= 128) return launch_shape<T, Shape<32, 4>>(cuda, stream);
  return launch_shape<T, Shape<32, 8>>(cuda, stream);
}

}  // namespace arcore::selective_state_update
