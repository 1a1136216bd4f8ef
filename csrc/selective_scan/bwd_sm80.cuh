// Backward for GPUs from sm_80 on. A block goes through its chunks backwards; each chunk redoes its forward
// from the state that the forward kept before it, keeping every fourth state in shared memory, and then
// sweeps back four steps at a time. Sums over channels: within a warp by exchanges, over the warps of a block
// and then over blocks in a fixed order. No atomics.
#pragma once

#include "selective_scan/scan_sm80.cuh"

namespace arcore::selective_scan {

template <typename S>
struct BackwardLayout {
  static constexpr int kSteps = S::kChannels * kScanPitch, kCoefficient = kCudaChunk * S::kPitch;
  // Every fourth state of the chunk.
  static constexpr int kKept = kCudaChunk / 4 * kScanThreads * S::kStates;
  // Sums of dB and dC over the channels of a warp. Where 64 states are too many for a copy per warp, the
  // warps take turns.
  static constexpr bool kTurns = S::kState > 64;
  // Of so many steps at a time.
  static constexpr int kSumSteps = kCudaChunk / 4, kOneSum = kSumSteps * S::kState;
  static constexpr int kSums = (kTurns ? 1 : kScanWarps) * 2 * kOneSum;
  static constexpr int kBytes = (4 * kSteps + 2 * kCoefficient + kKept + kSums + kCudaChunk) * 4;
  static_assert(kBytes <= 163 * 1024, "more than sm_80 has");
};

// The chunk before this one, copied while the block works. Where each thread copies from is found again for
// every chunk: registers are short.
template <typename S>
struct AheadBack : AheadRows<S, 4> {
  using Rows = AheadRows<S, 4>;

