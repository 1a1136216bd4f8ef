// Mamba-3's scan on the CPU; compiled once per instruction set. README.md beside this file describes the
// matrices.
#include <cstring>

#include "common/chunk_products.h"
#include "common/flush_denormals.h"
#include "common/vec.h"
#include "mamba3_scan/params.h"

namespace arcore::mamba3_scan {
namespace ARCORE_ISA {
namespace {

// Heads of one task: they read the same rows of B and C.
constexpr int64_t kHeads = 4;
// As in ssd: beyond this the decay of one step is 0 in any case, and sums of such steps stay finite.
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

// How the kernels keep states: the first elements of all pairs, then the second ones, each padded to whole
// vectors.
struct Pairs {
  int64_t half, padded_half;
  bool halves;

  Pairs(int64_t states, bool halves)
      : half(states / 2), padded_half(round_up(states / 2, kLanes)), halves(halves) {}
  int64_t padded() const { return 2 * padded_half; }
  int64_t first(int64_t s) const { return halves ? s : 2 * s; }
  int64_t second(int64_t s) const { return halves ? half + s : 2 * s + 1; }

  // One row of states, from the caller's order and into it.
  void take(const float* from, float* row) const {
    if (halves) {
      for (int64_t s = 0; s < half; ++s)
        row[s] = from[s];
      for (int64_t s = 0; s < half; ++s)
        row[padded_half + s] = from[half + s];
    } else {
      for (int64_t s = 0; s < half; ++s) {
        row[s] = from[2 * s];
        row[padded_half + s] = from[2 * s + 1];
      }
    }
    for (int64_t s = half; s < padded_half; ++s)
      row[s] = row[padded_half + s] = 0.0f;
  }
  void give(const float* row, float* to) const {
    for (int64_t s = 0; s < half; ++s) {
      to[first(s)] = row[s];
      to[second(s)] = row[padded_half + s];
    }
  }
};

struct Work {
  int64_t states;   // padded
  int64_t pitch;    // of rows of B and C
  int64_t x_pitch;  // of rows of x and y
  int64_t angles;   // padded
  ColumnPanels inputs, state;
  float *raw_B, *raw_C;       // rows of the group
  float *B_bias, *C_bias;     // rows of the task's heads
  float *B, *C, *B_panels;    // of one head, turned: rows, rows, transposed rows
  float *cosines, *sines;     // [kChunk, angles]
  float *S, *M;               // C B^T; the same with decays and weights
  float *x, *y, *z, *scaled;  // rows of one head
  float *x_panels, *kept_panels;
  float* hold;       // one row as floats
  float* states_of;  // [kHeads] panels of [states, dim]
  double* phases;    // [kHeads, angles]: the sum of the turns so far, below 2 pi
  // [kChunk], by rows: log2 of the decay up to a step, in two parts; the decay; from a step to the chunk's
  // end; weights
  float *high, *low, *decay, *rest, *kept, *own;

  int64_t state_floats() const { return round_up(state.floats(), 16); }

  // Lays the buffers out from `base` on, and returns their size.
  int64_t lay(const Args& args, float* base) {
    states = Pairs(args.states, args.halves).padded();
    pitch = round_up(states, 16) + 16;
    x_pitch = round_up(args.dim, kPanel) + 16;
    angles = round_up(args.angles, 16);
    inputs = {kChunk, args.dim};
    state = {states, args.dim};
    int64_t at = 0;
    const auto take = [&](float*& buffer, int64_t floats) {
      buffer = base + at;
      at += round_up(floats, 16);
    };
    for (float** rows : {&raw_B, &raw_C, &B, &C})
      take(*rows, kChunk * pitch);
    for (float** rows : {&B_bias, &C_bias})
      take(*rows, kHeads * args.rank * pitch);
    take(B_panels, kChunk * states);
    for (float** table : {&cosines, &sines})
      take(*table, kChunk * angles);
    for (float** square : {&S, &M})
      take(*square, kChunk * kStride);
    for (float** rows : {&x, &y, &z, &scaled})
      take(*rows, kChunk * x_pitch);
    for (float** panels : {&x_panels, &kept_panels})
      take(*panels, inputs.floats());
    take(hold, max_of(max_of(args.states, args.dim), args.angles) + 16);
    take(states_of, kHeads * state_floats());
    float* doubles = nullptr;
    take(doubles, 2 * kHeads * angles);
    phases = reinterpret_cast<double*>(doubles);
    for (float** numbers : {&high, &low, &decay, &rest, &kept, &own})
      take(*numbers, kChunk + 16);
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

// n elements of a view as floats, and the reverse.
void read(const View& v, int64_t batch, int64_t time, int64_t head, int64_t rank, int64_t n, float* dst) {
  with_type(v.dtype, [&](auto type) {
    using T = decltype(type);
    const T* src =
        static_cast<const T*>(v.data) + batch * v.batch + time * v.time + head * v.head + rank * v.rank;
    if (v.last == 1) {
      to_float(src, dst, n);
    } else {
      for (int64_t i = 0; i < n; ++i)
        dst[i] = static_cast<float>(src[i * v.last]);
    }
  });
}

void write(const View& v, int64_t batch, int64_t time, int64_t head, int64_t rank, int64_t n,
           const float* src) {
  with_type(v.dtype, [&](auto type) {
    using T = decltype(type);
    T* dst = static_cast<T*>(v.data) + batch * v.batch + time * v.time + head * v.head + rank * v.rank;
    if (v.last == 1) {
      from_float(src, dst, n);
    } else {
      for (int64_t i = 0; i < n; ++i)
        dst[i * v.last] = static_cast<T>(src[i]);
    }
  });
}

float read_one(const View& v, int64_t batch, int64_t time, int64_t head) {
  float value = 0.0f;
  read(v, batch, time, head, 0, 1, &value);
  return value;
}

void write_one(const View& v, int64_t batch, int64_t time, int64_t head, float value) {
  write(v, batch, time, head, 0, 1, &value);
}

// Rows of channels, zero up to whole panels and where a step is skipped.
void load_inputs(const View& v, const Args& args, const Block& block, int64_t head, const Chunk& chunk,
                 const Work& w, float* dst) {
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t r = 0; r < args.rank; ++r) {
      float* row = dst + (t * args.rank + r) * w.x_pitch;
      int64_t filled = 0;
      if (!skipped(chunk, t)) {
        read(v, block.batch, chunk.begin + t, head, r, args.dim, row);
        filled = args.dim;
      }
      for (int64_t i = filled; i < w.x_pitch - 16; ++i)
        row[i] = 0.0f;
    }
}

void load_matrix(const View& v, const Args& args, const Block& block, const Chunk& chunk, const Work& w,
                 float* dst) {
  const Pairs pairs(args.states, args.halves);
  for (int64_t t = 0; t < chunk.length; ++t) {
    if (skipped(chunk, t)) continue;
    for (int64_t r = 0; r < args.rank; ++r) {
      read(v, block.batch, chunk.begin + t, block.group, r, args.states, w.hold);
      pairs.take(w.hold, dst + (t * args.rank + r) * w.pitch);
    }
  }
}

// Biases of the task's heads, once per task.
void load_biases(const Args& args, const Block& block, const Work& w) {
  const Pairs pairs(args.states, args.halves);
  struct Side {
    const float* from;
    float* to;
  };
  for (const auto& [from, to] : {Side{args.B_bias, w.B_bias}, Side{args.C_bias, w.C_bias}})
    for (int64_t h = 0; h < block.heads; ++h)
      for (int64_t r = 0; r < args.rank; ++r) {
        float* row = to + (h * args.rank + r) * w.pitch;
        if (from != nullptr)
          pairs.take(from + ((block.head + h) * args.rank + r) * args.states, row);
        else
          for (int64_t n = 0; n < w.states; ++n)
            row[n] = 0.0f;
      }
}

constexpr double kPi = 3.14159265358979323846;

// Cosines and sines of `phase`, which lies in [0, 2 pi]: a quarter of the circle by its number, the rest by
// Taylor's series on [-pi / 4, pi / 4], within 1 ulp of 1.
void circle(const double* phase, int64_t n, float* cosines, float* sines) {
  for (int64_t i = 0; i < n; ++i) {
    const int quarter = static_cast<int>(phase[i] * (2.0 / kPi) + 0.5);
    const float x = static_cast<float>(phase[i] - static_cast<double>(quarter) * (kPi / 2)), q = x * x;
    const float s = x + x * q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880))));
    const float c = 1.0f - 0.5f * q +
                    q * q * (1.0f / 24 + q * (-1.0f / 720 + q * (1.0f / 40320 + q * (-1.0f / 3628800))));
    const bool odd = (quarter & 1) != 0;
    const float co = odd ? s : c, si = odd ? c : s;
    cosines[i] = ((quarter + 1) & 2) != 0 ? -co : co;
    sines[i] = (quarter & 2) != 0 ? -si : si;
  }
}

