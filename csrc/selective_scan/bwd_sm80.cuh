// Backward for GPUs from sm_80 on. A block goes through its chunks backwards; each chunk redoes its forward
// from the state that the forward kept before it, keeping every fourth state in shared memory, and then
// sweeps back four steps at a time. Sums over channels: within a warp by exchanges, over the warps of a block
// and then over blocks in a fixed order. No atomics.
#pragma once

#include "selective_scan/scan_sm80.cuh"

namespace arcore::selective_scan {

template <typename S>
struct BackwardLayout {
  static constexpr int kSteps = S::kChannels * kScanPitch, kCoefficient = kCudaChunk * S::kState;
  // Every fourth state of the chunk.
  static constexpr int kKept = kCudaChunk / 4 * kScanThreads * S::kStates;
  // Sums of dB and dC over the channels of a warp. Where 64 states are too many for a copy per warp, the
  // warps take turns.
  static constexpr bool kTurns = S::kState > 64;
  static constexpr int kSums = (kTurns ? 1 : kScanWarps) * 2 * kCoefficient;
  static constexpr int kBytes = (4 * kSteps + 2 * kCoefficient + kKept + kSums + kCudaChunk) * 4;
  static_assert(kBytes <= 163 * 1024, "more than sm_80 has");
};

// Sums v[0, 2 kStates) over the channels of a warp. Afterwards v[0, return value) holds the sums of elements
// `base` on.
template <typename S>
ARCORE_DEVICE int sum_over_channels(float (&v)[2 * S::kStates], int& base) {
  int count = 2 * S::kStates;
  base = 0;
  ARCORE_UNROLL
  for (int mask = 16; mask >= S::kLanes; mask >>= 1) {
    if (count > 1) {
      const int half = count / 2;
      const bool upper = (lane_index() & mask) != 0;
      ARCORE_UNROLL
      for (int i = 0; i < S::kStates; ++i) {
        if (i >= half) continue;
        const float keep = upper ? v[i + half] : v[i], send = upper ? v[i] : v[i + half];
        v[i] = keep + shuffle_xor(send, mask);
      }
      base += upper ? half : 0;
      count = half;
    } else {
      v[0] += shuffle_xor(v[0], mask);
    }
  }
  return count;
}

template <typename S>
ARCORE_LAUNCH_BOUNDS(kScanThreads, S::kStates > 4 ? 1 : 3)
ARCORE_KERNEL scan_backward(ARCORE_KERNEL_ARGS BackwardCuda cuda) {
  using Layout = BackwardLayout<S>;
  constexpr int kStates = S::kStates;
  const BackwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  // [channel][step]: dt, then the gradient of delta; dt u, then that of u; u, then y; the gradient of y.
  float* dts = reinterpret_cast<float*>(shared_memory());
  float* inputs = dts + Layout::kSteps;
  float* us = inputs + Layout::kSteps;
  float* grads = us + Layout::kSteps;
  float* Bs = grads + Layout::kSteps;
  float* Cs = Bs + Layout::kCoefficient;
  float* kept = Cs + Layout::kCoefficient;  // [four steps][state of lane][thread]
  float* sums = kept + Layout::kKept;       // [warp][dB, dC][step][state]
  int32_t* marks = reinterpret_cast<int32_t*>(sums + Layout::kSums);
  const bool marked = cuda.layout.marks != nullptr, packed = cuda.layout.packed;
  const Owner<S> o = owner_of_thread<S>(cuda.layout);
  const int thread = thread_index(), warp = warp_index();
  float* my_sums = sums + (Layout::kTurns ? 0 : warp * 2 * Layout::kCoefficient);

  float A[kStates], B[kStates], C[kStates], carry[kStates], grad_A[kStates] = {}, grad_B[kStates] = {},
                                                            grad_C[kStates] = {};
  ARCORE_UNROLL
  for (int s = 0; s < kStates; ++s) {
    const int n = o.lane * kStates + s;
    A[s] = o.real() && n < p.state ? a.in.A[o.own_channel() * p.state + n] * kScanLog2E : 0.0f;
  }
  load_constant<S>(B, a.in.B, p, o);
  load_constant<S>(C, a.in.C, p, o);
  load_state<S>(carry, packed ? nullptr : a.grad_last_state, p, o, o.batch);
  const float skip = a.in.D != nullptr && o.real() ? a.in.D[o.own_channel()] : 0.0f;
  float grad_skip = 0.0f, grad_bias = 0.0f;

  const int64_t chunks = (p.length + kCudaChunk - 1) / kCudaChunk;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * kCudaChunk;
    if (marked) {
      stage_marks(marks, cuda.layout, p, o.batch, begin);
      sync_threads();
    }
    auto live = [&](int channel, int t) {
      return channel < o.channels && begin + t < p.length && !(marked && (marks[t] & kPadding));
    };
    for_each_input<S>(a.in.delta, [&](int channel, int t) {
      float dt = 0.0f;
      if (live(channel, t)) {
        const int64_t c = o.channel0 + channel;
        dt = load_any(a.in.delta.data, a.in.delta.dtype, sequence_at(a.in.delta, o.batch, c, begin + t));
        if (a.in.delta_bias != nullptr) dt += a.in.delta_bias[c];
        if (p.delta_softplus) dt = softplus(dt);
      }
      dts[channel * kScanPitch + t] = dt;
    });
    for_each_input<S>(a.in.u, [&](int channel, int t) {
      us[channel * kScanPitch + t] =
          live(channel, t) ? load_any(a.in.u.data, a.in.u.dtype,
                                      sequence_at(a.in.u, o.batch, o.channel0 + channel, begin + t))
                           : 0.0f;
    });
    for_each_input<S>(a.grad_out, [&](int channel, int t) {
      float grad = 0.0f;
      if (a.grad_out.data != nullptr && live(channel, t)) {
        const int64_t c = o.channel0 + channel;
        grad = load_any(a.grad_out.data, a.grad_out.dtype, sequence_at(a.grad_out, o.batch, c, begin + t));
        if (a.in.z.data != nullptr) {
          const float z = load_any(a.in.z.data, a.in.z.dtype, sequence_at(a.in.z, o.batch, c, begin + t));
          grad *= z * sigmoid(z);
        }
      }
      grads[channel * kScanPitch + t] = grad;
    });
    const int32_t* padding = marked ? marks : nullptr;
    stage_coefficient<S>(Bs, a.in.B, p, padding, o.batch, o.channel0, begin);
    stage_coefficient<S>(Cs, a.in.C, p, padding, o.batch, o.channel0, begin);
    sync_threads();
    for (int i = thread; i < S::kChannels * kCudaChunk; i += kScanThreads) {
      const int at = i / kCudaChunk * kScanPitch + i % kCudaChunk;
      inputs[at] = dts[at] * us[at];
    }
    sync_threads();

    const int row0 = o.channel * kScanPitch;
    float h[kStates];
    if (begin == 0) {
      load_state<S>(h, packed ? nullptr : a.in.initial_state, p, o, o.batch);
    } else {
      ARCORE_UNROLL
      for (int s = 0; s < kStates; ++s) {
        const int n = o.lane * kStates + s;
        h[s] = o.real() && n < p.state ? a.states[kept_at<S>(p, o, chunk - 1, n)] : 0.0f;
      }
    }
    auto restart = [&](int t) {
      if (marked && (marks[t] & kRestart))
        load_state<S>(h, packed ? a.in.initial_state : nullptr, p, o, marks[t] >> 8);
    };
    ARCORE_NO_UNROLL
    for (int t0 = 0; t0 < kCudaChunk; t0 += 4) {
      ARCORE_UNROLL
      for (int s = 0; s < kStates; ++s)
        kept[(t0 / 4 * kStates + s) * kScanThreads + thread] = h[s];
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int t = t0 + j;
        restart(t);
        const float dt = dts[row0 + t], input = inputs[row0 + t];
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s) {
          const float b = a.in.B.groups == 0 ? B[s] : Bs[t * S::kState + o.lane * kStates + s];
          h[s] = exp2_approx(dt * A[s]) * h[s] + input * b;
        }
      }
    }

    ARCORE_NO_UNROLL
    for (int t0 = kCudaChunk - 4; t0 >= 0; t0 -= 4) {
      float decay[4][kStates], decayed[4][kStates];
      float y[4], by_B[4], by_A[4];
      ARCORE_UNROLL
      for (int s = 0; s < kStates; ++s)
        h[s] = kept[(t0 / 4 * kStates + s) * kScanThreads + thread];
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int t = t0 + j;
        restart(t);
        const float dt = dts[row0 + t], input = inputs[row0 + t];
        y[j] = 0.0f;
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s) {
          const int n = t * S::kState + o.lane * kStates + s;
          const float b = a.in.B.groups == 0 ? B[s] : Bs[n], c = a.in.C.groups == 0 ? C[s] : Cs[n];
          decay[j][s] = exp2_approx(dt * A[s]);
          decayed[j][s] = decay[j][s] * h[s];
          h[s] = decayed[j][s] + input * b;
          y[j] += c * h[s];
        }
      }
      ARCORE_UNROLL
      for (int j = 3; j >= 0; --j) {
        const int t = t0 + j;
        if (marked && (marks[t] & kEnd)) load_state<S>(carry, a.grad_last_state, p, o, marks[t] >> 8);
        const float dt = dts[row0 + t], input = inputs[row0 + t], grad = grads[row0 + t];
        by_B[j] = by_A[j] = 0.0f;
        float products[2 * kStates];
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s) {
          const int n = t * S::kState + o.lane * kStates + s;
          const float b = a.in.B.groups == 0 ? B[s] : Bs[n], c = a.in.C.groups == 0 ? C[s] : Cs[n];
          const float G = grad * c + carry[s];
          const float after = decayed[j][s] + input * b;
          products[s] = G * input;
          products[kStates + s] = grad * after;
          by_B[j] += G * b;
          const float through = G * decayed[j][s];
          by_A[j] += through * A[s];
          grad_A[s] += through * dt;
          grad_B[s] += products[s];
          grad_C[s] += products[kStates + s];
          carry[s] = decay[j][s] * G;
        }
        if (marked && (marks[t] & kRestart)) {
          if (packed) store_state<S>(a.grad_initial_state, carry, p, o, marks[t] >> 8);
          ARCORE_UNROLL
          for (int s = 0; s < kStates; ++s)
            carry[s] = 0.0f;
        }
        int base = 0;
        const int count = sum_over_channels<S>(products, base);
        auto add = [&](bool first) {
          ARCORE_UNROLL
          for (int i = 0; i < 2 * kStates; ++i) {
            if (i >= count) continue;
            const int kind = (base + i) / kStates, n = o.lane * kStates + (base + i) % kStates;
            float* at = my_sums + kind * Layout::kCoefficient + t * S::kState + n;
            *at = first ? products[i] : *at + products[i];
          }
        };
        if constexpr (Layout::kTurns) {
          ARCORE_NO_UNROLL
          for (int turn = 0; turn < kScanWarps; ++turn) {
            if (turn == warp) add(turn == 0);
            sync_threads();
          }
        } else {
          add(true);
        }
      }
      const float sum_y = sum_four_steps<S>(y), sum_B = sum_four_steps<S>(by_B),
                  sum_A = sum_four_steps<S>(by_A);
      if (o.lane < 4) {
        const int at = row0 + t0 + o.lane;
        const float dt = dts[at], u = us[at], grad = grads[at];
        // The state passes steps of padding and those behind the end; they have no delta.
        const bool passes =
            begin + t0 + o.lane >= p.length || (marked && (marks[t0 + o.lane] & kPadding) != 0);
        // A was scaled for base 2.
        float grad_dt = u * sum_B + sum_A * (1.0f / kScanLog2E);
        // The derivative of softplus is 1 - exp(-softplus).
        if (p.delta_softplus) grad_dt *= -expm1f(-dt);
        if (passes) grad_dt = 0.0f;
        dts[at] = grad_dt;
        inputs[at] = skip * grad + dt * sum_B;
        us[at] = sum_y + skip * u;
        grad_skip += grad * u;
        grad_bias += grad_dt;
      }
      sync_warp();
    }
    sync_threads();

    for_each_input<S>(a.grad_delta, [&](int channel, int t) {
      if (channel < o.channels && begin + t < p.length)
        store_any(a.grad_delta.data, a.grad_delta.dtype,
                  sequence_at(a.grad_delta, o.batch, o.channel0 + channel, begin + t),
                  dts[channel * kScanPitch + t]);
    });
    for_each_input<S>(a.grad_u, [&](int channel, int t) {
      if (channel < o.channels && begin + t < p.length)
        store_any(a.grad_u.data, a.grad_u.dtype,
                  sequence_at(a.grad_u, o.batch, o.channel0 + channel, begin + t),
                  inputs[channel * kScanPitch + t]);
    });
    if (a.grad_z.data != nullptr) {
      for_each_input<S>(a.grad_z, [&](int channel, int t) {
        if (channel >= o.channels || begin + t >= p.length) return;
        float grad = 0.0f;
        if (a.grad_out.data != nullptr && live(channel, t)) {
          const int64_t c = o.channel0 + channel;
          const float z = load_any(a.in.z.data, a.in.z.dtype, sequence_at(a.in.z, o.batch, c, begin + t));
          const float s = sigmoid(z);
          grad = load_any(a.grad_out.data, a.grad_out.dtype, sequence_at(a.grad_out, o.batch, c, begin + t)) *
                 us[channel * kScanPitch + t] * s * (1.0f + z * (1.0f - s));
        }
        store_any(a.grad_z.data, a.grad_z.dtype,
                  sequence_at(a.grad_z, o.batch, o.channel0 + channel, begin + t), grad);
      });
    }
    const int64_t block = o.batch * cuda.layout.blocks + block_x() % cuda.layout.blocks;
    for (int i = thread; i < kCudaChunk * S::kState; i += kScanThreads) {
      const int t = i / S::kState, n = i % S::kState;
      if (begin + t >= p.length || n >= p.state) continue;
      const int64_t to = (block * p.length + begin + t) * p.state + n;
      float total_B = sums[i], total_C = sums[Layout::kCoefficient + i];
      if constexpr (!Layout::kTurns) {
        ARCORE_UNROLL
        for (int w = 1; w < kScanWarps; ++w) {
          total_B += sums[w * 2 * Layout::kCoefficient + i];
          total_C += sums[(w * 2 + 1) * Layout::kCoefficient + i];
        }
      }
      if (a.in.B.groups != 0) a.partial_B[to] = total_B;
      if (a.in.C.groups != 0) a.partial_C[to] = total_C;
    }
    sync_threads();
  }

  if (!packed) store_state<S>(a.grad_initial_state, carry, p, o, o.batch);
  store_state<S>(a.partial_A, grad_A, p, o, o.batch);
  if (a.in.B.groups == 0) store_state<S>(a.partial_B, grad_B, p, o, o.batch);
  if (a.in.C.groups == 0) store_state<S>(a.partial_C, grad_C, p, o, o.batch);
  // Lanes 0 to 3 of a channel hold the sums of their steps.
  if (o.lane >= 4) grad_skip = grad_bias = 0.0f;
  grad_skip += shuffle_xor(grad_skip, 1);
  grad_skip += shuffle_xor(grad_skip, 2);
  grad_bias += shuffle_xor(grad_bias, 1);
  grad_bias += shuffle_xor(grad_bias, 2);
  if (o.lane == 0 && o.real()) {
    a.partial_D[o.batch * p.dim + o.own_channel()] = grad_skip;
    a.partial_delta_bias[o.batch * p.dim + o.own_channel()] = grad_bias;
  }
}

