// States and outputs for GPUs from sm_80 on: mma.sync, ldmatrix, cp.async. A block of four warps
// owns 64 channels of a head and goes through cells of 64 steps (32 above 128 states); a warp owns 16 of
// the channels, whose states stay in its registers, as sums of one product and as factors of the next.
#pragma once

#include "ssd/tiles_sm80.cuh"

namespace arcore::ssd {

// Above 128 states four more warps have the other half of the states, and the sums of what both read.
template <typename S>
struct ScanShape {
  static constexpr int kHalves = S::kStates > 128 ? 2 : 1, kStates = S::kStates / kHalves;
  static constexpr int kWarps = 4 * kHalves, kThreads = 32 * kWarps;
  static constexpr int kSums = S::kRows * 8;  // of a thread's part of 16 channels at all steps
};

// Shared memory: up to two stages of tiles and step sizes, the triangle of a cell, what the second half of
// the states gives to the outputs, a weight per step.
template <typename S, bool kOutputs>
struct ScanLayout {
  static constexpr int kRight = 0, kC = S::kTileN * S::kInputs, kLeft = kOutputs ? 2 * kC : kC;
  static constexpr int kNumbers = kLeft + S::kTileP * S::kLeft;
  static constexpr int kVectors = 3;  // dt, high, low
  static constexpr int kStageBytes = kNumbers * 2 + kVectors * S::kSteps * 4;
  static constexpr int kTriangleBytes = kOutputs ? S::kSplit * S::kTileS * 2 : 0;
  static constexpr int kSumBytes = kOutputs && ScanShape<S>::kHalves == 2 ? 128 * ScanShape<S>::kSums * 4 : 0;
  static constexpr int bytes(int stages) {
    return stages * kStageBytes + kTriangleBytes + kSumBytes + S::kSteps * 4;
  }
};

// A warp's states: 16 channels by all states, in the layout of the sums of a product.
template <typename S>
struct States {
  static constexpr int kTiles = ScanShape<S>::kStates / 8;
  float h[kTiles][4];

  // `at` is the first state of the warp's first channel; without channels all is 0. Offsets from the lane's
  // own place are constants, so that they take no registers. `pitch`: from one channel to the next.
  ARCORE_DEVICE void load(const float* at, int channels, int states, int pitch) {
    at += own_place(pitch);
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float* row = at + half * 8 * pitch;
      const int left = states_left(half, channels, states);
      ARCORE_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        ARCORE_UNROLL
        for (int e = 0; e < 2; ++e)
          h[t][2 * half + e] = 8 * t + e < left ? load_global(row + 8 * t + e) : 0.0f;
      }
    }
  }
  ARCORE_DEVICE void store(float* at, int channels, int states, int pitch) const {
    at += own_place(pitch);
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* row = at + half * 8 * pitch;
      const int left = states_left(half, channels, states);
      ARCORE_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        ARCORE_UNROLL
        for (int e = 0; e < 2; ++e)
          if (8 * t + e < left) store_global(row + 8 * t + e, h[t][2 * half + e]);
      }
    }
  }

 private:
  ARCORE_DEVICE static int64_t own_place(int pitch) {
    return static_cast<int64_t>(row_in_block(0)) * pitch + column_in_block(0, 0);
  }
  ARCORE_DEVICE static int states_left(int half, int channels, int states) {
    return hide(row_in_block(2 * half) < channels ? states - column_in_block(0, 0) : 0);
  }
};

