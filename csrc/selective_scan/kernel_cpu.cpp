// CPU forward and backward; compiled once per instruction set. The loops and the numerics are described in
// README.md beside this file.
#include "common/flush_denormals.h"
#include "common/vec.h"
#include "selective_scan/params.h"

namespace arcore::selective_scan {
namespace ARCORE_ISA {
namespace {

// Channels of a slice: its carried states stay in cache, and one packed chunk of B and C serves all of them.
constexpr int64_t kSliceChannels = 128;
// A slice's partial sums of dB and dC take 2 * state floats per step, whatever the number of its channels.
constexpr int64_t kChannelsPerState = 8;

// States that the backward handles at once, in quads: their two sums over channels fill one vector, or two of
// four lanes.
constexpr int kBlock = kLanes < 8 ? 4 : kLanes / 2;
// States that the forward keeps in registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kForwardBlock = 16;
#else
constexpr int kForwardBlock = 4;
#endif
constexpr int kSmallBlock = 4;

// A tile holds kLanes channels (the lanes of a vector) of up to kChunk steps. Rows of slack before it take
// what a backwards transposition writes past a ragged end.
constexpr int64_t kTile = kChunk * kLanes;
constexpr int64_t kTileFloats = kTile + kLanes * kLanes;

int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// How the channels are cut: units share one group of B and one of C, slices are equal parts of a unit.
struct Cut {
  int64_t units, unit_channels, slices_per_unit, slice_channels;

  Cut(const Problem& p, const Inputs& in) {
    const int64_t b = max_of<int64_t>(in.B.groups, 1), c = max_of<int64_t>(in.C.groups, 1);
    units = b / greatest_common_divisor(b, c) * c;
    unit_channels = p.dim / units;
    const int64_t most = max_of(kSliceChannels, kChannelsPerState * p.state);
    slices_per_unit = max_of<int64_t>((unit_channels + most - 1) / most, 1);
    slice_channels = round_up((unit_channels + slices_per_unit - 1) / slices_per_unit, kLanes);
    slices_per_unit = max_of<int64_t>((unit_channels + slice_channels - 1) / slice_channels, 1);
  }
  int64_t slices() const { return units * slices_per_unit; }
  int64_t tiles() const { return slice_channels / kLanes; }
};

// One task's share of the channels.
struct Slice {
  int64_t batch, index, channel, channels, unit;

