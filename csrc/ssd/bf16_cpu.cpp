// bfloat16 forward and backward on the processor's own bfloat16 products; compiled once for AVX512-BF16 dot
// products and once for AMX tiles. The order of work is that of kernel_cpu.cpp; README.md says what is
// rounded.
#include "common/bf16_panel.h"
#include "ssd/steps_cpu.h"

namespace arcore::ssd {
namespace ARCORE_ISA {
namespace {

constexpr int64_t kRows = Bf16Unit::kRows;

int64_t whole_depth(int64_t n) {
  return round_up(n, Bf16Unit::kDepth);
}
int blocks_of(int64_t columns) {
  return static_cast<int>((columns + 15) / 16);
}

// A matrix that is copied into rows of `width` elements, a multiple of 32; its padding is 0.
struct Matrix {
  BFloat16* rows;
  int64_t width;
  BFloat16* row(int64_t t) const { return rows + t * width; }
};

struct Work {
  int64_t depth;       // of states, padded
  int64_t width;       // of channels, padded
  Matrix B, C;         // of the group
  BFloat16* B_turned;  // [states, kChunk]
  BFloat16* B_columns;
  float* S;  // C B^T
  bool B_finite, C_finite;
  // Of one head.
  Matrix x;
  BFloat16 *M, *x_pairs, *kept_pairs, *state_pairs;
  bool x_finite;
  float *within, *through;  // [kRows, width]: parts of y from the chunk's own steps and from the state
  float *z, *D;
  float* states;  // [kHeads] of [depth, width], as float32
  float* kept;    // [kChunk]: size of a step times its decay to the chunk's end
  Steps steps;
  Bf16Unit unit;

  int64_t state_floats() const { return depth * width; }
  static int64_t state_column(int64_t c) { return c; }
  int64_t state_pitch(int64_t) const { return width; }
  TransposedPanels columns_of_states() const { return {depth}; }
  PairPanels channels_by_steps() const { return {kChunk, width}; }
  PairPanels channels_by_states() const { return {depth, width}; }