// The phases after each step of a chunk as tables of cosines and sines; `phase` moves on. Null tables: it
// only moves.
void turn_tables(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Work& w,
                 double* phase, float* cosines, float* sines) {
  for (int64_t t = 0; t < chunk.length; ++t) {
    if (!skipped(chunk, t)) {
      read(args.turn, block.batch, chunk.begin + t, head, 0, args.angles, w.hold);
      for (int64_t s = 0; s < args.angles; ++s) {
        const double sum = phase[s] + static_cast<double>(w.hold[s]);
        phase[s] = sum - __builtin_floor(sum * (0.5 / kPi)) * (2.0 * kPi);
      }
    }
    if (cosines == nullptr) continue;
    circle(phase, args.angles, cosines + t * w.angles, sines + t * w.angles);
    for (int64_t s = args.angles; s < w.angles; ++s) {
      cosines[t * w.angles + s] = 1.0f;
      sines[t * w.angles + s] = 0.0f;
    }
  }
}

void start_phase(const Args& args, const Work& w, const float* from, double* phase) {
  for (int64_t s = 0; s < w.angles; ++s)
    phase[s] = from != nullptr && s < args.angles ? static_cast<double>(from[s]) : 0.0;
}

// A row with its bias, turned.
void turn_row(const Work& w, int64_t padded_half, const float* raw, const float* bias, const float* cosines,
              const float* sines, float* row) {
  for (int64_t s = 0; s < padded_half; s += kLanes) {
    const Vec a = load(raw + s) + load(bias + s);
    const Vec b = load(raw + padded_half + s) + load(bias + padded_half + s);
    if (s < w.angles) {
      const Vec c = load(cosines + s), d = load(sines + s);
      store(row + s, a * c - b * d);
      store(row + padded_half + s, a * d + b * c);
    } else {
      store(row + s, a);
      store(row + padded_half + s, b);
    }
  }
}

void turn_rows(const Args& args, const Chunk& chunk, const Work& w, const float* raw, const float* bias,
               float* dst) {
  const int64_t padded_half = w.states / 2;
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t r = 0; r < args.rank; ++r) {
      const int64_t at = (t * args.rank + r) * w.pitch;
      if (skipped(chunk, t))
        std::memset(dst + at, 0, static_cast<size_t>(w.states) * sizeof(float));
      else
        turn_row(w, padded_half, raw + at, bias + r * w.pitch, w.cosines + t * w.angles,
                 w.sines + t * w.angles, dst + at);
    }
}

// B alone, or B, C and C B^T up to the diagonal, of one head and chunk. The tables of the chunk are there.
void load_head_B(const Args& args, int64_t h, const Chunk& chunk, const Work& w) {
  turn_rows(args, chunk, w, w.raw_B, w.B_bias + h * args.rank * w.pitch, w.B);
}
void load_head(const Args& args, int64_t h, const Chunk& chunk, const Work& w) {
  const int64_t rows = chunk.length * args.rank;
  load_head_B(args, h, chunk, w);
  turn_rows(args, chunk, w, w.raw_C, w.C_bias + h * args.rank * w.pitch, w.C);
  transposed_panels(rows, w.B, w.pitch, w.states, w.B_panels);
  for (int64_t row = 0; row < rows; row += kMaxRows) {
    const int count = static_cast<int>(min_of<int64_t>(kMaxRows, rows - row));
    const int64_t end = min_of(rows, (row + count + args.rank - 1) / args.rank * args.rank);
    for (int64_t s = 0; s < end; s += kPanel)
      multiply(count, 2, w.C + row * w.pitch, w.pitch, w.B_panels + s * w.states, w.S + row * kStride + s,
               kStride, w.states);
  }
}

double log2_of_step(float log_decay) {
  const double log = static_cast<double>(log_decay) * 1.4426950408889634;
  // NaN passes both comparisons.
  return log < -kLargestLog ? -kLargestLog : log > kLargestLog ? kLargestLog : log;
}

