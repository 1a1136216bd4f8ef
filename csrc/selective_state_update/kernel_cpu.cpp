// CPU step of the selective scan; compiled once per instruction set. README.md beside this file describes the
// loops.
#include "common/state_step.h"
#include "common/vec.h"
#include "selective_state_update/params.h"

namespace arcore::selective_state_update {
namespace ARCORE_ISA {
namespace {

template <typename T>
void read_as(const T* src, int64_t stride, int64_t n, float* dst) {
  if (stride == 1) {
    to_float(src, dst, n);
  } else {
    for (int64_t i = 0; i < n; ++i)
      dst[i] = static_cast<float>(src[i * stride]);
  }
}

// A step of a batch row.
struct At {
  int64_t batch, step;
};

// Elements [begin, begin + n) of one head.
void read(const View& v, At at, int64_t head, int64_t begin, int64_t n, float* dst) {
  const int64_t first = at.batch * v.batch + at.step * v.step + head * v.head + begin * v.last;
  with_type(v.dtype,
            [&](auto type) { read_as(static_cast<const decltype(type)*>(v.data) + first, v.last, n, dst); });
}

void write(const View& v, At at, int64_t head, int64_t begin, int64_t n, const float* src) {
  const int64_t first = at.batch * v.batch + at.step * v.step + head * v.head + begin * v.last;
  with_type(v.dtype, [&](auto type) {
    using T = decltype(type);
    T* dst = static_cast<T*>(v.data) + first;
    if (v.last == 1) {
      from_float(src, dst, n);
    } else {
      for (int64_t i = 0; i < n; ++i)
        dst[i * v.last] = static_cast<T>(src[i]);
    }
  });
}

template <typename T, bool kTied>
void update_channels(const Args& args, int64_t head, int64_t channel, T* state, Slice& s) {
  const State& layout = args.state;
  const bool whole = s.padded == s.states;
  const bool direct = sizeof(T) == 4 && layout.state == 1 && whole;
  Vec sums[kLanes];
  for (int64_t c0 = 0; c0 < s.count; c0 += kLanes) {
    const int64_t valid = min_of<int64_t>(kLanes, s.count - c0);
    const float a_log = kTied ? args.A[head] : 0.0f;
    const auto row_of_A = [&](int64_t c) {
      return kTied ? nullptr : args.A + (head * args.dim + channel + c) * s.states;
    };
    int64_t i = 0;
    if (direct)
      for (; i + kTogether <= valid; i += kTogether) {
        float* h = reinterpret_cast<float*>(state + (c0 + i) * layout.channel);
        advance<kTied, kTogether>(row_of_A(c0 + i), s, c0 + i, a_log, h, h, layout.channel, sums + i);
      }
    for (; i < valid; ++i) {
      const float* A = row_of_A(c0 + i);
      T* row = state + (c0 + i) * layout.channel;
      if (direct) {
        float* h = reinterpret_cast<float*>(row);
        advance<kTied, 1>(A, s, c0 + i, a_log, h, h, 0, sums + i);
        continue;
      }
      read_as(row, layout.state, s.states, s.tail[0]);
      if (!kTied && !whole) {
        to_float(A, s.tail[1], s.states);
        A = s.tail[1];
      }
      advance<kTied, 1>(A, s, c0 + i, a_log, s.tail[0], s.tail[2], 0, sums + i);
      if (layout.state == 1) {
        from_float(s.tail[2], row, s.states);
      } else {
        for (int64_t n = 0; n < s.states; ++n)
          row[n * layout.state] = static_cast<T>(s.tail[2][n]);
      }
    }
    for (; i < kLanes; ++i)
      sums[i] = Vec(0.0f);
    Vec quads[kLanes / 4];
    for (int64_t q = 0; q < kLanes / 4; ++q)
      quads[q] = sum_quad(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]);
    store(s.y + c0, sum_groups(quads));
  }
}

void update_slice(const Args& args, At at, int64_t row, int64_t head, int64_t channel, int64_t count,
                  Slice& s) {
  float x[kSlice];
  s.count = count;
  const int64_t whole = round_up(count, kLanes);
  const int64_t group = head / (args.heads / args.groups);
  read(args.B, at, group, 0, s.states, s.B);
  read(args.C, at, group, 0, s.states, s.C);
  read(args.x, at, head, channel, count, x);
  read(args.dt, at, head, channel, count, s.dt);
  for (int64_t c = count; c < whole; ++c)
    x[c] = s.dt[c] = 0.0f;
  const int64_t first = head * args.dim + channel;
  if (args.dt_bias != nullptr)
    for (int64_t c = 0; c < count; ++c)
      s.dt[c] += args.dt_bias[first + c];
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vec dt = args.softplus ? softplus(load(s.dt + c)) : load(s.dt + c);
    store(s.dt + c, dt * Vec(kLog2e));
    store(s.drive + c, dt * load(x + c));
  }
  with_type(args.state.dtype, [&](auto type) {
    using T = decltype(type);
    T* state = static_cast<T*>(args.state.data) + row * args.state.row + head * args.state.head +
               channel * args.state.channel;
    args.tied ? update_channels<T, true>(args, head, channel, state, s)
              : update_channels<T, false>(args, head, channel, state, s);
  });
  if (args.D != nullptr)
    for (int64_t c = 0; c < count; ++c)
      s.y[c] += args.D[first + c] * x[c];
  if (args.z.data != nullptr) {
    float z[kSlice];
    read(args.z, at, head, channel, count, z);
    for (int64_t c = count; c < whole; ++c)
      z[c] = 0.0f;
    for (int64_t c = 0; c < whole; c += kLanes)
      store(s.y + c, load(s.y + c) * silu(load(z + c)));
  }
  write(args.out, at, head, channel, count, s.y);
}

// Copies a slice of a row's state to its snapshot after `step` steps.
void take_snapshot(const Args& args, int64_t batch, int64_t step, int64_t row, int64_t head, int64_t channel,
                   int64_t count) {
  const Snapshots& to = args.snapshots;
  const State& from = args.state;
  if (to.data == nullptr) return;
  with_type(from.dtype, [&](auto type) {
    using T = decltype(type);
    const T* src =
        static_cast<const T*>(from.data) + row * from.row + head * from.head + channel * from.channel;
    T* dst =
        static_cast<T*>(to.data) + batch * to.batch + step * to.step + head * to.head + channel * to.channel;
    for (int64_t c = 0; c < count; ++c)
      for (int64_t n = 0; n < args.states; ++n)
        dst[c * to.channel + n * to.state] = src[c * from.channel + n * from.state];
  });
}

void update(const Args& args, int64_t begin, int64_t end) {
  const int64_t slices = (args.dim + kSlice - 1) / kSlice;
  Slice s{};
  s.states = args.states;
  s.padded = round_up(args.states, kLanes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / slices, channel = task % slices * kSlice;
    const int64_t count = min_of<int64_t>(kSlice, args.dim - channel);
    for (int64_t batch = 0; batch < args.batch; ++batch) {
      const int64_t row = args.rows != nullptr ? args.rows[batch] : batch;
      const bool padding = args.rows != nullptr && (row == args.pad || row < 0);
      const int64_t real = padding ? 0 : args.counts != nullptr ? args.counts[batch] : args.steps;
      if (!padding) take_snapshot(args, batch, 0, row, head, channel, count);
      for (int64_t step = 0; step < args.steps; ++step) {
        if (step < real) {
          update_slice(args, {batch, step}, row, head, channel, count, s);
        } else {
          std::memset(s.y, 0, sizeof(s.y));
          write(args.out, {batch, step}, head, channel, count, s.y);
        }
        if (!padding) take_snapshot(args, batch, step + 1, row, head, channel, count);
      }
    }
  }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{kSlice, update};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::selective_state_update
