// What the sm_80 forward and backward share: which thread owns what, and the staging of a chunk in shared
// memory.
//
// kLanes lanes of a warp own a channel, each kStates of its states, and go through time together; sums over
// states are exchanges between these lanes. B, C and the channels' inputs of a chunk of steps are staged in
// shared memory.
#pragma once

#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "common/sm80/sequence.cuh"
#include "common/sm80/sequence_window.cuh"
#include "selective_scan/params.h"

namespace arcore::selective_scan {

// The pitch lets 16-byte reads of 8 channels at one step hit every bank once.
constexpr int kScanThreads = 128, kScanWarps = kScanThreads / 32, kScanPitch = kCudaChunk + 4;
constexpr float kScanLog2E = 1.4426950408889634f;

template <int kLanesOfChannel, int kStatesOfLane>
struct Shape {
  static constexpr int kLanes = kLanesOfChannel, kStates = kStatesOfLane, kState = kLanes * kStates;
  static constexpr int kChannels = kScanThreads / kLanes;
  // Of B and C, [step][state]; padded against bank conflicts where shared memory allows it.
  static constexpr int kPitch = kState > 128 ? kState : kState + 4;
};

// Which channels and which states a thread owns.
template <typename S>
struct Owner {
  int64_t batch, segment, channel0;  // first channel of the block
  int channels;                      // of the block
  int channel, lane;                 // within the block; within the lanes of the channel

  ARCORE_DEVICE bool real() const { return channel < channels; }
  ARCORE_DEVICE int64_t own_channel() const { return channel0 + channel; }
  // The first step of the segment, and the one behind its last.
  ARCORE_DEVICE int64_t begin(const CudaLayout& layout) const {
    return segment * layout.segment_chunks * kCudaChunk;
  }
  ARCORE_DEVICE int64_t end(const CudaLayout& layout, const Problem& p) const {
    const int64_t next = (segment + 1) * layout.segment_chunks * kCudaChunk;
    return next < p.length ? next : p.length;
  }
  // Where the segment's parts of sums over rows go.
  ARCORE_DEVICE int64_t part(const CudaLayout& layout) const { return batch * layout.segments + segment; }
};

template <typename S>
ARCORE_DEVICE Owner<S> owner_of_thread(const CudaLayout& layout) {
  const int64_t tiles = (layout.cell + S::kChannels - 1) / S::kChannels;
  const int64_t block = block_x() % layout.blocks, cell = block / tiles, first = block % tiles * S::kChannels;
  const int64_t left = layout.cell - first;
  Owner<S> o;
  o.batch = block_x() / layout.blocks / layout.segments;
  o.segment = block_x() / layout.blocks % layout.segments;
  o.channel0 = cell * layout.cell + first;
  o.channels = static_cast<int>(left < S::kChannels ? left : S::kChannels);
  o.channel = thread_index() / S::kLanes;
  o.lane = thread_index() % S::kLanes;
  return o;
}

// A chunk of a tensor as [channel][step], zeros outside.
template <typename S>
ARCORE_DEVICE void stage_inputs(float* to, const Sequence& from, const Problem& p, const Owner<S>& o,
                                int64_t begin) {
  load_window<S::kChannels>(from, {o.batch, o.channel0, begin, p.length, o.channels, kCudaChunk, kScanPitch},
                            to, [](int, int64_t) { return 0.0f; });
}
template <typename S>
ARCORE_DEVICE void store_outputs(const Sequence& to, const float* from, const Problem& p, const Owner<S>& o,
                                 int64_t begin) {
  store_window<S::kChannels>(to, {o.batch, o.channel0, begin, p.length, o.channels, kCudaChunk, kScanPitch},
                             from);
}

// B or C of a chunk as [step][state] floats, zeros outside.
template <typename S>
ARCORE_DEVICE void stage_coefficient(float* to, const Coefficient& m, const Problem& p, const Owner<S>& o,
                                     int64_t begin) {
  const int64_t bytes = m.dtype == StorageType::kFloat32 ? 4 : 2, group = o.channel0 / (p.dim / m.groups);
  const Sequence rows{static_cast<char*>(m.data) + group * m.channel * bytes, m.batch, m.state, m.time,
                      m.dtype};
  load_window<S::kState, true>(
      rows, {o.batch, 0, begin, p.length, static_cast<int>(p.state), kCudaChunk, S::kPitch}, to,
      [](int, int64_t) { return 0.0f; });
}

// Zeros in the steps of B or C that are padding: with dt = 0 beside them they keep the state, whatever (even
// NaN) lies there. Between barriers.
template <typename S>
ARCORE_DEVICE void clear_padding(float* coefficient, const int32_t* marks) {
  for (int i = thread_index(); i < kCudaChunk * S::kState; i += kScanThreads)
    if ((marks[i / S::kState] & kPadding) != 0)
      store_shared(coefficient + i / S::kState * S::kPitch + i % S::kState, 0.0f);
}

// ---- chunks that are copied ahead ----

enum AheadInput { kAheadDelta, kAheadU, kAheadZ, kAheadGradOut };

// Rows of 16-bit inputs, copied as they are while the block works on another chunk: 32 steps of delta, u, z
// and (four inputs) of the gradients of the output, a channel each, and of B and C, a state each.
template <typename S, int kInputs>
struct AheadRows {
  static constexpr bool kUsed = S::kState <= 64;
  static constexpr int kRowBytes = kCudaChunk * 2, kParts = kRowBytes / 16;
  static constexpr int kB = kInputs * S::kChannels, kC = kB + S::kState, kRows = kC + S::kState;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kMine = (kRows * kParts + kScanThreads - 1) / kScanThreads;
  static_assert(kScanThreads % kParts == 0, "a thread's parts of its rows are the same");