// Decays and weights of a head's chunk by rows. Differences of neighbours stay exact where the sum has grown
// large.
void load_steps(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Work& w) {
  const int64_t rows = chunk.length * args.rank, whole = round_up(rows, kLanes);
  double total = 0.0;
  for (int64_t t = 0; t < chunk.length; ++t) {
    const int64_t time = chunk.begin + t;
    const bool skip = skipped(chunk, t);
    if (!skip) total += log2_of_step(read_one(args.log_decay, block.batch, time, head));
    const float high = static_cast<float>(total), low = static_cast<float>(total - static_cast<double>(high));
    const float kept = skip ? 0.0f : read_one(args.kept, block.batch, time, head);
    const float own = skip ? 0.0f : read_one(args.own, block.batch, time, head);
    for (int64_t i = t * args.rank; i < (t + 1) * args.rank; ++i) {
      w.high[i] = high;
      w.low[i] = low;
      w.kept[i] = kept;
      w.own[i] = own;
    }
  }
  for (int64_t i = rows; i < whole; ++i)
    w.high[i] = w.low[i] = w.kept[i] = w.own[i] = 0.0f;
  const Vec high(w.high[rows - 1]), low(w.low[rows - 1]);
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(w.decay + i, exp2(load(w.high + i)));
    store(w.rest + i, exp2((high - load(w.high + i)) + (low - load(w.low + i))));
  }
}

// M = (C B^T) times the decay from step s to step t and the weight of what s adds; within a step its own
// weight.
void decay_products(const Args& args, int64_t rows, const Work& w) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = i / args.rank * args.rank, at = i * kStride;
    const Vec high(w.high[i]), low(w.low[i]);
    for (int64_t s = 0; s < begin; s += kLanes) {
      const Vec between = (high - load(w.high + s)) + (low - load(w.low + s));
      store(w.M + at + s, load(w.S + at + s) * (load(w.kept + s) * exp2(between)));
    }
    for (int64_t s = begin; s < begin + args.rank; ++s)
      w.M[at + s] = w.S[at + s] * w.own[i];
  }
}

// x in panels, and what of it is left in the state at the chunk's end.
void drive(int64_t rows, const Work& w) {
  row_panels(rows, w.inputs, w.x, w.x_pitch, w.x_panels);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec weight(w.rest[i] * w.kept[i]);
    for (int64_t p = 0; p < w.inputs.count(); ++p)
      for (int64_t v = 0; v < w.inputs.vectors(p); ++v) {
        const int64_t at = w.inputs.offset(p, i) + v * kLanes;
        store(w.kept_panels + at, weight * load(w.x_panels + at));
      }
  }
}

// state = decay * state + rows^T panels.
void carry(int64_t rows, const Work& w, const float* matrix, const float* panels, float* state) {
  const Vec decay(w.decay[rows - 1]);
  for (int64_t i = 0; i < w.state.floats(); i += kLanes)
    store(state + i, decay * load(state + i));
  for (int64_t p = 0; p < w.state.count(); ++p) {
    const int64_t width = w.state.vectors(p) * kLanes;
    for (int64_t n = 0; n < w.states; n += kMaxRows)
      multiply_add_transposed(static_cast<int>(min_of<int64_t>(kMaxRows, w.states - n)), w.state.vectors(p),
                              matrix + n, w.pitch, panels + w.inputs.offset(p, 0),
                              state + w.state.offset(p, n), width, rows);
  }
}

void clear_rows(const Work& w, int64_t rows, float* dst) {
  std::memset(dst, 0, static_cast<size_t>(rows * w.x_pitch) * sizeof(float));
}

// out = matrix times `state`, panels of [states, dim].
void times_state(int64_t rows, const Work& w, const float* matrix, const float* state, float* out) {
  clear_rows(w, rows, out);
  for (int64_t row = 0; row < rows; row += kMaxRows) {
    const int count = static_cast<int>(min_of<int64_t>(kMaxRows, rows - row));
    for (int64_t p = 0; p < w.state.count(); ++p)
      multiply_add(count, w.state.vectors(p), matrix + row * w.pitch, w.pitch, state + w.state.offset(p, 0),
                   out + row * w.x_pitch + p * kPanel, w.x_pitch, w.states);
  }
}

// rows[i] *= factors[i].
void scale_rows(int64_t rows, const Work& w, const float* factors, const float* from, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < w.x_pitch - 16; c += kLanes)
      store(to + i * w.x_pitch + c, Vec(factors[i]) * load(from + i * w.x_pitch + c));
}

// What the state before the chunk gives to its steps.
void from_before(int64_t rows, const Work& w, const float* state, bool zero, float* out) {
  if (zero) return clear_rows(w, rows, out);
  times_state(rows, w, w.C, state, out);
  scale_rows(rows, w, w.decay, out, out);
}

void outputs(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Work& w,
             const float* state, bool zero) {
  const int64_t rows = chunk.length * args.rank;
  from_before(rows, w, state, zero, w.y);
  add_lower(w.M, rows, args.rank, w.inputs, w.x_panels, w.y, w.x_pitch);
  const Vec skip(args.D != nullptr ? args.D[head] : 0.0f);
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t r = 0; r < args.rank; ++r) {
      const int64_t at = (t * args.rank + r) * w.x_pitch;
      float* y = w.y + at;
      if (skipped(chunk, t)) {
        std::memset(y, 0, static_cast<size_t>(args.dim) * sizeof(float));
      } else {
        if (args.D != nullptr)
          for (int64_t i = 0; i < args.dim; i += kLanes)
            store(y + i, fma(skip, load(w.x + at + i), load(y + i)));
        if (args.z.data != nullptr) {
          read(args.z, block.batch, chunk.begin + t, head, r, args.dim, w.z);
          for (int64_t i = args.dim; i < round_up(args.dim, kLanes); ++i)
            w.z[i] = 0.0f;
          for (int64_t i = 0; i < args.dim; i += kLanes)
            store(y + i, load(y + i) * silu(load(w.z + i)));
        }
      }
      write(args.out, block.batch, chunk.begin + t, head, r, args.dim, y);
    }
}

// [dim, states] -> panels of [states, dim] in the kernel's order, and back. Null: zero.
void load_state(const Args& args, const Work& w, const float* from, float* state) {
  const Pairs pairs(args.states, args.halves);
  for (int64_t i = 0; i < w.state.floats(); ++i)
    state[i] = 0.0f;
  for (int64_t c = 0; c < args.dim && from != nullptr; ++c)
    for (int64_t s = 0; s < pairs.half; ++s) {
      state[w.state.offset(c / kPanel, s) + c % kPanel] = from[c * args.states + pairs.first(s)];
      state[w.state.offset(c / kPanel, pairs.padded_half + s) + c % kPanel] =
          from[c * args.states + pairs.second(s)];
    }
}