  Slice(const Cut& cut, int64_t task) {
    batch = task / cut.slices();
    index = task % cut.slices();
    unit = index / cut.slices_per_unit;
    const int64_t within = index % cut.slices_per_unit * cut.slice_channels;
    channel = unit * cut.unit_channels + within;
    channels = min_of(cut.slice_channels, cut.unit_channels - within);
  }
};

int64_t padded(int64_t state, int64_t block) {
  return round_up(state, block);
}

int64_t group_of(const Cut& cut, const Slice& slice, const Coefficient& m) {
  return slice.unit / (cut.units / m.groups);
}

// ---- between memory and tiles

template <typename T>
void load_rows(const Sequence& s, const T* first, int64_t valid, int64_t length, float* tile, float* rows) {
  // Rows of consecutive steps per channel: convert, then transpose.
  const bool forwards = s.time == 1;
  const T* lowest = forwards ? first : first - (length - 1);
  float* start = forwards ? tile : tile + (length - 1) * kLanes;
  const int64_t step = forwards ? kLanes : -kLanes;
  int64_t done = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (valid == kLanes)
      for (; done + kLanes <= length; done += kLanes)
        transpose_block(reinterpret_cast<const float*>(lowest) + done, s.channel, start + done * step, step);
  }
  if (done == length) return;
  for (int64_t c = 0; c < kLanes; ++c) {
    if (c < valid)
      to_float(lowest + c * s.channel + done, rows + c * kChunk, length - done);
    else
      std::memset(rows + c * kChunk, 0, static_cast<size_t>(length - done) * sizeof(float));
  }
  for (int64_t t = done; t < length; t += kLanes)
    transpose_block(rows + (t - done), kChunk, start + t * step, step);
}

template <typename T>
void load_tile(const Sequence& s, int64_t batch, int64_t channel, int64_t valid, int64_t begin,
               int64_t length, float* tile, float* rows) {
  const T* first = static_cast<const T*>(s.data) + batch * s.batch + channel * s.channel + begin * s.time;
  if (s.channel == 1 && valid == kLanes) {
    for (int64_t t = 0; t < length; ++t)
      store(tile + t * kLanes, load_lanes(first + t * s.time));
  } else if (s.time == 1 || s.time == -1) {
    load_rows(s, first, valid, length, tile, rows);
  } else {
    for (int64_t t = 0; t < length; ++t)
      for (int64_t c = 0; c < kLanes; ++c)
        tile[t * kLanes + c] = c < valid ? static_cast<float>(first[c * s.channel + t * s.time]) : 0.0f;
  }
}

template <typename T>
void store_rows(const Sequence& s, T* first, int64_t valid, int64_t length, const float* tile, float* rows) {
  const bool forwards = s.time == 1;
  T* lowest = forwards ? first : first - (length - 1);
  const float* start = forwards ? tile : tile + (length - 1) * kLanes;
  const int64_t step = forwards ? kLanes : -kLanes;
  int64_t done = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (valid == kLanes)
      for (; done + kLanes <= length; done += kLanes)
        transpose_block(start + done * step, step, reinterpret_cast<float*>(lowest) + done, s.channel);
  }
  if (done == length) return;
  for (int64_t t = done; t < length; t += kLanes)
    transpose_block(start + t * step, step, rows + (t - done), kChunk);
  for (int64_t c = 0; c < valid; ++c)
    from_float(rows + c * kChunk, lowest + c * s.channel + done, length - done);
}

template <typename T>
void store_tile(const Sequence& s, int64_t batch, int64_t channel, int64_t valid, int64_t begin,
                int64_t length, const float* tile, float* rows) {
  T* first = static_cast<T*>(s.data) + batch * s.batch + channel * s.channel + begin * s.time;
  if (s.channel == 1 && valid == kLanes) {
    for (int64_t t = 0; t < length; ++t)
      store_lanes(first + t * s.time, load(tile + t * kLanes));
  } else if (s.time == 1 || s.time == -1) {
    store_rows(s, first, valid, length, tile, rows);
  } else {
    for (int64_t t = 0; t < length; ++t)
      for (int64_t c = 0; c < valid; ++c)
        first[c * s.channel + t * s.time] = static_cast<T>(tile[t * kLanes + c]);
  }
}

// What is the same for all tiles of one chunk.
struct Window {
  int64_t batch, begin, length;
};

void load_tile(const Sequence& s, const Window& w, int64_t channel, int64_t valid, float* tile, float* rows) {
  with_type(s.dtype, [&](auto type) {
    load_tile<decltype(type)>(s, w.batch, channel, valid, w.begin, w.length, tile, rows);
  });
}
void store_tile(const Sequence& s, const Window& w, int64_t channel, int64_t valid, const float* tile,
                float* rows) {
  with_type(s.dtype, [&](auto type) {
    store_tile<decltype(type)>(s, w.batch, channel, valid, w.begin, w.length, tile, rows);
  });
}

// Varying B or C of one chunk as [length, states], zero-filled to `states`.
void pack_varying(const Coefficient& m, int64_t group, const Window& w, int64_t state, int64_t states,
                  float* packed) {
  with_type(m.dtype, [&](auto type) {
    using T = decltype(type);
    const T* src = static_cast<const T*>(m.data) + w.batch * m.batch + group * m.channel + w.begin * m.time;
    for (int64_t t = 0; t < w.length; ++t) {
      float* row = packed + t * states;
      if (m.state == 1)
        to_float(src + t * m.time, row, state);
      else
        for (int64_t n = 0; n < state; ++n)
          row[n] = static_cast<float>(src[n * m.state + t * m.time]);
      for (int64_t n = state; n < states; ++n)
        row[n] = 0.0f;
    }
  });
}

// Constant B or C, or A times `factor`, as [tile, state, lane], zero-filled.
template <typename T>
void pack_lanes(const T* src, int64_t channel_stride, int64_t state_stride, float factor, const Slice& slice,
                int64_t state, int64_t states, float* packed) {
  for (int64_t c0 = 0; c0 < slice.channels; c0 += kLanes)
    for (int64_t n = 0; n < states; ++n)
      for (int64_t c = 0; c < kLanes; ++c) {
        const bool inside = n < state && c0 + c < slice.channels;
        packed[(c0 * states) + n * kLanes + c] =
            inside ? factor *
                         static_cast<float>(src[(slice.channel + c0 + c) * channel_stride + n * state_stride])
                   : 0.0f;
      }
}
void pack_constant(const Coefficient& m, const Slice& slice, int64_t state, int64_t states, float* packed) {
  with_type(m.dtype, [&](auto type) {
    using T = decltype(type);
    pack_lanes(static_cast<const T*>(m.data), m.channel, m.state, 1.0f, slice, state, states, packed);
  });
}

// [channel, state] rows of a state tensor <-> [state, lane].
void load_state(const float* src, int64_t valid, int64_t state, int64_t states, float* carried) {
  for (int64_t n = 0; n < states; ++n)
    for (int64_t c = 0; c < kLanes; ++c)
      carried[n * kLanes + c] = src != nullptr && n < state && c < valid ? src[c * state + n] : 0.0f;
}
void store_state(const float* carried, int64_t valid, int64_t state, float* dst) {
  for (int64_t c = 0; c < valid; ++c)
    for (int64_t n = 0; n < state; ++n)
      dst[c * state + n] = carried[n * kLanes + c];
}
// [state, dim] rows of a kept state <-> [state, lane].
void load_kept(const float* src, int64_t dim, int64_t valid, int64_t state, int64_t states, float* carried) {
  for (int64_t n = 0; n < states; ++n)
    for (int64_t c = 0; c < kLanes; ++c)
      carried[n * kLanes + c] = n < state && c < valid ? src[n * dim + c] : 0.0f;
}
void store_kept(const float* carried, int64_t dim, int64_t valid, int64_t state, float* dst) {
  for (int64_t n = 0; n < state; ++n)
    if (valid == kLanes)
      store(dst + n * dim, load(carried + n * kLanes));
    else
      std::memcpy(dst + n * dim, carried + n * kLanes, static_cast<size_t>(valid) * sizeof(float));
}

// Zeroes the rows of skipped steps: with dt = u = B = C = 0 such a step leaves the state as it is, whatever
// (even NaN) the padding holds.
void skip_padding(const Chunk& chunk, float* rows, int64_t row_floats) {
  if (chunk.ids == nullptr) return;
  for (int64_t t = 0; t < chunk.length; ++t)
    if (chunk.ids[t * chunk.id_stride] < 0)
      std::memset(rows + t * row_floats, 0, static_cast<size_t>(row_floats) * sizeof(float));
}

const Chunk* chunks_of(const Problem& p, int64_t batch, int64_t* count) {
  const int64_t row = p.chunk_rows == 1 ? 0 : batch;
  *count = p.first_chunk[row + 1] - p.first_chunk[row];
  return p.chunks + p.first_chunk[row];
}

// Varying B and C of one chunk.
void pack_chunk(const Inputs& in, const Cut& cut, const Slice& slice, const Chunk& chunk, const Window& w,
                int64_t state, int64_t states, float* b, float* c) {
  if (in.B.groups) {
    pack_varying(in.B, group_of(cut, slice, in.B), w, state, states, b);
    skip_padding(chunk, b, states);
  }
  if (in.C.groups) {
    pack_varying(in.C, group_of(cut, slice, in.C), w, state, states, c);
    skip_padding(chunk, c, states);
  }
}

// Row of the state tensors: sequences of a packed row, else the batch row.
int64_t state_row(const Chunk& chunk, int64_t batch) {
  return chunk.sequence >= 0 ? chunk.sequence : batch;
}

float* take(float** next, int64_t floats) {
  float* taken = *next;
  *next += round_up(floats, 16);
  return taken;
}
// A tile with its slack in front.
float* take_tile(float** next) {
  return take(next, kTileFloats) + kLanes * kLanes;
}

// dt = softplus(delta + bias), in place.
void step_sizes(const Problem& p, const Inputs& in, int64_t channel, int64_t valid, int64_t length,
                float* delta) {
  if (in.delta_bias != nullptr) {
    float bias[kLanes];
    for (int64_t c = 0; c < kLanes; ++c)
      bias[c] = c < valid ? in.delta_bias[channel + c] : 0.0f;
    const Vec add = load(bias);
    for (int64_t t = 0; t < length; ++t)
      store(delta + t * kLanes, load(delta + t * kLanes) + add);
  }
  if (p.delta_softplus)
    for (int64_t t = 0; t < length; ++t)
      store(delta + t * kLanes, softplus(load(delta + t * kLanes)));
}

Vec lanes_of(const float* per_channel, int64_t channel, int64_t valid) {
  float lanes[kLanes];
  for (int64_t c = 0; c < kLanes; ++c)
    lanes[c] = per_channel != nullptr && c < valid ? per_channel[channel + c] : 0.0f;
  return load(lanes);
}

// ---- forward

// One chunk of one tile: `kStates` states from n0 on. b and c are [length, stride] scalars where they vary,
// [state, lane] where constant.
template <int kStates, bool kVaryB, bool kVaryC>
void scan_block(int64_t length, const float* dt, const float* dtu, const float* a, const float* b,
                const float* c, int64_t stride, float* carried, float* y) {
  Vec h[kStates];
#pragma GCC unroll 16
  for (int n = 0; n < kStates; ++n)
    h[n] = load(carried + n * kLanes);
  for (int64_t t = 0; t < length; ++t) {
    const Vec step = load(dt + t * kLanes), input = load(dtu + t * kLanes);
    Vec sum = load(y + t * kLanes);
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      const Vec decay = exp2(step * load(a + n * kLanes));
      const Vec bn = kVaryB ? Vec(b[t * stride + n]) : load(b + n * kLanes);
      const Vec cn = kVaryC ? Vec(c[t * stride + n]) : load(c + n * kLanes);
      h[n] = fma(decay, h[n], input * bn);
      sum = fma(cn, h[n], sum);
    }
    store(y + t * kLanes, sum);
  }
#pragma GCC unroll 16
  for (int n = 0; n < kStates; ++n)
    store(carried + n * kLanes, h[n]);
}

