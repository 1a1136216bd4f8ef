// What the float32 and the bfloat16 kernels share: the order of work, rows in memory, step sizes and decays,
// states, sums of partial gradients.
#pragma once

#include "common/ask.h"
#include "common/chunk_products.h"
#include "common/flush_denormals.h"
#include "common/vec.h"
#include "ssd/params.h"

namespace arcore::ssd {
namespace ARCORE_ISA {
namespace {

// Heads of one task: they share the products of B and C.
constexpr int64_t kHeads = 4;
constexpr int64_t kMaxStates = 256;
// Beyond this the decay of one step is 0 (or infinite) in any case; sums of such steps stay finite, so that
// A = -inf forgets instead of giving -inf - -inf.
constexpr double kLargestLog = 1e5;

// Block of heads within one group.
struct Block {
  int64_t batch, group, head, heads;

  static int64_t per_group(const Args& args) { return (args.heads / args.groups + kHeads - 1) / kHeads; }
  Block(const Args& args, int64_t task) {
    const int64_t in_group = args.heads / args.groups, blocks = per_group(args);
    batch = task / (args.groups * blocks);
    group = task / blocks % args.groups;
    const int64_t first = task % blocks * kHeads;
    head = group * in_group + first;
    heads = min_of<int64_t>(kHeads, in_group - first);
  }
};

int64_t tasks(const Args& args) {
  return args.batch * args.groups * Block::per_group(args);
}

// Hands out parts of a thread's scratch, each on cache lines of its own; without memory it only counts.
class Layout {
 public:
  explicit Layout(float* base) : base_(base) {}
  void take(float*& buffer, int64_t floats) {
    buffer = base_ + at_;
    at_ += round_up(floats, 16);
  }
  void take(BFloat16*& buffer, int64_t elements) {
    buffer = reinterpret_cast<BFloat16*>(base_ + at_);
    at_ += round_up((elements + 1) / 2, 16);
  }
  int64_t floats() const { return at_; }

 private:
  float* base_;
  int64_t at_ = 0;
};

bool skipped(const Chunk& chunk, int64_t t) {
  return chunk.ids != nullptr && chunk.ids[t * chunk.id_stride] < 0;
}

template <typename T>
T* row_of(const View& v, int64_t batch, int64_t head, int64_t t) {
  return static_cast<T*>(v.data) + batch * v.batch + head * v.head + t * v.time;
}

// Rows of a chunk as floats; skipped steps become 0, whatever they hold.
void load_rows(const View& v, int64_t batch, int64_t head, const Chunk& chunk, int64_t n, float* dst,
               int64_t pitch) {
  with_type(v.dtype, [&](auto type) {
    using T = decltype(type);
    const T* first = row_of<T>(v, batch, head, chunk.begin);
    for (int64_t t = 0; t < chunk.length; ++t) {
      const T* src = first + t * v.time;
      float* row = dst + t * pitch;
      if (skipped(chunk, t)) {
        for (int64_t i = 0; i < n; ++i)
          row[i] = 0.0f;
      } else if (v.last == 1) {
        to_float(src, row, n);
      } else {
        for (int64_t i = 0; i < n; ++i)
          row[i] = static_cast<float>(src[i * v.last]);
      }
    }
  });
}

void store_row(const View& v, int64_t batch, int64_t head, int64_t t, int64_t n, const float* src) {
  with_type(v.dtype, [&](auto type) {
    using T = decltype(type);
    T* dst = row_of<T>(v, batch, head, t);
    if (v.last == 1) {
      from_float(src, dst, n);
    } else {
      for (int64_t i = 0; i < n; ++i)
        dst[i * v.last] = static_cast<T>(src[i]);
    }
  });
}

// Rows that a head of the next chunk reads and writes. They lie far apart, so the kernels ask for them while
// they work on this chunk: a few at a time, since a processor keeps a few dozen such requests before it
// waits.
struct Ahead {
  const Chunk* chunk;  // null: there is none
  int64_t batch, head, dim;