// y += C state^T for all steps of the cell and the warp's channels. The sums of `h` lie as the right factor
// wants them.
template <typename S>
ARCORE_DEVICE void read_states(float (&y)[S::kRows][2][4], const States<S>& state, const bfloat16* C) {
  ARCORE_UNROLL
  for (int k = 0; k < ScanShape<S>::kStates / 16; ++k) {
    uint32_t b[S::kSplit][4];
    ARCORE_UNROLL
    for (int j = 0; j < 2; ++j) {
      ARCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float (&h)[4] = state.h[2 * k + half];
        const Split<S::kSplit> both = split<S::kSplit>(h[2 * j], h[2 * j + 1]);
        ARCORE_UNROLL
        for (int part = 0; part < S::kSplit; ++part)
          b[part][2 * j + half] = both.part[part];
      }
    }
    ARCORE_UNROLL
    for (int m = 0; m < S::kRows; ++m) {
      uint32_t a[S::kInputs][4];
      load_rows<S::kInputs>(a, C + m * 16 * S::kPitchN + k * 16, S::kPitchN, S::kTileN);
      multiply(y[m][0], a, b, 0);
      multiply(y[m][1], a, b, 2);
    }
  }
}

// The halves of a word that hold steps `step` and the next one, where they are in `bits`.
ARCORE_DEVICE uint32_t halves_of(uint64_t bits, int step) {
  const auto two = static_cast<uint32_t>(bits >> step);
  return ((two & 1u) != 0 ? 0xffffu : 0u) | ((two & 2u) != 0 ? 0xffff0000u : 0u);
}

// state <- decay state + sum over the steps of `run` of weight left right^T; without the first part where
// nothing was there before (0 times an infinite decay is NaN).
template <typename S>
ARCORE_DEVICE void advance_states(States<S>& state, bool before, float decay, const bfloat16* left,
                                  const bfloat16* right, const float* weights, const Run& run) {
  constexpr int kTogether = 4;  // tiles whose sums are formed at once
  const uint64_t bits = run.bits();
  const bool whole = run.begin == 0 && run.end == S::kSteps;
  const int step = 2 * (lane_index() % 4);
  uint32_t a[S::kRows][S::kSplit][4];
  ARCORE_UNROLL
  for (int k = 0; k < S::kRows; ++k) {
    uint32_t words[S::kLeft][4];
    load_rows_transposed<S::kLeft>(words, left + k * 16 * S::kPitchP, S::kPitchP, S::kTileP);
    ARCORE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int first = 16 * k + step + i / 2 * 8;
      uint32_t mine[S::kLeft];
      ARCORE_UNROLL
      for (int part = 0; part < S::kLeft; ++part)
        mine[part] = whole ? words[part][i] : words[part][i] & halves_of(bits, first);
      float x, y;
      join(mine, x, y);
      const Split<S::kSplit> both = split<S::kSplit>(weights[first] * x, weights[first + 1] * y);
      ARCORE_UNROLL
      for (int part = 0; part < S::kSplit; ++part)
        a[k][part][i] = both.part[part];
    }
  }
  ARCORE_UNROLL
  for (int t = 0; t < States<S>::kTiles; t += kTogether) {
    float sums[kTogether][4] = {};
    ARCORE_UNROLL
    for (int k = 0; k < S::kRows; ++k) {
      ARCORE_UNROLL
      for (int pair = 0; pair < kTogether; pair += 2) {
        uint32_t b[S::kInputs][4];
        load_columns<S::kInputs>(b, right + k * 16 * S::kPitchN + (t + pair) * 8, S::kPitchN, S::kTileN);
        if (!whole) {
          // Other sequences may hold NaN, which times 0 is NaN.
          ARCORE_UNROLL
          for (int part = 0; part < S::kInputs; ++part) {
            ARCORE_UNROLL
            for (int i = 0; i < 4; ++i)
              b[part][i] &= halves_of(bits, 16 * k + step + i % 2 * 8);
          }
        }
        multiply(sums[pair], a[k], b, 0);
        multiply(sums[pair + 1], a[k], b, 2);
      }
    }
    ARCORE_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      ARCORE_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& h = state.h[t + i][e];
        h = before ? fused_multiply_add(decay, h, sums[i][e]) : sums[i][e];
      }
    }
  }
}

