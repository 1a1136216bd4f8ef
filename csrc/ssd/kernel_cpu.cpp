// CPU forward; compiled once per instruction set. README.md beside this file describes the matrices.
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

// state = decay * state + rows^T panels, with states as panels over channels.
void carry(const Args& args, const Chunk& chunk, const Work& w, const float* rows, const float* panels,
           float* state) {
  const Vec decay(w.decay[chunk.length - 1]);
  for (int64_t i = 0; i < w.state.floats(); i += kLanes)
    store(state + i, decay * load(state + i));
  for (int64_t p = 0; p < w.state.count(); ++p) {
    const int64_t width = w.state.vectors(p) * kLanes;
    for (int64_t n = 0; n < args.states; n += kMaxRows)
      multiply_add_transposed(static_cast<int>(min_of<int64_t>(kMaxRows, args.states - n)),
                              w.state.vectors(p), rows + n, w.pitch, panels + w.inputs.offset(p, 0),
                              state + w.state.offset(p, n), width, chunk.length);
  }
}

void advance(const Args& args, const Chunk& chunk, const Work& w, float* state) {
  carry(args, chunk, w, w.B, w.kept, state);
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
  }
  add_lower(w.M, chunk.length, 1, w.inputs, w.driven, w.y, w.x_pitch);
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
  const FlushDenormals flush;
  Work work{};
  const int64_t floats = work.lay(args, workspace);
  // Padding of the buffers is read by whole vectors.
  for (int64_t i = 0; i < floats; ++i)
    workspace[i] = 0.0f;
  for (int64_t task = begin; task < end; ++task)
    forward_block(args, Block(args, task), work);
}

// ---- backward

int64_t chunks_of_row(const Args& args, int64_t batch) {
  const int64_t row = args.chunk_rows == 1 ? 0 : batch;
  return args.first_chunk[row + 1] - args.first_chunk[row];
}

struct BackWork : Work {
  ColumnPanels columns;  // of [kChunk, states]
  float *B_columns, *C_columns;
  float *grad, *u, *scaled;        // rows of a head: gradient of y; dt x; one of them times a decay
  float *grad_panels, *grad_kept;  // the gradient in panels, and times the decay from the chunk's start
  float *u_t, *kept_t, *grad_t;    // transposed panels: dt x, the same decayed to the end, grad_kept
  float *E, *dM;                   // decays between steps; gradient of M, then times M
  float *dS, *dB_t,
      *dC_t;  // of the group: gradient of C B^T; parts of dB, dC through states, [states, steps]
  float *gated, *from_state, *du, *dBC;
  float *slope, *log_grad, *above;  // [kChunk]
  float *adjoint, *saved, *checkpoints;
  double grad_a[kHeads], grad_bias[kHeads];
  float* grad_d;  // [kHeads, padded dim]

  int64_t head_states() const { return kHeads * state_floats(); }

  int64_t lay_backward(const Args& args, const Segments& segments, float* base) {
    int64_t at = lay(args, base);
    columns = {kChunk, args.states};
    const auto take = [&](float*& buffer, int64_t floats) {
      buffer = base + at;
      at += round_up(floats, 16);
    };
    const int64_t rows = kChunk * x_pitch, square = kChunk * kStride;
    const int64_t transposed = kChunk * round_up(args.dim, kPanel);
    const int64_t by_state = round_up(args.states, 16) * kStride;
    for (float** buffer : {&B_columns, &C_columns})
      take(*buffer, columns.floats());
    for (float** buffer : {&grad, &u, &scaled, &gated, &from_state, &du})
      take(*buffer, rows);
    for (float** buffer : {&grad_panels, &grad_kept})
      take(*buffer, inputs.floats());
    for (float** buffer : {&u_t, &kept_t, &grad_t})
      take(*buffer, transposed);
    for (float** buffer : {&E, &dM, &dS})
      take(*buffer, square);
    for (float** buffer : {&dB_t, &dC_t})
      take(*buffer, by_state);
    take(dBC, kChunk * pitch);
    for (float** buffer : {&slope, &log_grad, &above})
      take(*buffer, kChunk + 16);
    take(grad_d, kHeads * x_pitch);
    take(adjoint, head_states());
    take(saved, segments.length * head_states());
    take(checkpoints, segments.count * head_states());
    return at;
  }
};

