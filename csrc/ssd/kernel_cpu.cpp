// CPU forward; compiled once per instruction set. README.md beside this file describes the matrices.
#include "common/matmul_panel.h"
#include "common/vec.h"
#include "ssd/params.h"

namespace arcore::ssd {
namespace ARCORE_ISA {
namespace {

// Heads of one task: they share the products of B and C.
constexpr int64_t kHeads = 4;
// Beyond this the decay of one step is 0 (or infinite) in any case; sums of such steps stay finite, so that
// A = -inf forgets instead of giving -inf - -inf.
constexpr double kLargestLog = 1e5;
// One cache line more than a power of two, so that rows do not compete for the same cache sets.
constexpr int64_t kStride = kChunk + 16;
static_assert(kChunk % kPanel == 0);

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

struct Work {
  int64_t pitch;    // of rows of B and C
  int64_t x_pitch;  // of rows of x and y
  ColumnPanels inputs, state;
  float *B, *C, *B_panels, *S;  // of the group: rows, rows, transposed rows, C B^T
  float *M, *x, *y, *z, *driven,
      *kept;      // of one head; driven and kept: dt x in panels, decayed to the chunk's end
  float* states;  // [kHeads] panels of [states, dim]
  float *dt, *high, *low,
      *decay;  // [kChunk]: step size; log2 of the decay up to a step, in two parts; the decay

  int64_t state_floats() const { return round_up(state.floats(), 16); }