  __attribute__((always_inline)) void ask(const View& v, int64_t begin, int64_t count) const {
    if (chunk == nullptr || v.data == nullptr || v.last != 1) return;
    const int64_t size = v.dtype == StorageType::kFloat32 ? 4 : 2;
    const char* first =
        static_cast<const char*>(v.data) + (batch * v.batch + head * v.head + chunk->begin * v.time) * size;
    for (int64_t t = begin; t < min_of(begin + count, chunk->length); ++t)
      ask_for(first + t * v.time * size, dim * size);
  }
};

// Of one head and chunk, [kChunk + 16] each: step size; log2 of the decay up to a step, in two parts; the
// decay up to a step, and from a step to the chunk's end.
struct Steps {
  float *dt, *high, *low, *decay, *rest;

  void lay(Layout& layout) {
    for (float** buffer : {&dt, &high, &low, &decay, &rest})
      layout.take(*buffer, kChunk + 16);
  }
};

// dt + bias of a chunk, 0 beyond it to the end of the vector.
void load_dt(const Args& args, const Block& block, int64_t head, const Chunk& chunk, float* dst) {
  with_type(args.dt.dtype, [&](auto type) {
    using T = decltype(type);
    const T* dt = row_of<T>(args.dt, block.batch, head, chunk.begin);
    for (int64_t t = 0; t < chunk.length; ++t)
      dst[t] =
          static_cast<float>(dt[t * args.dt.time]) + (args.dt_bias != nullptr ? args.dt_bias[head] : 0.0f);
  });
  for (int64_t t = chunk.length; t < round_up(chunk.length, kLanes); ++t)
    dst[t] = 0.0f;
}

// Step sizes of a head, and the log2 of its decay from the chunk's start, as a sum of two floats: differences
// of neighbours stay exact where the sum itself has grown large. Beyond the chunk dt is 0.
void load_steps(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Steps& w) {
  load_dt(args, block, head, chunk, w.dt);
  const int64_t whole = round_up(chunk.length, kLanes);
  for (int64_t t = 0; t < whole; t += kLanes) {
    const Vec dt = args.softplus ? softplus(load(w.dt + t)) : load(w.dt + t);
    const Vec low(args.dt_low), high(args.dt_high);
    store(w.dt + t, where_less(dt, low, low, where_less(high, dt, high, dt)));
  }
  double total = 0.0;
  const double a = static_cast<double>(args.A[head]) * 1.4426950408889634;
  for (int64_t t = 0; t < chunk.length; ++t) {
    if (skipped(chunk, t)) w.dt[t] = 0.0f;
    const double log = skipped(chunk, t) ? 0.0 : static_cast<double>(w.dt[t]) * a;
    // NaN passes both comparisons.
    total += log < -kLargestLog ? -kLargestLog : log > kLargestLog ? kLargestLog : log;
    w.high[t] = static_cast<float>(total);
    w.low[t] = static_cast<float>(total - static_cast<double>(w.high[t]));
  }
  const float high = w.high[chunk.length - 1], low = w.low[chunk.length - 1];
  for (int64_t t = chunk.length; t < kChunk; ++t) {
    w.dt[t] = 0.0f;
    w.high[t] = high;
    w.low[t] = low;
  }
  for (int64_t t = 0; t < kChunk; t += kLanes) {
    store(w.decay + t, exp2(load(w.high + t)));
    store(w.rest + t, exp2((Vec(high) - load(w.high + t)) + (Vec(low) - load(w.low + t))));
  }
}

// How the clamped step follows from dt.
void load_slopes(const Args& args, const Block& block, int64_t head, const Chunk& chunk, float* slopes) {
  load_dt(args, block, head, chunk, slopes);
  const Vec low(args.dt_low), high(args.dt_high), zero(0.0f);
  for (int64_t t = 0; t < chunk.length; t += kLanes) {
    const Vec raw = load(slopes + t);
    Vec slope(1.0f);
    const Vec step = args.softplus ? softplus(raw, slope) : raw;
    store(slopes + t, where_less(step, low, zero, where_less(high, step, zero, slope)));
  }
  for (int64_t t = 0; t < chunk.length; ++t)
    if (skipped(chunk, t)) slopes[t] = 0.0f;
}

// [rows, columns] -> [columns, rows].
void transpose(const float* src, int64_t src_pitch, int64_t rows, int64_t columns, float* dst,
               int64_t dst_pitch) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= columns) {
        transpose_block(src + r * src_pitch + c, src_pitch, dst + c * dst_pitch + r, dst_pitch);
        continue;
      }
      for (int64_t i = r; i < min_of<int64_t>(rows, r + kLanes); ++i)
        for (int64_t j = c; j < min_of<int64_t>(columns, c + kLanes); ++j)
          dst[j * dst_pitch + i] = src[i * src_pitch + j];
    }
}