int64_t backward_workspace(const BackwardArgs& args) {
  int64_t most = 1;
  for (int64_t row = 0; row < args.in.chunk_rows; ++row)
    most = max_of(most, chunks_of_row(args.in, row));
  // Shorter rows never need more: the length of segments grows with the number of chunks, but for its jump
  // down where rows stop keeping everything.
  Segments segments(most);
  segments.length = max_of(segments.length, min_of(most, kKeptChunks));
  BackWork work{};
  return work.lay_backward(args.in, segments, nullptr);
}

// Rows of a chunk with zeros up to whole panels.
void load_padded(const View& v, const Block& block, int64_t head, const Chunk& chunk, const Args& args,
                 const Work& w, float* dst) {
  load_rows(v, block.batch, head, chunk, args.dim, dst, w.x_pitch);
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t i = args.dim; i < w.x_pitch - 16; ++i)
      dst[t * w.x_pitch + i] = 0.0f;
}

// How the clamped step follows from dt, before load_steps.
void load_slopes(const Args& args, const Block& block, int64_t head, const Chunk& chunk, BackWork& w) {
  with_type(args.dt.dtype, [&](auto type) {
    using T = decltype(type);
    const T* dt = static_cast<const T*>(args.dt.data) + block.batch * args.dt.batch + head * args.dt.head +
                  chunk.begin * args.dt.time;
    for (int64_t t = 0; t < chunk.length; ++t)
      w.slope[t] =
          static_cast<float>(dt[t * args.dt.time]) + (args.dt_bias != nullptr ? args.dt_bias[head] : 0.0f);
  });
  for (int64_t t = chunk.length; t < round_up(chunk.length, kLanes); ++t)
    w.slope[t] = 0.0f;
  const Vec low(args.dt_low), high(args.dt_high), zero(0.0f);
  for (int64_t t = 0; t < chunk.length; t += kLanes) {
    const Vec raw = load(w.slope + t);
    Vec slope(1.0f);
    const Vec step = args.softplus ? softplus(raw, slope) : raw;
    store(w.slope + t, where_less(step, low, zero, where_less(high, step, zero, slope)));
  }
  for (int64_t t = 0; t < chunk.length; ++t)
    if (skipped(chunk, t)) w.slope[t] = 0.0f;
}

// The decays between steps and M, up to the diagonal, and 0 beyond it to the end of the vector.
void decays_and_products(const Chunk& chunk, const BackWork& w) {
  const Vec zero(0.0f);
  for (int64_t t = 0; t < chunk.length; ++t) {
    const Vec high(w.high[t]), low(w.low[t]);
    for (int64_t s = 0; s <= t; s += kLanes) {
      const Vec between = (high - load(w.high + s)) + (low - load(w.low + s));
      const Vec decay = keep_lanes(exp2(between), 0, t + 1 - s, zero);
      store(w.E + t * kStride + s, decay);
      store(w.M + t * kStride + s, keep_lanes(load(w.S + t * kStride + s) * decay, 0, t + 1 - s, zero));
    }
  }
}

// out = states of all steps times `rows`, of which `state` holds panels [states, dim].
void times_state(const Args& args, const Chunk& chunk, const Work& w, const float* rows, const float* state,
                 float* out) {
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t i = 0; i < w.x_pitch - 16; i += kLanes)
      store(out + t * w.x_pitch + i, Vec(0.0f));
  for (int64_t row = 0; row < chunk.length; row += kMaxRows) {
    const int count = static_cast<int>(min_of<int64_t>(kMaxRows, chunk.length - row));
    for (int64_t p = 0; p < w.state.count(); ++p)
      multiply_add(count, w.state.vectors(p), rows + row * w.pitch, w.pitch, state + w.state.offset(p, 0),
                   out + row * w.x_pitch + p * kPanel, w.x_pitch, args.states);
  }
}