  // Lays the buffers out from `base` on, and returns their size.
  int64_t lay(const Args& args, float* base) {
    pitch = round_up(args.states, 16) + 16;
    x_pitch = round_up(args.dim, kPanel) + 16;
    inputs = {kChunk, args.dim};
    state = {args.states, args.dim};
    int64_t at = 0;
    const auto take = [&](float*& buffer, int64_t floats) {
      buffer = base + at;
      at += round_up(floats, 16);
    };
    take(B, kChunk * pitch);
    take(C, kChunk * pitch);
    take(B_panels, kChunk * args.states);
    take(S, kChunk * kStride);
    take(M, kChunk * kStride);
    take(x, kChunk * x_pitch);
    take(y, kChunk * x_pitch);
    take(z, x_pitch);
    take(driven, inputs.floats());
    take(kept, inputs.floats());
    take(states, kHeads * state_floats());
    take(dt, kChunk + 16);
    take(high, kChunk + 16);
    take(low, kChunk + 16);
    take(decay, kChunk + 16);
    return at;
  }
};

int64_t workspace(const Args& args) {
  Work work{};
  return work.lay(args, nullptr);
}

bool skipped(const Chunk& chunk, int64_t t) {
  return chunk.ids != nullptr && chunk.ids[t * chunk.id_stride] < 0;
}

// Rows of a chunk as floats; skipped steps become 0, whatever they hold.
void load_rows(const View& v, int64_t batch, int64_t head, const Chunk& chunk, int64_t n, float* dst,
               int64_t pitch) {
  with_type(v.dtype, [&](auto type) {
    using T = decltype(type);
    const T* first = static_cast<const T*>(v.data) + batch * v.batch + head * v.head + chunk.begin * v.time;
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
    T* dst = static_cast<T*>(v.data) + batch * v.batch + head * v.head + t * v.time;
    if (v.last == 1) {
      from_float(src, dst, n);
    } else {
      for (int64_t i = 0; i < n; ++i)
        dst[i * v.last] = static_cast<T>(src[i]);
    }
  });
}

// B, C and C B^T, up to the diagonal, of one chunk.
void load_group(const Args& args, const Block& block, const Chunk& chunk, Work& w) {
  load_rows(args.B, block.batch, block.group, chunk, args.states, w.B, w.pitch);
  load_rows(args.C, block.batch, block.group, chunk, args.states, w.C, w.pitch);
  for (int64_t s = 0; s < chunk.length; s += kPanel)
    pack_transposed({w.B + s * w.pitch, w.pitch}, min_of<int64_t>(kPanel, chunk.length - s), args.states,
                    w.B_panels + s * args.states);
  for (int64_t row = 0; row < chunk.length; row += kMaxRows) {
    const int rows = static_cast<int>(min_of<int64_t>(kMaxRows, chunk.length - row));
    for (int64_t s = 0; s < row + rows; s += kPanel)
      multiply(rows, 2, w.C + row * w.pitch, w.pitch, w.B_panels + s * args.states, w.S + row * kStride + s,
               kStride, args.states);
  }
}

// Step sizes of a head, and the log2 of its decay from the chunk's start, as a sum of two floats: differences
// of neighbours stay exact where the sum itself has grown large.
void load_steps(const Args& args, const Block& block, int64_t head, const Chunk& chunk, Work& w) {
  with_type(args.dt.dtype, [&](auto type) {
    using T = decltype(type);
    const T* dt = static_cast<const T*>(args.dt.data) + block.batch * args.dt.batch + head * args.dt.head +
                  chunk.begin * args.dt.time;
    for (int64_t t = 0; t < chunk.length; ++t)
      w.dt[t] =
          static_cast<float>(dt[t * args.dt.time]) + (args.dt_bias != nullptr ? args.dt_bias[head] : 0.0f);
  });
  const int64_t whole = round_up(chunk.length, kLanes);
  for (int64_t t = chunk.length; t < whole; ++t)
    w.dt[t] = 0.0f;
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
  for (int64_t t = chunk.length; t < whole; ++t)
    w.high[t] = w.low[t] = 0.0f;
  for (int64_t t = 0; t < whole; t += kLanes)
    store(w.decay + t, exp2(load(w.high + t)));
}

// M = (C B^T) times the decay from step s to step t, up to the diagonal.
void decay_products(const Chunk& chunk, const Work& w) {
  for (int64_t t = 0; t < chunk.length; ++t) {
    const Vec high(w.high[t]), low(w.low[t]);
    for (int64_t s = 0; s <= t; s += kLanes) {
      const Vec between = (high - load(w.high + s)) + (low - load(w.low + s));
      store(w.M + t * kStride + s, load(w.S + t * kStride + s) * exp2(between));
    }
  }
}

// dt x, and the same decayed to the chunk's end, in panels.
void drive(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Work& w) {
  load_rows(args.x, block.batch, head, chunk, args.dim, w.x, w.x_pitch);
  const int64_t last = chunk.length - 1;
  for (int64_t t = 0; t < chunk.length; ++t) {
    const Vec dt(w.dt[t]);
    const Vec rest = exp2(Vec((w.high[last] - w.high[t]) + (w.low[last] - w.low[t])));
    float* row = w.x + t * w.x_pitch;
    for (int64_t i = args.dim; i < w.x_pitch - 16; ++i)
      row[i] = 0.0f;
    for (int64_t p = 0; p < w.inputs.count(); ++p)
      for (int64_t v = 0; v < w.inputs.vectors(p); ++v) {
        const int64_t to = w.inputs.offset(p, t) + v * kLanes;
        const Vec u = dt * load(row + p * kPanel + v * kLanes);
        store(w.driven + to, u);
        store(w.kept + to, rest * u);
      }
  }
}

// state = decay * state + kept^T B, with states as panels over channels.
void advance(const Args& args, const Chunk& chunk, const Work& w, float* state) {
  const Vec decay(w.decay[chunk.length - 1]);
  const int64_t floats = w.state.floats();
  for (int64_t i = 0; i < floats; i += kLanes)
    store(state + i, decay * load(state + i));
  for (int64_t p = 0; p < w.state.count(); ++p) {
    const int64_t width = w.state.vectors(p) * kLanes;
    for (int64_t n = 0; n < args.states; n += kMaxRows)
      multiply_add_transposed(static_cast<int>(min_of<int64_t>(kMaxRows, args.states - n)),
                              w.state.vectors(p), w.B + n, w.pitch, w.kept + w.inputs.offset(p, 0),
                              state + w.state.offset(p, n), width, chunk.length);
  }
}

void outputs(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Work& w,
             const float* state, bool from_zero) {
  for (int64_t row = 0; row < chunk.length; row += kMaxRows) {
    const int rows = static_cast<int>(min_of<int64_t>(kMaxRows, chunk.length - row));
    float* y = w.y + row * w.x_pitch;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < w.x_pitch - 16; i += kLanes)
        store(y + r * w.x_pitch + i, Vec(0.0f));
    if (!from_zero) {
      for (int64_t p = 0; p < w.state.count(); ++p)
        multiply_add(rows, w.state.vectors(p), w.C + row * w.pitch, w.pitch, state + w.state.offset(p, 0),
                     y + p * kPanel, w.x_pitch, args.states);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < w.x_pitch - 16; i += kLanes)
          store(y + r * w.x_pitch + i, Vec(w.decay[row + r]) * load(y + r * w.x_pitch + i));
    }
    for (int64_t p = 0; p < w.inputs.count(); ++p) {
      const float* driven = w.driven + w.inputs.offset(p, 0);
      const int64_t width = w.inputs.vectors(p) * kLanes;
      if (row > 0)
        multiply_add(rows, w.inputs.vectors(p), w.M + row * kStride, kStride, driven, y + p * kPanel,
                     w.x_pitch, row);
      // The triangle: products with the zeros above the diagonal would carry a NaN of a later step into
      // earlier ones.
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; i += kLanes) {
          float* at = y + r * w.x_pitch + p * kPanel + i;
          Vec sum = load(at);
          for (int64_t s = row; s <= row + r; ++s)
            sum = fma(Vec(w.M[(row + r) * kStride + s]), load(driven + s * width + i), sum);
          store(at, sum);
        }
    }
  }
  for (int64_t t = 0; t < chunk.length; ++t) {
    float* y = w.y + t * w.x_pitch;
    if (skipped(chunk, t)) {
      for (int64_t i = 0; i < args.dim; ++i)
        y[i] = 0.0f;
    } else {
      if (args.D != nullptr)
        for (int64_t i = 0; i < args.dim; ++i)
          y[i] += args.D[head * args.dim + i] * w.x[t * w.x_pitch + i];
      if (args.z.data != nullptr) {
        const Chunk step{chunk.begin + t, 1, 0, 0, false, false, false, false, nullptr, 0};
        load_rows(args.z, block.batch, head, step, args.dim, w.z, w.x_pitch);
        for (int64_t i = args.dim; i < round_up(args.dim, kLanes); ++i)
          w.z[i] = 0.0f;
        for (int64_t i = 0; i < args.dim; i += kLanes)
          store(y + i, load(y + i) * silu(load(w.z + i)));
      }
    }
    store_row(args.out, block.batch, head, chunk.begin + t, args.dim, y);
  }
}