// [dim, states], null: zeros, -> the thread's order, and back. There channel c of state n lies at
// state_column(c) + n state_pitch(c), next to the channels of its vector.
template <typename Work>
void load_state(const Args& args, const Work& w, const float* from, float* state) {
  std::memset(state, 0, static_cast<size_t>(w.state_floats()) * sizeof(float));
  for (int64_t c = 0; c < args.dim && from != nullptr; c += kLanes)
    transpose(from + c * args.states, args.states, min_of<int64_t>(kLanes, args.dim - c), args.states,
              state + w.state_column(c), w.state_pitch(c));
}
template <typename Work>
void store_state(const Args& args, const Work& w, const float* state, float* to) {
  for (int64_t c = 0; c < args.dim; c += kLanes)
    transpose(state + w.state_column(c), w.state_pitch(c), args.states, min_of<int64_t>(kLanes, args.dim - c),
              to + c * args.states, args.states);
}

// Where the states of the sequence lie that a chunk belongs to.
int64_t state_at(const Args& args, const Block& block, const Chunk& chunk, int64_t head) {
  const int64_t sequence = chunk.sequence < 0 ? block.batch : chunk.sequence;
  return (sequence * args.heads + head) * args.dim * args.states;
}

bool starts_at_zero(const Args& args, const Chunk& chunk) {
  return chunk.first && (chunk.zero_start || args.initial_state == nullptr);
}

// ---- The order of work. `Work` has the buffers, and the kernel's functions of it are found by its
// namespace.

template <typename Work>
void forward_block(const Args& args, const Block& block, Work& w) {
  const int64_t row = args.chunk_rows == 1 ? 0 : block.batch;
  const Chunk* end = args.chunks + args.first_chunk[row + 1];
  for (const Chunk* chunk = args.chunks + args.first_chunk[row]; chunk < end; ++chunk) {
    if (chunk->length > 0) load_group(args, block, *chunk, w);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t head = block.head + h, at = state_at(args, block, *chunk, head);
      float* state = w.states + h * w.state_floats();
      const bool zero = starts_at_zero(args, *chunk);
      if (chunk->first) load_state(args, w, zero ? nullptr : args.initial_state + at, state);
      const Ahead ahead{chunk + 1 < end ? chunk + 1 : nullptr, block.batch, head, args.dim};
      if (chunk->length > 0) head_forward(args, block, head, *chunk, ahead, w, state, zero);
      if (chunk->keep_last) store_state(args, w, state, args.last_state + at);
    }
  }
}

template <typename Work>
int64_t workspace(const Args& args) {
  Layout layout(nullptr);
  Work work{};
  work.lay(args, layout);
  return layout.floats();
}

template <typename Work>
void forward(const Args& args, float* workspace, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  Layout layout(workspace);
  Work work{};
  work.lay(args, layout);
  // Padding of the buffers is read by whole vectors.
  std::memset(workspace, 0, static_cast<size_t>(layout.floats()) * sizeof(float));
  for (int64_t task = begin; task < end; ++task)
    forward_block(args, Block(args, task), work);
}

int64_t chunks_of_row(const Args& args, int64_t batch) {
  const int64_t row = args.chunk_rows == 1 ? 0 : batch;
  return args.first_chunk[row + 1] - args.first_chunk[row];
}

// What every backward keeps beside its buffers: states before chunks, their gradients, and sums over a row.
struct Carried {
  // Of kHeads each: gradients of states, states in the kernel's own form, and states.
  float *adjoint, *saved, *checkpoints;
  float* grad_d;  // [kHeads, d_pitch]
  int64_t d_pitch;
  double grad_a[kHeads], grad_bias[kHeads];

