// CPU forward, backward and update; compiled once per instruction set. README.md beside this file describes
// the loops.
#include <type_traits>

#include "causal_conv1d/params.h"
#include "common/ask.h"
#include "common/vec.h"

namespace arcore::causal_conv1d {
namespace ARCORE_ISA {
namespace {

// Steps that a group of channels is taken through at once: its rows stay in the first-level cache.
constexpr int64_t kSteps = 256;
// Where channels lie side by side each step is in another page, which hardware does not see coming: lines are
// asked for so many steps ahead.
constexpr int64_t kAhead = 8;
// Taps up to which one new input per channel has a loop of its own.
constexpr int64_t kMaxTaps = 8;

// Rows of a group: [lanes, stride] floats.
struct Rows {
  float* data;
  int64_t stride;
  float* row(int64_t lane) const { return data + lane * stride; }
};

int64_t row_stride(int64_t width) {
  // Room for the inputs before the steps, for whole vectors after them, and an odd number of cache lines.
  return round_up(kSteps + width - 1 + kLanes, 32) + 16;
}

// Steps [begin, begin + length) of up to kLanes channels -> rows[lane][0, length).
template <typename T>
void load_rows(const Sequence& s, int64_t batch, int64_t channel, int64_t valid, int64_t begin,
               int64_t length, const Rows& rows, float* block) {
  const T* first = static_cast<const T*>(s.data) + batch * s.batch + channel * s.channel + begin * s.time;
  if (s.time == 1) {
    for (int64_t c = 0; c < valid; ++c)
      to_float(first + c * s.channel, rows.row(c), length);
  } else if (s.channel == 1 && valid == kLanes) {
    int64_t t = 0;
    for (; t + kLanes <= length; t += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        ask_for_reading(first + (t + kLanes + i) * s.time);
        store(block + i * kLanes, load_lanes(first + (t + i) * s.time));
      }
      transpose_block(block, kLanes, rows.data + t, rows.stride);
    }
    for (; t < length; ++t)
      for (int64_t c = 0; c < kLanes; ++c)
        rows.row(c)[t] = static_cast<float>(first[c + t * s.time]);
  } else {
    for (int64_t c = 0; c < valid; ++c)
      for (int64_t t = 0; t < length; ++t)
        rows.row(c)[t] = static_cast<float>(first[c * s.channel + t * s.time]);
  }
}

template <typename T>
void store_rows(const Sequence& s, int64_t batch, int64_t channel, int64_t valid, int64_t begin,
                int64_t length, const Rows& rows, float* block) {
  T* first = static_cast<T*>(s.data) + batch * s.batch + channel * s.channel + begin * s.time;
  if (s.time == 1) {
    for (int64_t c = 0; c < valid; ++c)
      from_float(rows.row(c), first + c * s.channel, length);
  } else if (s.channel == 1 && valid == kLanes) {
    int64_t t = 0;
    for (; t + kLanes <= length; t += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i)
        ask_for_writing(first + (t + kLanes + i) * s.time);
      transpose_block(rows.data + t, rows.stride, block, kLanes);
      for (int64_t i = 0; i < kLanes; ++i)
        store_lanes(first + (t + i) * s.time, load(block + i * kLanes));
    }
    for (; t < length; ++t)
      for (int64_t c = 0; c < kLanes; ++c)
        first[c + t * s.time] = static_cast<T>(rows.row(c)[t]);
  } else {
    for (int64_t c = 0; c < valid; ++c)
      for (int64_t t = 0; t < length; ++t)
        first[c * s.channel + t * s.time] = static_cast<T>(rows.row(c)[t]);
  }
}

// out[t] = act(bias + sum_j weight[j] in[t + j]) for whole vectors that cover [0, length). kWidth = 0 reads
// `width`.
template <int kWidth, bool kMasked, bool kSilu>
void filter(const float* in, const float* weight, int64_t width, Vec bias, const uint32_t* masks,
            int64_t mask_stride, int64_t length, float* out) {
  const int64_t taps = kWidth ? kWidth : width;
  Vec w[kWidth ? kWidth : 1];
  for (int j = 0; j < kWidth; ++j)
    w[j] = Vec(weight[j]);
  for (int64_t t = 0; t < length; t += kLanes) {
    Vec sum = bias;
#pragma GCC unroll 4
    for (int64_t j = 0; j < taps; ++j) {
      Vec x = load(in + t + j);
      if (kMasked) x = keep_bits(x, masks + j * mask_stride + t);
      sum = fma(kWidth ? w[kWidth ? j : 0] : Vec(weight[j]), x, sum);
    }
    store(out + t, kSilu ? silu(sum) : sum);
  }
}

using Filter = void (*)(const float*, const float*, int64_t, Vec, const uint32_t*, int64_t, int64_t, float*);

template <bool kMasked, bool kSilu>
Filter pick_filter(int64_t width) {
  switch (width) {
    case 2:
      return filter<2, kMasked, kSilu>;
    case 3:
      return filter<3, kMasked, kSilu>;
    case 4:
      return filter<4, kMasked, kSilu>;
    default:
      return filter<0, kMasked, kSilu>;
  }
}
Filter pick_filter(int64_t width, bool masked, bool with_silu) {
  if (masked) return with_silu ? pick_filter<true, true>(width) : pick_filter<true, false>(width);
  return with_silu ? pick_filter<false, true>(width) : pick_filter<false, false>(width);
}

// What one group of channels of one batch row needs.
struct Group {
  int64_t batch, channel, valid;