template <bool kVaryB, bool kVaryC>
void scan_states(int64_t states, int64_t length, const float* dt, const float* dtu, const float* a,
                 const float* b, const float* c, float* carried, float* y) {
  constexpr int64_t b_step = kVaryB ? 1 : kLanes, c_step = kVaryC ? 1 : kLanes;
  int64_t n = 0;
  for (; n + kForwardBlock <= states; n += kForwardBlock)
    scan_block<kForwardBlock, kVaryB, kVaryC>(length, dt, dtu, a + n * kLanes, b + n * b_step, c + n * c_step,
                                              states, carried + n * kLanes, y);
  for (; n < states; n += kSmallBlock)
    scan_block<kSmallBlock, kVaryB, kVaryC>(length, dt, dtu, a + n * kLanes, b + n * b_step, c + n * c_step,
                                            states, carried + n * kLanes, y);
}

// A tile is taken through several chunks before the next tile's turn: in long rows contiguous in time each
// channel's steps lie pages apart from those of the others, and every visit of a page should bring more than
// one chunk. The packed B and C of these chunks stay in the first-level caches.
constexpr int64_t kWindowFloats = 8192;

int64_t window_of(int64_t states) {
  return max_of<int64_t>(kWindowFloats / (kChunk * states), 1);
}

// Asks for the steps of a tile that lie contiguous in time; elsewhere neighbours come along anyway.
void prefetch(const Sequence& s, const Window& w, int64_t channel, int64_t valid) {
  if (s.data == nullptr || (s.time != 1 && s.time != -1)) return;
  const int64_t bytes = s.dtype == StorageType::kFloat32 ? 4 : 2;
  const int64_t first = s.time == 1 ? w.begin : -(w.begin + w.length - 1);
  const char* base =
      static_cast<const char*>(s.data) + (w.batch * s.batch + channel * s.channel + first) * bytes;
  for (int64_t c = 0; c < valid; ++c)
    for (int64_t at = 0; at < w.length * bytes; at += 64)
      __builtin_prefetch(base + c * s.channel * bytes + at, 0, 2);
}

int64_t forward_workspace(const Problem& p, const Inputs& in) {
  const Cut cut(p, in);
  const int64_t states = padded(p.state, kSmallBlock);
  // a, carried, constant B, constant C; packed B and C of a window; five tiles and the rows of a
  // transposition.
  return 4 * round_up(cut.slice_channels * states, 16) +
         2 * round_up(window_of(states) * kChunk * states, 16) + 5 * kTileFloats + kTile;
}