  void lay(const Segments& segments, int64_t state_floats, int64_t saved_floats, int64_t padded_dim,
           Layout& layout) {
    d_pitch = padded_dim;
    layout.take(grad_d, kHeads * d_pitch);
    layout.take(adjoint, kHeads * state_floats);
    layout.take(saved, segments.length * kHeads * saved_floats);
    layout.take(checkpoints, segments.count * kHeads * state_floats);
  }
  void clear() {
    for (int64_t h = 0; h < kHeads; ++h)
      grad_a[h] = grad_bias[h] = 0.0;
    std::memset(grad_d, 0, static_cast<size_t>(kHeads * d_pitch) * sizeof(float));
  }
};

template <typename BackWork>
int64_t backward_workspace(const BackwardArgs& args) {
  int64_t most = 1;
  for (int64_t row = 0; row < args.in.chunk_rows; ++row)
    most = max_of(most, chunks_of_row(args.in, row));
  // Shorter rows never need more: the length of segments grows with the number of chunks, but for its jump
  // down where rows stop keeping everything.
  Segments segments(most);
  segments.length = max_of(segments.length, min_of(most, kKeptChunks));
  Layout layout(nullptr);
  BackWork work{};
  work.lay_backward(args.in, segments, layout);
  return layout.floats();
}

// The states before the chunks [begin, end) of a row; `save` gets them as they come.
template <typename BackWork, typename Save>
void states_before(const Args& args, const Block& block, BackWork& w, const Chunk* chunks, int64_t begin,
                   int64_t end, const Save& save) {
  for (int64_t i = begin; i < end; ++i) {
    const Chunk& chunk = chunks[i];
    const bool more = i + 1 < end && chunk.length > 0;
    if (more) load_inputs(args, block, chunk, w);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t head = block.head + h, at = state_at(args, block, chunk, head);
      float* state = w.states + h * w.state_floats();
      if (chunk.first)
        load_state(args, w, starts_at_zero(args, chunk) ? nullptr : args.initial_state + at, state);
      save(i, h, state);
      const Ahead ahead{i + 2 < end ? &chunk + 1 : nullptr, block.batch, head, args.dim};
      if (more) head_states(args, block, head, chunk, ahead, w, state);
    }
  }
}

template <typename BackWork>
void backward_block(const BackwardArgs& args, int64_t task, BackWork& w, float* workspace) {
  const Args& in = args.in;
  const Block block(in, task);
  const Segments segments(chunks_of_row(in, block.batch));
  Layout layout(workspace);
  w.lay_backward(in, segments, layout);
  const Chunk* chunks = in.chunks + in.first_chunk[in.chunk_rows == 1 ? 0 : block.batch];
  const int64_t floats = w.state_floats();
  const auto copy = [&](float* to, const float* from) {
    std::memcpy(to, from, static_cast<size_t>(floats) * sizeof(float));
  };
  Carried& c = w.carried;
  c.clear();
  if (segments.count > 1)
    states_before(in, block, w, chunks, 0, (segments.count - 1) * segments.length + 1,
                  [&](int64_t i, int64_t h, const float* state) {
                    if (i % segments.length == 0)
                      copy(c.checkpoints + (i / segments.length * kHeads + h) * floats, state);
                  });
  for (int64_t segment = segments.count - 1; segment >= 0; --segment) {
    const int64_t begin = segment * segments.length;
    const int64_t end = min_of(begin + segments.length, segments.chunks);
    if (segments.count > 1)
      for (int64_t h = 0; h < block.heads; ++h)
        copy(w.states + h * floats, c.checkpoints + (segment * kHeads + h) * floats);
    states_before(in, block, w, chunks, begin, end, [&](int64_t i, int64_t h, const float* state) {
      save_state(w, state, c.saved + ((i - begin) * kHeads + h) * w.saved_floats());
    });
    for (int64_t i = end - 1; i >= begin; --i) {
      const Chunk& chunk = chunks[i];
      if (chunk.length > 0) open_group(args, block, chunk, w);
      for (int64_t h = 0; h < block.heads; ++h) {
        const int64_t at = state_at(in, block, chunk, block.head + h);
        float* adjoint = c.adjoint + h * floats;
        if (chunk.last)
          load_state(in, w,
                     args.grad_last_state != nullptr && chunk.keep_last ? args.grad_last_state + at : nullptr,
                     adjoint);
        const Ahead ahead{i > 0 ? &chunk - 1 : nullptr, block.batch, block.head + h, in.dim};
        if (chunk.length > 0)
          head_backward(args, block, h, chunk, ahead, w,
                        c.saved + ((i - begin) * kHeads + h) * w.saved_floats(), adjoint,
                        starts_at_zero(in, chunk));
        if (chunk.first && args.grad_initial_state != nullptr && !chunk.zero_start)
          store_state(in, w, adjoint, args.grad_initial_state + at);
      }
      if (chunk.length > 0) close_group(args, task, chunk, w);
    }
  }
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t at = block.batch * in.heads + block.head + h;
    args.partial_A[at] = static_cast<float>(c.grad_a[h]);
    args.partial_bias[at] = static_cast<float>(c.grad_bias[h]);
    std::memcpy(args.partial_D + at * in.dim, c.grad_d + h * c.d_pitch,
                static_cast<size_t>(in.dim) * sizeof(float));
  }
}

