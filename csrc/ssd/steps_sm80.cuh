// What is elementwise beside the scan, for GPUs from sm_80 on: step sizes before it, and the fold of what
// cells add to the states.
#pragma once

#include "ssd/tiles_sm80.cuh"

namespace arcore::ssd {

constexpr int kStepThreads = 128, kStepWarps = kStepThreads / 32;

// A warp per cell and head.
template <int kSteps>
ARCORE_LAUNCH_BOUNDS(kStepThreads, 8)
ARCORE_KERNEL step_sizes(ARCORE_KERNEL_ARGS StepCuda a) {
  constexpr int kMine = kSteps / 32;
  const Args& p = a.in;
  const CudaLayout& layout = a.layout;
  const int64_t blocks = (p.heads + kStepWarps - 1) / kStepWarps;
  const int64_t cell = block_x() / blocks % layout.cells, batch = block_x() / blocks / layout.cells;
  const int64_t head = block_x() % blocks * kStepWarps + warp_index();
  const int lane = lane_index();
  if (head >= p.heads) return;

  const float bias = p.dt_bias != nullptr ? p.dt_bias[head] : 0.0f;
  const double log_of_one = static_cast<double>(p.A[head]) * 1.4426950408889634;
  uint64_t starts = 0, ends = 0, skipped = 0;
  float dt[kMine], slope[kMine];
  double log[kMine];
  bool start[kMine];
  ARCORE_UNROLL
  for (int i = 0; i < kMine; ++i) {
    const int place = lane * kMine + i;
    const int64_t t = cell * kSteps + place;
    const bool inside = t < p.length;
    const int32_t mark = inside && layout.marks != nullptr ? layout.marks[batch * p.length + t] : 0;
    const bool skip = !inside || (mark & kPadding) != 0;
    start[i] = (mark & kRestart) != 0;
    // Lanes hold neighbouring steps, ballots one step of each: the bits of step `place` are put in their
    // place.
    const uint64_t bit = uint64_t{1} << place;
    starts |= start[i] ? bit : 0;
    ends |= (mark & kEnd) != 0 ? bit : 0;
    skipped |= skip ? bit : 0;
    const float raw =
        (skip ? 0.0f
              : load_any(p.dt.data, p.dt.dtype, batch * p.dt.batch + t * p.dt.time + head * p.dt.head)) +
        bias;
    const float step = p.softplus ? softplus(raw) : raw;
    // NaN stays.
    dt[i] = step < p.dt_low ? p.dt_low : step > p.dt_high ? p.dt_high : step;
    // The derivative of softplus is 1 - exp(-softplus).
    slope[i] = skip || step < p.dt_low || step > p.dt_high ? 0.0f : p.softplus ? -expm1f(-step) : 1.0f;
    dt[i] = skip ? 0.0f : dt[i];
    const double exact = skip ? 0.0 : static_cast<double>(dt[i]) * log_of_one;
    log[i] = exact < -kLargestLog ? -kLargestLog : exact > kLargestLog ? kLargestLog : exact;
  }
  // Sums over steps that start anew where a sequence does.
  double sum = log[0];
  bool cut = start[0];
  ARCORE_UNROLL
  for (int i = 1; i < kMine; ++i) {
    sum = start[i] ? log[i] : sum + log[i];
    cut = cut || start[i];
  }
  ARCORE_UNROLL
  for (int delta = 1; delta < 32; delta *= 2) {
    const double before = shuffle_up(sum, delta);
    const bool cut_before = shuffle_up(static_cast<int>(cut), delta) != 0;
    if (lane >= delta) {
      sum = cut ? sum : before + sum;
      cut = cut || cut_before;
    }
  }
  double total = shuffle_up(sum, 1);
  if (lane == 0) total = 0.0;
  const int64_t row = (batch * p.heads + head) * layout.cells * kSteps + cell * kSteps;
  ARCORE_UNROLL
  for (int i = 0; i < kMine; ++i) {
    total = start[i] ? log[i] : total + log[i];
    const float high = static_cast<float>(total);
    const int64_t at = row + lane * kMine + i;
    float* to = layout.dt + at;
    store_global(to, dt[i]);
    store_global(to + layout.sizes, high);
    store_global(to + 2 * layout.sizes, static_cast<float>(total - static_cast<double>(high)));
    if (layout.slopes) store_global(to + 3 * layout.sizes, slope[i]);
  }
  if (head != 0) return;
  for (int mask = 16; mask > 0; mask >>= 1) {
    starts |= shuffle_xor(starts, mask);
    ends |= shuffle_xor(ends, mask);
    skipped |= shuffle_xor(skipped, mask);
  }
  if (lane == 0) layout.cell_marks[batch * layout.cells + cell] = {starts, ends, skipped};
}

constexpr int kFoldThreads = 128;

// A thread per state.
ARCORE_LAUNCH_BOUNDS(kFoldThreads, 8)
ARCORE_KERNEL fold_states(ARCORE_KERNEL_ARGS FoldCuda a) {
  constexpr int kAhead = 8;  // loads under way
  const int64_t row = a.heads * a.size, per_row = (row + kFoldThreads - 1) / kFoldThreads;
  const int64_t batch = block_x() / per_row, at = block_x() % per_row * kFoldThreads + thread_index();
  if (at >= row) return;
  const int64_t head = at / a.size;
  bool before = a.enter != nullptr;
  float state = before ? a.enter[batch * row + at] : 0.0f;
  for (int64_t first = 0; first < a.cells; first += kAhead) {
    float own[kAhead], passes[kAhead];
    ARCORE_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + k, cell = a.backwards ? a.cells - 1 - i : i;
      if (i >= a.cells) continue;
      own[k] = a.states[(batch * a.cells + cell) * row + at];
      passes[k] = load_readonly(a.passes + (batch * a.cells + cell) * a.heads + head);
    }
    ARCORE_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + k, cell = a.backwards ? a.cells - 1 - i : i;
      if (i >= a.cells) continue;
      a.states[(batch * a.cells + cell) * row + at] = state;
      // -1: nothing passes.
      state = before && !(passes[k] < 0.0f) ? fused_multiply_add(passes[k], state, own[k]) : own[k];
      before = true;
    }
  }
  if (a.leave != nullptr) a.leave[batch * row + at] = state;
}