void forward_slice(const ForwardArgs& args, const Cut& cut, const Slice& slice, float* workspace) {
  const Problem& p = args.problem;
  const Inputs& in = args.in;
  const int64_t states = padded(p.state, kSmallBlock);
  float* next = workspace;
  float* a = take(&next, cut.slice_channels * states);
  float* carried = take(&next, cut.slice_channels * states);
  const int64_t window = window_of(states), packed = kChunk * states;
  float* all_b = take(&next, in.B.groups ? window * packed : cut.slice_channels * states);
  float* all_c = take(&next, in.C.groups ? window * packed : cut.slice_channels * states);
  float *dt = take_tile(&next), *u = take_tile(&next), *dtu = take_tile(&next), *y = take_tile(&next);
  float* z = take_tile(&next);
  float* rows = take(&next, kTile);

  pack_lanes(in.A, p.state, 1, kLog2e, slice, p.state, states, a);
  if (!in.B.groups) pack_constant(in.B, slice, p.state, states, all_b);
  if (!in.C.groups) pack_constant(in.C, slice, p.state, states, all_c);

  int64_t count;
  const Chunk* chunks = chunks_of(p, slice.batch, &count);
  const auto steps_of = [&](int64_t i) { return Window{slice.batch, chunks[i].begin, chunks[i].length}; };
  for (int64_t first = 0; first < count; first += window) {
    const int64_t end = min_of(first + window, count);
    for (int64_t i = first; i < end; ++i)
      pack_chunk(in, cut, slice, chunks[i], steps_of(i), p.state, states, all_b + (i - first) * packed,
                 all_c + (i - first) * packed);
    const int64_t parts = end - first, tiles = (slice.channels + kLanes - 1) / kLanes;
    for (int64_t part = 0; part < tiles * parts; ++part) {
      const int64_t c0 = part / parts * kLanes, i = first + part % parts;
      const Chunk& chunk = chunks[i];
      const Window w = steps_of(i);
      const float* b = all_b + (in.B.groups ? (i - first) * packed : 0);
      const float* c = all_c + (in.C.groups ? (i - first) * packed : 0);
      const int64_t row = state_row(chunk, slice.batch);
      const int64_t channel = slice.channel + c0, valid = min_of<int64_t>(kLanes, slice.channels - c0);
      float* state = carried + c0 * states;
      if (chunk.first)
        load_state(in.initial_state != nullptr && !chunk.zero_start
                       ? in.initial_state + (row * p.dim + channel) * p.state
                       : nullptr,
                   valid, p.state, states, state);
      else if (args.states != nullptr)
        store_kept(state, p.dim, valid, p.state,
                   args.states + ((slice.batch * p.slots + chunk.slot) * p.state) * p.dim + channel);
      load_tile(in.u, w, channel, valid, u, rows);
      load_tile(in.delta, w, channel, valid, dt, rows);
      step_sizes(p, in, channel, valid, w.length, dt);
      skip_padding(chunk, dt, kLanes);
      skip_padding(chunk, u, kLanes);
      const Vec skip = lanes_of(in.D, channel, valid);
      for (int64_t t = 0; t < w.length; ++t) {
        const Vec ut = load(u + t * kLanes);
        store(dtu + t * kLanes, load(dt + t * kLanes) * ut);
        store(y + t * kLanes, in.D != nullptr ? skip * ut : Vec(0.0f));
      }
      if (part + 1 < tiles * parts) {
        const int64_t next_c0 = (part + 1) / parts * kLanes;
        const Window next_steps = steps_of(first + (part + 1) % parts);
        for (const Sequence* s : {&in.u, &in.delta, &in.z, &args.out})
          prefetch(*s, next_steps, slice.channel + next_c0,
                   min_of<int64_t>(kLanes, slice.channels - next_c0));
      }
      const float* at = a + c0 * states;
      if (in.B.groups && in.C.groups)
        scan_states<true, true>(states, w.length, dt, dtu, at, b, c, state, y);
      else if (in.B.groups)
        scan_states<true, false>(states, w.length, dt, dtu, at, b, c + c0 * states, state, y);
      else if (in.C.groups)
        scan_states<false, true>(states, w.length, dt, dtu, at, b + c0 * states, c, state, y);
      else
        scan_states<false, false>(states, w.length, dt, dtu, at, b + c0 * states, c + c0 * states, state, y);
      if (in.z.data != nullptr) {
        load_tile(in.z, w, channel, valid, z, rows);
        for (int64_t t = 0; t < w.length; ++t) {
          const Vec gate = load(z + t * kLanes);
          store(y + t * kLanes, load(y + t * kLanes) * silu(gate));
        }
      }
      skip_padding(chunk, y, kLanes);
      store_tile(args.out, w, channel, valid, y, rows);
      if (chunk.last && chunk.keep_last)
        store_state(state, valid, p.state, args.last_state + (row * p.dim + channel) * p.state);
    }
  }
}

void forward(const ForwardArgs& args, float* workspace, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const Cut cut(args.problem, args.in);
  for (int64_t task = begin; task < end; ++task)
    forward_slice(args, cut, Slice(cut, task), workspace);
}

// ---- backward

// Pointers of one chunk of one tile; states from n0 on are reached by the offsets of scan_back.
struct BackTile {
  int64_t length, stride;      // stride: floats per step of varying b and c
  const float *dt, *dtu, *gy;  // [length, lane]
  const float *a, *a2;         // A and A * log2(e), [state, lane]
  const float *b, *c;
  const float* start;               // state before the chunk, [state, lane]
  float* adjoint;                   // a_(t+1) G_(t+1), [state, lane]
  float *decay, *kept;              // [length, kBlock, lane]: exp(dt A) and exp(dt A) h_(t-1)
  float *gb, *ga, *y;               // [length, lane], added to: sum G B, sum G A exp(dt A) h_(t-1), sum C h
  float *grad_a, *grad_b, *grad_c;  // [state, lane], added to; grad_b and grad_c where constant
  float* sums;                      // [length, blocks, 2 * kBlock], added to: dC and dB summed over lanes
  int64_t sums_stride;
};