// out[n][t] += sum over channels of state[n] and the rows that `transposed` holds.
void add_state_times(const Args& args, const Chunk& chunk, const Work& w, const float* state,
                     const float* transposed, float* out) {
  for (int64_t n = 0; n < args.states; n += kMaxRows) {
    const int count = static_cast<int>(min_of<int64_t>(kMaxRows, args.states - n));
    for (int64_t p = 0; p < w.state.count(); ++p) {
      const int64_t width = w.state.vectors(p) * kLanes, used = min_of(width, args.dim - p * kPanel);
      for (int64_t t = 0; t < chunk.length; t += kPanel)
        multiply_add(count, 2, state + w.state.offset(p, n), width,
                     transposed + t * args.dim + p * kPanel * kPanel, out + n * kStride + t, kStride, used);
    }
  }
}

// dS += dM E; dM becomes dM M; above[j] = the sum of those that go from before step j to j or later.
void through_products(const Chunk& chunk, BackWork& w) {
  const Vec zero(0.0f);
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t s = 0; s <= t; s += kLanes) {
      const int64_t at = t * kStride + s;
      const Vec grad = keep_lanes(load(w.dM + at), 0, t + 1 - s, zero);
      store(w.dS + at, fma(grad, load(w.E + at), load(w.dS + at)));
      store(w.dM + at, grad * load(w.M + at));
    }
  float columns[kChunk + 16] = {};
  for (int64_t t = chunk.length - 1; t >= 0; --t) {
    Vec sum(0.0f);
    for (int64_t s = 0; s <= t; s += kLanes) {
      const Vec column = load(columns + s) + load(w.dM + t * kStride + s);
      store(columns + s, column);
      sum = sum + keep_lanes(column, 0, t - s, zero);
    }
    w.above[t] = reduce_add(sum);
  }
}