  void lay(const Args& args, Layout& layout) {
    depth = pad_depth(args.states);
    width = pad_depth(args.dim);
    B.width = C.width = depth;
    x.width = width;
    for (BFloat16** buffer : {&B.rows, &C.rows, &B_turned, &B_columns})
      layout.take(*buffer, kChunk * depth);
    layout.take(S, kChunk * kStride);
    layout.take(M, kChunk * kChunk);
    for (BFloat16** buffer : {&x.rows, &x_pairs, &kept_pairs})
      layout.take(*buffer, kChunk * width);
    layout.take(state_pairs, state_floats());
    for (float** buffer : {&within, &through, &z})
      layout.take(*buffer, kRows * width);
    layout.take(D, width);
    layout.take(states, kHeads * state_floats());
    layout.take(kept, kChunk);
    steps.lay(layout);
  }
};

// Rows of a chunk, up to a whole step of the products; skipped steps become 0, whatever they hold. Returns
// whether all of them are finite.
bool load_matrix(const View& v, int64_t batch, int64_t head, const Chunk& chunk, int64_t n,
                 const Matrix& to) {
  const BFloat16* first = row_of<const BFloat16>(v, batch, head, chunk.begin);
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 bad = 0;
  for (int64_t t = 0; t < chunk.length; ++t) {
    const BFloat16* src = first + t * v.time;
    BFloat16* dst = to.row(t);
    const bool none = skipped(chunk, t);
    if (!none && v.last != 1)
      for (int64_t i = 0; i < n; ++i)
        dst[i] = src[i * v.last];
    const BFloat16* from = v.last == 1 ? src : dst;
    for (int64_t i = 0; i < to.width; i += 32) {
      const __mmask32 here = none ? 0 : first_elements(n - i);
      const __m512i x = _mm512_maskz_loadu_epi16(here, from + i);
      bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
      _mm512_store_si512(dst + i, x);
    }
  }
  const int64_t whole = pad_depth(chunk.length);
  std::memset(to.row(chunk.length), 0,
              static_cast<size_t>((whole - chunk.length) * to.width) * sizeof(BFloat16));
  return bad == 0;
}

// [steps of a chunk, columns] -> [columns, kChunk].
void turn(const Matrix& m, int64_t length, int64_t columns, BFloat16* turned) {
  for (int64_t t = 0; t < length; t += 32)
    for (int64_t i = 0; i < columns; i += 16)
      turn_block(m.row(t) + i, m.width, turned + i * kChunk + t, kChunk);
}

// B alone, for the states.
void load_inputs(const Args& args, const Block& block, const Chunk& chunk, Work& w) {
  w.B_finite = load_matrix(args.B, block.batch, block.group, chunk, args.states, w.B);
  turn(w.B, chunk.length, args.states, w.B_turned);
}

// B, C and C B^T, up to the diagonal, of one chunk.
void load_group(const Args& args, const Block& block, const Chunk& chunk, Work& w) {
  load_inputs(args, block, chunk, w);
  w.C_finite = load_matrix(args.C, block.batch, block.group, chunk, args.states, w.C);
  const TransposedPanels panels = w.columns_of_states();
  pack_transposed({w.B.rows, w.depth, chunk.length, w.depth}, panels, 0, w.B_columns);
  for (int64_t row = 0; row < chunk.length; row += kRows) {
    const int64_t rows = min_of(kRows, chunk.length - row);
    w.unit.multiply(static_cast<int>(rows), w.depth, w.C.row(row), w.depth, w.B_columns, panels.panel(),
                    blocks_of(row + rows), w.S + row * kStride, kStride);
  }
}

// C B^T times the decay from step s to step t and the size of step s, up to the diagonal; 0 beyond it to a
// whole step of the products.
void decay_products(const Chunk& chunk, Work& w) {
  const Steps& steps = w.steps;
  const Vec zero(0.0f);
  for (int64_t t = 0; t < chunk.length; ++t) {
    const Vec high(steps.high[t]), low(steps.low[t]);
    const auto decayed = [&](int64_t s) {
      if (s > t) return zero;
      const Vec between = (high - load(steps.high + s)) + (low - load(steps.low + s));
      const Vec weight = exp2(between) * load(steps.dt + s);
      return keep_lanes(load(w.S + t * kStride + s) * weight, 0, t + 1 - s, zero);
    };
    for (int64_t s = 0; s < chunk.length; s += 32)
      store_pair(w.M + t * kChunk + s, decayed(s), decayed(s + 16));
  }
}

// Rows of channels by pairs of steps, up to a whole step of the products; null is not wanted. `scaled` gets
// them times the factor of their step.
void pair_rows(const Matrix& m, int64_t length, const PairPanels& panels, const float* factors,
               BFloat16* plain, BFloat16* scaled) {
  const int64_t whole = pad_depth(length);
  for (int64_t t = 0; t < whole; t += 2) {
    const Vec even(factors[t]), odd(factors[t + 1]);
    for (int64_t i = 0; i < m.width; i += 16) {
      const __m512i pairs = pairs_of(_mm256_load_si256(reinterpret_cast<const __m256i*>(m.row(t) + i)),
                                     _mm256_load_si256(reinterpret_cast<const __m256i*>(m.row(t + 1) + i)));
      const int64_t to = panels.offset(i / 32, t) + i % 32 * 2;
      if (plain != nullptr) _mm512_store_si512(plain + to, pairs);
      _mm512_store_si512(scaled + to, rounded_pairs(even * even_of(pairs), odd * odd_of(pairs)));
    }
  }
}

// x, and by pairs of steps x and the same times dt and the decay to the chunk's end.
void drive(const Args& args, const Block& block, int64_t head, const Chunk& chunk, Work& w) {
  w.x_finite = load_matrix(args.x, block.batch, head, chunk, args.dim, w.x);
  for (int64_t t = 0; t < kChunk; t += kLanes)
    store(w.kept + t, load(w.steps.dt + t) * load(w.steps.rest + t));
  pair_rows(w.x, chunk.length, w.channels_by_steps(), w.kept, w.x_pairs, w.kept_pairs);
}

// The state by pairs of states, which it is read by, and the state itself times the decay of the chunk.
void decay_state(const Args& args, const Chunk& chunk, Work& w, float* state) {
  const Vec decay(w.steps.decay[chunk.length - 1]);
  const PairPanels panels = w.channels_by_states();
  for (int64_t n = 0; n < args.states; n += 2)
    for (int64_t i = 0; i < w.width; i += 16) {
      float* even = state + n * w.width + i;
      float* odd = even + w.width;
      const Vec e = load(even), o = load(odd);
      _mm512_store_si512(w.state_pairs + panels.offset(i / 32, n) + i % 32 * 2, rounded_pairs(e, o));
      store(even, decay * e);
      store(odd, decay * o);
    }
}

// state += rows^T pairs, where `turned` is the rows by columns; meanwhile x of the next chunk comes.
void add_to_state(const Args& args, const Chunk& chunk, const Ahead& ahead, Work& w, const BFloat16* turned,
                  const BFloat16* pairs, float* state) {
  for (int64_t n = 0; n < args.states; n += kRows) {
    ahead.ask(args.x, n * kChunk / args.states, kRows * kChunk / args.states + 1);
    w.unit.multiply_add(static_cast<int>(min_of(kRows, args.states - n)), whole_depth(chunk.length),
                        turned + n * kChunk, kChunk, pairs, w.channels_by_steps().panel(),
                        blocks_of(args.dim), state + n * w.width, w.width);
  }
}

// out (+)= m times the rows that `pairs` holds, where m has rows of kChunk elements.
template <bool kAdd>
void multiply(Bf16Unit& unit, int64_t rows, int64_t depth, const BFloat16* m, const BFloat16* pairs,
              const PairPanels& panels, int64_t columns, float* out, int64_t pitch) {
  const int count = static_cast<int>(rows), blocks = blocks_of(columns);
  if constexpr (kAdd)
    unit.multiply_add(count, depth, m, kChunk, pairs, panels.panel(), blocks, out, pitch);
  else
    unit.multiply(count, depth, m, kChunk, pairs, panels.panel(), blocks, out, pitch);
}

void add_row(float factor, const BFloat16* row, int64_t columns, float* out) {
  for (int64_t i = 0; i < columns; ++i)
    out[i] += factor * static_cast<float>(row[i]);
}

// Rows [row, row + rows) of M x, into w.within. Rows that hold NaN or infinity are added one by one: products
// with the zeros beyond the diagonal would carry them into earlier steps.
void multiply_within(const Args& args, Work& w, int64_t row, int64_t rows) {
  if (w.x_finite)
    return multiply<false>(w.unit, rows, whole_depth(row + rows), w.M + row * kChunk, w.x_pairs,
                           w.channels_by_steps(), args.dim, w.within, w.width);
  for (int64_t r = 0; r < rows; ++r) {
    float* out = w.within + r * w.width;
    std::memset(out, 0, static_cast<size_t>(args.dim) * sizeof(float));
    for (int64_t s = 0; s <= row + r; ++s)
      add_row(static_cast<float>(w.M[(row + r) * kChunk + s]), w.x.row(s), args.dim, out);
  }
}

void outputs(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Ahead& ahead,
             Work& w, bool from_zero) {
  if (args.D != nullptr)
    std::memcpy(w.D, args.D + head * args.dim, static_cast<size_t>(args.dim) * sizeof(float));
  for (int64_t row = 0; row < chunk.length; row += kRows) {
    const int64_t rows = min_of(kRows, chunk.length - row);
    for (const View* v : {&args.z, &args.out})
      ahead.ask(*v, row, rows);
    multiply_within(args, w, row, rows);
    if (!from_zero)
      w.unit.multiply(static_cast<int>(rows), w.depth, w.C.row(row), w.depth, w.state_pairs,
                      w.channels_by_states().panel(), blocks_of(args.dim), w.through, w.width);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = row + r;
      float* y = w.within + r * w.width;
      BFloat16* out = row_of<BFloat16>(args.out, block.batch, head, chunk.begin + t);
      const bool none = skipped(chunk, t);
      if (args.z.data != nullptr) {
        const Chunk step{chunk.begin + t, 1, 0, 0, false, false, false, false, nullptr, 0};
        load_rows(args.z, block.batch, head, step, args.dim, w.z, w.width);
      }
      for (int64_t i = 0; i < w.width; i += 32) {
        Vec part[2];
        for (int64_t v = 0; v < 2; ++v) {
          const int64_t at = i + v * 16;
          Vec sum = load(y + at);
          if (!from_zero) sum = fma(Vec(w.steps.decay[t]), load(w.through + r * w.width + at), sum);
          if (args.D != nullptr) sum = fma(load(w.D + at), load_lanes(w.x.row(t) + at), sum);
          if (args.z.data != nullptr) sum = sum * silu(load(w.z + at));
          part[v] = none ? Vec(0.0f) : sum;
        }
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part[1], part[0]));
        if (args.out.last == 1) {
          _mm512_mask_storeu_epi16(out + i, first_elements(args.dim - i), both);
        } else {
          alignas(64) BFloat16 rounded[32];
          _mm512_store_si512(rounded, both);
          for (int64_t c = i; c < min_of(args.dim, i + 32); ++c)
            out[c * args.out.last] = rounded[c - i];
        }
      }
    }
  }
}