template <bool kVaryB, bool kVaryC, bool kNeedY>
void scan_back(const BackTile& k) {
  constexpr int kQuads = kBlock / 4;
  {
    Vec h[kBlock];
#pragma GCC unroll 8
    for (int n = 0; n < kBlock; ++n)
      h[n] = load(k.start + n * kLanes);
    for (int64_t t = 0; t < k.length; ++t) {
      const Vec step = load(k.dt + t * kLanes), input = load(k.dtu + t * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < kBlock; ++n) {
        const Vec decay = exp2(step * load(k.a2 + n * kLanes));
        const Vec bn = kVaryB ? Vec(k.b[t * k.stride + n]) : load(k.b + n * kLanes);
        const Vec kept = decay * h[n];
        h[n] = fma(input, bn, kept);
        store(k.decay + (t * kBlock + n) * kLanes, decay);
        store(k.kept + (t * kBlock + n) * kLanes, kept);
      }
    }
  }
  Vec adjoint[kBlock], grad_a[kBlock];
#pragma GCC unroll 8
  for (int n = 0; n < kBlock; ++n) {
    adjoint[n] = load(k.adjoint + n * kLanes);
    grad_a[n] = load(k.grad_a + n * kLanes);
  }
  for (int64_t t = k.length - 1; t >= 0; --t) {
    const Vec step = load(k.dt + t * kLanes), input = load(k.dtu + t * kLanes), g = load(k.gy + t * kLanes);
    Vec gb = load(k.gb + t * kLanes), ga = load(k.ga + t * kLanes);
    Vec y = kNeedY ? load(k.y + t * kLanes) : Vec(0.0f);
    constexpr int kQuadsOfVector = kLanes / 4;
    Vec quads[2 * kBlock / kLanes][kQuadsOfVector];
#pragma GCC unroll 2
    for (int q = 0; q < kQuads; ++q) {
      Vec for_c[4], for_b[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const int n = 4 * q + j;
        const Vec bn = kVaryB ? Vec(k.b[t * k.stride + n]) : load(k.b + n * kLanes);
        const Vec cn = kVaryC ? Vec(k.c[t * k.stride + n]) : load(k.c + n * kLanes);
        const Vec kept = load(k.kept + (t * kBlock + n) * kLanes);
        const Vec h = fma(input, bn, kept);
        const Vec grad = fma(g, cn, adjoint[n]);
        for_c[j] = g * h;
        for_b[j] = grad * input;
        if (kNeedY) y = fma(cn, h, y);
        gb = fma(grad, bn, gb);
        const Vec through = grad * kept;
        ga = fma(through, load(k.a + n * kLanes), ga);
        grad_a[n] = fma(through, step, grad_a[n]);
        adjoint[n] = load(k.decay + (t * kBlock + n) * kLanes) * grad;
        if (!kVaryB) store(k.grad_b + n * kLanes, load(k.grad_b + n * kLanes) + for_b[j]);
        if (!kVaryC) store(k.grad_c + n * kLanes, load(k.grad_c + n * kLanes) + for_c[j]);
      }
      quads[q / kQuadsOfVector][q % kQuadsOfVector] =
          kVaryC ? sum_quad(for_c[0], for_c[1], for_c[2], for_c[3]) : Vec(0.0f);
      quads[(kQuads + q) / kQuadsOfVector][(kQuads + q) % kQuadsOfVector] =
          kVaryB ? sum_quad(for_b[0], for_b[1], for_b[2], for_b[3]) : Vec(0.0f);
    }
    if (kVaryB || kVaryC) {
      float* sums = k.sums + t * k.sums_stride;
      for (int v = 0; v < 2 * kBlock / kLanes; ++v)
        store(sums + v * kLanes, load(sums + v * kLanes) + sum_groups(quads[v]));
    }
    store(k.gb + t * kLanes, gb);
    store(k.ga + t * kLanes, ga);
    if (kNeedY) store(k.y + t * kLanes, y);
  }
#pragma GCC unroll 8
  for (int n = 0; n < kBlock; ++n) {
    store(k.adjoint + n * kLanes, adjoint[n]);
    store(k.grad_a + n * kLanes, grad_a[n]);
  }
}

using ScanBack = void (*)(const BackTile&);

ScanBack pick_scan_back(bool vary_b, bool vary_c, bool need_y) {
  if (vary_b && vary_c) return need_y ? scan_back<true, true, true> : scan_back<true, true, false>;
  if (vary_b) return need_y ? scan_back<true, false, true> : scan_back<true, false, false>;
  if (vary_c) return need_y ? scan_back<false, true, true> : scan_back<false, true, false>;
  return need_y ? scan_back<false, false, true> : scan_back<false, false, false>;
}

int64_t backward_workspace(const Problem& p, const Inputs& in) {
  const Cut cut(p, in);
  const int64_t states = padded(p.state, kBlock);
  // A twice, B, C, adjoint, dA, dB, dC per slice; packed B and C, sums per chunk; the state before a chunk;
  // decay and kept of a block; tiles; rows.
  return 8 * round_up(cut.slice_channels * states, 16) + 4 * round_up(kChunk * states, 16) + states * kLanes +
         2 * kTile * kBlock + 11 * kTileFloats + kTile + 2 * cut.slice_channels + 64;
}

// Sums of one chunk into the slice's partial dB and dC.
void store_sums(const BackwardArgs& args, const Cut& cut, const Slice& slice, const Window& w, int64_t states,
                const float* sums) {
  const Problem& p = args.problem;
  const int64_t offset = ((slice.batch * cut.slices() + slice.index) * p.length + w.begin) * p.state;
  for (int part = 0; part < 2; ++part) {
    float* partial = part == 0 ? args.partial_C : args.partial_B;
    if ((part == 0 ? args.in.C.groups : args.in.B.groups) == 0) continue;
    for (int64_t t = 0; t < w.length; ++t)
      for (int64_t n = 0; n < p.state; ++n)
        partial[offset + t * p.state + n] =
            sums[2 * (t * states + n / kBlock * kBlock) + part * kBlock + n % kBlock];
  }
}