// Gradients of one head and chunk. `state` is the one before the chunk, `adjoint` the gradient of the one
// after it, and afterwards of the one before.
void head_backward(const BackwardArgs& args, const Block& block, int64_t h, const Chunk& chunk, BackWork& w,
                   const float* state, float* adjoint, bool from_zero) {
  const Args& in = args.in;
  const int64_t head = block.head + h, length = chunk.length, last = length - 1;
  const int64_t padded = w.x_pitch - 16, pitch = w.x_pitch;
  load_slopes(in, block, head, chunk, w);
  load_steps(in, block, head, chunk, w);
  decays_and_products(chunk, w);
  drive(in, block, head, chunk, w);
  if (args.grad_out.data != nullptr)
    load_padded(args.grad_out, block, head, chunk, in, w, w.grad);
  else
    std::memset(w.grad, 0, static_cast<size_t>(length * pitch) * sizeof(float));
  if (!from_zero) {
    times_state(in, chunk, w, w.C, state, w.from_state);
    for (int64_t t = 0; t < length; ++t)
      for (int64_t i = 0; i < padded; i += kLanes)
        store(w.from_state + t * pitch + i, Vec(w.decay[t]) * load(w.from_state + t * pitch + i));
  } else {
    std::memset(w.from_state, 0, static_cast<size_t>(length * pitch) * sizeof(float));
  }
  if (in.z.data != nullptr) {
    std::memcpy(w.y, w.from_state, static_cast<size_t>(length * pitch) * sizeof(float));
    add_lower(w.M, length, 1, w.inputs, w.driven, w.y, pitch);
    load_padded(in.z, block, head, chunk, in, w, w.gated);
    float skip[kPanel];
    for (int64_t i = 0; i < padded; i += kLanes) {
      for (int64_t c = 0; c < kLanes; ++c)
        skip[c] = in.D != nullptr && i + c < in.dim ? in.D[head * in.dim + i + c] : 0.0f;
      const Vec d = load(skip), one(1.0f);
      for (int64_t t = 0; t < length; ++t) {
        const int64_t at = t * pitch + i;
        const Vec y = fma(d, load(w.x + at), load(w.y + at)), z = load(w.gated + at), g = load(w.grad + at);
        const Vec s = sigmoid(z), gs = g * s;
        store(w.gated + at, gs * y * fma(z, one - s, one));
        store(w.grad + at, gs * z);
      }
    }
    for (int64_t t = 0; t < length; ++t) {
      if (skipped(chunk, t)) std::memset(w.gated + t * pitch, 0, static_cast<size_t>(in.dim) * sizeof(float));
      store_row(args.grad_z, block.batch, head, chunk.begin + t, in.dim, w.gated + t * pitch);
    }
  }
  // Rows that the products below need.
  for (int64_t t = 0; t < length; ++t)
    for (int64_t i = 0; i < padded; i += kLanes)
      store(w.u + t * pitch + i, Vec(w.dt[t]) * load(w.x + t * pitch + i));
  transposed_panels(chunk.length, w.u, pitch, in.dim, w.u_t);
  for (int64_t t = 0; t < length; ++t) {
    const Vec rest = exp2(Vec((w.high[last] - w.high[t]) + (w.low[last] - w.low[t])));
    for (int64_t i = 0; i < padded; i += kLanes)
      store(w.scaled + t * pitch + i, rest * load(w.u + t * pitch + i));
  }
  transposed_panels(chunk.length, w.scaled, pitch, in.dim, w.kept_t);
  row_panels(chunk.length, w.inputs, w.grad, pitch, w.grad_panels);
  for (int64_t t = 0; t < length; ++t)
    for (int64_t i = 0; i < padded; i += kLanes)
      store(w.scaled + t * pitch + i, Vec(w.decay[t]) * load(w.grad + t * pitch + i));
  row_panels(chunk.length, w.inputs, w.scaled, pitch, w.grad_kept);

  // Through M.
  for (int64_t row = 0; row < length; row += kMaxRows) {
    const int rows = static_cast<int>(min_of<int64_t>(kMaxRows, length - row));
    for (int64_t s = 0; s < row + rows; s += kPanel)
      multiply(rows, 2, w.grad + row * pitch, pitch, w.u_t + s * in.dim, w.dM + row * kStride + s, kStride,
               in.dim);
  }
  through_products(chunk, w);

  // Through the states.
  add_state_times(in, chunk, w, adjoint, w.kept_t, w.dB_t);
  float kept = 0.0f;
  if (!from_zero) {
    transposed_panels(chunk.length, w.scaled, pitch, in.dim, w.grad_t);
    add_state_times(in, chunk, w, state, w.grad_t, w.dC_t);
    kept = w.decay[last] * dot(adjoint, state, w.state.floats());
  }
  times_state(in, chunk, w, w.B, adjoint, w.du);
  // dt A of a step decays whatever goes from a step before it to it or later: sums of such parts, never
  // differences.
  float read = 0.0f, written = 0.0f;
  for (int64_t t = 0; t < length; ++t) {
    const Vec rest = exp2(Vec((w.high[last] - w.high[t]) + (w.low[last] - w.low[t])));
    for (int64_t i = 0; i < padded; i += kLanes)
      store(w.du + t * pitch + i, rest * load(w.du + t * pitch + i));
    w.log_grad[t] = w.above[t] + kept + written;
    written += dot(w.u + t * pitch, w.du + t * pitch, padded);
  }
  for (int64_t t = last; t >= 0; --t) {
    read += dot(w.grad + t * pitch, w.from_state + t * pitch, padded);
    w.log_grad[t] += read;
  }
  add_lower_transposed(w.M, length, 1, w.inputs, w.grad_panels, w.du, pitch);
  carry(in, chunk, w, w.C, w.grad_kept, adjoint);

  // Inputs and step sizes.
  const double a = static_cast<double>(in.A[head]);
  float* grad_d = w.grad_d + h * pitch;
  for (int64_t t = 0; t < length; ++t) {
    const float* x = w.x + t * pitch;
    float *du = w.du + t * pitch, *grad = w.grad + t * pitch;
    float ddt = 0.0f;
    if (skipped(chunk, t)) {
      std::memset(du, 0, static_cast<size_t>(in.dim) * sizeof(float));
    } else {
      ddt = dot(du, x, padded);
      const double log = static_cast<double>(w.dt[t]) * a * 1.4426950408889634;
      if (!(log < -kLargestLog || log > kLargestLog)) {
        ddt += w.log_grad[t] * in.A[head];
        w.grad_a[h] += static_cast<double>(w.log_grad[t]) * static_cast<double>(w.dt[t]);
      }
      ddt *= w.slope[t];
      w.grad_bias[h] += static_cast<double>(ddt);
      for (int64_t i = 0; i < padded; i += kLanes) {
        store(du + i, Vec(w.dt[t]) * load(du + i));
        store(grad_d + i, fma(load(grad + i), load(x + i), load(grad_d + i)));
      }
      if (in.D != nullptr)
        for (int64_t i = 0; i < in.dim; ++i)
          du[i] += in.D[head * in.dim + i] * grad[i];
    }
    store_row(args.grad_x, block.batch, head, chunk.begin + t, in.dim, du);
    with_type(args.grad_dt.dtype, [&](auto type) {
      using T = decltype(type);
      static_cast<T*>(args.grad_dt.data)[block.batch * args.grad_dt.batch + head * args.grad_dt.head +
                                         (chunk.begin + t) * args.grad_dt.time] = static_cast<T>(ddt);
    });
  }
}