// [dim, states] -> panels of [states, dim], and back.
void load_state(const Args& args, const Work& w, const float* from, float* state) {
  for (int64_t i = 0; i < w.state.floats(); ++i)
    state[i] = 0.0f;
  for (int64_t c = 0; c < args.dim && from != nullptr; ++c)
    for (int64_t n = 0; n < args.states; ++n)
      state[w.state.offset(c / kPanel, n) + c % kPanel] = from[c * args.states + n];
}

void store_state(const Args& args, const Work& w, const float* state, float* to) {
  for (int64_t c = 0; c < args.dim; ++c)
    for (int64_t n = 0; n < args.states; ++n)
      to[c * args.states + n] = state[w.state.offset(c / kPanel, n) + c % kPanel];
}

void forward_block(const Args& args, const Block& block, Work& w) {
  const int64_t row = args.chunk_rows == 1 ? 0 : block.batch;
  for (int64_t i = args.first_chunk[row]; i < args.first_chunk[row + 1]; ++i) {
    const Chunk& chunk = args.chunks[i];
    const int64_t sequence = chunk.sequence < 0 ? block.batch : chunk.sequence;
    if (chunk.length > 0) load_group(args, block, chunk, w);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t head = block.head + h;
      const int64_t at = (sequence * args.heads + head) * args.dim * args.states;
      float* state = w.states + h * w.state_floats();
      const bool zero = chunk.first && (chunk.zero_start || args.initial_state == nullptr);
      if (chunk.first) load_state(args, w, zero ? nullptr : args.initial_state + at, state);
      if (chunk.length > 0) {
        load_steps(args, block, head, chunk, w);
        decay_products(chunk, w);
        drive(args, block, head, chunk, w);
        outputs(args, block, head, chunk, w, state, zero);
        advance(args, chunk, w, state);
      }
      if (chunk.keep_last) store_state(args, w, state, args.last_state + at);
    }
  }
}

void forward(const Args& args, float* workspace, int64_t begin, int64_t end) {
  Work work{};
  const int64_t floats = work.lay(args, workspace);
  // Padding of the buffers is read by whole vectors.
  for (int64_t i = 0; i < floats; ++i)
    workspace[i] = 0.0f;
  for (int64_t task = begin; task < end; ++task)
    forward_block(args, Block(args, task), work);
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{tasks, workspace, forward};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::ssd