void backward_slice(const BackwardArgs& args, const Cut& cut, const Slice& slice, float* workspace) {
  const Problem& p = args.problem;
  const Inputs& in = args.in;
  const int64_t states = padded(p.state, kBlock), per_slice = cut.slice_channels * states;
  float* next = workspace;
  float *a = take(&next, per_slice), *a2 = take(&next, per_slice), *adjoint = take(&next, per_slice);
  float *grad_a = take(&next, per_slice), *grad_b = take(&next, per_slice), *grad_c = take(&next, per_slice);
  float* b = take(&next, in.B.groups ? kChunk * states : per_slice);
  float* c = take(&next, in.C.groups ? kChunk * states : per_slice);
  float* sums = take(&next, 2 * kChunk * states);
  float* start = take(&next, states * kLanes);
  float *decay = take(&next, kTile * kBlock), *kept = take(&next, kTile * kBlock);
  float *u = take_tile(&next), *x = take_tile(&next), *dt = take_tile(&next), *dtu = take_tile(&next);
  float *z = take_tile(&next), *g = take_tile(&next), *gy = take_tile(&next), *y = take_tile(&next);
  float *gb = take_tile(&next), *ga = take_tile(&next), *result = take_tile(&next);
  float* rows = take(&next, kTile);
  float *grad_d = take(&next, cut.slice_channels), *grad_bias = take(&next, cut.slice_channels);

  pack_lanes(in.A, p.state, 1, 1.0f, slice, p.state, states, a);
  pack_lanes(in.A, p.state, 1, kLog2e, slice, p.state, states, a2);
  if (!in.B.groups) pack_constant(in.B, slice, p.state, states, b);
  if (!in.C.groups) pack_constant(in.C, slice, p.state, states, c);
  std::memset(grad_a, 0, static_cast<size_t>(per_slice) * sizeof(float));
  std::memset(grad_b, 0, static_cast<size_t>(per_slice) * sizeof(float));
  std::memset(grad_c, 0, static_cast<size_t>(per_slice) * sizeof(float));
  std::memset(grad_d, 0, static_cast<size_t>(cut.slice_channels) * sizeof(float));
  std::memset(grad_bias, 0, static_cast<size_t>(cut.slice_channels) * sizeof(float));
  const bool gated = in.z.data != nullptr;
  const ScanBack scan = pick_scan_back(in.B.groups != 0, in.C.groups != 0, gated);

  int64_t count;
  const Chunk* chunks = chunks_of(p, slice.batch, &count);
  for (int64_t i = count - 1; i >= 0; --i) {
    const Chunk& chunk = chunks[i];
    const Window w{slice.batch, chunk.begin, chunk.length};
    pack_chunk(in, cut, slice, chunk, w, p.state, states, b, c);
    std::memset(sums, 0, static_cast<size_t>(2 * w.length * states) * sizeof(float));
    const int64_t row = state_row(chunk, slice.batch);
    for (int64_t c0 = 0; c0 < slice.channels; c0 += kLanes) {
      const int64_t channel = slice.channel + c0, valid = min_of<int64_t>(kLanes, slice.channels - c0);
      const int64_t at = c0 * states, state_at = (row * p.dim + channel) * p.state;
      if (chunk.last)
        load_state(
            args.grad_last_state != nullptr && chunk.keep_last ? args.grad_last_state + state_at : nullptr,
            valid, p.state, states, adjoint + at);
      if (chunk.first)
        load_state(in.initial_state != nullptr && !chunk.zero_start ? in.initial_state + state_at : nullptr,
                   valid, p.state, states, start);
      else
        load_kept(args.states + ((slice.batch * p.slots + chunk.slot) * p.state) * p.dim + channel, p.dim,
                  valid, p.state, states, start);
      load_tile(in.u, w, channel, valid, u, rows);
      load_tile(in.delta, w, channel, valid, x, rows);
      if (args.grad_out.data != nullptr)
        load_tile(args.grad_out, w, channel, valid, g, rows);
      else
        std::memset(g, 0, static_cast<size_t>(w.length * kLanes) * sizeof(float));
      skip_padding(chunk, u, kLanes);
      skip_padding(chunk, g, kLanes);
      if (gated) {
        load_tile(in.z, w, channel, valid, z, rows);
        skip_padding(chunk, z, kLanes);
      }
      const Vec bias = lanes_of(in.delta_bias, channel, valid), skip = lanes_of(in.D, channel, valid);
      for (int64_t t = 0; t < w.length; ++t) {
        const int64_t o = t * kLanes;
        const Vec xt = load(x + o) + bias, ut = load(u + o);
        Vec slope(1.0f);
        const Vec step = p.delta_softplus ? softplus(xt, slope) : xt;
        store(x + o, slope);
        store(dt + o, step);
        store(dtu + o, step * ut);
        store(gb + o, Vec(0.0f));
        store(ga + o, Vec(0.0f));
        Vec gt = load(g + o);
        if (gated) {
          // result holds what the gate's gradient needs beside y: gout s (1 + z (1 - s)).
          const Vec zt = load(z + o), s = sigmoid(zt), gs = gt * s, one(1.0f);
          store(result + o, gs * fma(zt, one - s, one));
          gt = gs * zt;
          store(y + o, skip * ut);
        }
        store(gy + o, gt);
      }
      skip_padding(chunk, dt, kLanes);
      skip_padding(chunk, dtu, kLanes);
      BackTile k{};
      k.length = w.length;
      k.stride = states;
      k.dt = dt;
      k.dtu = dtu;
      k.gy = gy;
      k.decay = decay;
      k.kept = kept;
      k.gb = gb;
      k.ga = ga;
      k.y = y;
      k.sums_stride = 2 * states;
      for (int64_t n = 0; n < states; n += kBlock) {
        const int64_t lane = n * kLanes;
        k.a = a + at + lane;
        k.a2 = a2 + at + lane;
        k.b = in.B.groups ? b + n : b + at + lane;
        k.c = in.C.groups ? c + n : c + at + lane;
        k.start = start + lane;
        k.adjoint = adjoint + at + lane;
        k.grad_a = grad_a + at + lane;
        k.grad_b = grad_b + at + lane;
        k.grad_c = grad_c + at + lane;
        k.sums = sums + 2 * n;
        scan(k);
      }
      if (gated) {
        for (int64_t t = 0; t < w.length; ++t) {
          const int64_t o = t * kLanes;
          store(result + o, load(result + o) * load(y + o));
        }
        store_tile(args.grad_z, w, channel, valid, result, rows);
      }
      Vec sum_d = load(grad_d + c0), sum_bias = load(grad_bias + c0);
      skip_padding(chunk, x, kLanes);
      skip_padding(chunk, ga, kLanes);
      for (int64_t t = 0; t < w.length; ++t) {
        const int64_t o = t * kLanes;
        const Vec ut = load(u + o), gbt = load(gb + o), gyt = load(gy + o);
        store(result + o, fma(skip, gyt, load(dt + o) * gbt));
        sum_d = fma(gyt, ut, sum_d);
        const Vec grad_delta = fma(ut, gbt, load(ga + o)) * load(x + o);
        sum_bias = sum_bias + grad_delta;
        store(ga + o, grad_delta);
      }
      store(grad_d + c0, sum_d);
      store(grad_bias + c0, sum_bias);
      store_tile(args.grad_u, w, channel, valid, result, rows);
      store_tile(args.grad_delta, w, channel, valid, ga, rows);
      if (chunk.first && args.grad_initial_state != nullptr && !chunk.zero_start)
        store_state(adjoint + at, valid, p.state, args.grad_initial_state + state_at);
    }
    store_sums(args, cut, slice, w, states, sums);
  }

  for (int64_t c0 = 0; c0 < slice.channels; c0 += kLanes) {
    const int64_t valid = min_of<int64_t>(kLanes, slice.channels - c0);
    const int64_t channel = slice.batch * p.dim + slice.channel + c0;
    store_state(grad_a + c0 * states, valid, p.state, args.partial_A + channel * p.state);
    if (!in.B.groups) store_state(grad_b + c0 * states, valid, p.state, args.partial_B + channel * p.state);
    if (!in.C.groups) store_state(grad_c + c0 * states, valid, p.state, args.partial_C + channel * p.state);
    std::memcpy(args.partial_D + channel, grad_d + c0, static_cast<size_t>(valid) * sizeof(float));
    std::memcpy(args.partial_delta_bias + channel, grad_bias + c0,
                static_cast<size_t>(valid) * sizeof(float));
  }
}