void head_states(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Ahead& ahead,
                 Work& w, float* state) {
  load_steps(args, block, head, chunk, w.steps);
  drive(args, block, head, chunk, w);
  decay_state(args, chunk, w, state);
  add_to_state(args, chunk, ahead, w, w.B_turned, w.kept_pairs, state);
}

void head_forward(const Args& args, const Block& block, int64_t head, const Chunk& chunk, const Ahead& ahead,
                  Work& w, float* state, bool from_zero) {
  load_steps(args, block, head, chunk, w.steps);
  decay_products(chunk, w);
  drive(args, block, head, chunk, w);
  decay_state(args, chunk, w, state);
  outputs(args, block, head, chunk, ahead, w, from_zero);
  add_to_state(args, chunk, ahead, w, w.B_turned, w.kept_pairs, state);
}

// ---- backward

struct BackWork : Work {
  Matrix grad;          // gradient of y
  Matrix adjoint_rows;  // gradient of the state, [states, channels]
  BFloat16 *C_turned, *B_pairs, *C_pairs;
  BFloat16 *plain, *plain_turned;  // C B^T times decays without the size of the step; dS in close_group
  BFloat16 *x_columns, *kept_columns, *grad_pairs, *grad_kept_pairs, *grad_kept_columns, *adjoint_pairs;
  bool grad_finite;
  float *E, *dM;            // decays between steps; gradient of M, then times M
  float *dS, *dB_t, *dC_t;  // of the group, as in kernel_cpu.cpp
  bool dC_given;
  float *y, *gated, *from_state, *du_state, *du, *dBC;
  float *slope, *log_grad, *above;  // [kChunk]
  Carried carried;