void store_state(const Args& args, const Work& w, const float* state, float* to) {
  const Pairs pairs(args.states, args.halves);
  for (int64_t c = 0; c < args.dim; ++c)
    for (int64_t s = 0; s < pairs.half; ++s) {
      to[c * args.states + pairs.first(s)] = state[w.state.offset(c / kPanel, s) + c % kPanel];
      to[c * args.states + pairs.second(s)] =
          state[w.state.offset(c / kPanel, pairs.padded_half + s) + c % kPanel];
    }
}

// Whether a chunk starts from zero, and the row of the state tensors that its sequence has.
bool from_zero(const Args& args, const Chunk& chunk) {
  return chunk.first && (chunk.zero_start || args.initial_state == nullptr);
}
int64_t state_row(const Args& args, const Block& block, const Chunk& chunk, int64_t head) {
  return (chunk.sequence < 0 ? block.batch : chunk.sequence) * args.heads + head;
}

void start_head(const Args& args, const Chunk& chunk, const Work& w, int64_t row, float* state,
                double* phase) {
  if (!chunk.first) return;
  const int64_t at = row * args.dim * args.states;
  const bool zero = chunk.zero_start;
  load_state(args, w, zero || args.initial_state == nullptr ? nullptr : args.initial_state + at, state);
  start_phase(args, w,
              zero || args.initial_angle == nullptr ? nullptr : args.initial_angle + row * args.angles,
              phase);
}