  Group(const Problem& p, int64_t task) {
    const int64_t groups = (p.dim + kLanes - 1) / kLanes;
    batch = task / groups;
    channel = task % groups * kLanes;
    valid = min_of<int64_t>(kLanes, p.dim - channel);
  }
};

// The masks of a window as [width, kSteps + kLanes], so that whole vectors may be read.
const uint32_t* window_masks(const Problem& p, const Inputs& in, int64_t batch, int64_t begin, int64_t length,
                             float* room) {
  if (in.masks == nullptr) return nullptr;
  auto* masks = reinterpret_cast<uint32_t*>(room);
  for (int64_t j = 0; j < p.width; ++j) {
    uint32_t* row = masks + j * (kSteps + kLanes);
    std::memcpy(row, in.masks + (batch * p.width + j) * p.length + begin, static_cast<size_t>(length) * 4);
    std::memset(row + length, 0, kLanes * 4);
  }
  return masks;
}

// The inputs before a row's first step.
void load_history(const Problem& p, const Inputs& in, const Group& g, const Rows& x) {
  const int64_t width = p.width - 1;
  for (int64_t c = 0; c < kLanes; ++c)
    for (int64_t j = 0; j < width; ++j)
      x.row(c)[j] = in.history != nullptr && c < g.valid
                        ? in.history[(g.batch * p.dim + g.channel + c) * width + j]
                        : 0.0f;
}

int64_t forward_workspace(const Problem& p) {
  return 2 * kLanes * row_stride(p.width) + kLanes * kLanes + p.width * (kSteps + kLanes) + 64;
}

// Whole vectors of steps can be read and written where they are.
bool in_place(const Sequence& s) {
  return s.dtype == StorageType::kFloat32 && s.time == 1;
}

// A group whose rows lie contiguous in time as floats, row by row: only outputs that read inputs before the
// row, and the last ones that fill no vector, go through `buffer`.
void filter_in_place(const ForwardArgs& args, const Group& g, Filter run, float* buffer) {
  const Problem& p = args.problem;
  const Sequence &x = args.in.x, &out = args.out;
  const int64_t before = p.width - 1, head = min_of<int64_t>(round_up(before, kLanes), p.length);
  const int64_t tail = (p.length - head) % kLanes, body = p.length - head - tail;
  float* result = buffer + round_up(before + head + 2 * kLanes, kLanes);
  for (int64_t c = g.channel; c < g.channel + g.valid; ++c) {
    const float* in = static_cast<const float*>(x.data) + g.batch * x.batch + c * x.channel;
    float* to = static_cast<float*>(out.data) + g.batch * out.batch + c * out.channel;
    const float* weight = args.in.weight + c * p.width;
    const Vec bias(args.in.bias != nullptr ? args.in.bias[c] : 0.0f);
    const auto through_buffer = [&](int64_t begin, int64_t length) {
      std::memset(buffer + before + length, 0, kLanes * sizeof(float));
      run(buffer, weight, p.width, bias, nullptr, 0, length, result);
      std::memcpy(to + begin, result, static_cast<size_t>(length) * sizeof(float));
    };
    if (head > 0) {
      for (int64_t j = 0; j < before; ++j)
        buffer[j] = args.in.history != nullptr ? args.in.history[(g.batch * p.dim + c) * before + j] : 0.0f;
      std::memcpy(buffer + before, in, static_cast<size_t>(head) * sizeof(float));
      through_buffer(0, head);
    }
    run(in + head - before, weight, p.width, bias, nullptr, 0, body, to + head);
    if (tail > 0) {
      const int64_t begin = head + body;
      std::memcpy(buffer, in + begin - before, static_cast<size_t>(before + tail) * sizeof(float));
      through_buffer(begin, tail);
    }
  }
}

// A sequence of a packed row, as if it were a row of its own.
Sequence part(Sequence s, int64_t begin) {
  if (s.data != nullptr)
    s.data = static_cast<char*>(s.data) + begin * s.time * (s.dtype == StorageType::kFloat32 ? 4 : 2);
  return s;
}

void forward_group(const ForwardArgs& args, const Group& g, float* workspace) {
  const Problem& p = args.problem;
  const int64_t before = p.width - 1, stride = row_stride(p.width);
  const Rows x{workspace, stride}, out{workspace + kLanes * stride, stride};
  float* block = workspace + 2 * kLanes * stride;
  float* room = block + kLanes * kLanes;
  const Filter run = pick_filter(p.width, args.in.masks != nullptr, p.silu);
  if (args.in.masks == nullptr && in_place(args.in.x) && in_place(args.out))
    return filter_in_place(args, g, run, workspace);
  load_history(p, args.in, g, x);
  for (int64_t begin = 0; begin < p.length; begin += kSteps) {
    const int64_t length = min_of(kSteps, p.length - begin);
    with_type(args.in.x.dtype, [&](auto type) {
      load_rows<decltype(type)>(args.in.x, g.batch, g.channel, g.valid, begin, length,
                                {x.data + before, stride}, block);
    });
    const uint32_t* masks = window_masks(p, args.in, g.batch, begin, length, room);
    for (int64_t c = 0; c < g.valid; ++c) {
      float* in = x.row(c);
      std::memset(in + before + length, 0, kLanes * sizeof(float));
      float* result = out.row(c);
      const Vec bias(args.in.bias != nullptr ? args.in.bias[g.channel + c] : 0.0f);
      run(in, args.in.weight + (g.channel + c) * p.width, p.width, bias, masks, kSteps + kLanes, length,
          result);
      if (masks != nullptr)
        for (int64_t t = 0; t < length; t += kLanes)
          store(result + t, keep_bits(load(result + t), masks + before * (kSteps + kLanes) + t));
      for (int64_t j = 0; j < before; ++j)
        in[j] = in[length + j];
    }
    with_type(args.out.dtype, [&](auto type) {
      store_rows<decltype(type)>(args.out, g.batch, g.channel, g.valid, begin, length, out, block);
    });
  }
}

// Steps and groups of a block of rows whose channels lie side by side: what it reads stays in the
// second-level cache, and pages are visited few times.
constexpr int64_t kBlockSteps = 64, kBlockGroups = 8;

// Outputs [begin, begin + length) of a whole group whose channels lie side by side: lanes are channels, and
// the last inputs stay in registers. The same sums in the same order as `filter`.
template <typename T, int kWidth, bool kMasked, bool kSilu>
void filter_lanes(const ForwardArgs& args, const Group& g, int64_t begin, int64_t length) {
  const Problem& p = args.problem;
  const Sequence &x = args.in.x, &out = args.out;
  constexpr int kBefore = kWidth - 1;
  const T* from = static_cast<const T*>(x.data) + g.batch * x.batch + g.channel;
  T* to = static_cast<T*>(out.data) + g.batch * out.batch + g.channel;
  const auto gather = [&](const float* first, int64_t stride) {
    float lanes[kLanes];
    for (int64_t c = 0; c < kLanes; ++c)
      lanes[c] = first[c * stride];
    return load(lanes);
  };
  Vec w[kWidth], window[kWidth];
  for (int j = 0; j < kWidth; ++j)
    w[j] = gather(args.in.weight + g.channel * kWidth + j, kWidth);
  const Vec bias = args.in.bias != nullptr ? load(args.in.bias + g.channel) : Vec(0.0f);
  for (int j = 0; j < kBefore; ++j) {
    const int64_t t = begin - kBefore + j;
    window[j] = t >= 0 ? load_lanes(from + t * x.time)
                : args.in.history != nullptr
                    ? gather(args.in.history + (g.batch * p.dim + g.channel) * kBefore + kBefore + t, kBefore)
                    : Vec(0.0f);
  }
  const uint32_t* masks = kMasked ? args.in.masks + g.batch * kWidth * p.length : nullptr;
  for (int64_t t = begin; t < begin + length; ++t) {
    window[kBefore] = load_lanes(from + t * x.time);
    ask_for_reading(from + (t + kAhead) * x.time);
    ask_for_writing(to + (t + kAhead) * out.time);
    Vec sum = bias;
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j)
      sum = fma(w[j], !kMasked || masks[j * p.length + t] ? window[j] : Vec(0.0f), sum);
    if (kSilu) sum = silu(sum);
    if (kMasked && !masks[kBefore * p.length + t]) sum = Vec(0.0f);
    store_lanes(to + t * out.time, sum);
#pragma GCC unroll 4
    for (int j = 0; j < kBefore; ++j)
      window[j] = window[j + 1];
  }
}