  // States are kept as bfloat16 rows, the form in which they are factors.
  int64_t saved_floats() const { return state_floats() / 2; }
  TransposedPanels columns_of_channels() const { return {width}; }
  PairPanels states_by_steps() const { return {kChunk, depth}; }

  void lay_backward(const Args& args, const Segments& segments, Layout& layout) {
    lay(args, layout);
    grad.width = adjoint_rows.width = width;
    layout.take(grad.rows, kChunk * width);
    for (BFloat16** buffer : {&adjoint_rows.rows, &adjoint_pairs})
      layout.take(*buffer, depth * width);
    for (BFloat16** buffer : {&C_turned, &B_pairs, &C_pairs})
      layout.take(*buffer, kChunk * depth);
    for (BFloat16** buffer : {&plain, &plain_turned})
      layout.take(*buffer, kChunk * kChunk);
    for (BFloat16** buffer : {&x_columns, &kept_columns, &grad_pairs, &grad_kept_pairs, &grad_kept_columns})
      layout.take(*buffer, kChunk * width);
    for (float** buffer : {&E, &dM, &dS})
      layout.take(*buffer, kChunk * kStride);
    for (float** buffer : {&dB_t, &dC_t})
      layout.take(*buffer, depth * kStride);
    for (float** buffer : {&y, &gated, &from_state, &du_state, &du})
      layout.take(*buffer, kChunk * width);
    layout.take(dBC, kChunk * depth);
    for (float** buffer : {&slope, &log_grad, &above})
      layout.take(*buffer, kChunk + 16);
    carried.lay(segments, state_floats(), saved_floats(), width, layout);
  }
};

void save_state(const BackWork& w, const float* state, float* saved) {
  BFloat16* to = reinterpret_cast<BFloat16*>(saved);
  for (int64_t i = 0; i < w.state_floats(); i += 32)
    store_pair(to + i, load(state + i), load(state + i + 16));
}

Vec dot_lanes(const BFloat16* a, const float* b, int64_t n) {
  Vec sum(0.0f);
  for (int64_t i = 0; i < n; i += kLanes)
    sum = fma(load_lanes(a + i), load(b + i), sum);
  return sum;
}