// (C B^T) times the decay from step s to step t and dt of step s, for all steps that see each other.
template <typename S>
ARCORE_DEVICE void make_triangle(bfloat16* triangle, const bfloat16* C, const bfloat16* B, const float* dt,
                                 const float* high, const float* low, uint64_t starts, int warp) {
  constexpr int kWarps = ScanShape<S>::kWarps;
  using Blocks = Triangle<S::kSteps, kWarps>;
  float c[Blocks::kMine][2][4] = {};
  multiply_triangle<S::kInputs, S::kInputs, S::kSteps, S::kStates, kWarps>(c, C, B, warp);
  ARCORE_UNROLL
  for (int m = 0; m < Blocks::kMine; ++m) {
    int number, i, j;
    if (!Blocks::block(warp, m, number, i, j)) continue;
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int t = 16 * i + row_in_block(2 * half), first = first_of(starts, t);
      ARCORE_UNROLL
      for (int n = 0; n < 2; ++n) {
        ARCORE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int s = 16 * j + column_in_block(n, e);
          float& value = c[m][n][2 * half + e];
          value = first <= s && s <= t ? value * (decay_between(high, low, s, t) * dt[s]) : 0.0f;
        }
      }
    }
    store_block<S::kSplit, S::kSteps>(triangle, i, j, c[m]);
  }
}

// out = (y + D x) silu(z) of the warp's channels, at the steps of `run`.
template <typename S>
ARCORE_DEVICE void store_outputs(const Args& p, const float (&y)[S::kRows][2][4], const bfloat16* x,
                                 int64_t batch, int64_t head, int64_t begin, int64_t channel, int channels,
                                 uint64_t skipped, const Run& run) {
  const bool paired = rows_paired(p.out);
  const int lane = hide(lane_index());
  const int64_t to = batch * p.out.batch + begin * p.out.time + head * p.out.head + channel * p.out.last,
                of_z = batch * p.z.batch + begin * p.z.time + head * p.z.head + channel * p.z.last;
  const int left = p.length - begin < S::kSteps ? static_cast<int>(p.length - begin) : S::kSteps;
  ARCORE_UNROLL
  for (int j = 0; j < 2; ++j) {
    const int c = 8 * j + 2 * (lane % 4);
    if (c >= channels) continue;
    const bool both = c + 1 < channels;
    float skip[2] = {};
    if (p.D != nullptr) {
      skip[0] = p.D[head * p.dim + channel + c];
      if (both) skip[1] = p.D[head * p.dim + channel + c + 1];
    }
    ARCORE_UNROLL
    for (int m = 0; m < S::kRows; ++m) {
      ARCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + lane / 4;
        if (row >= left || !run.holds(row)) continue;
        const bool off = (skipped >> row & 1) != 0;
        float value[2] = {y[m][j][2 * half], y[m][j][2 * half + 1]};
        if (p.D != nullptr) {
          float input[2];
          load_two<S::kLeft>(x, row * S::kPitchP + c, S::kTileP, input[0], input[1]);
          value[0] = fused_multiply_add(skip[0], input[0], value[0]);
          value[1] = fused_multiply_add(skip[1], input[1], value[1]);
        }
        if (p.z.data != nullptr) {
          const int64_t at = of_z + row * p.z.time + c * p.z.last;
          const float first = load_any(p.z.data, p.z.dtype, at);
          const float second = both ? load_any(p.z.data, p.z.dtype, at + p.z.last) : 0.0f;
          value[0] *= first * sigmoid(first);
          value[1] *= second * sigmoid(second);
        }
        store_two(p.out, to + row * p.out.time + c * p.out.last, off ? 0.0f : value[0], off ? 0.0f : value[1],
                  both, paired);
      }
    }
  }
}

template <typename S, bool kOutputs>
struct ScanKernel {
  ScanCuda call;
  int stages;
};

