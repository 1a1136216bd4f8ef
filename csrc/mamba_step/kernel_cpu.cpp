// CPU kernels of one Mamba layer for single tokens; compiled once per instruction set. README.md beside this
// file describes the passes.
#include "common/state_step.h"
#include "common/vec.h"
#include "common/weight_products.h"
#include "mamba_step/params.h"

namespace arcore::mamba_step {
namespace ARCORE_ISA {
namespace {

static_assert(kGroup % kLanes == 0 && kSlice % kLanes == 0 && kMostStates == kMaxStates);

void widen(const Args& args) {
  with_type(args.dtype, [&](auto type) {
    to_float(static_cast<const decltype(type)*>(args.given), args.x, args.batch * args.dim);
  });
}

void normalise(const Args& args) {
  normalise_rows(args.x, args.batch, args.dim, args.eps, args.norm, args.normed);
}

// Stores lanes of a row that has `left` elements more.
template <typename T>
inline void store_some(T* p, Vec x, int64_t left) {
  if (left >= kLanes)
    store_lanes(p, x);
  else
    store_lanes(p, x, left);
}

// Lanes of numbers that lie `stride` apart, of which there are `left` more.
inline Vec load_apart(const float* p, int64_t stride, int64_t left) {
  if (stride == 1) return load_some(p, left);
  alignas(64) float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i)
    lanes[i] = i < left ? p[i * stride] : 0.0f;
  return load(lanes);
}

template <typename S>
void convolve_by(const Args& args, int64_t begin, int64_t end) {
  const int64_t before = args.taps - 1;
  const Packed<float> out{args.mixed, args.batch, args.inner};
  for (int64_t c = begin * kGroup; c < end * kGroup; c += kLanes) {
    const int64_t left = args.inner - c;
    if (left <= 0) {
      for (int64_t b = 0; b < args.batch; ++b)
        store(out.at(b, c), Vec(0.0f));
      continue;
    }
    Vec taps[kMostTaps];
    for (int64_t j = 0; j < args.taps; ++j)
      taps[j] = load_apart(args.conv_weight + c * args.weight_channel + j * args.weight_tap,
                           args.weight_channel, left);
    const Vec bias = args.conv_bias != nullptr ? load_some(args.conv_bias + c, left) : Vec(0.0f);
    for (int64_t b = 0; b < args.batch; ++b) {
      S* kept = static_cast<S*>(args.conv_state) + b * args.conv_row + c;
      const Vec fresh = load_some(args.projected + b * args.in_proj.rows + c, left);
      Vec sum = bias;
      for (int64_t j = 0; j < before; ++j) {
        const Vec input = load_some(kept + j * args.conv_time, left);
        sum = fma(taps[j], input, sum);
        if (j > 0) store_some(kept + (j - 1) * args.conv_time, input, left);
      }
      store_some(kept + (before - 1) * args.conv_time, fresh, left);
      store(out.at(b, c), silu(fma(taps[before], fresh, sum)));
    }
  }
}

void convolve(const Args& args, int64_t begin, int64_t end) {
  with_type(args.conv_dtype, [&](auto type) { convolve_by<decltype(type)>(args, begin, end); });
}

// The states of channels [c, c + valid) of a slice that begins at `first`, and their outputs.
void advance_lanes(const Args& args, Slice& s, int64_t first, int64_t c, int64_t valid, float* state) {
  const bool whole = s.padded == s.states;
  const float* A = args.A + (first + c) * s.states;
  float* rows = state + (first + c) * s.states;
  Vec sums[kLanes];
  int64_t i = 0;
  if (whole)
    for (; i + kTogether <= valid; i += kTogether) {
      float* h = rows + i * s.states;
      advance<false, kTogether>(A + i * s.states, s, c + i, 0.0f, h, h, s.states, sums + i);
    }
  for (; i < valid; ++i) {
    float* h = rows + i * s.states;
    if (whole) {
      advance<false, 1>(A + i * s.states, s, c + i, 0.0f, h, h, 0, sums + i);
      continue;
    }
    to_float(h, s.tail[0], s.states);
    to_float(A + i * s.states, s.tail[1], s.states);
    advance<false, 1>(s.tail[1], s, c + i, 0.0f, s.tail[0], s.tail[2], 0, sums + i);
    from_float(s.tail[2], h, s.states);
  }
  for (; i < kLanes; ++i)
    sums[i] = Vec(0.0f);
  Vec quads[kLanes / 4];
  for (int64_t q = 0; q < kLanes / 4; ++q)
    quads[q] = sum_quad(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]);
  store(s.y + c, sum_groups(quads));
}

void scan(const Args& args, int64_t begin, int64_t end) {
  Slice s{};
  s.states = args.states;
  s.padded = round_up(args.states, kLanes);
  const Packed<float> mixed{args.mixed, args.batch, args.inner};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * kSlice;
    s.count = min_of(kSlice, args.inner - first);
    multiply(args.dt_proj, args.batch, args.low_rank, args.delta, false, first, first + s.count);
    for (int64_t b = 0; b < args.batch; ++b) {
      const float* selected = args.selected + b * args.x_proj.rows + args.rank;
      to_float(selected, s.B, s.states);
      to_float(selected + s.states, s.C, s.states);
      for (int64_t c = 0; c < s.count; c += kLanes) {
        const Vec dt = softplus(load_some(args.delta + b * args.inner + first + c, s.count - c));
        store(s.dt + c, dt * Vec(kLog2e));
        store(s.drive + c, dt * load(mixed.at(b, first + c)));
      }
      const float* z = args.projected + b * args.in_proj.rows + args.inner + first;
      for (int64_t c = 0; c < s.count; c += kLanes) {
        const int64_t left = s.count - c;
        advance_lanes(args, s, first, c, min_of<int64_t>(kLanes, left), args.state + b * args.state_row);
        float* u = mixed.at(b, first + c);
        const Vec y = fma(load_some(args.D + first + c, left), load(u), load(s.y + c));
        store(u, y * silu(load_some(z + c, left)));
      }
    }
  }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{kSlice, widen, narrow, normalise, pack, multiply, convolve, scan};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::mamba_step