// The decays between steps, 0 beyond the diagonal to the end of the vector; C B^T times them, and, if M is
// wanted, times the size of step s too, 0 beyond the diagonal to a whole step of the products.
void decays_and_products(const Chunk& chunk, BackWork& w, bool wants_M) {
  const Steps& steps = w.steps;
  const Vec zero(0.0f);
  for (int64_t t = 0; t < chunk.length; ++t) {
    const Vec high(steps.high[t]), low(steps.low[t]);
    for (int64_t s = 0; s < chunk.length; s += 32) {
      Vec product[2] = {zero, zero}, sized[2] = {zero, zero};
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t at = s + v * 16;
        if (at > t) continue;
        const Vec between = (high - load(steps.high + at)) + (low - load(steps.low + at));
        const Vec decay = keep_lanes(exp2(between), 0, t + 1 - at, zero);
        store(w.E + t * kStride + at, decay);
        product[v] = keep_lanes(load(w.S + t * kStride + at) * decay, 0, t + 1 - at, zero);
        sized[v] = product[v] * load(steps.dt + at);
      }
      store_pair(w.plain + t * kChunk + s, product[0], product[1]);
      if (wants_M) store_pair(w.M + t * kChunk + s, sized[0], sized[1]);
    }
  }
}

// Lower triangle by rows of steps -> by columns.
void turn_square(const BFloat16* square, int64_t length, BFloat16* turned) {
  BFloat16* rows = const_cast<BFloat16*>(square);
  std::memset(rows + length * kChunk, 0,
              static_cast<size_t>((pad_depth(length) - length) * kChunk) * sizeof(BFloat16));
  turn({rows, kChunk}, length, length, turned);
}

// out[s] (+)= sum over t >= s of m[t][s] row t, where `turned` is m by columns; row by row where rows are not
// finite, since products with the zeros of m would carry them to steps that they do not reach.
template <bool kAdd>
void from_later(BackWork& w, int64_t length, const BFloat16* turned, const Matrix& rows, bool finite,
                const BFloat16* pairs, const PairPanels& panels, int64_t columns, float* out) {
  for (int64_t row = 0; finite && row < length; row += kRows) {
    const int64_t from = row / Bf16Unit::kDepth * Bf16Unit::kDepth;
    multiply<kAdd>(w.unit, min_of(kRows, length - row), whole_depth(length) - from,
                   turned + row * kChunk + from, pairs + panels.offset(0, from), panels, columns,
                   out + row * rows.width, rows.width);
  }
  for (int64_t s = 0; !finite && s < length; ++s) {
    float* to = out + s * rows.width;
    if (!kAdd) std::memset(to, 0, static_cast<size_t>(columns) * sizeof(float));
    for (int64_t t = s; t < length; ++t)
      add_row(static_cast<float>(turned[s * kChunk + t]), rows.row(t), columns, to);
  }
}

// out[t] += sum over s <= t of m[t][s] row s, likewise.
void add_earlier(BackWork& w, int64_t length, const BFloat16* m, const Matrix& rows, bool finite,
                 const BFloat16* pairs, const PairPanels& panels, int64_t columns, float* out) {
  for (int64_t row = 0; finite && row < length; row += kRows) {
    const int64_t count = min_of(kRows, length - row);
    multiply<true>(w.unit, count, whole_depth(row + count), m + row * kChunk, pairs, panels, columns,
                   out + row * rows.width, rows.width);
  }
  for (int64_t t = 0; !finite && t < length; ++t)
    for (int64_t s = 0; s <= t; ++s)
      add_row(static_cast<float>(m[t * kChunk + s]), rows.row(s), columns, out + t * rows.width);
}