void forward_block(const Args& args, const Block& block, Work& w) {
  const int64_t row = args.chunk_rows == 1 ? 0 : block.batch;
  load_biases(args, block, w);
  for (int64_t i = args.first_chunk[row]; i < args.first_chunk[row + 1]; ++i) {
    const Chunk& chunk = args.chunks[i];
    const int64_t rows = chunk.length * args.rank;
    load_matrix(args.B, args, block, chunk, w, w.raw_B);
    load_matrix(args.C, args, block, chunk, w, w.raw_C);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t head = block.head + h, at = state_row(args, block, chunk, head);
      float* state = w.states_of + h * w.state_floats();
      double* phase = w.phases + h * w.angles;
      start_head(args, chunk, w, at, state, phase);
      if (chunk.length > 0) {
        turn_tables(args, block, head, chunk, w, phase, w.cosines, w.sines);
        load_head(args, h, chunk, w);
        load_steps(args, block, head, chunk, w);
        decay_products(args, rows, w);
        load_inputs(args.x, args, block, head, chunk, w, w.x);
        drive(rows, w);
        outputs(args, block, head, chunk, w, state, from_zero(args, chunk));
        carry(rows, w, w.B, w.kept_panels, state);
      }
      if (chunk.keep_last) {
        store_state(args, w, state, args.last_state + at * args.dim * args.states);
        for (int64_t s = 0; s < args.angles; ++s)
          args.last_angle[at * args.angles + s] = static_cast<float>(phase[s]);
      }
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
  ColumnPanels columns;                   // of [kChunk, states]
  float *B_columns, *C_columns;           // of a head
  float *grad, *gated, *from_state, *du;  // rows of a head: gradient of y, and others
  float *grad_panels, *grad_kept;  // the gradient in panels, and times the decay from the chunk's start
  float *x_t, *kept_t, *grad_t;    // transposed panels: x, x decayed to the end and weighed, grad decayed
  float *E, *dM, *dS;              // decays between steps; gradients of M and of C B^T
  float *dB_t, *dC_t;              // through states, [states, rows]
  float *dB, *dC;                  // rows of a head, turned
  float *sum_B, *sum_C;            // rows of the group, summed over the task's heads
  float *bias_B, *bias_C;          // [kHeads, rank] rows
  float *kept_grad, *own_grad, *log_grad, *above;  // [kChunk], by rows
  float* angle_grad;                               // [kChunk, angles]
  double* turning;                                 // [kHeads, angles]: sum of the gradients of later phases
  float *adjoint, *saved, *checkpoints;
  double* phases_before;  // [chunks, kHeads, angles]
  double grad_d[kHeads];

  int64_t head_states() const { return kHeads * state_floats(); }

  int64_t lay_backward(const Args& args, const Segments& segments, float* base) {
    int64_t at = lay(args, base);
    columns = {kChunk, states};
    const auto take = [&](float*& buffer, int64_t floats) {
      buffer = base + at;
      at += round_up(floats, 16);
    };
    const auto take_doubles = [&](double*& buffer, int64_t count) {
      float* floats = nullptr;
      take(floats, 2 * count);
      buffer = reinterpret_cast<double*>(floats);
    };
    for (float** buffer : {&B_columns, &C_columns})
      take(*buffer, columns.floats());
    for (float** buffer : {&grad, &gated, &from_state, &du})
      take(*buffer, kChunk * x_pitch);
    for (float** buffer : {&grad_panels, &grad_kept})
      take(*buffer, inputs.floats());
    for (float** buffer : {&x_t, &kept_t, &grad_t})
      take(*buffer, kChunk * round_up(args.dim, kPanel));
    for (float** buffer : {&E, &dM, &dS})
      take(*buffer, kChunk * kStride);
    for (float** buffer : {&dB_t, &dC_t})
      take(*buffer, states * kStride);
    for (float** buffer : {&dB, &dC, &sum_B, &sum_C})
      take(*buffer, kChunk * pitch);
    for (float** buffer : {&bias_B, &bias_C})
      take(*buffer, kHeads * args.rank * pitch);
    for (float** buffer : {&kept_grad, &own_grad, &log_grad, &above})
      take(*buffer, kChunk + 16);
    take(angle_grad, kChunk * angles);
    take_doubles(turning, kHeads * angles);
    take(adjoint, head_states());
    take(saved, segments.length * head_states());
    take(checkpoints, segments.count * head_states());
    take_doubles(phases_before, segments.chunks * kHeads * angles);
    return at;
  }
};

int64_t backward_workspace(const BackwardArgs& args) {
  int64_t most = 1;
  for (int64_t row = 0; row < args.in.chunk_rows; ++row)
    most = max_of(most, chunks_of_row(args.in, row));
  // Shorter rows never need more, as in ssd.
  Segments segments(most);
  segments.length = max_of(segments.length, min_of(most, kKeptChunks));
  BackWork work{};
  return work.lay_backward(args.in, segments, nullptr);
}

// The decays between steps, and M, with 0 beyond the own step to the end of the vector.
void decays_and_products(const Args& args, int64_t rows, const BackWork& w) {
  const Vec zero(0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = i / args.rank * args.rank, end = begin + args.rank, at = i * kStride;
    const Vec high(w.high[i]), low(w.low[i]);
    for (int64_t s = 0; s < end; s += kLanes) {
      const Vec between = (high - load(w.high + s)) + (low - load(w.low + s));
      const Vec decay = keep_lanes(exp2(between), 0, begin - s, zero);
      store(w.E + at + s, decay);
      store(w.M + at + s, keep_lanes(load(w.S + at + s) * (load(w.kept + s) * decay), 0, begin - s, zero));
    }
    for (int64_t s = begin; s < end; ++s)
      w.M[at + s] = w.S[at + s] * w.own[i];
  }
}

// out[n][i] += sum over channels of state[n] and the rows that `transposed` holds.
void add_state_times(const Args& args, int64_t rows, const Work& w, const float* state,
                     const float* transposed, float* out) {
  for (int64_t n = 0; n < w.states; n += kMaxRows) {
    const int count = static_cast<int>(min_of<int64_t>(kMaxRows, w.states - n));
    for (int64_t p = 0; p < w.state.count(); ++p) {
      const int64_t width = w.state.vectors(p) * kLanes, used = min_of(width, args.dim - p * kPanel);
      for (int64_t i = 0; i < rows; i += kPanel)
        multiply_add(count, 2, state + w.state.offset(p, n), width,
                     transposed + i * args.dim + p * kPanel * kPanel, out + n * kStride + i, kStride, used);
    }
  }
}

// From the gradient of M those of C B^T, of the weights, and of what decays between steps.
void through_products(const Args& args, int64_t rows, BackWork& w) {
  const Vec zero(0.0f);
  float columns[kChunk + 16] = {}, weights[kChunk + 16] = {};
  for (int64_t i = rows - 1; i >= 0; --i) {
    const int64_t begin = i / args.rank * args.rank, end = begin + args.rank, at = i * kStride;
    Vec sum(0.0f);
    for (int64_t s = 0; s < end; s += kLanes) {
      const Vec grad = keep_lanes(load(w.dM + at + s), 0, begin - s, zero);
      const Vec decayed = grad * load(w.E + at + s), kept = load(w.kept + s);
      store(w.dS + at + s, decayed * kept);
      const Vec through = decayed * keep_lanes(load(w.S + at + s), 0, begin - s, zero);
      store(weights + s, load(weights + s) + through);
      const Vec column = load(columns + s) + through * kept;
      store(columns + s, column);
      sum = sum + keep_lanes(column, 0, begin - s, zero);
    }
    float own = 0.0f;
    for (int64_t s = begin; s < end; ++s) {
      own += w.dM[at + s] * w.S[at + s];
      w.dS[at + s] = w.dM[at + s] * w.own[i];
    }
    w.own_grad[i] = own;
    w.above[i] = reduce_add(sum);  // of the first row of a step: whatever goes from before it to it or later
  }
  for (int64_t i = 0; i < rows; ++i)
    w.kept_grad[i] = weights[i];
}

// Back through the turn: the gradient of a turned row becomes that of the row before, and its part of the
// angles'.
void turn_back(const Work& w, int64_t padded_half, const float* turned, const float* cosines,
               const float* sines, float* grad, float* angle_grad) {
  for (int64_t s = 0; s < padded_half && s < w.angles; s += kLanes) {
    const Vec first = load(grad + s), second = load(grad + padded_half + s);
    const Vec c = load(cosines + s), d = load(sines + s);
    const Vec part = second * load(turned + s) - first * load(turned + padded_half + s);
    store(angle_grad + s, load(angle_grad + s) + part);
    store(grad + s, first * c + second * d);
    store(grad + padded_half + s, second * c - first * d);
  }
}

// Rows of dB or dC of a head: through the states and through C B^T, then back through the turn into the sums.
template <typename Add>
void matrix_gradient(const Args& args, const Chunk& chunk, const BackWork& w, const float* through,
                     const float* turned, float* rows_of, float* bias, float* sum, const Add& add) {
  const int64_t rows = chunk.length * args.rank, padded_half = w.states / 2;
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t n = 0; n < w.states; n += kLanes)
      transpose_block(through + n * kStride + i, kStride, rows_of + i * w.pitch + n, w.pitch);
  add(rows_of);
  for (int64_t t = 0; t < chunk.length; ++t) {
    if (skipped(chunk, t)) continue;
    for (int64_t r = 0; r < args.rank; ++r) {
      const int64_t at = (t * args.rank + r) * w.pitch;
      turn_back(w, padded_half, turned + at, w.cosines + t * w.angles, w.sines + t * w.angles, rows_of + at,
                w.angle_grad + t * w.angles);
      for (int64_t n = 0; n < w.states; n += kLanes) {
        const Vec grad = load(rows_of + at + n);
        store(sum + at + n, load(sum + at + n) + grad);
        store(bias + r * w.pitch + n, load(bias + r * w.pitch + n) + grad);
      }
    }
  }
}