  ARCORE_DEVICE void copy(const BackwardArgs& a, const Owner<S>& o, int64_t begin, int64_t end) const {
    const int thread = hide(thread_index());
    ARCORE_UNROLL
    for (int i = 0; i < Rows::kMine; ++i) {
      const int row = Rows::row_of(thread, i);
      if (row < Rows::kRows)
        Rows::copy_part(thread, i, Rows::start(row, a.in, &a.grad_out, a.problem, o), begin, end);
    }
    copy_async_commit();
  }
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

// Of a multiprocessor: what ptxas allocates without spills.
template <typename S, bool kPlain>
constexpr int kBackwardBlocks = S::kStates > 4              ? 1
                                : kPlain && S::kState <= 32 ? 4
                                                            : 3;

// kPlain: B and C vary in time and rows are whole; else all that is looked up.
template <typename S, bool kPlain>
ARCORE_LAUNCH_BOUNDS(kScanThreads, (kBackwardBlocks<S, kPlain>))
ARCORE_KERNEL scan_backward(ARCORE_KERNEL_ARGS BackwardCuda cuda) {
  using Layout = BackwardLayout<S>;
  constexpr int kStates = S::kStates;
  const BackwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  // [channel][step]: delta, dt, then the gradient of delta; u, then the gradient of u; the gradients of the
  // output, then of y; z, what the gradient of z has beside y, then that gradient.
  float* dts = reinterpret_cast<float*>(shared_memory());
  float* us = dts + Layout::kSteps;
  float* grads = us + Layout::kSteps;
  float* gates = grads + Layout::kSteps;
  float* Bs = gates + Layout::kSteps;
  float* Cs = Bs + Layout::kCoefficient;
  float* kept = Cs + Layout::kCoefficient;  // [four steps][state of lane][thread]
  float* sums = kept + Layout::kKept;       // [warp][dB, dC][step][state]
  int32_t* marks = reinterpret_cast<int32_t*>(sums + Layout::kSums);
  const bool marked = !kPlain && cuda.layout.marks != nullptr, packed = cuda.layout.packed;
  const bool vary_B = kPlain || a.in.B.groups != 0, vary_C = kPlain || a.in.C.groups != 0;
  const bool gated = a.in.z.data != nullptr;
  const Owner<S> o = owner_of_thread<S>(cuda.layout);
  const int thread = thread_index(), warp = warp_index();
  float* my_sums = sums + (Layout::kTurns ? 0 : warp * 2 * Layout::kOneSum);

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
  enter_segment<S, false>(cuda.layout, p, o, A, carry);
  // Of the partial sums over channels.
  const int block = static_cast<int>(o.batch * cuda.layout.blocks + block_x() % cuda.layout.blocks);
  const float skip = a.in.D != nullptr && o.real() ? a.in.D[o.own_channel()] : 0.0f;
  const int first = o.lane * kStates, row0 = o.channel * kScanPitch;
  float grad_skip = 0.0f, grad_bias = 0.0f;

  const int first_chunk = static_cast<int>(o.segment * cuda.layout.segment_chunks);
  int chunk = static_cast<int>((o.end(cuda.layout, p) + kCudaChunk - 1) / kCudaChunk) - 1;
  const bool copied = kPlain && AheadBack<S>::kUsed && cuda.ahead,
             bfloat = a.in.u.dtype == StorageType::kBFloat16;
  const AheadBack<S> ahead{{reinterpret_cast<unsigned char*>(marks + kCudaChunk)}};
  if (copied) ahead.copy(a, o, int64_t{chunk} * kCudaChunk, p.length);
  for (; chunk >= first_chunk; --chunk) {
    const int64_t begin = int64_t{chunk} * kCudaChunk;
    // Steps of the chunk that exist.
    const int steps = static_cast<int>(p.length - begin < kCudaChunk ? p.length - begin : kCudaChunk);
    if (copied) {
      copy_async_wait<0>();
    } else {
      stage_inputs<S>(dts, a.in.delta, p, o, begin);
      stage_inputs<S>(us, a.in.u, p, o, begin);
      if (a.grad_out.data != nullptr) stage_inputs<S>(grads, a.grad_out, p, o, begin);
      if (gated) stage_inputs<S>(gates, a.in.z, p, o, begin);
      if (vary_B) stage_coefficient<S>(Bs, a.in.B, p, o, begin);
      if (vary_C) stage_coefficient<S>(Cs, a.in.C, p, o, begin);
      if (marked) stage_marks(marks, cuda.layout, p, o.batch, begin);
    }
    sync_threads();
    if (copied) {
      ahead.transpose(Bs, AheadBack<S>::kB, bfloat);
      ahead.transpose(Cs, AheadBack<S>::kC, bfloat);
    }
    if (marked) {
      if (vary_B) clear_padding<S>(Bs, marks);
      if (vary_C) clear_padding<S>(Cs, marks);
    }
    float bias = 0.0f;  // read again for every chunk: registers are short
    if (a.in.delta_bias != nullptr && o.real()) bias = a.in.delta_bias[o.channel0 + hide(o.channel)];
    // The lanes of a channel share what has to be done once per step, four steps at a time.
    for (int t0 = 4 * o.lane; t0 < kCudaChunk; t0 += 4 * S::kLanes) {
      Float4 dt, u, grad{}, gate{};
      if (copied) {
        dt = ahead.four(kAheadDelta, o.channel, t0, bfloat);
        u = ahead.four(kAheadU, o.channel, t0, bfloat);
        if (gated) gate = ahead.four(kAheadZ, o.channel, t0, bfloat);
        grad = ahead.four(kAheadGradOut, o.channel, t0, bfloat);
      } else {
        dt = load_four_steps(dts + row0 + t0);
        u = load_four_steps(us + row0 + t0);
        if (gated) gate = load_four_steps(gates + row0 + t0);
        if (a.grad_out.data != nullptr) grad = load_four_steps(grads + row0 + t0);
      }
      ARCORE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const bool off = t0 + k >= steps || (marked && (marks[t0 + k] & kPadding) != 0);
        const float x = dt.x[k] + bias;
        dt.x[k] = off ? 0.0f : p.delta_softplus ? softplus(x) : x;
        u.x[k] = off ? 0.0f : u.x[k];
        grad.x[k] = off ? 0.0f : grad.x[k];
        if (gated) {
          const float v = off ? 0.0f : gate.x[k], s = sigmoid(v), scaled = grad.x[k] * s;
          gate.x[k] = scaled * (1.0f + v * (1.0f - s));
          grad.x[k] = scaled * v;
        }
      }
      store_four_steps(dts + row0 + t0, dt);
      store_four_steps(us + row0 + t0, u);
      store_four_steps(grads + row0 + t0, grad);
      if (gated) store_four_steps(gates + row0 + t0, gate);
    }
    if (marked || copied)
      sync_threads();
    else
      sync_warp();
    // The rows have been read by all threads.
    if (copied && chunk > first_chunk) ahead.copy(a, o, begin - kCudaChunk, p.length);

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
      const Float4 dt = load_four_steps(dts + row0 + t0), u = load_four_steps(us + row0 + t0);
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int t = t0 + j;
        const float input = dt.x[j] * u.x[j];
        restart(t);
        if (vary_B) load_step<S>(Bs + t * S::kPitch + first, B);
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s)
          h[s] = fused_multiply_add(exp2_approx(dt.x[j] * A[s]), h[s], input * B[s]);
      }
    }

    ARCORE_NO_UNROLL
    for (int t0 = kCudaChunk - 4; t0 >= 0; t0 -= 4) {
      // before: the state that a step starts from.
      float decay[4][kStates], before[4][kStates];
      float y[4], by_B[4], by_A[4];
      ARCORE_UNROLL
      for (int s = 0; s < kStates; ++s)
        h[s] = kept[(t0 / 4 * kStates + s) * kScanThreads + thread];
      const Float4 dt = load_four_steps(dts + row0 + t0);
      Float4 input = load_four_steps(us + row0 + t0);
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j)
        input.x[j] *= dt.x[j];
      ARCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int t = t0 + j;
        restart(t);
        y[j] = 0.0f;
        if (vary_B) load_step<S>(Bs + t * S::kPitch + first, B);
        if (vary_C && gated) load_step<S>(Cs + t * S::kPitch + first, C);
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s) {
          decay[j][s] = exp2_approx(dt.x[j] * A[s]);
          before[j][s] = h[s];
          h[s] = fused_multiply_add(decay[j][s], h[s], input.x[j] * B[s]);
          if (gated) y[j] = fused_multiply_add(C[s], h[s], y[j]);
        }
      }
      const float sum_y = gated ? sum_four_steps<S>(y) : 0.0f;
      const Float4 grad = load_four_steps(grads + row0 + t0);
      ARCORE_UNROLL
      for (int j = 3; j >= 0; --j) {
        const int t = t0 + j;
        if (marked && (marks[t] & kEnd)) load_state<S>(carry, a.grad_last_state, p, o, marks[t] >> 8);
        by_B[j] = by_A[j] = 0.0f;
        if (vary_B) load_step<S>(Bs + t * S::kPitch + first, B);
        if (vary_C) load_step<S>(Cs + t * S::kPitch + first, C);
        float products[2 * kStates];
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s) {
          const float G = fused_multiply_add(grad.x[j], C[s], carry[s]);
          // A sequence that starts at the next step leaves its own state there.
          const float after = kPlain ? j == 3 ? h[s] : before[j < 3 ? j + 1 : j][s]
                                     : fused_multiply_add(decay[j][s], before[j][s], input.x[j] * B[s]);
          products[s] = G * input.x[j];
          products[kStates + s] = grad.x[j] * after;
          by_B[j] = fused_multiply_add(G, B[s], by_B[j]);
          carry[s] = decay[j][s] * G;
          const float through = carry[s] * before[j][s];
          by_A[j] = fused_multiply_add(through, A[s], by_A[j]);
          grad_A[s] = fused_multiply_add(through, dt.x[j], grad_A[s]);
          if (!vary_B) grad_B[s] += products[s];
          if (!vary_C) grad_C[s] += products[kStates + s];
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
            float* at = my_sums + kind * Layout::kOneSum + t % Layout::kSumSteps * S::kState + n;
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
      const float sum_B = sum_four_steps<S>(by_B), sum_A = sum_four_steps<S>(by_A);
      if (o.lane < 4) {
        const int at = row0 + t0 + o.lane;
        const float dt = dts[at], u = us[at], grad = grads[at];
        // The state passes steps of padding and those behind the end; they have no delta.
        const bool passes = t0 + o.lane >= steps || (marked && (marks[t0 + o.lane] & kPadding) != 0);
        // A was scaled for base 2.
        float grad_dt = u * sum_B + sum_A * (1.0f / kScanLog2E);
        if (p.delta_softplus) grad_dt *= softplus_slope(dt);
        if (passes) grad_dt = 0.0f;
        dts[at] = grad_dt;
        us[at] = skip * grad + dt * sum_B;
        if (gated) gates[at] *= sum_y + skip * u;
        grad_skip += grad * u;
        grad_bias += grad_dt;
      }
      sync_warp();
      if (t0 % Layout::kSumSteps != 0) continue;
      // The sums of these steps are complete.
      sync_threads();
      for (int i = thread; i < Layout::kOneSum; i += kScanThreads) {
        const int t = t0 + i / S::kState, n = i % S::kState;
        if (t >= steps || n >= p.state) continue;
        const int64_t to = (int64_t{block} * p.length + begin + t) * p.state + n;
        float total_B = sums[i], total_C = sums[Layout::kOneSum + i];
        if constexpr (!Layout::kTurns) {
          ARCORE_UNROLL
          for (int w = 1; w < kScanWarps; ++w) {
            total_B += sums[w * 2 * Layout::kOneSum + i];
            total_C += sums[(w * 2 + 1) * Layout::kOneSum + i];
          }
        }
        if (vary_B) a.partial_B[to] = total_B;
        if (vary_C) a.partial_C[to] = total_C;
      }
      sync_threads();
    }

    store_outputs<S>(a.grad_delta, dts, p, o, begin);
    store_outputs<S>(a.grad_u, us, p, o, begin);
    if (gated) store_outputs<S>(a.grad_z, gates, p, o, begin);
    if (!copied) sync_threads();
  }

  if (!packed && o.segment == 0) store_state<S>(a.grad_initial_state, carry, p, o, o.batch);
  store_state<S>(a.partial_A, grad_A, p, o, o.part(cuda.layout));
  if (!vary_B) store_state<S>(a.partial_B, grad_B, p, o, o.part(cuda.layout));
  if (!vary_C) store_state<S>(a.partial_C, grad_C, p, o, o.part(cuda.layout));
  // Lanes 0 to 3 of a channel hold the sums of their steps.
  if (o.lane >= 4) grad_skip = grad_bias = 0.0f;
  grad_skip += shuffle_xor(grad_skip, 1);
  grad_skip += shuffle_xor(grad_skip, 2);
  grad_bias += shuffle_xor(grad_bias, 1);
  grad_bias += shuffle_xor(grad_bias, 2);
  if (o.lane == 0 && o.real()) {
    a.partial_D[o.part(cuda.layout) * p.dim + o.own_channel()] = grad_skip;
    a.partial_delta_bias[o.part(cuda.layout) * p.dim + o.own_channel()] = grad_bias;
  }
}