  unsigned char* rows;

  // The i-th row that a thread copies a part of.
  ARCORE_DEVICE static int row_of(int thread, int i) { return (thread + i * kScanThreads) / kParts; }
  // Where a row starts in memory, null where it has nothing.
  ARCORE_DEVICE static const char* start(int row, const Inputs& in, const Sequence* grad_out,
                                         const Problem& p, const Owner<S>& o) {
    if (row < kB) {
      const int which = row / S::kChannels;
      const Sequence& s = which == kAheadDelta ? in.delta
                          : which == kAheadU   ? in.u
                          : which == kAheadZ   ? in.z
                                               : *grad_out;
      if (s.data == nullptr) return nullptr;
      return static_cast<const char*>(s.data) +
             2 * (o.batch * s.batch + (o.channel0 + row % S::kChannels) * s.channel);
    }
    const Coefficient& m = row < kC ? in.B : in.C;
    const int n = row < kC ? row - kB : row - kC;
    if (n >= p.state) return nullptr;
    return static_cast<const char*>(m.data) +
           2 * (o.batch * m.batch + o.channel0 / (p.dim / m.groups) * m.channel + n * m.state);
  }
  ARCORE_DEVICE void copy_part(int thread, int i, const char* from, int64_t begin, int64_t end) const {
    const int row = row_of(thread, i), part = thread % kParts;
    const int64_t at = begin + part * 8;
    const bool there = from != nullptr && at < end;
    const void* source = there ? static_cast<const void*>(from + 2 * at) : rows;
    if (row < kRows) copy_async<16>(rows + row * kRowBytes + part * 16, source, there);
  }
  ARCORE_DEVICE static void widen(uint32_t word, bool bfloat, float& low, float& high) {
    if (bfloat)
      unpack2<bfloat16>(word, low, high);
    else
      unpack2<float16>(word, low, high);
  }
  // Four steps of a channel's input.
  ARCORE_DEVICE Float4 four(AheadInput input, int channel, int step, bool bfloat) const {
    const int row = static_cast<int>(input) * S::kChannels + channel;
    const Vector8 v = load_shared(reinterpret_cast<const Vector8*>(rows + row * kRowBytes + step * 2));
    Float4 out;
    widen(v.word[0], bfloat, out.x[0], out.x[1]);
    widen(v.word[1], bfloat, out.x[2], out.x[3]);
    return out;
  }
  // B or C as [step][state] floats.
  ARCORE_DEVICE void transpose(float* to, int first_row, bool bfloat) const {
    for (int i = thread_index(); i < S::kState * kParts; i += kScanThreads) {
      const int n = i / kParts, step = i % kParts * 8;
      const auto v =
          load_shared(reinterpret_cast<const Vector16*>(rows + (first_row + n) * kRowBytes + step * 2));
      ARCORE_UNROLL
      for (int w = 0; w < 4; ++w) {
        float low, high;
        widen(v.word[w], bfloat, low, high);
        store_shared(to + (step + 2 * w) * S::kPitch + n, low);
        store_shared(to + (step + 2 * w + 1) * S::kPitch + n, high);
      }
    }
  }
};

// Whether a launch may copy ahead: one 16-bit type, neighbours in time in memory, 16-byte aligned rows of
// whole 16 bytes, and blocks without missing channels.
template <typename S>
bool can_copy_ahead(const Inputs& in, const Sequence* grad_out, const Problem& p, const CudaLayout& layout) {
  if (!AheadRows<S, 3>::kUsed || layout.marks != nullptr || in.B.groups == 0 || in.C.groups == 0)
    return false;
  const StorageType type = in.u.dtype;
  bool good = type != StorageType::kFloat32 && p.length % 8 == 0 && layout.cell % S::kChannels == 0;
  auto look = [&](const void* data, StorageType dtype, int64_t time, int64_t a, int64_t b, int64_t c) {
    good = good && dtype == type && time == 1 && ((a | b | c) & 7) == 0 &&
           (reinterpret_cast<uintptr_t>(data) & 15) == 0;
  };
  for (const Sequence* s : {&in.u, &in.delta, &in.z, grad_out})
    if (s != nullptr && s->data != nullptr) look(s->data, s->dtype, s->time, s->batch, s->channel, 0);
  for (const Coefficient* m : {&in.B, &in.C})
    look(m->data, m->dtype, m->time, m->batch, m->channel, m->state);
  return good;
}

// This lane's states of one step of B or C.
template <typename S>
ARCORE_DEVICE void load_step(const float* from, float (&to)[S::kStates]) {
  if constexpr (S::kStates % 4 == 0) {
    ARCORE_UNROLL
    for (int s = 0; s < S::kStates; s += 4) {
      const Float4 four = load_shared(reinterpret_cast<const Float4*>(from + s));
      ARCORE_UNROLL
      for (int k = 0; k < 4; ++k)
        to[s + k] = four.x[k];
    }
  } else {
    ARCORE_UNROLL
    for (int s = 0; s < S::kStates; ++s)
      to[s] = load_shared(from + s);
  }
}

ARCORE_DEVICE Float4 load_four_steps(const float* from) {
  return load_shared(reinterpret_cast<const Float4*>(from));
}
ARCORE_DEVICE void store_four_steps(float* to, const Float4& four) {
  store_shared(reinterpret_cast<Float4*>(to), four);
}

// A constant B or C of this thread's states.
template <typename S>
ARCORE_DEVICE void load_constant(float (&to)[S::kStates], const Coefficient& m, const Problem& p,
                                 const Owner<S>& o) {
  ARCORE_UNROLL
  for (int s = 0; s < S::kStates; ++s) {
    const int n = o.lane * S::kStates + s;
    to[s] = m.groups == 0 && o.real() && n < p.state
                ? load_any(m.data, m.dtype, o.own_channel() * m.channel + n * m.state)
                : 0.0f;
  }
}

ARCORE_DEVICE void stage_marks(int32_t* to, const CudaLayout& layout, const Problem& p, int64_t batch,
                               int64_t begin) {
  for (int t = thread_index(); t < kCudaChunk; t += kScanThreads)
    to[t] = begin + t < p.length ? layout.marks[batch * p.length + begin + t] : kPadding;
}

template <typename S>
ARCORE_DEVICE void load_state(float (&h)[S::kStates], const float* from, const Problem& p, const Owner<S>& o,
                              int64_t row) {
  ARCORE_UNROLL
  for (int s = 0; s < S::kStates; ++s) {
    const int n = o.lane * S::kStates + s;
    h[s] = from != nullptr && o.real() && n < p.state ? from[(row * p.dim + o.own_channel()) * p.state + n]
                                                      : 0.0f;
  }
}
template <typename S>
ARCORE_DEVICE void store_state(float* to, const float (&h)[S::kStates], const Problem& p, const Owner<S>& o,
                               int64_t row) {
  if (!o.real() || to == nullptr) return;
  ARCORE_UNROLL
  for (int s = 0; s < S::kStates; ++s) {
    const int n = o.lane * S::kStates + s;
    if (n < p.state) to[(row * p.dim + o.own_channel()) * p.state + n] = h[s];
  }
}

// The kept states: [batch, slots, state, dim].
template <typename S>
ARCORE_DEVICE int64_t kept_at(const Problem& p, const Owner<S>& o, int64_t slot, int n) {
  return ((o.batch * p.slots + slot) * p.state + n) * p.dim + o.own_channel();
}

// ---- segments ----

template <typename S>
ARCORE_DEVICE int64_t end_at(const CudaLayout& layout, const Problem& p, const Owner<S>& o, int64_t segment,
                             int n) {
  return ((o.batch * layout.segments + segment) * p.state + n) * p.dim + o.own_channel();
}
// What leaves the segment, and what becomes of what enters it.
template <typename S>
ARCORE_DEVICE void store_end(const CudaLayout& layout, const Problem& p, const Owner<S>& o,
                             const float (&end)[S::kStates], float sum_dt, bool passes) {
  if (!o.real()) return;
  ARCORE_UNROLL
  for (int s = 0; s < S::kStates; ++s) {
    const int n = o.lane * S::kStates + s;
    if (n < p.state) layout.ends[end_at<S>(layout, p, o, o.segment, n)] = end[s];
  }
  if (o.lane == 0) {
    float* to = layout.passes + o.part(layout) * 2 * p.dim + o.own_channel();
    to[0] = sum_dt;
    to[p.dim] = passes ? 1.0f : 0.0f;
  }
}
// What enters this segment, from what entered the first one (kForward) or the last.
template <typename S, bool kForward>
ARCORE_DEVICE void enter_segment(const CudaLayout& layout, const Problem& p, const Owner<S>& o,
                                 const float (&A)[S::kStates], float (&state)[S::kStates]) {
  if (!o.real()) return;
  const int64_t count = kForward ? o.segment : layout.segments - 1 - o.segment;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t segment = kForward ? i : layout.segments - 1 - i;
    const float* from = layout.passes + (o.batch * layout.segments + segment) * 2 * p.dim + o.own_channel();
    const float sum_dt = from[0];
    const bool passes = from[p.dim] != 0.0f;
    ARCORE_UNROLL
    for (int s = 0; s < S::kStates; ++s) {
      const int n = o.lane * S::kStates + s;
      if (n >= p.state) continue;
      const float end = layout.ends[end_at<S>(layout, p, o, segment, n)];
      state[s] = passes ? fused_multiply_add(exp2_approx(sum_dt * A[s]), state[s], end) : end;
    }
  }
}