template <typename BackWork>
void backward(const BackwardArgs& args, float* workspace, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  // Padding of the buffers is read by whole vectors.
  std::memset(workspace, 0, static_cast<size_t>(backward_workspace<BackWork>(args)) * sizeof(float));
  BackWork work{};
  for (int64_t task = begin; task < end; ++task)
    backward_block(args, task, work, workspace);
}

// ---- Parts of a head's backward.

// above[j] = the sum of the parts m[t][s] of steps t and s that go from before step j to j or later; m is 0
// beyond the diagonal to the end of the vector.
void sums_above(const float* m, int64_t length, float* above) {
  const Vec zero(0.0f);
  float columns[kChunk + 16] = {};
  for (int64_t t = length - 1; t >= 0; --t) {
    Vec sum(0.0f);
    for (int64_t s = 0; s <= t; s += kLanes) {
      const Vec column = load(columns + s) + load(m + t * kStride + s);
      store(columns + s, column);
      sum = sum + keep_lanes(column, 0, t - s, zero);
    }
    above[t] = reduce_add(sum);
  }
}

// From what reaches a step's size directly and through its decay to the gradient of dt; sums of A's and the
// bias'.
float step_gradient(const Args& in, int64_t head, int64_t h, float direct, float through_decay, float dt,
                    float slope, Carried& c) {
  float grad = direct;
  const double log = static_cast<double>(dt) * static_cast<double>(in.A[head]) * 1.4426950408889634;
  if (!(log < -kLargestLog || log > kLargestLog)) {
    grad += through_decay * in.A[head];
    c.grad_a[h] += static_cast<double>(through_decay) * static_cast<double>(dt);
  }
  grad *= slope;
  c.grad_bias[h] += static_cast<double>(grad);
  return grad;
}

void store_dt_gradient(const BackwardArgs& args, const Block& block, int64_t head, int64_t t, float grad) {
  with_type(args.grad_dt.dtype, [&](auto type) {
    using T = decltype(type);
    *row_of<T>(args.grad_dt, block.batch, head, t) = static_cast<T>(grad);
  });
}

struct Partial {
  const float* sums;
  const View* grad;
};

// Adds the blocks of one group in their order.
void backward_reduce(const BackwardArgs& args, int64_t begin, int64_t end) {
  const Args& in = args.in;
  const int64_t blocks = Block::per_group(in), size = in.length * in.states;
  float sums[kMaxStates + 16];
  for (int64_t task = begin; task < end; ++task)
    for (const auto& [partial, grad] :
         {Partial{args.partial_B, &args.grad_B}, {args.partial_C, &args.grad_C}})
      for (int64_t t = 0; t < in.length; ++t) {
        const float* first = partial + task * blocks * size + t * in.states;
        std::memset(sums, 0, sizeof(sums));
        for (int64_t b = 0; b < blocks; ++b)
          for (int64_t n = 0; n < in.states; ++n)
            sums[n] += first[b * size + n];
        store_row(*grad, task / in.groups, task % in.groups, t, in.states, sums);
      }
}

template <typename Work, typename BackWork>
constexpr CpuKernels kernels() {
  return {tasks,          workspace<Work>, forward<Work>, backward_workspace<BackWork>, backward<BackWork>,
          backward_reduce};
}

}  // namespace
}  // namespace ARCORE_ISA
}  // namespace arcore::ssd