using LaneFilter = void (*)(const ForwardArgs&, const Group&, int64_t, int64_t);

template <typename T, int kWidth>
LaneFilter pick_lane_filter(bool masked, bool with_silu) {
  if (masked) return with_silu ? filter_lanes<T, kWidth, true, true> : filter_lanes<T, kWidth, true, false>;
  return with_silu ? filter_lanes<T, kWidth, false, true> : filter_lanes<T, kWidth, false, false>;
}

// Null where channels do not lie side by side or there are other numbers of taps.
LaneFilter pick_lane_filter(const ForwardArgs& args) {
  if (args.in.x.channel != 1 || args.out.channel != 1 || args.in.x.dtype != args.out.dtype ||
      args.in.x.time == 1 || args.out.time == 1)
    return nullptr;
  LaneFilter picked = nullptr;
  with_type(args.in.x.dtype, [&](auto type) {
    using T = decltype(type);
    const bool masked = args.in.masks != nullptr, with_silu = args.problem.silu;
    switch (args.problem.width) {
      case 2:
        picked = pick_lane_filter<T, 2>(masked, with_silu);
        break;
      case 3:
        picked = pick_lane_filter<T, 3>(masked, with_silu);
        break;
      case 4:
        picked = pick_lane_filter<T, 4>(masked, with_silu);
        break;
      default:
        break;
    }
  });
  return picked;
}