// Gradients of one head and chunk. `state` is the one before the chunk, `adjoint` the gradient of the one
// after it, and afterwards of the one before. The tables of cosines and sines are there.
void head_backward(const BackwardArgs& args, const Block& block, int64_t h, const Chunk& chunk, BackWork& w,
                   const float* state, float* adjoint, bool zero) {
  const Args& in = args.in;
  const int64_t head = block.head + h, rank = in.rank, rows = chunk.length * rank;
  const int64_t padded = w.x_pitch - 16, pitch = w.x_pitch;
  load_head(in, h, chunk, w);
  load_steps(in, block, head, chunk, w);
  decays_and_products(in, rows, w);
  load_inputs(in.x, in, block, head, chunk, w, w.x);
  drive(rows, w);
  if (args.grad_out.data != nullptr)
    load_inputs(args.grad_out, in, block, head, chunk, w, w.grad);
  else
    clear_rows(w, rows, w.grad);
  from_before(rows, w, state, zero, w.from_state);
  const float skip = in.D != nullptr ? in.D[head] : 0.0f;
  if (in.z.data != nullptr) {
    std::memcpy(w.y, w.from_state, static_cast<size_t>(rows * pitch) * sizeof(float));
    add_lower(w.M, rows, rank, w.inputs, w.x_panels, w.y, pitch);
    load_inputs(in.z, in, block, head, chunk, w, w.gated);
    const Vec d(skip), one(1.0f);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < padded; c += kLanes) {
        const int64_t at = i * pitch + c;
        const Vec y = fma(d, load(w.x + at), load(w.y + at)), z = load(w.gated + at), g = load(w.grad + at);
        const Vec s = sigmoid(z), gs = g * s;
        store(w.gated + at, gs * y * fma(z, one - s, one));
        store(w.grad + at, gs * z);
      }
    for (int64_t t = 0; t < chunk.length; ++t)
      for (int64_t r = 0; r < rank; ++r) {
        float* row = w.gated + (t * rank + r) * pitch;
        if (skipped(chunk, t)) std::memset(row, 0, static_cast<size_t>(in.dim) * sizeof(float));
        write(args.grad_z, block.batch, chunk.begin + t, head, r, in.dim, row);
      }
  }
  // Rows that the products below need.
  transposed_panels(rows, w.x, pitch, in.dim, w.x_t);
  float weights[kChunk + 16] = {};
  for (int64_t i = 0; i < rows; ++i)
    weights[i] = w.rest[i] * w.kept[i];
  scale_rows(rows, w, weights, w.x, w.scaled);
  transposed_panels(rows, w.scaled, pitch, in.dim, w.kept_t);
  row_panels(rows, w.inputs, w.grad, pitch, w.grad_panels);
  scale_rows(rows, w, w.decay, w.grad, w.scaled);
  row_panels(rows, w.inputs, w.scaled, pitch, w.grad_kept);
  row_panels(rows, w.columns, w.B, w.pitch, w.B_columns);
  row_panels(rows, w.columns, w.C, w.pitch, w.C_columns);

  // Through M.
  for (int64_t row = 0; row < rows; row += kMaxRows) {
    const int count = static_cast<int>(min_of<int64_t>(kMaxRows, rows - row));
    const int64_t end = min_of(rows, (row + count + rank - 1) / rank * rank);
    for (int64_t s = 0; s < end; s += kPanel)
      multiply(count, 2, w.grad + row * pitch, pitch, w.x_t + s * in.dim, w.dM + row * kStride + s, kStride,
               in.dim);
  }
  through_products(in, rows, w);

  // Through the states.
  const size_t by_state = static_cast<size_t>(w.states * kStride) * sizeof(float);
  std::memset(w.dB_t, 0, by_state);
  std::memset(w.dC_t, 0, by_state);
  add_state_times(in, rows, w, adjoint, w.kept_t, w.dB_t);
  float kept = 0.0f;
  if (!zero) {
    transposed_panels(rows, w.scaled, pitch, in.dim, w.grad_t);
    add_state_times(in, rows, w, state, w.grad_t, w.dC_t);
    kept = w.decay[rows - 1] * dot(adjoint, state, w.state.floats());
  }
  times_state(rows, w, w.B, adjoint, w.du);
  scale_rows(rows, w, w.rest, w.du, w.du);
  // The log of a step's decay scales whatever goes from a step before it to it or later: sums of such parts,
  // never differences.
  float read_sum = 0.0f, written = 0.0f;
  for (int64_t t = 0; t < chunk.length; ++t) {
    w.log_grad[t] = w.above[t * rank] + kept + written;
    for (int64_t i = t * rank; i < (t + 1) * rank; ++i) {
      const float part = dot(w.x + i * pitch, w.du + i * pitch, padded);
      w.kept_grad[i] += part;
      written += w.kept[i] * part;
    }
  }
  for (int64_t t = chunk.length - 1; t >= 0; --t) {
    for (int64_t i = t * rank; i < (t + 1) * rank; ++i)
      read_sum += dot(w.grad + i * pitch, w.from_state + i * pitch, padded);
    w.log_grad[t] += read_sum;
  }
  scale_rows(rows, w, w.kept, w.du, w.du);
  add_lower_transposed(w.M, rows, rank, w.inputs, w.grad_panels, w.du, pitch);
  carry(rows, w, w.C, w.grad_kept, adjoint);

  // B, C, their biases and the angles.
  std::memset(w.angle_grad, 0, static_cast<size_t>(chunk.length * w.angles) * sizeof(float));
  matrix_gradient(in, chunk, w, w.dB_t, w.B, w.dB, w.bias_B + h * rank * w.pitch, w.sum_B, [&](float* to) {
    add_lower_transposed(w.dS, rows, rank, w.columns, w.C_columns, to, w.pitch);
  });
  matrix_gradient(in, chunk, w, w.dC_t, w.C, w.dC, w.bias_C + h * rank * w.pitch, w.sum_C,
                  [&](float* to) { add_lower(w.dS, rows, rank, w.columns, w.B_columns, to, w.pitch); });
  double* turning = w.turning + h * w.angles;
  for (int64_t t = chunk.length - 1; t >= 0; --t) {
    const bool skip_step = skipped(chunk, t);
    for (int64_t s = 0; s < in.angles; ++s) {
      if (!skip_step) turning[s] += static_cast<double>(w.angle_grad[t * w.angles + s]);
      w.hold[s] = skip_step ? 0.0f : static_cast<float>(turning[s]);
    }
    write(args.grad_turn, block.batch, chunk.begin + t, head, 0, in.angles, w.hold);
  }

  // Inputs and weights.
  for (int64_t t = 0; t < chunk.length; ++t) {
    const bool skip_step = skipped(chunk, t);
    float kept_grad = 0.0f, own_grad = 0.0f;
    for (int64_t r = 0; r < rank; ++r) {
      const int64_t i = t * rank + r;
      float* du = w.du + i * pitch;
      kept_grad += w.kept_grad[i];
      own_grad += w.own_grad[i];
      if (skip_step) {
        std::memset(du, 0, static_cast<size_t>(in.dim) * sizeof(float));
      } else {
        w.grad_d[h] += static_cast<double>(dot(w.grad + i * pitch, w.x + i * pitch, padded));
        for (int64_t c = 0; c < padded; c += kLanes)
          store(du + c, fma(Vec(skip), load(w.grad + i * pitch + c), load(du + c)));
      }
      write(args.grad_x, block.batch, chunk.begin + t, head, r, in.dim, du);
    }
    float log_grad = w.log_grad[t];
    if (!skip_step) {
      const double log = static_cast<double>(read_one(in.log_decay, block.batch, chunk.begin + t, head)) *
                         1.4426950408889634;
      if (log < -kLargestLog || log > kLargestLog) log_grad = 0.0f;
    }
    write_one(args.grad_log_decay, block.batch, chunk.begin + t, head, skip_step ? 0.0f : log_grad);
    write_one(args.grad_kept, block.batch, chunk.begin + t, head, skip_step ? 0.0f : kept_grad);
    write_one(args.grad_own, block.batch, chunk.begin + t, head, skip_step ? 0.0f : own_grad);
  }
}