// dB and dC: sums over the blocks of a group, in their order. A thread per (batch row, group, step, state).
ARCORE_KERNEL sum_slices(ARCORE_KERNEL_ARGS BackwardCuda cuda) {
  const BackwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  const bool of_B = block_y() == 0;
  const Coefficient& to = of_B ? a.grad_B : a.grad_C;
  const float* partial = of_B ? a.partial_B : a.partial_C;
  if (to.data == nullptr) return;
  const int64_t i = block_x() * block_threads() + thread_index();
  const int64_t n = i % p.state, t = i / p.state % p.length, group = i / p.state / p.length % to.groups,
                batch = i / p.state / p.length / to.groups;
  if (batch >= p.batch) return;
  const int64_t slices = cuda.layout.blocks / to.groups;
  const float* from = partial + ((batch * cuda.layout.blocks + group * slices) * p.length + t) * p.state + n;
  float sum = 0.0f;
  for (int64_t s = 0; s < slices; ++s)
    sum += from[s * p.length * p.state];
  store_any(to.data, to.dtype, batch * to.batch + group * to.channel + n * to.state + t * to.time, sum);
}

template <typename S>
struct LaunchBackward {
  static int run(const BackwardCuda& cuda, void* stream) {
    const int64_t blocks = cuda.layout.blocks * cuda.args.problem.batch;
    return launch(scan_backward<S>, {blocks, 1, 1, kScanThreads, BackwardLayout<S>::kBytes}, stream, cuda);
  }
};

}  // namespace arcore::selective_scan