// Tasks [begin, end) of one batch row.
void forward_row(const ForwardArgs& args, float* workspace, int64_t begin, int64_t end) {
  const LaneFilter lanes = pick_lane_filter(args);
  for (int64_t first = begin; first < end; first += kBlockGroups) {
    const int64_t stop = min_of(first + kBlockGroups, end);
    for (int64_t t = 0; lanes != nullptr && t < args.problem.length; t += kBlockSteps)
      for (int64_t task = first; task < stop; ++task) {
        const Group g(args.problem, task);
        if (g.valid == kLanes) lanes(args, g, t, min_of(kBlockSteps, args.problem.length - t));
      }
    for (int64_t task = first; task < stop; ++task) {
      const Group g(args.problem, task);
      if (lanes == nullptr || g.valid < kLanes) forward_group(args, g, workspace);
    }
  }
}

void forward(const ForwardArgs& args, float* workspace, int64_t begin, int64_t end) {
  const int64_t groups = (args.problem.dim + kLanes - 1) / kLanes;
  for (int64_t first = begin; first < end;) {
    const int64_t row = first / groups, stop = min_of((row + 1) * groups, end);
    ForwardArgs own = args;
    if (args.problem.spans != nullptr) {
      const Span& span = args.problem.spans[row];
      own.problem.length = span.length;
      own.in.x = part(args.in.x, span.begin);
      own.out = part(args.out, span.begin);
    }
    forward_row(own, workspace, first, stop);
    first = stop;
  }
}

int64_t backward_workspace(const Problem& p) {
  return 3 * kLanes * row_stride(p.width) + kLanes * kLanes + p.width * (kSteps + kLanes) +
         kLanes * (2 * p.width + 1);
}