// The gradient of the state behind a chunk as bfloat16, by pairs of states and by rows; then times the decay
// of the chunk. Returns its product with the state before the chunk, or 0 without one.
float round_adjoint(const Args& args, const Chunk& chunk, const BackWork& w, const Matrix* state,
                    float* adjoint) {
  const PairPanels panels = w.channels_by_states();
  const Vec decay(w.steps.decay[chunk.length - 1]);
  Vec sums[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  for (int64_t n = 0; n < args.states; n += 2)
    for (int64_t i = 0; i < w.width; i += 32) {
      float* at[4] = {adjoint + n * w.width + i, adjoint + n * w.width + i + 16,
                      adjoint + (n + 1) * w.width + i, adjoint + (n + 1) * w.width + i + 16};
      const Vec x[4] = {load(at[0]), load(at[1]), load(at[2]), load(at[3])};
      BFloat16* to = w.adjoint_pairs + panels.offset(i / 32, n);
      _mm512_store_si512(to, rounded_pairs(x[0], x[2]));
      _mm512_store_si512(to + 32, rounded_pairs(x[1], x[3]));
      store_pair(w.adjoint_rows.row(n) + i, x[0], x[1]);
      store_pair(w.adjoint_rows.row(n + 1) + i, x[2], x[3]);
      for (int64_t k = 0; k < 4; ++k) {
        if (state != nullptr)
          sums[k] = fma(x[k], load_lanes(state->row(n + k / 2) + i + k % 2 * 16), sums[k]);
        store(at[k], decay * x[k]);
      }
    }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out = rows of B or C times a state, all steps of a chunk; meanwhile rows of `wanted` come for the next one.
void times_state(const Args& args, const Chunk& chunk, const Ahead& ahead, const View& wanted, BackWork& w,
                 const Matrix& rows, const BFloat16* pairs, float* out) {
  for (int64_t row = 0; row < chunk.length; row += kRows) {
    const int64_t count = min_of(kRows, chunk.length - row);
    ahead.ask(wanted, row, count);
    w.unit.multiply(static_cast<int>(count), w.depth, rows.row(row), w.depth, pairs,
                    w.channels_by_states().panel(), blocks_of(args.dim), out + row * w.width, w.width);
  }
}

// out[n][t] (+)= sum over channels of state row n and the row of step t.
void add_state_times(const Args& args, const Chunk& chunk, BackWork& w, const Matrix& state,
                     const BFloat16* columns, bool first, float* out) {
  const int64_t panel = w.columns_of_channels().panel();
  const int blocks = blocks_of(chunk.length);
  for (int64_t n = 0; n < args.states; n += kRows) {
    const int rows = static_cast<int>(min_of(kRows, args.states - n));
    float* to = out + n * kStride;
    if (first)
      w.unit.multiply(rows, w.width, state.row(n), w.width, columns, panel, blocks, to, kStride);
    else
      w.unit.multiply_add(rows, w.width, state.row(n), w.width, columns, panel, blocks, to, kStride);
  }
}

// Columns that lie in panels times the factor of their step.
void scale_columns(const BackWork& w, int64_t length, const float* factors, const BFloat16* from,
                   BFloat16* to) {
  for (int64_t t = 0; t < pad_depth(length); t += 16) {
    const Vec factor = load(factors + t);
    const int64_t first = w.columns_of_channels().offset(t);
    for (int64_t i = first; i < first + w.width * 32; i += 64) {
      const __m512i pairs = _mm512_load_si512(from + i);
      _mm512_store_si512(to + i, rounded_pairs(factor * even_of(pairs), factor * odd_of(pairs)));
    }
  }
}

// The gradient before the gate from the one behind it, and z's.
void through_gate(const BackwardArgs& args, const Block& block, int64_t head, const Chunk& chunk,
                  BackWork& w) {
  const Args& in = args.in;
  const int64_t length = chunk.length, width = w.width;
  for (int64_t t = 0; t < length; ++t)
    for (int64_t i = 0; i < width; i += kLanes)
      store(w.y + t * width + i, Vec(w.steps.decay[t]) * load(w.from_state + t * width + i));
  add_earlier(w, length, w.M, w.x, w.x_finite, w.x_pairs, w.channels_by_steps(), in.dim, w.y);
  load_rows(in.z, block.batch, head, chunk, in.dim, w.gated, width);
  for (int64_t t = 0; t < length; ++t)
    std::memset(w.gated + t * width + in.dim, 0, static_cast<size_t>(width - in.dim) * sizeof(float));
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 bad = 0;
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t i = 0; i < width; i += 32) {
      Vec part[2];
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t c = i + v * 16, at = t * width + c;
        Vec y = load(w.y + at);
        if (in.D != nullptr) y = fma(load(w.D + c), load_lanes(w.x.rows + at), y);
        const Vec one(1.0f);
        const Vec z = load(w.gated + at), g = load_lanes(w.grad.rows + at), s = sigmoid(z), gs = g * s;
        store(w.gated + at, gs * y * fma(z, one - s, one));
        part[v] = gs * z;
      }
      const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part[1], part[0]));
      bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(both, exponent), exponent);
      _mm512_store_si512(w.grad.row(t) + i, both);
    }
    if (skipped(chunk, t)) std::memset(w.gated + t * width, 0, static_cast<size_t>(in.dim) * sizeof(float));
    store_row(args.grad_z, block.batch, head, chunk.begin + t, in.dim, w.gated + t * width);
  }
  w.grad_finite = bad == 0;
}

