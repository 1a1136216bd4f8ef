// New inputs against a state that changes in place, for GPUs from sm_80 on: a thread per channel of a row.
#pragma once

#include "causal_conv1d/params.h"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "common/sm80/named_rows.cuh"
#include "common/sm80/sequence.cuh"

namespace arcore::causal_conv1d {

constexpr int kUpdateThreads = 128;

// One channel of one row. Input i >= 0 is new, i < 0 lies in the state.
struct Channel {
  const UpdateArgs& a;
  int64_t batch, channel, row, at;
  bool circular;

  ARCORE_DEVICE int64_t slot(int64_t i) const {
    const int64_t kept = a.state_length;
    return circular ? ((at + i) % kept + kept) % kept : kept + i;
  }
  ARCORE_DEVICE int64_t state_at(int64_t place) const { return sequence_at(a.state, row, channel, place); }
  ARCORE_DEVICE float input(int64_t i) const {
    return i >= 0 ? load_any(a.x.data, a.x.dtype, sequence_at(a.x, batch, channel, i))
                  : load_any(a.state.data, a.state.dtype, state_at(slot(i)));
  }
  ARCORE_DEVICE void keep(int64_t place, float value) const {
    store_any(a.state.data, a.state.dtype, state_at(place), value);
  }
};

// kWidth > 0: the taps' inputs move through registers.
template <int kWidth>
ARCORE_DEVICE void filter_steps(const Channel& me) {
  const UpdateArgs& a = me.a;
  const float* weight = a.weight + me.channel * a.width;
  const float bias = a.bias != nullptr ? load_readonly(a.bias + me.channel) : 0.0f;
  const auto finish = [&](int64_t t, float sum) {
    store_any(a.out.data, a.out.dtype, sequence_at(a.out, me.batch, me.channel, t),
              a.silu ? sum * sigmoid(sum) : sum);
  };
  if constexpr (kWidth > 0) {
    float w[kWidth], x[kWidth];
    ARCORE_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      w[j] = load_readonly(weight + j);
      x[j] = j + 1 < kWidth ? me.input(j + 1 - kWidth) : 0.0f;
    }
    for (int64_t t = 0; t < a.steps; ++t) {
      x[kWidth - 1] = me.input(t);
      float sum = bias;
      ARCORE_UNROLL
      for (int j = 0; j < kWidth; ++j)
        sum = fused_multiply_add(w[j], x[j], sum);
      finish(t, sum);
      ARCORE_UNROLL
      for (int j = 0; j + 1 < kWidth; ++j)
        x[j] = x[j + 1];
    }
  } else {
    for (int64_t t = 0; t < a.steps; ++t) {
      float sum = bias;
      for (int64_t j = 0; j < a.width; ++j)
        sum = fused_multiply_add(load_readonly(weight + j), me.input(t - a.width + 1 + j), sum);
      finish(t, sum);
    }
  }
}

ARCORE_DEVICE void keep_inputs(const Channel& me) {
  const int64_t kept = me.a.state_length, steps = me.a.steps;
  if (me.circular) {
    for (int64_t t = steps > kept ? steps - kept : 0; t < steps; ++t)
      me.keep(me.slot(t), me.input(t));
  } else {
    // Upwards: what a place receives lies above it.
    for (int64_t k = 0; k < kept; ++k)
      me.keep(k, me.input(k - kept + steps));
  }
}

template <int kWidth>
ARCORE_LAUNCH_BOUNDS(kUpdateThreads, 8)
ARCORE_KERNEL update_states(ARCORE_KERNEL_ARGS UpdateCuda cuda) {
  const UpdateArgs& a = cuda.args;
  const int64_t tiles = (a.dim + kUpdateThreads - 1) / kUpdateThreads;
  const int64_t channel = block_x() % tiles * kUpdateThreads + thread_index();
  int64_t batch = block_x() / tiles;
  const int64_t row = named_row(cuda.rows, batch);
  if (row < 0 || row >= cuda.state_rows) {
    // An index behind the state cannot be refused without asking the device: it shows.
    if (channel < a.dim)
      for (int64_t t = 0; t < a.steps; ++t)
        store_any(a.out.data, a.out.dtype, sequence_at(a.out, batch, channel, t),
                  row < 0 ? 0.0f : bits_float(0x7fc00000u));
    return;
  }
  if (named_before(cuda.rows, batch, row)) return;
  const bool circular = cuda.write_at.data != nullptr && a.state_length > 0;
  while (batch >= 0) {
    if (channel < a.dim) {
      const Channel me{a, batch, channel, row, circular ? named_row(cuda.write_at, batch) : 0, circular};
      filter_steps<kWidth>(me);
      keep_inputs(me);
    }
    batch = next_to_name(cuda.rows, batch, a.batch, row, reinterpret_cast<uint32_t*>(shared_memory()));
  }
}

template <int kWidth>
int launch_update(const UpdateCuda& cuda, void* stream) {
  const int64_t tiles = (cuda.args.dim + kUpdateThreads - 1) / kUpdateThreads;
  return launch(update_states<kWidth>, {cuda.args.batch * tiles, 1, 1, kUpdateThreads, 16}, stream, cuda);
}

}  // namespace arcore::causal_conv1d