// The first launch over long rows: what each segment but the first would leave, on its left, of the gradient
// of the state if nothing entered it on its right.
template <typename S>
struct CarriesLayout {
  static constexpr int kSteps = S::kChannels * kScanPitch, kCoefficient = kCudaChunk * S::kPitch;
  static constexpr int kBytes = (3 * kSteps + kCoefficient + kCudaChunk) * 4;
};
// Four blocks would spill with 16 lanes of 4 states, and with 32 of 8.
template <typename S>
ARCORE_LAUNCH_BOUNDS(kScanThreads, (S::kStates == 4   ? 2
                                    : S::kStates == 8 ? 3
                                                      : 4))
ARCORE_KERNEL scan_carries(ARCORE_KERNEL_ARGS BackwardCuda cuda) {
  using Layout = CarriesLayout<S>;
  constexpr int kStates = S::kStates;
  const BackwardArgs& a = cuda.args;
  const Problem& p = a.problem;
  float* dts = reinterpret_cast<float*>(shared_memory());
  float* grads = dts + Layout::kSteps;
  float* gates = grads + Layout::kSteps;
  float* Cs = gates + Layout::kSteps;
  int32_t* marks = reinterpret_cast<int32_t*>(Cs + Layout::kCoefficient);
  const bool marked = cuda.layout.marks != nullptr;
  const bool vary_C = a.in.C.groups != 0, gated = a.in.z.data != nullptr;
  const Owner<S> o = owner_of_thread<S>(cuda.layout);
  if (o.segment == 0) return;
  const float bias = a.in.delta_bias != nullptr && o.real() ? a.in.delta_bias[o.own_channel()] : 0.0f;
  float A[kStates], C[kStates], carry[kStates] = {}, sum_dt = 0.0f;
  bool passes = true;
  ARCORE_UNROLL
  for (int s = 0; s < kStates; ++s) {
    const int n = o.lane * kStates + s;
    A[s] = o.real() && n < p.state ? a.in.A[o.own_channel() * p.state + n] * kScanLog2E : 0.0f;
  }
  load_constant<S>(C, a.in.C, p, o);
  const int row = o.channel * kScanPitch, first = o.lane * kStates;
  const int64_t first_chunk = o.segment * cuda.layout.segment_chunks;
  for (int64_t chunk = (o.end(cuda.layout, p) + kCudaChunk - 1) / kCudaChunk - 1; chunk >= first_chunk;
       --chunk) {
    const int64_t begin = chunk * kCudaChunk;
    stage_inputs<S>(dts, a.in.delta, p, o, begin);
    if (a.grad_out.data != nullptr) stage_inputs<S>(grads, a.grad_out, p, o, begin);
    if (gated) stage_inputs<S>(gates, a.in.z, p, o, begin);
    if (vary_C) stage_coefficient<S>(Cs, a.in.C, p, o, begin);
    if (marked) stage_marks(marks, cuda.layout, p, o.batch, begin);
    sync_threads();
    if (marked && vary_C) clear_padding<S>(Cs, marks);
    for (int t0 = 4 * o.lane; t0 < kCudaChunk; t0 += 4 * S::kLanes) {
      Float4 dt = load_four_steps(dts + row + t0), grad{}, z{};
      if (a.grad_out.data != nullptr) grad = load_four_steps(grads + row + t0);
      if (gated) z = load_four_steps(gates + row + t0);
      ARCORE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const bool off = begin + t0 + k >= p.length || (marked && (marks[t0 + k] & kPadding) != 0);
        const float x = dt.x[k] + bias;
        dt.x[k] = off ? 0.0f : p.delta_softplus ? softplus(x) : x;
        grad.x[k] = off ? 0.0f : gated ? grad.x[k] * sigmoid(z.x[k]) * z.x[k] : grad.x[k];
      }
      store_four_steps(dts + row + t0, dt);
      store_four_steps(grads + row + t0, grad);
    }
    sync_threads();
    ARCORE_NO_UNROLL
    for (int t0 = kCudaChunk - 4; t0 >= 0; t0 -= 4) {
      const Float4 dt = load_four_steps(dts + row + t0), grad = load_four_steps(grads + row + t0);
      ARCORE_UNROLL
      for (int j = 3; j >= 0; --j) {
        const int t = t0 + j;
        if (marked && (marks[t] & kEnd)) {
          load_state<S>(carry, a.grad_last_state, p, o, marks[t] >> 8);
          passes = false;
        }
        if (vary_C) load_step<S>(Cs + t * S::kPitch + first, C);
        sum_dt += dt.x[j];
        const bool starts = marked && (marks[t] & kRestart) != 0;
        ARCORE_UNROLL
        for (int s = 0; s < kStates; ++s) {
          const float G = fused_multiply_add(grad.x[j], C[s], carry[s]);
          carry[s] = starts ? 0.0f : exp2_approx(dt.x[j] * A[s]) * G;
        }
        passes = passes && !starts;
      }
    }
    sync_threads();
  }
  store_end<S>(cuda.layout, p, o, carry, sum_dt, passes);
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