void backward(const BackwardArgs& args, float* workspace, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const Cut cut(args.problem, args.in);
  for (int64_t task = begin; task < end; ++task)
    backward_slice(args, cut, Slice(cut, task), workspace);
}

// Adds the slices of one group in their order.
void reduce_group(const Problem& p, const Cut& cut, const float* partial, const Coefficient& grad,
                  int64_t batch, int64_t group) {
  const int64_t per_group = cut.slices() / grad.groups, size = p.length * p.state;
  const float* first = partial + (batch * cut.slices() + group * per_group) * size;
  with_type(grad.dtype, [&](auto type) {
    using T = decltype(type);
    T* dst = static_cast<T*>(grad.data) + batch * grad.batch + group * grad.channel;
    for (int64_t t = 0; t < p.length; ++t)
      for (int64_t n = 0; n < p.state; ++n) {
        float sum = 0.0f;
        for (int64_t s = 0; s < per_group; ++s)
          sum += first[s * size + t * p.state + n];
        dst[n * grad.state + t * grad.time] = static_cast<T>(sum);
      }
  });
}

void backward_reduce(const BackwardArgs& args, int64_t begin, int64_t end) {
  const Cut cut(args.problem, args.in);
  const int64_t groups = max_of(args.in.B.groups, args.in.C.groups);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / groups, group = task % groups;
    if (group < args.in.B.groups) reduce_group(args.problem, cut, args.partial_B, args.grad_B, batch, group);
    if (group < args.in.C.groups) reduce_group(args.problem, cut, args.partial_C, args.grad_C, batch, group);
  }
}

// ---- forward-mode

// One chunk of one tile, kSmallBlock states: the state h and its tangent g, both carried. Arrays that end in
// _t are tangents; b, c and theirs are [length, stride] scalars where they vary, [state, lane] where
// constant.
struct TangentTile {
  int64_t length, stride;
  const float *dt, *dt_t, *dtu, *dtu_t;  // [length, lane]
  const float *a, *a_t;                  // [state, lane]
  const float *b, *b_t, *c, *c_t;
  float *h, *g;    // [state, lane]
  float *y, *y_t;  // [length, lane], added to
};

template <bool kVaryB, bool kVaryC>
void scan_tangent(const TangentTile& k) {
  Vec h[kSmallBlock], g[kSmallBlock];
#pragma GCC unroll 4
  for (int n = 0; n < kSmallBlock; ++n) {
    h[n] = load(k.h + n * kLanes);
    g[n] = load(k.g + n * kLanes);
  }
  const auto b_at = [&](const float* b, int64_t t, int n) {
    return kVaryB ? Vec(b[t * k.stride + n]) : load(b + n * kLanes);
  };
  const auto c_at = [&](const float* c, int64_t t, int n) {
    return kVaryC ? Vec(c[t * k.stride + n]) : load(c + n * kLanes);
  };
  for (int64_t t = 0; t < k.length; ++t) {
    const int64_t o = t * kLanes;
    const Vec step = load(k.dt + o), step_t = load(k.dt_t + o);
    const Vec input = load(k.dtu + o), input_t = load(k.dtu_t + o);
    Vec y = load(k.y + o), y_t = load(k.y_t + o);
#pragma GCC unroll 4
    for (int n = 0; n < kSmallBlock; ++n) {
      const Vec a = load(k.a + n * kLanes);
      const Vec decay = exp2(step * a * Vec(kLog2e)), kept = decay * h[n];
      const Vec rate = fma(step_t, a, step * load(k.a_t + n * kLanes));
      const Vec b = b_at(k.b, t, n), c = c_at(k.c, t, n);
      g[n] = fma(input_t, b, fma(input, b_at(k.b_t, t, n), fma(decay, g[n], rate * kept)));
      h[n] = fma(input, b, kept);
      y = fma(c, h[n], y);
      y_t = fma(c, g[n], fma(c_at(k.c_t, t, n), h[n], y_t));
    }
    store(k.y + o, y);
    store(k.y_t + o, y_t);
  }
#pragma GCC unroll 4
  for (int n = 0; n < kSmallBlock; ++n) {
    store(k.h + n * kLanes, h[n]);
    store(k.g + n * kLanes, g[n]);
  }
}

int64_t tangent_workspace(const Problem& p, const Inputs& in) {
  const Cut cut(p, in);
  const int64_t states = padded(p.state, kSmallBlock);
  const int64_t per_slice = round_up(cut.slice_channels * states, 16);
  // A and the state; B and C, per slice or per chunk; each with its tangent.
  return 8 * per_slice + 4 * round_up(kChunk * states, 16) + 10 * kTileFloats + kTile;
}