// Sums of four steps over the lanes of a channel; lane l (mod 4) gets that of step l.
template <typename S>
ARCORE_DEVICE float sum_four_steps(const float (&y)[4]) {
  float v[4] = {y[0], y[1], y[2], y[3]};
  for (int mask = S::kLanes / 2; mask >= 4; mask >>= 1)
    ARCORE_UNROLL
  for (int j = 0; j < 4; ++j)
    v[j] += shuffle_xor(v[j], mask);
  const int lane = lane_index();
  const bool upper = (lane & 2) != 0;
  const float a = (upper ? v[2] : v[0]) + shuffle_xor(upper ? v[0] : v[2], 2);
  const float b = (upper ? v[3] : v[1]) + shuffle_xor(upper ? v[1] : v[3], 2);
  const bool odd = (lane & 1) != 0;
  return (odd ? b : a) + shuffle_xor(odd ? a : b, 1);
}

// Pick the narrowest shape that holds the states: few are up to kFewStates.
constexpr int64_t kFewStates = 16;

template <template <typename> class Launch, typename Args>
int launch_for_few_states(const Args& args, int64_t state, void* stream) {
  if (state <= 4) return Launch<Shape<4, 1>>::run(args, stream);
  if (state <= 8) return Launch<Shape<4, 2>>::run(args, stream);
  return Launch<Shape<4, 4>>::run(args, stream);
}
template <template <typename> class Launch, typename Args>
int launch_for_many_states(const Args& args, int64_t state, void* stream) {
  if (state <= 32) return Launch<Shape<8, 4>>::run(args, stream);
  if (state <= 64) return Launch<Shape<16, 4>>::run(args, stream);
  if (state <= 128) return Launch<Shape<32, 4>>::run(args, stream);
  return Launch<Shape<32, 8>>::run(args, stream);
}

inline int64_t channels_for_state(int64_t state) {
  return state <= 16 ? 32 : state <= 32 ? 16 : state <= 64 ? 8 : 4;
}

}  // namespace arcore::selective_scan
