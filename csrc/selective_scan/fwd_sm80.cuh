// Forward for GPUs from sm_80 on: sequential in time, parallel over batch rows, channels and states.
#pragma once

#include "selective_scan/scan_sm80.cuh"

namespace arcore::selective_scan {

// Shared memory: [channel][step] of (dt, dt u) and u, [step][state] of B and C, marks.
template <typename S>
struct ForwardLayout {
  static constexpr int kSteps = S::kChannels * kScanPitch, kCoefficient = kCudaChunk * S::kState;
  static constexpr int kBytes = (3 * kSteps + 2 * kCoefficient + kCudaChunk) * 4;
};

template <typename S>
ARCORE_LAUNCH_BOUNDS(kScanThreads, 4)
ARCORE_KERNEL scan_forward(ARCORE_KERNEL_ARGS ForwardCuda cuda) {
  using Layout = ForwardLayout<S>;
  constexpr int kStates = S::kStates;
  const ForwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  float* dts = reinterpret_cast<float*>(shared_memory());
  float* inputs = dts + Layout::kSteps;  // dt u
  float* us = inputs + Layout::kSteps;
  float* Bs = us + Layout::kSteps;
  float* Cs = Bs + Layout::kCoefficient;
  int32_t* marks = reinterpret_cast<int32_t*>(Cs + Layout::kCoefficient);
  const bool marked = cuda.layout.marks != nullptr;
  const Owner<S> o = owner_of_thread<S>(cuda.layout);

  float A[kStates], B[kStates], C[kStates], h[kStates];
  ARCORE_UNROLL
  for (int s = 0; s < kStates; ++s) {
    const int n = o.lane * kStates + s;
    A[s] = o.real() && n < p.state ? a.in.A[o.own_channel() * p.state + n] * kScanLog2E : 0.0f;
  }
  load_constant<S>(B, a.in.B, p, o);
  load_constant<S>(C, a.in.C, p, o);
  load_state<S>(h, cuda.layout.packed ? nullptr : a.in.initial_state, p, o, o.batch);

  for (int64_t begin = 0; begin < p.length; begin += kCudaChunk) {
    if (marked) {
      stage_marks(marks, cuda.layout, p, o.batch, begin);
      sync_threads();
    }
    for_each_input<S>(a.in.delta, [&](int channel, int t) {
      float dt = 0.0f;
      if (channel < o.channels && begin + t < p.length && !(marked && (marks[t] & kPadding))) {
        const int64_t c = o.channel0 + channel;
        dt = load_any(a.in.delta.data, a.in.delta.dtype, sequence_at(a.in.delta, o.batch, c, begin + t));
        if (a.in.delta_bias != nullptr) dt += a.in.delta_bias[c];
        if (p.delta_softplus) dt = softplus(dt);
      }
      dts[channel * kScanPitch + t] = dt;
    });
    for_each_input<S>(a.in.u, [&](int channel, int t) {
      float u = 0.0f;
      if (channel < o.channels && begin + t < p.length && !(marked && (marks[t] & kPadding)))
        u = load_any(a.in.u.data, a.in.u.dtype,
                     sequence_at(a.in.u, o.batch, o.channel0 + channel, begin + t));
      us[channel * kScanPitch + t] = u;
    });
    const int32_t* padding = marked ? marks : nullptr;
    stage_coefficient<S>(Bs, a.in.B, p, padding, o.batch, o.channel0, begin);
    stage_coefficient<S>(Cs, a.in.C, p, padding, o.batch, o.channel0, begin);
    sync_threads();
    for (int i = thread_index(); i < S::kChannels * kCudaChunk; i += kScanThreads) {
      const int at = i / kCudaChunk * kScanPitch + i % kCudaChunk;
      inputs[at] = dts[at] * us[at];
    }
    sync_threads();

    if (a.states != nullptr && begin > 0 && o.real()) {
      ARCORE_UNROLL
      for (int s = 0; s < kStates; ++s) {
        const int n = o.lane * kStates + s;
        if (n < p.state) a.states[kept_at<S>(p, o, begin / kCudaChunk - 1, n)] = h[s];
      }
    }
    const float* my_dt = dts + o.channel * kScanPitch;
    const float* my_input = inputs + o.channel * kScanPitch;
    ARCORE_NO_UNROLL
    for (int t0 = 0; t0 < kCudaChunk; t0 += 4) {
      float y[4];
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int t = t0 + j;
        if (marked && (marks[t] & kRestart))
          load_state<S>(h, cuda.layout.packed ? a.in.initial_state : nullptr, p, o, marks[t] >> 8);
        const float dt = my_dt[t], input = my_input[t];
        y[j] = 0.0f;
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s) {
          const int n = t * S::kState + o.lane * kStates + s;
          const float b = a.in.B.groups == 0 ? B[s] : Bs[n], c = a.in.C.groups == 0 ? C[s] : Cs[n];
          h[s] = exp2_approx(dt * A[s]) * h[s] + input * b;
          y[j] += c * h[s];
        }
        if (marked && (marks[t] & kEnd)) store_state<S>(a.last_state, h, p, o, marks[t] >> 8);
      }
      const float sum = sum_four_steps<S>(y);
      // Every lane of the channel has read dt of these steps: their place takes the result.
      if (o.lane < 4) dts[o.channel * kScanPitch + t0 + o.lane] = sum;
    }
    sync_threads();
    for_each_input<S>(a.out, [&](int channel, int t) {
      if (channel >= o.channels || begin + t >= p.length) return;
      const int64_t c = o.channel0 + channel;
      float y = dts[channel * kScanPitch + t];
      if (a.in.D != nullptr) y += a.in.D[c] * us[channel * kScanPitch + t];
      if (a.in.z.data != nullptr) {
        const float z = load_any(a.in.z.data, a.in.z.dtype, sequence_at(a.in.z, o.batch, c, begin + t));
        y *= z * sigmoid(z);
      }
      if (marked && (marks[t] & kPadding)) y = 0.0f;
      store_any(a.out.data, a.out.dtype, sequence_at(a.out, o.batch, c, begin + t), y);
    });
    sync_threads();
  }
  if (!cuda.layout.packed) store_state<S>(a.last_state, h, p, o, o.batch);
}

template <typename S>
struct LaunchForward {
  static int run(const ForwardCuda& cuda, void* stream) {
    const int64_t blocks = cuda.layout.blocks * cuda.args.problem.batch;
    return launch(scan_forward<S>, {blocks, 1, 1, kScanThreads, ForwardLayout<S>::kBytes}, stream, cuda);
  }
};

}  // namespace arcore::selective_scan