void store_sums(const Args& args, const Chunk& chunk, const Work& w, const float* sum, int64_t task,
                float* partial) {
  const Pairs pairs(args.states, args.halves);
  float* to = partial + (task * args.length + chunk.begin) * args.rank * args.states;
  for (int64_t i = 0; i < chunk.length * args.rank; ++i) {
    if (skipped(chunk, i / args.rank))
      std::memset(to + i * args.states, 0, static_cast<size_t>(args.states) * sizeof(float));
    else
      pairs.give(sum + i * w.pitch, to + i * args.states);
  }
}

// The states and phases before the chunks [begin, end) of a row; `save` gets them as they come.
template <typename Save>
void states_before(const Args& args, const Block& block, BackWork& w, const Chunk* chunks, int64_t begin,
                   int64_t end, const Save& save) {
  for (int64_t i = begin; i < end; ++i) {
    const Chunk& chunk = chunks[i];
    const int64_t rows = chunk.length * args.rank;
    const bool more = i + 1 < end && chunk.length > 0;
    if (more) load_matrix(args.B, args, block, chunk, w, w.raw_B);
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t head = block.head + h;
      float* state = w.states_of + h * w.state_floats();
      double* phase = w.phases + h * w.angles;
      start_head(args, chunk, w, state_row(args, block, chunk, head), state, phase);
      save(i, h, state);
      if (!more) continue;
      std::memcpy(phase, w.phases_before + (i * kHeads + h) * w.angles,
                  static_cast<size_t>(w.angles) * sizeof(double));
      turn_tables(args, block, head, chunk, w, phase, w.cosines, w.sines);
      load_head_B(args, h, chunk, w);
      load_steps(args, block, head, chunk, w);
      load_inputs(args.x, args, block, head, chunk, w, w.x);
      drive(rows, w);
      carry(rows, w, w.B, w.kept_panels, state);
    }
  }
}

// The phases before all chunks of a row.
void all_phases(const Args& args, const Block& block, BackWork& w, const Chunk* chunks, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t h = 0; h < block.heads; ++h) {
      const Chunk& chunk = chunks[i];
      const int64_t row = state_row(args, block, chunk, block.head + h);
      double* phase = w.phases + h * w.angles;
      if (chunk.first)
        start_phase(args, w,
                    chunk.zero_start || args.initial_angle == nullptr
                        ? nullptr
                        : args.initial_angle + row * args.angles,
                    phase);
      std::memcpy(w.phases_before + (i * kHeads + h) * w.angles, phase,
                  static_cast<size_t>(w.angles) * sizeof(double));
      turn_tables(args, block, block.head + h, chunk, w, phase, nullptr, nullptr);
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
  load_biases(in, block, w);
  const size_t biases = static_cast<size_t>(kHeads * in.rank * w.pitch) * sizeof(float);
  std::memset(w.bias_B, 0, biases);
  std::memset(w.bias_C, 0, biases);
  for (int64_t h = 0; h < kHeads; ++h)
    w.grad_d[h] = 0.0;
  all_phases(in, block, w, chunks, segments.chunks);
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
        copy(w.states_of + h * floats, w.checkpoints + (segment * kHeads + h) * floats);
    states_before(in, block, w, chunks, begin, end, [&](int64_t i, int64_t h, const float* state) {
      copy(w.saved + ((i - begin) * kHeads + h) * floats, state);
    });
    for (int64_t i = end - 1; i >= begin; --i) {
      const Chunk& chunk = chunks[i];
      const bool some = chunk.length > 0;
      if (some) {
        load_matrix(in.B, in, block, chunk, w, w.raw_B);
        load_matrix(in.C, in, block, chunk, w, w.raw_C);
        const size_t rows = static_cast<size_t>(kChunk * w.pitch) * sizeof(float);
        std::memset(w.sum_B, 0, rows);
        std::memset(w.sum_C, 0, rows);
      }
      for (int64_t h = 0; h < block.heads; ++h) {
        const int64_t row = state_row(in, block, chunk, block.head + h);
        float* adjoint = w.adjoint + h * floats;
        double* turning = w.turning + h * w.angles;
        if (chunk.last) {
          const bool given = args.grad_last_state != nullptr && chunk.keep_last;
          load_state(in, w, given ? args.grad_last_state + row * in.dim * in.states : nullptr, adjoint);
          start_phase(in, w,
                      args.grad_last_angle != nullptr && chunk.keep_last
                          ? args.grad_last_angle + row * in.angles
                          : nullptr,
                      turning);
        }
        if (some) {
          std::memcpy(w.phases, w.phases_before + (i * kHeads + h) * w.angles,
                      static_cast<size_t>(w.angles) * sizeof(double));
          turn_tables(in, block, block.head + h, chunk, w, w.phases, w.cosines, w.sines);
          head_backward(args, block, h, chunk, w, w.saved + ((i - begin) * kHeads + h) * floats, adjoint,
                        from_zero(in, chunk));
        }
        if (chunk.first && !chunk.zero_start) {
          if (args.grad_initial_state != nullptr)
            store_state(in, w, adjoint, args.grad_initial_state + row * in.dim * in.states);
          if (args.grad_initial_angle != nullptr)
            for (int64_t s = 0; s < in.angles; ++s)
              args.grad_initial_angle[row * in.angles + s] = static_cast<float>(turning[s]);
        }
      }
      if (!some) continue;
      store_sums(in, chunk, w, w.sum_B, task, args.partial_B);
      store_sums(in, chunk, w, w.sum_C, task, args.partial_C);
    }
  }
  const Pairs pairs(in.states, in.halves);
  for (int64_t h = 0; h < block.heads; ++h) {
    const int64_t at = block.batch * in.heads + block.head + h;
    args.partial_D[at] = static_cast<float>(w.grad_d[h]);
    for (int64_t r = 0; r < in.rank; ++r) {
      pairs.give(w.bias_B + (h * in.rank + r) * w.pitch,
                 args.partial_B_bias + (at * in.rank + r) * in.states);
      pairs.give(w.bias_C + (h * in.rank + r) * w.pitch,
                 args.partial_C_bias + (at * in.rank + r) * in.states);
    }
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
  const int64_t blocks = Block::per_group(in), row = in.rank * in.states, size = in.length * row;
  float sums[256];
  for (int64_t task = begin; task < end; ++task)
    for (const auto& [partial, grad] :
         {Partial{args.partial_B, &args.grad_B}, {args.partial_C, &args.grad_C}})
      for (int64_t t = 0; t < in.length; ++t)
        for (int64_t r = 0; r < in.rank; ++r) {
          const float* first = partial + task * blocks * size + t * row + r * in.states;
          for (int64_t n = 0; n < in.states; ++n) {
            float sum = 0.0f;
            for (int64_t b = 0; b < blocks; ++b)
              sum += first[b * size + n];
            sums[n] = sum;
          }
          write(*grad, task / in.groups, t, task % in.groups, r, in.states, sums);
        }
}