// Windows from the last to the first. With h_t the gradient before the activation:
// dx_s = sum_j w_j h_(s + width - 1 - j), dw_j = sum_t h_t x_(t - width + 1 + j), and what would fall before
// the window is carried into the window before it.
void backward_group(const BackwardArgs& args, const Group& g, float* workspace) {
  const Problem& p = args.problem;
  const Inputs& in = args.in;
  const int64_t before = p.width - 1, stride = row_stride(p.width), mask_stride = kSteps + kLanes;
  const Rows x{workspace, stride}, h{workspace + kLanes * stride, stride};
  const Rows grad{workspace + 2 * kLanes * stride, stride};
  float* block = workspace + 3 * kLanes * stride;
  float* room = block + kLanes * kLanes;
  float* carried = room + p.width * mask_stride;      // [lanes, width - 1]: dx of steps before the window
  float* grad_weight = carried + kLanes * p.width;    // [lanes, width]
  float* grad_bias = grad_weight + kLanes * p.width;  // [lanes]
  std::memset(carried, 0, static_cast<size_t>(2 * kLanes * p.width + kLanes) * sizeof(float));
  const Filter run = pick_filter(p.width, in.masks != nullptr, false);

  for (int64_t begin = (p.length - 1) / kSteps * kSteps; begin >= 0; begin -= kSteps) {
    const int64_t length = min_of(kSteps, p.length - begin);
    // Inputs of the window and the `before` ones in front of it.
    const int64_t reach = min_of(before, begin);
    if (reach < before) load_history(p, in, g, x);
    if (reach < before && reach > 0)
      for (int64_t c = 0; c < kLanes; ++c)
        std::memmove(x.row(c), x.row(c) + reach, static_cast<size_t>(before - reach) * sizeof(float));
    with_type(in.x.dtype, [&](auto type) {
      using T = decltype(type);
      if (reach > 0)
        load_rows<T>(in.x, g.batch, g.channel, g.valid, begin - reach, reach,
                     {x.data + before - reach, stride}, block);
      load_rows<T>(in.x, g.batch, g.channel, g.valid, begin, length, {x.data + before, stride}, block);
      if (args.grad_out.data != nullptr)
        load_rows<T>(args.grad_out, g.batch, g.channel, g.valid, begin, length, h, block);
    });
    const uint32_t* masks = window_masks(p, in, g.batch, begin, length, room);
    for (int64_t c = 0; c < g.valid; ++c) {
      float *xs = x.row(c), *hs = h.row(c), *dx = grad.row(c);
      const float* weight = in.weight + (g.channel + c) * p.width;
      std::memset(xs + before + length, 0, kLanes * sizeof(float));
      if (args.grad_out.data == nullptr) std::memset(hs, 0, static_cast<size_t>(length) * sizeof(float));
      std::memset(hs + length, 0, kLanes * sizeof(float));
      if (p.silu) {
        const Vec bias(in.bias != nullptr ? in.bias[g.channel + c] : 0.0f);
        run(xs, weight, p.width, bias, masks, mask_stride, length, dx);
        for (int64_t t = 0; t < length; t += kLanes) {
          const Vec y = load(dx + t), s = sigmoid(y), one(1.0f);
          store(hs + t, load(hs + t) * s * fma(y, one - s, one));
        }
        std::memset(hs + length, 0, kLanes * sizeof(float));
      }
      if (masks != nullptr)
        for (int64_t t = 0; t < length; t += kLanes)
          store(hs + t, keep_bits(load(hs + t), masks + before * mask_stride + t));
      // dw and db: sums over the window.
      Vec sum_bias(0.0f);
      for (int64_t t = 0; t < length; t += kLanes)
        sum_bias = sum_bias + load(hs + t);
      grad_bias[c] += reduce_add(sum_bias);
      for (int64_t j = 0; j < p.width; ++j) {
        Vec sum(0.0f);
        for (int64_t t = 0; t < length; t += kLanes) {
          Vec input = load(xs + t + j);
          if (masks != nullptr) input = keep_bits(input, masks + j * mask_stride + t);
          sum = fma(load(hs + t), input, sum);
        }
        grad_weight[c * p.width + j] += reduce_add(sum);
      }
      // dx of [begin - before, begin + length): index i of dx is step begin - before + i.
      std::memset(dx, 0, static_cast<size_t>(length + before + kLanes) * sizeof(float));
      for (int64_t j = 0; j < p.width; ++j) {
        const Vec w(weight[j]);
        for (int64_t t = 0; t < length; t += kLanes) {
          Vec from = load(hs + t);
          if (masks != nullptr) from = keep_bits(from, masks + j * mask_stride + t);
          store(dx + t + j, fma(w, from, load(dx + t + j)));
        }
      }
      for (int64_t j = 0; j < before; ++j)
        dx[length + j] += carried[c * p.width + j];
      for (int64_t j = 0; j < before; ++j)
        carried[c * p.width + j] = dx[j];
    }
    with_type(args.grad_x.dtype, [&](auto type) {
      store_rows<decltype(type)>(args.grad_x, g.batch, g.channel, g.valid, begin, length,
                                 {grad.data + before, stride}, block);
    });
  }
  for (int64_t c = 0; c < g.valid; ++c) {
    const int64_t channel = g.batch * p.dim + g.channel + c;
    for (int64_t j = 0; j < p.width; ++j)
      args.partial_weight[channel * p.width + j] = grad_weight[c * p.width + j];
    args.partial_bias[channel] = grad_bias[c];
    if (args.grad_history != nullptr)
      for (int64_t j = 0; j < before; ++j)
        args.grad_history[channel * before + j] = carried[c * p.width + j];
  }
}