template <typename S, bool kOutputs>
ARCORE_LAUNCH_BOUNDS(ScanShape<S>::kThreads, (ScanShape<S>::kHalves == 2 ? 1 : 2))
ARCORE_KERNEL scan_cells(ARCORE_KERNEL_ARGS ScanKernel<S, kOutputs> kernel) {
  using Layout = ScanLayout<S, kOutputs>;
  constexpr int kSteps = S::kSteps, kThreads = ScanShape<S>::kThreads, kHalves = ScanShape<S>::kHalves;
  const ScanCuda& a = kernel.call;
  const Args& p = a.in;
  const CudaLayout& layout = a.layout;
  // 32 bits: registers are short, and a grid has no more blocks.
  const auto narrow = [](int64_t x) { return static_cast<int>(x); };
  const int block = narrow(block_x()), tiles_of_head = narrow(layout.tiles), heads = narrow(p.heads),
            segments = narrow(a.segments), cells = narrow(a.end - a.begin);
  const int tile = block % tiles_of_head, head = block / tiles_of_head % heads,
            place = block / tiles_of_head / heads, segment = place % segments, batch = place / segments;
  const int group = head / (heads / narrow(p.groups)), first = segment * narrow(a.segment_cells),
            next = first + narrow(a.segment_cells), last = next < cells ? next : cells;
  const auto cell_at = [&](int i) {
    return narrow(a.backwards ? a.end - 1 : a.begin) + (a.backwards ? -i : i);
  };

  // The warp's channels and states.
  const int warp = warp_index(), upper = warp / 4, first_state = upper * ScanShape<S>::kStates;
  const int column = tile * kTileChannels, channel = column + 16 * (warp % 4);
  const int columns = narrow(p.dim) - column < kTileChannels ? narrow(p.dim) - column : kTileChannels;
  const int channels = columns - 16 * (warp % 4), states = narrow(p.states);
  const bool mine = channels > 0;
  const auto state_at = [&](int64_t row) {
    return ((row * p.heads + head) * p.dim + channel) * p.states + first_state;
  };
  const auto kept_at = [&](int cell) {
    return state_at(static_cast<int64_t>(batch) * cells + cell - a.begin);
  };

  unsigned char* memory = shared_memory();
  const auto tiles_of = [&](int stage) {
    return reinterpret_cast<bfloat16*>(memory + stage * Layout::kStageBytes);
  };
  bfloat16* triangle = tiles_of(kernel.stages);
  float* sums =
      reinterpret_cast<float*>(memory + kernel.stages * Layout::kStageBytes + Layout::kTriangleBytes);
  float* weights = sums + Layout::kSumBytes / 4;
  const bool left_aligned = rows_aligned(a.left), right_aligned = rows_aligned(a.right);
  const bool C_aligned = kOutputs && rows_aligned(p.C);
  const auto load = [&](int i, int stage) {
    const int cell = cell_at(i);
    const int64_t begin = static_cast<int64_t>(cell) * kSteps;
    const int batch_row = hide(batch);
    const uint64_t skipped = layout.cell_marks[batch_row * layout.cells + cell].skipped;
    bfloat16* to = tiles_of(stage);
    load_tile<S::kInputs, kSteps, S::kStates, kThreads>(to + Layout::kRight, a.right, batch_row, group, begin,
                                                        0, states, skipped, right_aligned);
    if constexpr (kOutputs)
      load_tile<S::kInputs, kSteps, S::kStates, kThreads>(to + Layout::kC, p.C, batch_row, group, begin, 0,
                                                          states, skipped, C_aligned);
    load_tile<S::kLeft, kSteps, kTileChannels, kThreads>(to + Layout::kLeft, a.left, batch_row, head, begin,
                                                         column, columns, skipped, left_aligned);
    load_vectors<kSteps, 3, kThreads>(reinterpret_cast<float*>(to + Layout::kNumbers), layout.dt,
                                      layout.sizes,
                                      (batch_row * p.heads + head) * layout.cells * kSteps + begin);
    copy_async_commit();
  };

  States<S> state;
  // The state that the next run starts from, or null: zeros; and whether it has still to be loaded.
  const float* from = nullptr;
  bool enters = true;
  if (a.use == StateUse::kEnter) {
    if (first > 0 || a.enter != nullptr) from = a.states + kept_at(cell_at(first));
  } else if (a.use != StateUse::kOwn && a.enter != nullptr) {
    from = a.enter + state_at(batch);
  }
  // Whether there was something before the next step.
  bool before = from != nullptr;

  load(first, 0);
  for (int i = first; i < last; ++i) {
    const int stage = kernel.stages == 2 ? (i - first) % 2 : 0;
    copy_async_wait<0>();
    sync_threads();
    // Everyone is through with the cell before, which was in the other stage.
    if (kernel.stages == 2 && i + 1 < last) load(i + 1, 1 - stage);
    const int cell = cell_at(i), batch_row = hide(batch);
    const int64_t begin = static_cast<int64_t>(cell) * kSteps;
    const CellMarks marks = layout.cell_marks[batch_row * layout.cells + cell];
    const bfloat16* tiles = tiles_of(stage);
    const bfloat16 *right = tiles + Layout::kRight, *left = tiles + Layout::kLeft + 16 * (warp % 4);
    const float* dt = reinterpret_cast<const float*>(tiles + Layout::kNumbers);
    const float *high = dt + kSteps, *low = high + kSteps;

    if constexpr (kOutputs)
      make_triangle<S>(triangle, tiles + Layout::kC, right, dt, high, low, marks.starts, warp);

    // Packed rows go through the sequences of the cell one after the other. With sequence ids they start from
    // zeros, and one pass does: the state before reaches the first of them, and the last one leaves a state.
    const int runs = layout.packed ? count_bits64(marks.starts) + 1 : 1;
    float decay = 0.0f;
    bool passes = false;
    // What a cell adds for the next one is what its last run does.
    ARCORE_NO_UNROLL
    for (int r = a.use == StateUse::kOwn ? runs - 1 : 0; r < runs; ++r) {
      const int number = a.backwards ? runs - 1 - r : r;
      Run run, reads;
      if (layout.packed) {
        run = reads = run_of(marks.starts, number, kSteps);
      } else {
        reads = {0, first_start(marks.starts, kSteps)};
        run = a.backwards ? reads : Run{first_of(marks.starts, kSteps - 1), kSteps};
        passes = marks.starts == 0;
      }
      const bool empty = run.begin == run.end;
      int64_t sequence = 0;
      if (layout.packed && !empty) {
        sequence = layout.marks[batch * p.length + begin + run.begin] >> 8;
        const bool fresh = a.backwards ? (marks.ends & run.bits()) != 0 : number > 0;
        passes = !fresh;
        if (fresh) {
          enters = true;
          before = a.run_enter != nullptr;
          from = before ? a.run_enter + state_at(sequence) : nullptr;
        }
      }
      if (enters && mine) state.load(from, before ? channels : 0, states - first_state, states);
      enters = false;
      // Where a sequence ends in the cell, nobody asks for what was before it on the way back.
      if (a.use == StateUse::kKeep && r == 0 && mine)
        state.store(a.states + kept_at(cell), channels, states - first_state, states);
      if (r > 0) sync_threads();  // the weights of the pass before are no longer read
      for (int s = thread_index(); s < kSteps; s += kThreads) {
        float weight = 0.0f;
        if (run.holds(s)) {
          // A step of the gradient's way back decays what it adds too.
          weight = a.backwards ? exp2_approx(high[s]) : decay_between(high, low, s, run.end - 1) * dt[s];
        }
        weights[s] = weight;
      }
      float y[S::kRows][2][4] = {};
      const bool reading = kOutputs && mine && before && reads.begin < reads.end;
      float* lane_sums = sums + thread_index() % 128;
      if constexpr (kOutputs) {
        if (reading) read_states<S>(y, state, tiles + Layout::kC + first_state);
        if (reading && upper == 1) {
          ARCORE_UNROLL
          for (int k = 0; k < ScanShape<S>::kSums; ++k)
            lane_sums[128 * k] = y[k / 8][k / 4 % 2][k % 4];
        }
      }
      sync_threads();
      if constexpr (kOutputs) {
        if (mine && upper == 0 && (!empty || !layout.packed)) {
          // Steps of another sequence do not read the state, whatever is in it.
          ARCORE_UNROLL
          for (int m = 0; m < S::kRows; ++m) {
            ARCORE_UNROLL
            for (int half = 0; half < 2; ++half) {
              const int t = 16 * m + row_in_block(2 * half);
              const bool read = reading && reads.holds(t);
              const float factor = read ? exp2_approx(high[t]) : 0.0f;
              ARCORE_UNROLL
              for (int j = 0; j < 2; ++j) {
                ARCORE_UNROLL
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                  float value = y[m][j][e];
                  if constexpr (kHalves == 2) value += reading ? lane_sums[128 * (8 * m + 4 * j + e)] : 0.0f;
                  y[m][j][e] = read ? factor * value : 0.0f;
                }
              }
            }
          }
          multiply_by_triangle<S::kSplit, S::kLeft, kSteps>(y, triangle, left, S::kPitchP, marks.starts);
          store_outputs<S>(p, y, left, batch_row, head, begin, channel, channels, marks.skipped,
                           layout.packed ? run : Run{0, kSteps});
        }
      }
      // Ids that change between two cells leave no step that what comes from behind could pass: zeros remain.
      if (mine && (!empty || !layout.packed)) {
        decay = exp2_approx(high[empty ? 0 : run.end - 1]);
        advance_states<S>(state, before && (layout.packed || passes), decay, left, right + first_state,
                          weights, run);
        before = true;
        if (layout.packed && a.run_leave != nullptr && a.use != StateUse::kOwn) {
          const bool leaves = a.backwards ? number > 0 : (marks.ends & run.bits()) != 0;
          if (leaves) state.store(a.run_leave + state_at(sequence), channels, states - first_state, states);
        }
      }
    }
    if (a.use == StateUse::kOwn && mine) {
      // Of an empty run too: the next cell does not ask for the state.
      state.store(a.states + kept_at(cell), channels, states - first_state, states);
      if (thread_index() == 0 && tile == 0)
        store_global(a.passes + (static_cast<int64_t>(batch) * cells + cell - a.begin) * p.heads + head,
                     passes ? decay : -1.0f);
    }
    if (kernel.stages == 1 && i + 1 < last) {
      sync_threads();
      load(i + 1, 0);
    }
  }
  if (a.leave != nullptr && last == cells && mine)
    state.store(a.leave + state_at(batch), channels, states - first_state, states);
}