// ---- gate ----

// A thread per element.
ARCORE_LAUNCH_BOUNDS(kFoldThreads, 8)
ARCORE_KERNEL through_gate(ARCORE_KERNEL_ARGS GateCuda a) {
  const Args& p = a.in;
  const int64_t i = block_x() * kFoldThreads + thread_index();
  const int64_t channel = i % p.dim, head = i / p.dim % p.heads, t = i / p.dim / p.heads % p.length,
                batch = i / p.dim / p.heads / p.length;
  if (batch >= p.batch) return;
  const auto at = [&](const View& v) {
    return batch * v.batch + t * v.time + head * v.head + channel * v.last;
  };
  const int64_t cell = t / a.layout.steps;
  const uint64_t skipped = a.layout.cell_marks[batch * a.layout.cells + cell].skipped;
  float* y = static_cast<float*>(a.y.data) + at(a.y);
  float grad_y = 0.0f, grad_z = 0.0f;
  if ((skipped >> (t - cell * a.layout.steps) & 1) == 0 && a.grad_out.data != nullptr) {
    const float grad = load_any(a.grad_out.data, a.grad_out.dtype, at(a.grad_out)),
                z = load_any(p.z.data, p.z.dtype, at(p.z)), s = sigmoid(z), scaled = grad * s;
    grad_z = scaled * *y * fused_multiply_add(z, 1.0f - s, 1.0f);
    grad_y = scaled * z;
  }
  *y = grad_y;
  store_any(a.grad_z.data, a.grad_z.dtype, at(a.grad_z), grad_z);
}

// ---- sums over blocks ----

// dB and dC of the cells of one launch: the slices of a group in their order. A thread per (batch row, group,
// step, state).
ARCORE_LAUNCH_BOUNDS(kFoldThreads, 8)
ARCORE_KERNEL sum_slices(ARCORE_KERNEL_ARGS GradientCuda a) {
  const Args& p = a.in;
  const View& to = block_y() == 0 ? a.grad_B : a.grad_C;
  const float* partial = block_y() == 0 ? a.partial_B : a.partial_C;
  const int64_t steps = (a.end - a.begin) * a.layout.steps, i = block_x() * kFoldThreads + thread_index();
  const int64_t n = i % p.states, step = i / p.states % steps, group = i / p.states / steps % p.groups,
                batch = i / p.states / steps / p.groups, t = a.begin * a.layout.steps + step;
  if (batch >= p.batch || t >= p.length) return;
  const float* from = partial + ((batch * p.groups + group) * a.slices * steps + step) * p.states + n;
  float sum = 0.0f;
  for (int64_t s = 0; s < a.slices; ++s)
    sum += load_readonly(from + s * steps * p.states);
  store_any(to.data, to.dtype, batch * to.batch + t * to.time + group * to.head + n * to.last, sum);
}

}  // namespace arcore::ssd