void backward(const BackwardArgs& args, float* workspace, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const Group g(args.problem, task);
    BackwardArgs own = args;
    if (args.problem.spans != nullptr) {
      const Span& span = args.problem.spans[g.batch];
      own.problem.length = span.length;
      own.in.x = part(args.in.x, span.begin);
      own.grad_out = part(args.grad_out, span.begin);
      own.grad_x = part(args.grad_x, span.begin);
    }
    backward_group(own, g, workspace);
  }
}

// Where the inputs of one row of the state lie: input i, counted from the first new one, for i < 0.
struct Ring {
  int64_t at, kept;
  bool circular;
  int64_t slot(int64_t i) const { return circular ? ((at + i) % kept + kept) % kept : kept + i; }
};

// Taps of a group of channels, tap by tap, with zeros for channels that are not there.
struct Taps {
  alignas(64) float weight[kMaxTaps][kLanes];
  alignas(64) float bias[kLanes];

  void load(const UpdateArgs& args, int64_t channel, int64_t valid) {
    const float* w = args.weight + channel * args.width;
    for (int64_t c = 0; c < kLanes; ++c) {
      for (int64_t j = 0; j < args.width; ++j)
        weight[j][c] = c < valid ? w[c * args.width + j] : 0.0f;
      bias[c] = c < valid && args.bias != nullptr ? args.bias[channel + c] : 0.0f;
    }
  }
};

// A channel's state of four inputs side by side, as transformers keeps them.
typedef float Quad __attribute__((vector_size(16)));
constexpr int64_t kQuad = 4;

// Lanes of two quads, numbered 0 to 7.
template <int... kLane>
inline Quad pick(Quad a, Quad b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kLane...);
#else
  typedef int Places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Places{kLane...});
#endif
}

// Shifts `x` into the states of a whole group of channels; the inputs of each channel then are in `inputs`,
// oldest first.
void shift_quads(float* state, const float* x, float (*inputs)[kLanes]) {
  for (int64_t c = 0; c < kLanes; c += kQuad) {
    Quad q[kQuad], fresh;
    std::memcpy(&fresh, x + c, sizeof(Quad));
    std::memcpy(q, state + c * kQuad, sizeof(q));
    q[0] = pick<1, 2, 3, 4>(q[0], fresh);
    q[1] = pick<1, 2, 3, 5>(q[1], fresh);
    q[2] = pick<1, 2, 3, 6>(q[2], fresh);
    q[3] = pick<1, 2, 3, 7>(q[3], fresh);
    std::memcpy(state + c * kQuad, q, sizeof(q));
    const Quad low01 = pick<0, 4, 1, 5>(q[0], q[1]);
    const Quad low23 = pick<0, 4, 1, 5>(q[2], q[3]);
    const Quad high01 = pick<2, 6, 3, 7>(q[0], q[1]);
    const Quad high23 = pick<2, 6, 3, 7>(q[2], q[3]);
    const Quad column[kQuad] = {pick<0, 1, 4, 5>(low01, low23), pick<2, 3, 6, 7>(low01, low23),
                                pick<0, 1, 4, 5>(high01, high23), pick<2, 3, 6, 7>(high01, high23)};
    for (int64_t j = 0; j < kQuad; ++j)
      std::memcpy(inputs[j] + c, &column[j], sizeof(Quad));
  }
}

