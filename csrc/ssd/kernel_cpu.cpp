// CPU forward and backward in float32; compiled once per instruction set. README.md beside this file
// describes the matrices.
#include "ssd/steps_cpu.h"

namespace arcore::ssd {
namespace ARCORE_ISA {
namespace {

struct Work {
  int64_t pitch;    // of rows of B and C
  int64_t x_pitch;  // of rows of x and y
  ColumnPanels inputs, state;
  float *B, *C, *B_panels, *S;  // of the group: rows, rows, transposed rows, C B^T
  // Of one head; driven and kept: dt x in panels, decayed to the chunk's end.
  float *M, *x, *y, *z, *driven, *kept;
  float* states;  // [kHeads] panels of [states, dim]
  Steps steps;

  int64_t state_floats() const { return round_up(state.floats(), 16); }
  int64_t state_column(int64_t c) const { return state.offset(c / kPanel, 0) + c % kPanel; }
  int64_t state_pitch(int64_t c) const { return state.vectors(c / kPanel) * kLanes; }

  void lay(const Args& args, Layout& layout) {
    pitch = round_up(args.states, 16) + 16;
    x_pitch = round_up(args.dim, kPanel) + 16;
    inputs = {kChunk, args.dim};
    state = {args.states, args.dim};
    for (float** rows : {&B, &C})
      layout.take(*rows, kChunk * pitch);
    layout.take(B_panels, kChunk * args.states);
    for (float** square : {&S, &M})
      layout.take(*square, kChunk * kStride);
    for (float** rows : {&x, &y})
      layout.take(*rows, kChunk * x_pitch);
    layout.take(z, x_pitch);
    for (float** panels : {&driven, &kept})
      layout.take(*panels, inputs.floats());
    layout.take(states, kHeads * state_floats());
    steps.lay(layout);
  }
};

// B alone, for the states.
void load_inputs(const Args& args, const Block& block, const Chunk& chunk, const Work& w) {
  load_rows(args.B, block.batch, block.group, chunk, args.states, w.B, w.pitch);
}

// B, C and C B^T, up to the diagonal, of one chunk.
void load_group(const Args& args, const Block& block, const Chunk& chunk, const Work& w) {
  load_inputs(args, block, chunk, w);
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

// M = (C B^T) times the decay from step s to step t, up to the diagonal.
void decay_products(const Chunk& chunk, const Work& w) {
  for (int64_t t = 0; t < chunk.length; ++t) {
    const Vec high(w.steps.high[t]), low(w.steps.low[t]);
    for (int64_t s = 0; s <= t; s += kLanes) {
      const Vec between = (high - load(w.steps.high + s)) + (low - load(w.steps.low + s));
      store(w.M + t * kStride + s, load(w.S + t * kStride + s) * exp2(between));
    }
  }
}

// dt x, and the same decayed to the chunk's end, in panels.
void drive(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Work& w) {
  load_rows(args.x, block.batch, head, chunk, args.dim, w.x, w.x_pitch);
  for (int64_t t = 0; t < chunk.length; ++t) {
    const Vec dt(w.steps.dt[t]), rest(w.steps.rest[t]);
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
void carry(const Args& args, const Chunk& chunk, const Ahead& ahead, const Work& w, const float* rows,
           const float* panels, float* state) {
  const Vec decay(w.steps.decay[chunk.length - 1]);
  for (int64_t i = 0; i < w.state.floats(); i += kLanes)
    store(state + i, decay * load(state + i));
  for (int64_t p = 0; p < w.state.count(); ++p) {
    const int64_t width = w.state.vectors(p) * kLanes;
    for (int64_t n = 0; n < args.states; n += kMaxRows) {
      if (p == 0) ahead.ask(args.x, n * kChunk / args.states, kMaxRows * kChunk / args.states + 1);
      multiply_add_transposed(static_cast<int>(min_of<int64_t>(kMaxRows, args.states - n)),
                              w.state.vectors(p), rows + n, w.pitch, panels + w.inputs.offset(p, 0),
                              state + w.state.offset(p, n), width, chunk.length);
    }
  }
}

void advance(const Args& args, const Chunk& chunk, const Ahead& ahead, const Work& w, float* state) {
  carry(args, chunk, ahead, w, w.B, w.kept, state);
}

void outputs(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Ahead& ahead,
             const Work& w, const float* state, bool from_zero) {
  for (int64_t row = 0; row < chunk.length; row += kMaxRows) {
    const int rows = static_cast<int>(min_of<int64_t>(kMaxRows, chunk.length - row));
    for (const View* v : {&args.z, &args.out})
      ahead.ask(*v, row, rows);
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
          store(y + r * w.x_pitch + i, Vec(w.steps.decay[row + r]) * load(y + r * w.x_pitch + i));
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

void head_states(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Ahead& ahead,
                 const Work& w, float* state) {
  load_steps(args, block, head, chunk, w.steps);
  drive(args, block, head, chunk, w);
  advance(args, chunk, ahead, w, state);
}

void head_forward(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Ahead& ahead,
                  const Work& w, float* state, bool from_zero) {
  load_steps(args, block, head, chunk, w.steps);
  decay_products(chunk, w);
  drive(args, block, head, chunk, w);
  outputs(args, block, head, chunk, ahead, w, state, from_zero);
  advance(args, chunk, ahead, w, state);
}

// ---- backward

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
  Carried carried;

  int64_t saved_floats() const { return state_floats(); }

  void lay_backward(const Args& args, const Segments& segments, Layout& layout) {
    lay(args, layout);
    columns = {kChunk, args.states};
    const int64_t rows = kChunk * x_pitch, square = kChunk * kStride;
    const int64_t transposed = kChunk * round_up(args.dim, kPanel);
    const int64_t by_state = round_up(args.states, 16) * kStride;
    for (float** buffer : {&B_columns, &C_columns})
      layout.take(*buffer, columns.floats());
    for (float** buffer : {&grad, &u, &scaled, &gated, &from_state, &du})
      layout.take(*buffer, rows);
    for (float** buffer : {&grad_panels, &grad_kept})
      layout.take(*buffer, inputs.floats());
    for (float** buffer : {&u_t, &kept_t, &grad_t})
      layout.take(*buffer, transposed);
    for (float** buffer : {&E, &dM, &dS})
      layout.take(*buffer, square);
    for (float** buffer : {&dB_t, &dC_t})
      layout.take(*buffer, by_state);
    layout.take(dBC, kChunk * pitch);
    for (float** buffer : {&slope, &log_grad, &above})
      layout.take(*buffer, kChunk + 16);
    carried.lay(segments, state_floats(), saved_floats(), x_pitch, layout);
  }
};

// Rows of a chunk with zeros up to whole panels.
void load_padded(const View& v, const Block& block, int64_t head, const Chunk& chunk, const Args& args,
                 const Work& w, float* dst) {
  load_rows(v, block.batch, head, chunk, args.dim, dst, w.x_pitch);
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t i = args.dim; i < w.x_pitch - 16; ++i)
      dst[t * w.x_pitch + i] = 0.0f;
}

// The decays between steps and M, up to the diagonal, and 0 beyond it to the end of the vector.
void decays_and_products(const Chunk& chunk, const BackWork& w) {
  const Vec zero(0.0f);
  for (int64_t t = 0; t < chunk.length; ++t) {
    const Vec high(w.steps.high[t]), low(w.steps.low[t]);
    for (int64_t s = 0; s <= t; s += kLanes) {
      const Vec between = (high - load(w.steps.high + s)) + (low - load(w.steps.low + s));
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
  sums_above(w.dM, chunk.length, w.above);
}

// States are kept as they are.
void save_state(const BackWork& w, const float* state, float* saved) {
  std::memcpy(saved, state, static_cast<size_t>(w.state_floats()) * sizeof(float));
}

// Gradients of one head and chunk. `state` is the one before the chunk, `adjoint` the gradient of the one
// after it, and afterwards of the one before.
void head_backward(const BackwardArgs& args, const Block& block, int64_t h, const Chunk& chunk,
                   const Ahead& ahead, BackWork& w, const float* state, float* adjoint, bool from_zero) {
  const Args& in = args.in;
  const int64_t head = block.head + h, length = chunk.length, last = length - 1;
  const int64_t padded = w.x_pitch - 16, pitch = w.x_pitch;
  load_slopes(in, block, head, chunk, w.slope);
  load_steps(in, block, head, chunk, w.steps);
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
        store(w.from_state + t * pitch + i, Vec(w.steps.decay[t]) * load(w.from_state + t * pitch + i));
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
      store(w.u + t * pitch + i, Vec(w.steps.dt[t]) * load(w.x + t * pitch + i));
  transposed_panels(chunk.length, w.u, pitch, in.dim, w.u_t);
  for (int64_t t = 0; t < length; ++t) {
    const Vec rest(w.steps.rest[t]);
    for (int64_t i = 0; i < padded; i += kLanes)
      store(w.scaled + t * pitch + i, rest * load(w.u + t * pitch + i));
  }
  transposed_panels(chunk.length, w.scaled, pitch, in.dim, w.kept_t);
  row_panels(chunk.length, w.inputs, w.grad, pitch, w.grad_panels);
  for (int64_t t = 0; t < length; ++t)
    for (int64_t i = 0; i < padded; i += kLanes)
      store(w.scaled + t * pitch + i, Vec(w.steps.decay[t]) * load(w.grad + t * pitch + i));
  row_panels(chunk.length, w.inputs, w.scaled, pitch, w.grad_kept);

  // Through M.
  for (int64_t row = 0; row < length; row += kMaxRows) {
    const int rows = static_cast<int>(min_of<int64_t>(kMaxRows, length - row));
    for (const View* v : {&args.grad_out, &in.z, &args.grad_x})
      ahead.ask(*v, row, rows);
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
    kept = w.steps.decay[last] * dot(adjoint, state, w.state.floats());
  }
  times_state(in, chunk, w, w.B, adjoint, w.du);
  // dt A of a step decays whatever goes from a step before it to it or later: sums of such parts, never
  // differences.
  float read = 0.0f, written = 0.0f;
  for (int64_t t = 0; t < length; ++t) {
    const Vec rest(w.steps.rest[t]);
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
  carry(in, chunk, ahead, w, w.C, w.grad_kept, adjoint);

  // Inputs and step sizes.
  float* grad_d = w.carried.grad_d + h * pitch;
  for (int64_t t = 0; t < length; ++t) {
    const float* x = w.x + t * pitch;
    float *du = w.du + t * pitch, *grad = w.grad + t * pitch;
    float ddt = 0.0f;
    if (skipped(chunk, t)) {
      std::memset(du, 0, static_cast<size_t>(in.dim) * sizeof(float));
    } else {
      ddt =
          step_gradient(in, head, h, dot(du, x, padded), w.log_grad[t], w.steps.dt[t], w.slope[t], w.carried);
      for (int64_t i = 0; i < padded; i += kLanes) {
        store(du + i, Vec(w.steps.dt[t]) * load(du + i));
        store(grad_d + i, fma(load(grad + i), load(x + i), load(grad_d + i)));
      }
      if (in.D != nullptr)
        for (int64_t i = 0; i < in.dim; ++i)
          du[i] += in.D[head * in.dim + i] * grad[i];
    }
    store_row(args.grad_x, block.batch, head, chunk.begin + t, in.dim, du);
    store_dt_gradient(args, block, head, chunk.begin + t, ddt);
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

void open_group(const BackwardArgs& args, const Block& block, const Chunk& chunk, BackWork& w) {
  load_group(args.in, block, chunk, w);
  row_panels(chunk.length, w.columns, w.B, w.pitch, w.B_columns);
  row_panels(chunk.length, w.columns, w.C, w.pitch, w.C_columns);
  std::memset(w.dS, 0, static_cast<size_t>(kChunk * kStride) * sizeof(float));
  const size_t by_state = static_cast<size_t>(round_up(args.in.states, 16) * kStride) * sizeof(float);
  std::memset(w.dB_t, 0, by_state);
  std::memset(w.dC_t, 0, by_state);
}

void close_group(const BackwardArgs& args, int64_t task, const Chunk& chunk, BackWork& w) {
  store_matrix(args, chunk, w, w.dB_t, task, args.partial_B, [&](float* rows) {
    add_lower_transposed(w.dS, chunk.length, 1, w.columns, w.C_columns, rows, w.pitch);
  });
  store_matrix(args, chunk, w, w.dC_t, task, args.partial_C,
               [&](float* rows) { add_lower(w.dS, chunk.length, 1, w.columns, w.B_columns, rows, w.pitch); });
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels = kernels<Work, BackWork>();
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::ssd