// ---- one step

int64_t update_workspace(const UpdateArgs& args) {
  const int64_t states = Pairs(args.states, args.halves).padded() + 16;
  return (5 + 3 * args.rank) * states + 2 * args.rank * round_up(args.dim, 16) +
         5 * round_up(args.angles, 16) + 64;
}

void update(const UpdateArgs& args, float* workspace, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const Pairs pairs(args.states, args.halves);
  const int64_t rank = args.rank, states = args.states, row_floats = pairs.padded() + 16;
  const int64_t dim = round_up(args.dim, 16);
  Work w{};
  w.angles = round_up(args.angles, 16);
  w.states = pairs.padded();
  float* at = workspace;
  const auto take = [&](int64_t floats) {
    float* buffer = at;
    at += floats;
    return buffer;
  };
  float *raw = take(row_floats), *turned = take(row_floats), *bias = take(row_floats);
  float *nothing = take(row_floats), *hold = take(row_floats);
  float *B = take(rank * row_floats), *C = take(rank * row_floats), *last_B = take(rank * row_floats);
  float *x = take(rank * dim), *last_x = take(rank * dim);
  float *cosines = take(w.angles), *sines = take(w.angles), *turn = take(w.angles);
  double* phase = reinterpret_cast<double*>(take(2 * w.angles));
  for (float* p = workspace; p < at; ++p)
    *p = 0.0f;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / args.heads, head = task % args.heads, group = head / (args.heads / args.groups);
    read(args.turn, b, 0, head, 0, args.angles, turn);
    read(args.angle, b, 0, head, 0, args.angles, cosines);
    for (int64_t s = 0; s < args.angles; ++s) {
      const double sum = static_cast<double>(cosines[s]) + static_cast<double>(turn[s]);
      phase[s] = sum - __builtin_floor(sum * (0.5 / kPi)) * (2.0 * kPi);
      turn[s] = static_cast<float>(phase[s]);
    }
    write(args.angle, b, 0, head, 0, args.angles, turn);
    circle(phase, args.angles, cosines, sines);
    for (int64_t s = args.angles; s < w.angles; ++s) {
      cosines[s] = 1.0f;
      sines[s] = 0.0f;
    }
    for (int64_t r = 0; r < rank; ++r) {
      read(args.last_B, b, 0, head, r, states, last_B + r * row_floats);
      read(args.last_x, b, 0, head, r, args.dim, last_x + r * dim);
      read(args.x, b, 0, head, r, args.dim, x + r * dim);
      struct Side {
        const View* view;
        const float* bias;
        float* rows;
      };
      for (const Side& side : {Side{&args.B, args.B_bias, B}, Side{&args.C, args.C_bias, C}}) {
        read(*side.view, b, 0, group, r, states, hold);
        pairs.take(hold, raw);
        if (side.bias != nullptr) pairs.take(side.bias + (head * rank + r) * states, bias);
        turn_row(w, pairs.padded_half, raw, side.bias != nullptr ? bias : nothing, cosines, sines, turned);
        pairs.give(turned, side.rows + r * row_floats);
      }
      write(args.last_B, b, 0, head, r, states, B + r * row_floats);
      write(args.last_x, b, 0, head, r, args.dim, x + r * dim);
    }
    const float decay = __builtin_expf(read_one(args.log_decay, b, 0, head));
    const float before = decay * read_one(args.before, b, 0, head), now = read_one(args.now, b, 0, head);
    const float skip = args.D != nullptr ? args.D[head] : 0.0f;
    with_type(args.state.dtype, [&](auto type) {
      using T = decltype(type);
      T* h = static_cast<T*>(args.state.data) + b * args.state.batch + head * args.state.head;
      const int64_t whole = states / kLanes * kLanes;
      for (int64_t c = 0; c < args.dim; ++c) {
        T* row = h + c * args.state.rank;
        // The product of the last step's input goes first, so that the order of the sums is that of the
        // formula.
        const auto advance = [&](int64_t n, Vec value) {
          value = Vec(decay) * value;
          for (int64_t r = 0; r < rank; ++r)
            value = fma(Vec(before * last_x[r * dim + c]), load(last_B + r * row_floats + n), value);
          for (int64_t r = 0; r < rank; ++r)
            value = fma(Vec(now * x[r * dim + c]), load(B + r * row_floats + n), value);
          return value;
        };
        for (int64_t n = 0; n < whole; n += kLanes) {
          const Vec value = advance(n, load_lanes(row + n));
          store(hold + n, value);
          store_lanes(row + n, value);
        }
        if (whole < states) {
          for (int64_t n = whole; n < states; ++n)
            hold[n] = static_cast<float>(row[n]);
          for (int64_t n = states; n < whole + kLanes; ++n)
            hold[n] = 0.0f;
          store(hold + whole, advance(whole, load(hold + whole)));
          for (int64_t n = whole; n < states; ++n)
            row[n] = static_cast<T>(hold[n]);
        }
        for (int64_t r = 0; r < rank; ++r) {
          Vec sum(0.0f);
          for (int64_t n = 0; n < states; n += kLanes)
            sum = fma(load(hold + n), load(C + r * row_floats + n), sum);
          const float y = reduce_add(sum) + skip * x[r * dim + c];
          // last_x has been read for this channel, and is free.
          last_x[r * dim + c] = y;
        }
      }
    });
    for (int64_t r = 0; r < rank; ++r)
      write(args.out, b, 0, head, r, args.dim, last_x + r * dim);
  }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{tasks,    workspace,       forward,          backward_workspace,
                                       backward, backward_reduce, update_workspace, update};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::mamba3_scan
