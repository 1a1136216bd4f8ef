// Forward, backward and update for GPUs from sm_80 on: a thread per output or input, neighbours in memory to
// neighbouring threads; the width - 1 inputs that neighbours share come from the first-level cache.
#pragma once

#include "causal_conv1d/params.h"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "common/sm80/sequence.cuh"

namespace arcore::causal_conv1d {

constexpr int kConvThreads = 256;
// Taps whose gradients a thread sums at once.
constexpr int kTapsTogether = 4;

// A warp per row: its first and its last id that is not negative.
ARCORE_KERNEL find_ends(ARCORE_KERNEL_ARGS ForwardCuda cuda) {
  const int64_t row = block_x(), length = cuda.args.problem.length;
  const int32_t* ids = cuda.ids.data + row * cuda.ids.batch;
  int32_t first = -1, last = -1;
  for (int64_t begin = 0; begin < length; begin += 32) {
    const int64_t t = begin + lane_index();
    const int32_t id = t < length ? ids[t * cuda.ids.time] : -1;
    const uint32_t real = ballot(id >= 0);
    const int32_t low = shuffle(id, real == 0u ? 0 : lowest_bit(real));
    const int32_t high = shuffle(id, real == 0u ? 0 : 31 - leading_zeros(real));
    if (real == 0u) continue;
    if (first < 0) first = low;
    last = high;
  }
  if (lane_index() == 0) {
    cuda.ids.ends[2 * row] = first;
    cuda.ids.ends[2 * row + 1] = last;
  }
}

// One channel of one row, the inputs before the row included.
struct Line {
  const Problem& p;
  const Inputs& in;
  const Ids& ids;
  int64_t batch, channel;

  ARCORE_DEVICE int32_t id(int64_t t) const {
    if (ids.data == nullptr) return 0;
    return t < 0 ? ids.ends[2 * batch] : ids.data[batch * ids.batch + t * ids.time];
  }
  ARCORE_DEVICE float input(int64_t t) const {
    if (t >= 0) return load_any(in.x.data, in.x.dtype, sequence_at(in.x, batch, channel, t));
    return in.history == nullptr ? 0.0f
                                 : in.history[(batch * p.dim + channel) * (p.width - 1) + p.width - 1 + t];
  }
  ARCORE_DEVICE float weight(int64_t j) const { return in.weight[channel * p.width + j]; }