// One new input for each channel of a group, few taps. Whole groups whose channels lie side by side are read
// and written as vectors; else the inputs are brought together tap by tap.
template <typename X, typename S>
void update_group(const UpdateArgs& args, const Taps& taps, const Ring& ring, const X* x, S* state, X* out,
                  int64_t valid) {
  alignas(64) float inputs[kMaxTaps][kLanes], sums[kLanes];
  const int64_t before = args.width - 1, channel = args.state.channel, time = args.state.time;
  const bool whole = valid == kLanes, beside = whole && channel == 1;
  const auto gather = [&](const auto* from, int64_t stride, float* into) {
    for (int64_t c = 0; c < kLanes; ++c)
      into[c] = c < valid ? static_cast<float>(from[c * stride]) : 0.0f;
  };
  const auto input = [&](const auto* from, int64_t stride, float* into) {
    if (whole && stride == 1)
      store(into, load_lanes(from));
    else
      gather(from, stride, into);
  };
  bool shifted = false;
  input(x, args.x.channel, inputs[before]);
  if constexpr (std::is_same_v<S, float>)
    if (whole && !ring.circular && ring.kept == kQuad && channel == kQuad && time == 1 &&
        before == kQuad - 1) {
      alignas(64) float fresh[kLanes];
      store(fresh, load(inputs[before]));
      shift_quads(state, fresh, inputs);
      shifted = true;
    }
  if (!shifted)
    for (int64_t j = 0; j < before; ++j)
      input(state + ring.slot(j - before) * time, channel, inputs[j]);
  Vec sum = load(taps.bias);
  for (int64_t j = 0; j <= before; ++j)
    sum = fma(load(taps.weight[j]), load(inputs[j]), sum);
  if (args.silu) sum = silu(sum);
  if (whole && args.out.channel == 1) {
    store_lanes(out, sum);
  } else {
    store(sums, sum);
    for (int64_t c = 0; c < valid; ++c)
      out[c * args.out.channel] = static_cast<X>(sums[c]);
  }
  if (ring.kept == 0 || shifted) return;
  if (!ring.circular) {
    if (beside) {
      for (int64_t k = 0; k + 1 < ring.kept; ++k)
        store_lanes(state + k * time, load_lanes(state + (k + 1) * time));
    } else {
      for (int64_t c = 0; c < valid; ++c)
        for (int64_t k = 0; k + 1 < ring.kept; ++k)
          state[c * channel + k * time] = state[c * channel + (k + 1) * time];
    }
  }
  S* last = state + ring.slot(ring.circular ? 0 : -1) * time;
  if (beside) {
    store_lanes(last, load(inputs[before]));
  } else {
    for (int64_t c = 0; c < valid; ++c)
      last[c * channel] = static_cast<S>(inputs[before][c]);
  }
}

// Any number of new inputs and taps.
template <typename X, typename S>
void update_many(const UpdateArgs& args, const Ring& ring, const X* x, S* state, X* out) {
  const auto input = [&](int64_t c, int64_t i) {
    return i >= 0 ? static_cast<float>(x[c * args.x.channel + i * args.x.time])
                  : static_cast<float>(state[c * args.state.channel + ring.slot(i) * args.state.time]);
  };
  for (int64_t c0 = 0; c0 < args.dim; c0 += kLanes) {
    const int64_t valid = min_of<int64_t>(kLanes, args.dim - c0);
    for (int64_t t = 0; t < args.steps; ++t) {
      float sums[kLanes] = {};
      for (int64_t c = 0; c < valid; ++c) {
        float sum = args.bias != nullptr ? args.bias[c0 + c] : 0.0f;
        for (int64_t j = 0; j < args.width; ++j)
          sum += args.weight[(c0 + c) * args.width + j] * input(c0 + c, t - args.width + 1 + j);
        sums[c] = sum;
      }
      if (args.silu) store(sums, silu(load(sums)));
      for (int64_t c = 0; c < valid; ++c)
        out[(c0 + c) * args.out.channel + t * args.out.time] = static_cast<X>(sums[c]);
    }
  }
  for (int64_t c = 0; c < args.dim && ring.kept > 0; ++c) {
    S* kept_of = state + c * args.state.channel;
    if (ring.circular) {
      for (int64_t t = max_of<int64_t>(args.steps - ring.kept, 0); t < args.steps; ++t)
        kept_of[ring.slot(t) * args.state.time] = static_cast<S>(input(c, t));
    } else {
      for (int64_t k = 0; k < ring.kept; ++k)
        kept_of[k * args.state.time] = static_cast<S>(input(c, k - ring.kept + args.steps));
    }
  }
}