template <bool kPlain>
struct Backward {
  template <typename S>
  struct Launch {
    static int run(const BackwardCuda& cuda, void* stream) {
      const int64_t blocks = cuda.layout.blocks * cuda.args.problem.batch * cuda.layout.segments;
      if (cuda.layout.segments > 1) {
        const int error =
            launch(scan_carries<S>, {blocks, 1, 1, kScanThreads, CarriesLayout<S>::kBytes}, stream, cuda);
        if (error != 0) return error;
      }
      BackwardCuda call = cuda;
      call.ahead =
          kPlain && can_copy_ahead<S>(cuda.args.in, &cuda.args.grad_out, cuda.args.problem, cuda.layout);
      const int64_t shared = BackwardLayout<S>::kBytes + (call.ahead ? AheadBack<S>::kBytes : 0);
      return launch(scan_backward<S, kPlain>, {blocks, 1, 1, kScanThreads, shared}, stream, call);
    }
  };
};

// One file each, since each takes nvcc half a minute: up to 16 states, and more.
int launch_backward_few_plain_sm80(const BackwardCuda&, void* stream);
int launch_backward_few_any_sm80(const BackwardCuda&, void* stream);
int launch_backward_many_plain_sm80(const BackwardCuda&, void* stream);
int launch_backward_many_any_sm80(const BackwardCuda&, void* stream);

}  // namespace arcore::selective_scan