// Rows of dB or dC: `through` [states, steps] from the states, the rest of it added by `add`.
template <typename Add>
void store_matrix(const BackwardArgs& args, const Chunk& chunk, BackWork& w, const float* through,
                  int64_t task, float* partial, const Add& add) {
  const int64_t states = args.in.states;
  for (int64_t t = 0; t < chunk.length; t += kLanes)
    for (int64_t n = 0; n < states; n += kLanes)
      transpose_block(through + n * kStride + t, kStride, w.dBC + t * w.pitch + n, w.pitch);
  add(w.dBC);
  float* to = partial + (task * args.in.length + chunk.begin) * states;
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t n = 0; n < states; ++n)
      to[t * states + n] = skipped(chunk, t) ? 0.0f : w.dBC[t * w.pitch + n];
}

// The states before the chunks [begin, end) of a row; `save` gets them as they come.
template <typename Save>
void states_before(const Args& args, const Block& block, BackWork& w, const Chunk* chunks, int64_t begin,
                   int64_t end, const Save& save) {
  for (int64_t i = begin; i < end; ++i) {
    const Chunk& chunk = chunks[i];
    const int64_t sequence = chunk.sequence < 0 ? block.batch : chunk.sequence;
    const bool more = i + 1 < end && chunk.length > 0;
    if (more) load_rows(args.B, block.batch, block.group, chunk, args.states, w.B, w.pitch);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t at = (sequence * args.heads + block.head + h) * args.dim * args.states;
      float* state = w.states + h * w.state_floats();
      if (chunk.first)
        load_state(args, w,
                   chunk.zero_start || args.initial_state == nullptr ? nullptr : args.initial_state + at,
                   state);
      save(i, h, state);
      if (!more) continue;
      load_steps(args, block, block.head + h, chunk, w);
      drive(args, block, block.head + h, chunk, w);
      advance(args, chunk, w, state);
    }
  }
}