// Copies [count, kept] entries of a row's state to its snapshot after `step` inputs.
template <typename S>
void take_snapshot(const UpdateArgs& args, const S* state, int64_t batch, int64_t step, int64_t channel,
                   int64_t count) {
  const Snapshots& s = args.snapshots;
  if (s.data == nullptr) return;
  S* to = static_cast<S*>(s.data) + batch * s.batch + step * s.step + channel * s.channel;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t k = 0; k < args.state_length; ++k)
      to[c * s.channel + k * s.time] = state[c * args.state.channel + k * args.state.time];
}

template <typename X, typename S>
void update_rows(const UpdateArgs& args, int64_t begin, int64_t end) {
  const int64_t kept = args.state_length;
  const bool circular = args.write_at != nullptr && kept > 0;
  const auto row_of = [&](int64_t batch) { return args.rows != nullptr ? args.rows[batch] : batch; };
  const auto state_of = [&](int64_t batch) {
    return static_cast<S*>(args.state.data) + row_of(batch) * args.state.batch;
  };
  const auto x_of = [&](int64_t batch, int64_t t) {
    return static_cast<const X*>(args.x.data) + batch * args.x.batch + t * args.x.time;
  };
  const auto out_of = [&](int64_t batch, int64_t t) {
    return static_cast<X*>(args.out.data) + batch * args.out.batch + t * args.out.time;
  };
  const auto ring_of = [&](int64_t batch, int64_t t) {
    return Ring{circular ? (args.write_at[batch] % kept + t) % kept : 0, kept, circular};
  };
  const auto count_of = [&](int64_t batch) {
    return row_of(batch) < 0 ? 0 : args.counts != nullptr ? args.counts[batch] : args.steps;
  };
  // A few inputs are taken one after the other, with the bits of as many calls.
  const bool few = args.width <= kMaxTaps;
  UpdateArgs one = args;
  one.steps = 1;
  for (int64_t batch = begin; batch < end; ++batch) {
    for (int64_t t = count_of(batch); t < args.steps; ++t)
      for (int64_t c = 0; c < args.dim; ++c)
        out_of(batch, t)[c * args.out.channel] = static_cast<X>(0.0f);
    if (few || row_of(batch) < 0) continue;
    take_snapshot(args, state_of(batch), batch, 0, 0, args.dim);
    for (int64_t t = 0; t < args.steps; ++t) {
      if (t < count_of(batch))
        update_many(one, ring_of(batch, t), x_of(batch, t), state_of(batch), out_of(batch, t));
      take_snapshot(args, state_of(batch), batch, t + 1, 0, args.dim);
    }
  }
  if (!few) return;
  Taps taps;
  for (int64_t c = 0; c < args.dim; c += kLanes) {
    const int64_t valid = min_of<int64_t>(kLanes, args.dim - c);
    taps.load(args, c, valid);
    for (int64_t batch = begin; batch < end; ++batch) {
      if (row_of(batch) < 0) continue;
      S* state = state_of(batch) + c * args.state.channel;
      take_snapshot(args, state, batch, 0, c, valid);
      for (int64_t t = 0; t < args.steps; ++t) {
        if (t < count_of(batch))
          update_group(args, taps, ring_of(batch, t), x_of(batch, t) + c * args.x.channel, state,
                       out_of(batch, t) + c * args.out.channel, valid);
        take_snapshot(args, state, batch, t + 1, c, valid);
      }
    }
  }
}

void update(const UpdateArgs& args, int64_t begin, int64_t end) {
  with_type(args.x.dtype, [&](auto x) {
    with_type(args.state.dtype,
              [&](auto state) { update_rows<decltype(x), decltype(state)>(args, begin, end); });
  });
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{kLanes, forward_workspace, forward, backward_workspace, backward,
                                       update};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::causal_conv1d