// dS += dM E; dM becomes dM M; and the sums of its parts above each step.
void through_products(const Chunk& chunk, BackWork& w) {
  const Vec zero(0.0f);
  for (int64_t t = 0; t < chunk.length; ++t)
    for (int64_t s = 0; s <= t; s += kLanes) {
      const int64_t at = t * kStride + s, count = t + 1 - s;
      const Vec decay = load(w.E + at) * load(w.steps.dt + s);
      const Vec grad = keep_lanes(load(w.dM + at) * decay, 0, count, zero);
      store(w.dS + at, load(w.dS + at) + grad);
      store(w.dM + at, keep_lanes(grad * load(w.S + at), 0, count, zero));
    }
  sums_above(w.dM, chunk.length, w.above);
}

// Gradients of one head and chunk. `saved` is the state before the chunk, `adjoint` the gradient of the one
// after it, and afterwards of the one before.
void head_backward(const BackwardArgs& args, const Block& block, int64_t h, const Chunk& chunk,
                   const Ahead& ahead, BackWork& w, const float* saved, float* adjoint, bool from_zero) {
  const Args& in = args.in;
  const int64_t head = block.head + h, length = chunk.length, last = length - 1, width = w.width;
  const PairPanels by_steps = w.channels_by_steps();
  const TransposedPanels columns = w.columns_of_channels();
  const Steps& steps = w.steps;
  // A view of rows that are only read.
  const Matrix state{const_cast<BFloat16*>(reinterpret_cast<const BFloat16*>(saved)), width};
  load_slopes(in, block, head, chunk, w.slope);
  load_steps(in, block, head, chunk, w.steps);
  decays_and_products(chunk, w, in.z.data != nullptr);
  drive(in, block, head, chunk, w);
  w.grad_finite = true;
  if (args.grad_out.data != nullptr)
    w.grad_finite = load_matrix(args.grad_out, block.batch, head, chunk, in.dim, w.grad);
  else
    std::memset(w.grad.rows, 0, static_cast<size_t>(kChunk * width) * sizeof(BFloat16));
  if (in.D != nullptr) std::memcpy(w.D, in.D + head * in.dim, static_cast<size_t>(in.dim) * sizeof(float));

  const float kept = steps.decay[last] * round_adjoint(in, chunk, w, from_zero ? nullptr : &state, adjoint);
  if (from_zero) {
    std::memset(w.from_state, 0, static_cast<size_t>(length * width) * sizeof(float));
  } else {
    pack_pairs({state.rows, width, in.states, width}, w.channels_by_states(), 0, w.state_pairs);
    times_state(in, chunk, ahead, in.z, w, w.C, w.state_pairs, w.from_state);
  }
  if (in.z.data != nullptr) through_gate(args, block, head, chunk, w);

  // Through M.
  pair_rows(w.grad, length, by_steps, steps.decay, w.grad_pairs, w.grad_kept_pairs);
  pack_transposed({w.x.rows, width, length, width}, columns, 0, w.x_columns);
  for (int64_t row = 0; row < length; row += kRows) {
    const int64_t rows = min_of(kRows, length - row);
    ahead.ask(args.grad_x, row, rows);
    w.unit.multiply(static_cast<int>(rows), width, w.grad.row(row), width, w.x_columns, columns.panel(),
                    blocks_of(row + rows), w.dM + row * kStride, kStride);
  }
  through_products(chunk, w);

  // Through the states.
  scale_columns(w, length, w.kept, w.x_columns, w.kept_columns);
  add_state_times(in, chunk, w, w.adjoint_rows, w.kept_columns, h == 0, w.dB_t);
  if (!from_zero) {
    pack_transposed({w.grad.rows, width, length, width}, columns, 0, w.grad_kept_columns);
    scale_columns(w, length, steps.decay, w.grad_kept_columns, w.grad_kept_columns);
    add_state_times(in, chunk, w, state, w.grad_kept_columns, h == 0, w.dC_t);
  }
  w.dC_given = !from_zero;
  times_state(in, chunk, ahead, args.grad_out, w, w.B, w.adjoint_pairs, w.du_state);
  turn_square(w.plain, length, w.plain_turned);
  from_later<false>(w, length, w.plain_turned, w.grad, w.grad_finite, w.grad_pairs, by_steps, in.dim, w.du);
  add_to_state(in, chunk, ahead, w, w.C_turned, w.grad_kept_pairs, adjoint);

  // dt A of a step decays whatever goes from a step before it to it or later: sums of such parts, never
  // differences.
  float read = 0.0f, written = 0.0f;
  for (int64_t t = last; t >= 0; --t) {
    read += steps.decay[t] * reduce_add(dot_lanes(w.grad.row(t), w.from_state + t * width, width));
    w.log_grad[t] = w.above[t] + kept + read;
  }
  float* grad_d = w.carried.grad_d + h * width;
  for (int64_t t = 0; t < length; ++t) {
    const BFloat16 *x = w.x.row(t), *grad = w.grad.row(t);
    float *du = w.du + t * width, *du_state = w.du_state + t * width;
    const Vec dt(steps.dt[t]), rest(steps.rest[t]);
    Vec from_within(0.0f), from_states(0.0f);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec values = load_lanes(x + i), g = load_lanes(grad + i);
      const Vec through = rest * load(du_state + i);
      from_within = fma(values, load(du + i), from_within);
      from_states = fma(values, through, from_states);
      const Vec dx = dt * (load(du + i) + through);
      store(du + i, in.D != nullptr ? fma(load(w.D + i), g, dx) : dx);
      if (!skipped(chunk, t)) store(grad_d + i, fma(g, values, load(grad_d + i)));
    }
    const float by_states = reduce_add(from_states);
    const float log_grad = w.log_grad[t] + written;
    written += steps.dt[t] * by_states;
    float ddt = 0.0f;
    if (skipped(chunk, t))
      std::memset(du, 0, static_cast<size_t>(in.dim) * sizeof(float));
    else
      ddt = step_gradient(in, head, h, reduce_add(from_within) + by_states, log_grad, steps.dt[t], w.slope[t],
                          w.carried);
    store_row(args.grad_x, block.batch, head, chunk.begin + t, in.dim, du);
    store_dt_gradient(args, block, head, chunk.begin + t, ddt);
  }
}