  // Before the activation; `own` is the id of step t, which is not negative.
  ARCORE_DEVICE float sum(int64_t t, int32_t own) const {
    float sum = in.bias == nullptr ? 0.0f : in.bias[channel];
    for (int64_t j = 0; j < p.width; ++j) {
      const int64_t from = t - p.width + 1 + j;
      if (id(from) == own) sum = fmaf(weight(j), input(from), sum);
    }
    return sum;
  }
  // The gradient of that sum.
  ARCORE_DEVICE float grad(const Sequence& grad_out, int64_t t, int32_t own) const {
    const float grad = load_any(grad_out.data, grad_out.dtype, sequence_at(grad_out, batch, channel, t));
    if (!p.silu) return grad;
    const float x = sum(t, own), s = sigmoid(x);
    return grad * s * (1.0f + x * (1.0f - s));
  }
};

struct Place {
  int64_t batch, channel, time;
};

// The place of thread i among [batch, dim, steps], the inner dimension of `like` fastest.
ARCORE_DEVICE Place place_of(int64_t i, const Sequence& like, int64_t dim, int64_t steps) {
  if (time_is_inner(like)) return {i / steps / dim, i / steps % dim, i % steps};
  return {i / dim / steps, i % dim, i / dim % steps};
}

ARCORE_LAUNCH_BOUNDS(kConvThreads, 4)
ARCORE_KERNEL convolve(ARCORE_KERNEL_ARGS ForwardCuda cuda) {
  const ForwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  const int64_t i = block_x() * kConvThreads + thread_index();
  if (i >= p.batch * p.dim * p.length) return;
  const Place at = place_of(i, a.out, p.dim, p.length);
  const Line line{p, a.in, cuda.ids, at.batch, at.channel};
  const int32_t own = line.id(at.time);
  float out = 0.0f;
  if (own >= 0) {
    out = line.sum(at.time, own);
    if (p.silu) out *= sigmoid(out);
  }
  store_any(a.out.data, a.out.dtype, sequence_at(a.out, at.batch, at.channel, at.time), out);
}

// The last width - 1 inputs, those before x included.
ARCORE_KERNEL keep_last(ARCORE_KERNEL_ARGS ForwardCuda cuda) {
  const ForwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  const int64_t before = p.width - 1, i = block_x() * kConvThreads + thread_index();
  if (i >= p.batch * p.dim * before) return;
  const int64_t j = i % before, channel = i / before % p.dim, batch = i / before / p.dim;
  const Line line{p, a.in, cuda.ids, batch, channel};
  const int64_t t = p.length - before + j;
  const bool kept = cuda.ids.data == nullptr ||
                    (cuda.ids.ends[2 * batch + 1] >= 0 && line.id(t) == cuda.ids.ends[2 * batch + 1]);
  store_any(cuda.final_states.data, cuda.final_states.dtype,
            sequence_at(cuda.final_states, batch, channel, j), kept ? line.input(t) : 0.0f);
}

// The gradients of the inputs, those before x included.
ARCORE_LAUNCH_BOUNDS(kConvThreads, 3)
ARCORE_KERNEL grad_inputs(ARCORE_KERNEL_ARGS BackwardCuda cuda) {
  const BackwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  const int64_t before = a.grad_history == nullptr ? 0 : p.width - 1, steps = p.length + before;
  const int64_t i = block_x() * kConvThreads + thread_index();
  if (i >= p.batch * p.dim * steps) return;
  const Place at = place_of(i, a.grad_x, p.dim, steps);
  const int64_t t = at.time - before;
  const Line line{p, a.in, cuda.ids, at.batch, at.channel};
  const int32_t own = line.id(t);
  float grad = 0.0f;
  if (own >= 0) {
    if (a.grad_out.data != nullptr) {
      for (int64_t j = 0; j < p.width; ++j) {
        const int64_t to = t + p.width - 1 - j;
        if (to < 0 || to >= p.length || line.id(to) != own) continue;
        grad = fmaf(line.weight(j), line.grad(a.grad_out, to, own), grad);
      }
    }
    const int64_t last = t - (p.length - (p.width - 1));
    const bool kept = cuda.ids.data == nullptr || own == cuda.ids.ends[2 * at.batch + 1];
    if (cuda.grad_final != nullptr && last >= 0 && kept)
      grad += cuda.grad_final[(at.batch * p.dim + at.channel) * (p.width - 1) + last];
  }
  if (t >= 0)
    store_any(a.grad_x.data, a.grad_x.dtype, sequence_at(a.grad_x, at.batch, at.channel, t), grad);
  else
    a.grad_history[(at.batch * p.dim + at.channel) * before + at.time] = grad;
}

// dw and db of a batch row, and of kTapsTogether taps from `first` on. The steps of a row fall into 32
// classes, by their number modulo 32, which are added in order and then as a tree: the same sums for every
// layout. Where steps are neighbours in memory a warp has a channel and its lanes the classes; else a lane
// has a channel and each of the eight warps four classes.
struct TapSums {
  float of[kTapsTogether + 1];
};

ARCORE_DEVICE void add_step(TapSums& sums, const BackwardArgs& a, const Line& line, int64_t first,
                            int64_t t) {
  const Problem& p = a.problem;
  if (t >= p.length) return;
  const int32_t own = line.id(t);
  if (own < 0) return;
  const float grad = line.grad(a.grad_out, t, own);
  ARCORE_UNROLL
  for (int j = 0; j < kTapsTogether; ++j) {
    const int64_t from = t - p.width + 1 + first + j;
    if (first + j < p.width && line.id(from) == own) sums.of[j] = fmaf(grad, line.input(from), sums.of[j]);
  }
  sums.of[kTapsTogether] += grad;
}

ARCORE_LAUNCH_BOUNDS(kConvThreads, 3)
ARCORE_KERNEL grad_weights(ARCORE_KERNEL_ARGS BackwardCuda cuda) {
  constexpr int kWarps = kConvThreads / 32, kSums = kTapsTogether + 1, kClasses = 32 / kWarps;
  const BackwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  float* classes = reinterpret_cast<float*>(shared_memory());  // [sum][class][lane], lane per channel only
  const bool lanes_are_steps = time_is_inner(a.in.x);
  const int lane = lane_index(), warp = warp_index();
  const int64_t per_block = lanes_are_steps ? kWarps : 32, tiles = (p.dim + per_block - 1) / per_block;
  const int64_t batch = block_x() / tiles, first = block_y() * kTapsTogether;
  const int64_t channel = block_x() % tiles * per_block + (lanes_are_steps ? warp : lane);
  const bool works = channel < p.dim && a.grad_out.data != nullptr;
  const Line line{p, a.in, cuda.ids, batch, channel};
  TapSums total{};
  if (lanes_are_steps) {
    for (int64_t t = lane; works && t < p.length; t += 32)
      add_step(total, a, line, first, t);
    ARCORE_UNROLL
    for (int j = 0; j < kSums; ++j)
      total.of[j] = warp_sum(total.of[j]);
    if (lane != 0) return;
  } else {
    TapSums mine[kClasses] = {};
    for (int64_t begin = 0; works && begin < p.length; begin += 32)
      ARCORE_UNROLL
    for (int c = 0; c < kClasses; ++c)
      add_step(mine[c], a, line, first, begin + c * kWarps + warp);
    ARCORE_UNROLL
    for (int j = 0; j < kSums; ++j)
      ARCORE_UNROLL
    for (int c = 0; c < kClasses; ++c)
      classes[(j * 32 + c * kWarps + warp) * 32 + lane] = mine[c].of[j];
    sync_threads();
    // The tree of warp_sum.
    for (int width = 16; width > 0; width /= 2) {
      for (int i = warp; i < kSums * width; i += kWarps) {
        float* at = classes + (i / width * 32 + i % width) * 32 + lane;
        *at += at[width * 32];
      }
      sync_threads();
    }
    if (warp != 0) return;
    ARCORE_UNROLL
    for (int j = 0; j < kSums; ++j)
      total.of[j] = classes[j * 1024 + lane];
  }
  if (channel >= p.dim) return;
  ARCORE_UNROLL
  for (int j = 0; j < kTapsTogether; ++j)
    if (first + j < p.width) a.partial_weight[(batch * p.dim + channel) * p.width + first + j] = total.of[j];
  if (first == 0) a.partial_bias[batch * p.dim + channel] = total.of[kTapsTogether];
}

// Steps against the state of the last inputs: a thread per (batch entry, channel). Entries that name one row
// of the state belong to the first of them, which does them in order.
ARCORE_KERNEL convolve_steps(ARCORE_KERNEL_ARGS UpdateCuda cuda) {
  const UpdateArgs& a = cuda.args;
  const int64_t i = block_x() * kConvThreads + thread_index();
  if (i >= a.batch * a.dim) return;
  const int64_t c = i % a.dim, first = i / a.dim, kept = a.state_length;
  const int64_t row = a.rows == nullptr ? first : a.rows[first];
  const bool padding = row < 0, outside = row >= cuda.state_rows;
  if (a.rows != nullptr && !padding)
    for (int64_t b = 0; b < first; ++b)
      if (a.rows[b] == row) return;
  const bool circular = a.write_at != nullptr && kept > 0;
  for (int64_t batch = first; batch < a.batch; ++batch) {
    if (batch != first && (a.rows == nullptr || padding)) break;
    if (batch != first && a.rows[batch] != row) continue;
    int64_t start = circular ? a.write_at[batch] % kept : 0;
    if (start < 0) start += kept;
    auto slot = [&](int64_t t) {  // of step t, negative for the inputs before
      if (!circular) return kept + t;
      const int64_t at = (start + t) % kept;
      return at < 0 ? at + kept : at;
    };
    auto state_at = [&](int64_t place) { return sequence_at(a.state, row, c, place); };
    auto input = [&](int64_t t) {
      return t >= 0 ? load_any(a.x.data, a.x.dtype, sequence_at(a.x, batch, c, t))
                    : load_any(a.state.data, a.state.dtype, state_at(slot(t)));
    };
    for (int64_t t = 0; t < a.steps; ++t) {
      float sum = padding ? 0.0f : bits_float(0x7fc00000u);  // a row that is not there shows as NaN
      if (!padding && !outside) {
        sum = a.bias == nullptr ? 0.0f : a.bias[c];
        for (int64_t j = 0; j < a.width; ++j)
          sum = fmaf(a.weight[c * a.width + j], input(t - a.width + 1 + j), sum);
        if (a.silu) sum *= sigmoid(sum);
      }
      store_any(a.out.data, a.out.dtype, sequence_at(a.out, batch, c, t), sum);
    }
    if (padding || outside) continue;
    if (circular) {
      for (int64_t t = a.steps > kept ? a.steps - kept : 0; t < a.steps; ++t)
        store_any(a.state.data, a.state.dtype, state_at(slot(t)), input(t));
    } else {
      for (int64_t k = 0; k < kept; ++k)
        store_any(a.state.data, a.state.dtype, state_at(k), input(k - kept + a.steps));
    }
  }
}

inline int64_t conv_blocks(int64_t threads) {
  return (threads + kConvThreads - 1) / kConvThreads;
}

}  // namespace arcore::causal_conv1d
