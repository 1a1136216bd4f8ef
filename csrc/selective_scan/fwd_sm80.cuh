// Forward for GPUs from sm_80 on: sequential in time, parallel over batch rows, channels and states.
#pragma once

#include "selective_scan/scan_sm80.cuh"

namespace arcore::selective_scan {

// Shared memory: four tiles [channel][step], [step][state] of B and C, marks.
template <typename S>
struct ForwardLayout {
  static constexpr int kSteps = S::kChannels * kScanPitch, kCoefficient = kCudaChunk * S::kPitch;
  static constexpr int kBytes = (4 * kSteps + 2 * kCoefficient + kCudaChunk) * 4;
};

// kPlain: B and C vary in time and rows are whole; else all that is looked up.
template <typename S, bool kPlain>
ARCORE_LAUNCH_BOUNDS(kScanThreads, 4)
ARCORE_KERNEL scan_forward(ARCORE_KERNEL_ARGS ForwardCuda cuda) {
  using Layout = ForwardLayout<S>;
  constexpr int kStates = S::kStates;
  const ForwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  float* dts = reinterpret_cast<float*>(shared_memory());  // delta, then dt
  float* inputs = dts + Layout::kSteps;                    // u, then dt u
  float* gates = inputs + Layout::kSteps;                  // z, then silu(z), 0 on padding
  float* outs = gates + Layout::kSteps;                    // D u, then the result
  float* Bs = outs + Layout::kSteps;
  float* Cs = Bs + Layout::kCoefficient;
  int32_t* marks = reinterpret_cast<int32_t*>(Cs + Layout::kCoefficient);
  const bool marked = !kPlain && cuda.layout.marks != nullptr;
  const bool vary_B = kPlain || a.in.B.groups != 0, vary_C = kPlain || a.in.C.groups != 0;
  const bool gated = a.in.z.data != nullptr;
  const Owner<S> o = owner_of_thread<S>(cuda.layout);
  const int64_t channel = o.channel0 + (o.real() ? o.channel : 0);
  const float bias = a.in.delta_bias != nullptr ? a.in.delta_bias[channel] : 0.0f;
  const float skip = a.in.D != nullptr ? a.in.D[channel] : 0.0f;

  float A[kStates], B[kStates], C[kStates], h[kStates];
  ARCORE_UNROLL
  for (int s = 0; s < kStates; ++s) {
    const int n = o.lane * kStates + s;
    A[s] = o.real() && n < p.state ? a.in.A[channel * p.state + n] * kScanLog2E : 0.0f;
  }
  load_constant<S>(B, a.in.B, p, o);
  load_constant<S>(C, a.in.C, p, o);
  load_state<S>(h, cuda.layout.packed ? nullptr : a.in.initial_state, p, o, o.batch);
  const int row = o.channel * kScanPitch, first = o.lane * kStates;

  for (int64_t begin = 0; begin < p.length; begin += kCudaChunk) {
    if (a.states != nullptr && begin > 0 && o.real()) {
      ARCORE_UNROLL
      for (int s = 0; s < kStates; ++s)
        if (first + s < p.state) a.states[kept_at<S>(p, o, begin / kCudaChunk - 1, first + s)] = h[s];
    }
    stage_inputs<S>(dts, a.in.delta, p, o, begin);
    stage_inputs<S>(inputs, a.in.u, p, o, begin);
    if (gated) stage_inputs<S>(gates, a.in.z, p, o, begin);
    if (vary_B) stage_coefficient<S>(Bs, a.in.B, p, o, begin);
    if (vary_C) stage_coefficient<S>(Cs, a.in.C, p, o, begin);
    if (marked) stage_marks(marks, cuda.layout, p, o.batch, begin);
    sync_threads();
    if (marked) {
      if (vary_B) clear_padding<S>(Bs, marks);
      if (vary_C) clear_padding<S>(Cs, marks);
    }
    // The lanes of a channel share what has to be done once per step, four steps at a time.
    for (int t0 = 4 * o.lane; t0 < kCudaChunk; t0 += 4 * S::kLanes) {
      Float4 dt = load_four_steps(dts + row + t0), u = load_four_steps(inputs + row + t0), gate{}, out;
      if (gated) gate = load_four_steps(gates + row + t0);
      ARCORE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const bool off = begin + t0 + k >= p.length || (marked && (marks[t0 + k] & kPadding) != 0);
        const float x = dt.x[k] + bias, z = gate.x[k];
        dt.x[k] = off ? 0.0f : p.delta_softplus ? softplus(x) : x;
        out.x[k] = off || a.in.D == nullptr ? 0.0f : skip * u.x[k];
        u.x[k] = off ? 0.0f : dt.x[k] * u.x[k];
        gate.x[k] = off ? 0.0f : gated ? z * sigmoid(z) : 1.0f;
      }
      store_four_steps(dts + row + t0, dt);
      store_four_steps(inputs + row + t0, u);
      store_four_steps(gates + row + t0, gate);
      store_four_steps(outs + row + t0, out);
    }
    if (marked)
      sync_threads();
    else
      sync_warp();

    ARCORE_NO_UNROLL
    for (int t0 = 0; t0 < kCudaChunk; t0 += 4) {
      const Float4 dt = load_four_steps(dts + row + t0), input = load_four_steps(inputs + row + t0);
      float y[4] = {};
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int t = t0 + j;
        if (marked && (marks[t] & kRestart))
          load_state<S>(h, cuda.layout.packed ? a.in.initial_state : nullptr, p, o, marks[t] >> 8);
        if (vary_B) load_step<S>(Bs + t * S::kPitch + first, B);
        if (vary_C) load_step<S>(Cs + t * S::kPitch + first, C);
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s) {
          h[s] = fused_multiply_add(exp2_approx(dt.x[j] * A[s]), h[s], input.x[j] * B[s]);
          y[j] = fused_multiply_add(C[s], h[s], y[j]);
        }
        if (marked && (marks[t] & kEnd)) store_state<S>(a.last_state, h, p, o, marks[t] >> 8);
      }
      const float sum = sum_four_steps<S>(y);
      if (o.lane < 4) {
        const int at = row + t0 + o.lane;
        outs[at] = (outs[at] + sum) * gates[at];
      }
    }
    sync_threads();
    // The next chunk overwrites everything but `outs`, which it reaches after its first barrier.
    store_outputs<S>(a.out, outs, p, o, begin);
  }
  if (!cuda.layout.packed) store_state<S>(a.last_state, h, p, o, o.batch);
}

template <typename S>
struct LaunchForward {
  static int run(const ForwardCuda& cuda, void* stream) {
    const int64_t blocks = cuda.layout.blocks * cuda.args.problem.batch;
    const bool plain =
        cuda.layout.marks == nullptr && cuda.args.in.B.groups != 0 && cuda.args.in.C.groups != 0;
    return launch(plain ? scan_forward<S, true> : scan_forward<S, false>,
                  {blocks, 1, 1, kScanThreads, ForwardLayout<S>::kBytes}, stream, cuda);
  }
};

// More than kFewStates states; a file of its own, for the time that nvcc takes.
int launch_forward_many_sm80(const ForwardCuda&, void* stream);

}  // namespace arcore::selective_scan