void open_group(const BackwardArgs& args, const Block& block, const Chunk& chunk, BackWork& w) {
  load_group(args.in, block, chunk, w);
  turn(w.C, chunk.length, args.in.states, w.C_turned);
  pack_pairs({w.B.rows, w.depth, chunk.length, w.depth}, w.states_by_steps(), 0, w.B_pairs);
  pack_pairs({w.C.rows, w.depth, chunk.length, w.depth}, w.states_by_steps(), 0, w.C_pairs);
  std::memset(w.dS, 0, static_cast<size_t>(kChunk * kStride) * sizeof(float));
}

// Rows of dB or dC, which w.dBC holds.
void store_rows(const BackwardArgs& args, const Chunk& chunk, const BackWork& w, int64_t task,
                float* partial) {
  const int64_t states = args.in.states;
  float* to = partial + (task * args.in.length + chunk.begin) * states;
  for (int64_t t = 0; t < chunk.length; ++t) {
    if (skipped(chunk, t))
      std::memset(to + t * states, 0, static_cast<size_t>(states) * sizeof(float));
    else
      std::memcpy(to + t * states, w.dBC + t * w.depth, static_cast<size_t>(states) * sizeof(float));
  }
}

void close_group(const BackwardArgs& args, int64_t task, const Chunk& chunk, BackWork& w) {
  const int64_t length = chunk.length, states = args.in.states;
  const Vec zero(0.0f);
  for (int64_t t = 0; t < length; ++t)
    for (int64_t s = 0; s < length; s += 32) {
      const float* from = w.dS + t * kStride + s;
      store_pair(w.plain + t * kChunk + s, s <= t ? load(from) : zero, s + 16 <= t ? load(from + 16) : zero);
    }
  turn_square(w.plain, length, w.plain_turned);
  const auto through = [&](const float* states_by_steps) {
    for (int64_t t = 0; t < length; t += kLanes)
      for (int64_t n = 0; n < states; n += kLanes)
        transpose_block(states_by_steps + n * kStride + t, kStride, w.dBC + t * w.depth + n, w.depth);
  };
  through(w.dB_t);
  from_later<true>(w, length, w.plain_turned, w.C, w.C_finite, w.C_pairs, w.states_by_steps(), states, w.dBC);
  store_rows(args, chunk, w, task, args.partial_B);
  if (w.dC_given)
    through(w.dC_t);
  else
    std::memset(w.dBC, 0, static_cast<size_t>(length * w.depth) * sizeof(float));
  add_earlier(w, length, w.plain, w.B, w.B_finite, w.B_pairs, w.states_by_steps(), states, w.dBC);
  store_rows(args, chunk, w, task, args.partial_C);
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels = kernels<Work, BackWork>();
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::ssd