void backward_block(const BackwardArgs& args, int64_t task, BackWork& w, float* workspace) {
  const Args& in = args.in;
  const Block block(in, task);
  const Segments segments(chunks_of_row(in, block.batch));
  w.lay_backward(in, segments, workspace);
  const Chunk* chunks = in.chunks + in.first_chunk[in.chunk_rows == 1 ? 0 : block.batch];
  const int64_t floats = w.state_floats();
  const auto copy = [&](float* to, const float* from) {
    std::memcpy(to, from, static_cast<size_t>(floats) * sizeof(float));
  };
  for (int64_t h = 0; h < kHeads; ++h)
    w.grad_a[h] = w.grad_bias[h] = 0.0;
  std::memset(w.grad_d, 0, static_cast<size_t>(kHeads * w.x_pitch) * sizeof(float));
  if (segments.count > 1)
    states_before(in, block, w, chunks, 0, (segments.count - 1) * segments.length + 1,
                  [&](int64_t i, int64_t h, const float* state) {
                    if (i % segments.length == 0)
                      copy(w.checkpoints + (i / segments.length * kHeads + h) * floats, state);
                  });
  for (int64_t segment = segments.count - 1; segment >= 0; --segment) {
    const int64_t begin = segment * segments.length;
    const int64_t end = min_of(begin + segments.length, segments.chunks);
    if (segments.count > 1)
      for (int64_t h = 0; h < block.heads; ++h)
        copy(w.states + h * floats, w.checkpoints + (segment * kHeads + h) * floats);
    states_before(in, block, w, chunks, begin, end, [&](int64_t i, int64_t h, const float* state) {
      copy(w.saved + ((i - begin) * kHeads + h) * floats, state);
    });
    for (int64_t i = end - 1; i >= begin; --i) {
      const Chunk& chunk = chunks[i];
      const int64_t sequence = chunk.sequence < 0 ? block.batch : chunk.sequence;
      const bool zero = chunk.first && (chunk.zero_start || in.initial_state == nullptr);
      if (chunk.length > 0) {
        load_group(in, block, chunk, w);
        row_panels(chunk.length, w.columns, w.B, w.pitch, w.B_columns);
        row_panels(chunk.length, w.columns, w.C, w.pitch, w.C_columns);
        std::memset(w.dS, 0, static_cast<size_t>(kChunk * kStride) * sizeof(float));
        const size_t by_state = static_cast<size_t>(round_up(in.states, 16) * kStride) * sizeof(float);
        std::memset(w.dB_t, 0, by_state);
        std::memset(w.dC_t, 0, by_state);
      }
      for (int64_t h = 0; h < block.heads; ++h) {
        const int64_t at = (sequence * in.heads + block.head + h) * in.dim * in.states;
        float* adjoint = w.adjoint + h * floats;
        if (chunk.last)
          load_state(in, w,
                     args.grad_last_state != nullptr && chunk.keep_last ? args.grad_last_state + at : nullptr,
                     adjoint);
        if (chunk.length > 0)
          head_backward(args, block, h, chunk, w, w.saved + ((i - begin) * kHeads + h) * floats, adjoint,
                        zero);
        if (chunk.first && args.grad_initial_state != nullptr && !chunk.zero_start)
          store_state(in, w, adjoint, args.grad_initial_state + at);
      }
      if (chunk.length == 0) continue;
      store_matrix(args, chunk, w, w.dB_t, task, args.partial_B, [&](float* rows) {
        add_lower_transposed(w.dS, chunk.length, 1, w.columns, w.C_columns, rows, w.pitch);
      });
      store_matrix(args, chunk, w, w.dC_t, task, args.partial_C, [&](float* rows) {
        add_lower(w.dS, chunk.length, 1, w.columns, w.B_columns, rows, w.pitch);
      });
    }
  }
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t at = block.batch * in.heads + block.head + h;
    args.partial_A[at] = static_cast<float>(w.grad_a[h]);
    args.partial_bias[at] = static_cast<float>(w.grad_bias[h]);
    std::memcpy(args.partial_D + at * in.dim, w.grad_d + h * w.x_pitch,
                static_cast<size_t>(in.dim) * sizeof(float));
  }
}

void backward(const BackwardArgs& args, float* workspace, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t floats = backward_workspace(args);
  // Padding of the buffers is read by whole vectors.
  for (int64_t i = 0; i < floats; ++i)
    workspace[i] = 0.0f;
  BackWork work{};
  for (int64_t task = begin; task < end; ++task)
    backward_block(args, task, work, workspace);
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
        for (int64_t n = 0; n < in.states; ++n) {
          float sum = 0.0f;
          for (int64_t b = 0; b < blocks; ++b)
            sum += first[b * size + n];
          sums[n] = sum;
        }
        store_row(*grad, task / in.groups, task % in.groups, t, in.states, sums);
      }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{tasks,    workspace,      forward, backward_workspace,
                                       backward, backward_reduce};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::ssd