template <typename S, bool kOutputs>
int launch_scan(const ScanCuda& call, void* stream) {
  using Layout = ScanLayout<S, kOutputs>;
  const int64_t blocks = call.in.batch * call.segments * call.in.heads * call.layout.tiles;
  // Inputs that are not bfloat16 pass through registers, and nothing is copied ahead. Two stages, but where
  // one lets twice as many blocks into a multiprocessor and there are so many.
  constexpr int64_t kReserved = 1024;
  const bool twice = 2 * (Layout::bytes(2) + kReserved) <= call.layout.shared_of_multiprocessor ||
                     blocks <= call.layout.multiprocessors;
  const int stages = S::kInputs == 1 && S::kLeft == 1 && call.segment_cells > 1 && twice ? 2 : 1;
  return launch(scan_cells<S, kOutputs>, {blocks, 1, 1, ScanShape<S>::kThreads, Layout::bytes(stages)},
                stream, ScanKernel<S, kOutputs>{call, stages});
}
template <int kInputs, int kLeft, bool kOutputs>
int launch_scan_any_states(const ScanCuda& call, void* stream) {
  const int64_t states = call.in.states;
  if (states <= 64) return launch_scan<Shape<64, kInputs, kLeft>, kOutputs>(call, stream);
  if (states <= 128) return launch_scan<Shape<128, kInputs, kLeft>, kOutputs>(call, stream);
  return launch_scan<Shape<256, kInputs, kLeft>, kOutputs>(call, stream);
}

// A file each, for the time that nvcc takes.
int launch_outputs_of_one_part_sm80(const ScanCuda&, void* stream);
int launch_outputs_of_two_parts_sm80(const ScanCuda&, void* stream);
int launch_outputs_of_three_parts_sm80(const ScanCuda&, void* stream);
int launch_states_sm80(const ScanCuda&, void* stream);

}  // namespace arcore::ssd