void tangent_slice(const TangentArgs& args, const Cut& cut, const Slice& slice, float* workspace) {
  const Problem& p = args.problem;
  const Inputs &in = args.in, &along = args.along;
  const int64_t states = padded(p.state, kSmallBlock), per_slice = cut.slice_channels * states;
  float* next = workspace;
  const auto matrix = [&](bool varying) { return take(&next, varying ? kChunk * states : per_slice); };
  float *a = matrix(false), *a_t = matrix(false), *carried = matrix(false), *carried_t = matrix(false);
  float *b = matrix(in.B.groups), *b_t = matrix(in.B.groups);
  float *c = matrix(in.C.groups), *c_t = matrix(in.C.groups);
  float *u = take_tile(&next), *u_t = take_tile(&next), *dt = take_tile(&next), *dt_t = take_tile(&next);
  float *dtu = take_tile(&next), *dtu_t = take_tile(&next), *y = take_tile(&next), *y_t = take_tile(&next);
  float *z = take_tile(&next), *z_t = take_tile(&next);
  float* rows = take(&next, kTile);
  const auto clear = [](float* at, int64_t floats) {
    std::memset(at, 0, static_cast<size_t>(floats) * sizeof(float));
  };

  pack_lanes(in.A, p.state, 1, 1.0f, slice, p.state, states, a);
  if (along.A != nullptr)
    pack_lanes(along.A, p.state, 1, 1.0f, slice, p.state, states, a_t);
  else
    clear(a_t, per_slice);
  const auto pack_both = [&](const Coefficient& m, const Coefficient& m_t, float* to, float* to_t) {
    if (!m.groups) pack_constant(m, slice, p.state, states, to);
    if (m_t.data == nullptr)
      clear(to_t, m.groups ? kChunk * states : per_slice);
    else if (!m.groups)
      pack_constant(m_t, slice, p.state, states, to_t);
  };
  pack_both(in.B, along.B, b, b_t);
  pack_both(in.C, along.C, c, c_t);

  int64_t count;
  const Chunk* chunks = chunks_of(p, slice.batch, &count);
  for (int64_t i = 0; i < count; ++i) {
    const Chunk& chunk = chunks[i];
    const Window w{slice.batch, chunk.begin, chunk.length};
    pack_chunk(in, cut, slice, chunk, w, p.state, states, b, c);
    Inputs varying{};  // the tangents that are there
    if (along.B.data != nullptr) varying.B = along.B;
    if (along.C.data != nullptr) varying.C = along.C;
    pack_chunk(varying, cut, slice, chunk, w, p.state, states, b_t, c_t);
    const int64_t row = state_row(chunk, slice.batch);
    for (int64_t c0 = 0; c0 < slice.channels; c0 += kLanes) {
      const int64_t channel = slice.channel + c0, valid = min_of<int64_t>(kLanes, slice.channels - c0);
      float *h = carried + c0 * states, *g = carried_t + c0 * states;
      if (chunk.first) {
        const int64_t at = (row * p.dim + channel) * p.state;
        const auto start = [&](const float* from) {
          return from != nullptr && !chunk.zero_start ? from + at : nullptr;
        };
        load_state(start(in.initial_state), valid, p.state, states, h);
        load_state(start(along.initial_state), valid, p.state, states, g);
      }
      const auto tile = [&](const Sequence& s, float* to) {
        if (s.data != nullptr)
          load_tile(s, w, channel, valid, to, rows);
        else
          clear(to, w.length * kLanes);
        skip_padding(chunk, to, kLanes);
      };
      tile(in.u, u);
      tile(along.u, u_t);
      tile(in.delta, dt);
      tile(along.delta, dt_t);
      const bool gated = in.z.data != nullptr;
      if (gated) {
        tile(in.z, z);
        tile(along.z, z_t);
      }
      const Vec bias = lanes_of(in.delta_bias, channel, valid), skip = lanes_of(in.D, channel, valid);
      const Vec bias_t = lanes_of(along.delta_bias, channel, valid),
                skip_t = lanes_of(along.D, channel, valid);
      for (int64_t t = 0; t < w.length; ++t) {
        const int64_t o = t * kLanes;
        const Vec raw = load(dt + o) + bias;
        Vec slope(1.0f);
        store(dt + o, p.delta_softplus ? softplus(raw, slope) : raw);
        store(dt_t + o, slope * (load(dt_t + o) + bias_t));
      }
      skip_padding(chunk, dt, kLanes);
      skip_padding(chunk, dt_t, kLanes);
      for (int64_t t = 0; t < w.length; ++t) {
        const int64_t o = t * kLanes;
        const Vec ut = load(u + o), ut_t = load(u_t + o), step = load(dt + o);
        store(dtu + o, step * ut);
        store(dtu_t + o, fma(load(dt_t + o), ut, step * ut_t));
        store(y + o, skip * ut);
        store(y_t + o, fma(skip_t, ut, skip * ut_t));
      }
      TangentTile k{};
      k.length = w.length;
      k.stride = states;
      k.dt = dt;
      k.dt_t = dt_t;
      k.dtu = dtu;
      k.dtu_t = dtu_t;
      k.y = y;
      k.y_t = y_t;
      for (int64_t n = 0; n < states; n += kSmallBlock) {
        const int64_t lane = n * kLanes, at = c0 * states + lane;
        k.a = a + at;
        k.a_t = a_t + at;
        k.b = in.B.groups ? b + n : b + at;
        k.b_t = in.B.groups ? b_t + n : b_t + at;
        k.c = in.C.groups ? c + n : c + at;
        k.c_t = in.C.groups ? c_t + n : c_t + at;
        k.h = h + lane;
        k.g = g + lane;
        if (in.B.groups)
          in.C.groups ? scan_tangent<true, true>(k) : scan_tangent<true, false>(k);
        else
          in.C.groups ? scan_tangent<false, true>(k) : scan_tangent<false, false>(k);
      }
      if (gated)
        for (int64_t t = 0; t < w.length; ++t) {
          const int64_t o = t * kLanes;
          const Vec zt = load(z + o), s = sigmoid(zt), one(1.0f);
          const Vec through = load(y + o) * s * fma(zt, one - s, one);
          store(y_t + o, fma(load(y_t + o), s * zt, through * load(z_t + o)));
        }
      skip_padding(chunk, y_t, kLanes);
      store_tile(args.out, w, channel, valid, y_t, rows);
      if (chunk.last && chunk.keep_last)
        store_state(g, valid, p.state, args.last_state + (row * p.dim + channel) * p.state);
    }
  }
}

void tangent(const TangentArgs& args, float* workspace, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const Cut cut(args.problem, args.in);
  for (int64_t task = begin; task < end; ++task)
    tangent_slice(args, cut, Slice(cut, task), workspace);
}

int64_t slices(const Problem& p, const Inputs& in) {
  return Cut(p, in).slices();
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{slices,   forward_workspace, forward,           backward_workspace,
                                       backward, backward_reduce,   tangent_workspace, tangent};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::selective_scan
