// Gradients for GPUs from sm_80 on. The states before all cells and the gradients of those after them are
// there, so that a block of eight warps takes one cell and some heads of a group, one after the other. Sums
// over heads stay in registers, those over blocks are added in their order by a second kernel. No atomics.
#pragma once

#include "ssd/tiles_sm80.cuh"

namespace arcore::ssd {

constexpr int kGradientThreads = 256, kGradientWarps = kGradientThreads / 32;

// Shared memory: tiles of B, C, x and the gradient of y, a triangle, a tile of states; then floats.
template <typename S>
struct GradientLayout {
  using Blocks = Triangle<S::kSteps, kGradientWarps>;
  // Numbers.
  static constexpr int kPitchW = S::kStates + 8, kTileW = kTileChannels * kPitchW;
  static constexpr int kB = 0, kC = kB + S::kTileN * S::kInputs, kX = kC + S::kTileN * S::kInputs;
  static constexpr int kG = kX + S::kTileP * S::kInputs, kM = kG + S::kTileP * S::kLeft;
  static constexpr int kW = kM + S::kTileS * S::kSplit, kNumbers = kW + kTileW * S::kSplit;
  // Warps that share 16 steps of the gradient of x, and 8-channel tiles that each has.
  static constexpr int kShares = kGradientWarps / S::kRows, kChannelTiles = 8 / kShares;
  // Floats: step sizes; sums over a block's columns, its rows, the diagonal's elements; parts per step.
  static constexpr int kPitchD = 17;
  static constexpr int kSizes = 0, kColumns = 4 * S::kSteps, kRowSums = kColumns + Blocks::kBlocks * 16;
  static constexpr int kDiagonal = kRowSums + Blocks::kBlocks * 16;
  static constexpr int kWritten = kDiagonal + S::kRows * 16 * kPitchD;
  static constexpr int kRead = kWritten + kShares * S::kSteps;
  static constexpr int kKept = kRead + kGradientWarps * S::kSteps, kSkip = kKept + S::kSteps;
  static constexpr int kScratch = kSkip + S::kRows * kTileChannels;
  static constexpr int kMarks = kScratch + 2 * kGradientWarps;  // a CellMarks: registers are short
  static constexpr int kFloats = kMarks + 6;
  static constexpr int kBytes = kNumbers * 2 + kFloats * 4;
  static_assert(kBytes <= 163 * 1024, "more than sm_80 has");
};

// A tile of 64 channels by all states into shared memory, in parts; without `from` zeros. With kProduct the
// sum of its products with what stood there before, a thread's share of it.
template <typename S, bool kProduct>
ARCORE_DEVICE float stage_states(bfloat16* tile, const float* from, int channels, int states) {
  using Layout = GradientLayout<S>;
  constexpr int kQuadsOfRow = S::kStates / 4, kQuads = kTileChannels * kQuadsOfRow / kGradientThreads;
  constexpr int kTogether = kQuads < 8 ? kQuads : 8;  // loads under way
  const bool whole = (states & 3) == 0 && (reinterpret_cast<uintptr_t>(from) & 15) == 0;
  float sum = 0.0f;
  ARCORE_NO_UNROLL
  for (int first = 0; first < kQuads; first += kTogether) {
    float quads[kTogether][4];
    const int thread = hide(thread_index());
    ARCORE_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      const int at = thread + (first + i) * kGradientThreads;
      const int row = at / kQuadsOfRow, n = at % kQuadsOfRow * 4;
      const int left = from == nullptr || row >= channels ? 0 : states - n;
      const float* place = from + row * states + n;
      if (whole && left > 0) {
        const Vector16 raw = load_readonly(reinterpret_cast<const Vector16*>(place));
        ARCORE_UNROLL
        for (int k = 0; k < 4; ++k)
          quads[i][k] = bits_float(raw.word[k]);
      } else {
        ARCORE_UNROLL
        for (int k = 0; k < 4; ++k)
          quads[i][k] = k < left ? load_readonly(place + k) : 0.0f;
      }
    }
    ARCORE_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      const int at = thread + (first + i) * kGradientThreads;
      bfloat16* place = tile + at / kQuadsOfRow * Layout::kPitchW + at % kQuadsOfRow * 4;
      if constexpr (kProduct) {
        ARCORE_UNROLL
        for (int k = 0; k < 4; k += 2) {
          float a, b;
          load_two<S::kSplit>(place, k, Layout::kTileW, a, b);
          sum = fused_multiply_add(quads[i][k], a, sum);
          sum = fused_multiply_add(quads[i][k + 1], b, sum);
        }
      }
      const Split<S::kSplit> low = split<S::kSplit>(quads[i][0], quads[i][1]),
                             high = split<S::kSplit>(quads[i][2], quads[i][3]);
      ARCORE_UNROLL
      for (int part = 0; part < S::kSplit; ++part)
        store_shared(reinterpret_cast<Vector8*>(place + part * Layout::kTileW),
                     Vector8{{low.part[part], high.part[part]}});
    }
  }
  return sum;
}

// A warp's states of all steps: tiles of 8 states from `first` on. At 64 states two warps share what one
// ldmatrix loads.
template <typename S>
struct OwnStates {
  static constexpr int kTiles = S::kStates / (8 * kGradientWarps);
  static constexpr int kLoads = kTiles == 1 ? 1 : kTiles / 2;
  int load_at, half;  // the first column that is loaded; which tile of the first load is the first

  ARCORE_DEVICE explicit OwnStates(int warp)
      : load_at(kTiles == 1 ? warp / 2 * 16 : warp * kTiles * 8), half(kTiles == 1 ? warp % 2 * 2 : 0) {}
  ARCORE_DEVICE int first() const { return load_at + 4 * half; }

  // c[m] += rows of `left` times columns of `right`, 16 kDepth of them.
  template <int kDepth, int kA, int kB, int kCount>
  ARCORE_DEVICE void multiply_rows(float (&c)[kCount][kTiles][4], const bfloat16* left, int left_pitch,
                                   int left_part, const bfloat16* right, int right_pitch,
                                   int right_part) const {
    ARCORE_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      uint32_t b[kLoads][kB][4];
      ARCORE_UNROLL
      for (int l = 0; l < kLoads; ++l)
        load_columns<kB>(b[l], right + k * 16 * right_pitch + load_at + 16 * l, right_pitch, right_part);
      ARCORE_UNROLL
      for (int m = 0; m < kCount; ++m) {
        uint32_t a[kA][4];
        load_rows<kA>(a, left + m * 16 * left_pitch + k * 16, left_pitch, left_part);
        multiply_all(c[m], a, b);
      }
    }
  }
  // c += triangle right, or triangle^T right, with `right` of steps by states.
  template <bool kTransposed>
  ARCORE_DEVICE void multiply_steps(float (&c)[S::kRows][kTiles][4], const bfloat16* triangle,
                                    const bfloat16* right, uint64_t starts) const {
    bool found = false;
    ARCORE_UNROLL
    for (int k = 0; k < S::kRows; ++k) {
      uint32_t b[kLoads][S::kInputs][4];
      ARCORE_UNROLL
      for (int l = 0; l < kLoads; ++l) {
        load_columns<S::kInputs>(b[l], right + k * 16 * S::kPitchN + load_at + 16 * l, S::kPitchN, S::kTileN);
        ARCORE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const uint32_t finite = finite_bits(b[l][0][i]);
          found |= finite != 0xffffffffu;
          b[l][0][i] &= finite;
        }
      }
      ARCORE_UNROLL
      for (int m = kTransposed ? 0 : k; m < (kTransposed ? k + 1 : S::kRows); ++m) {
        uint32_t a[S::kSplit][4];
        if constexpr (kTransposed)
          load_rows_transposed<S::kSplit>(a, triangle + k * 16 * S::kPitchS + m * 16, S::kPitchS, S::kTileS);
        else
          load_rows<S::kSplit>(a, triangle + m * 16 * S::kPitchS + k * 16, S::kPitchS, S::kTileS);
        multiply_all(c[m], a, b);
      }
    }
    if (any_lane(found))
      add_not_finite<S::kSplit, S::kSteps, kTransposed>(c, triangle, 0, right + first(), S::kPitchN, starts);
  }

 private:
  template <int kA, int kB>
  ARCORE_DEVICE void multiply_all(float (&c)[kTiles][4], const uint32_t (&a)[kA][4],
                                  const uint32_t (&b)[kLoads][kB][4]) const {
    if constexpr (kTiles == 1) {
      if (half == 0)
        multiply(c[0], a, b[0], 0);
      else
        multiply(c[0], a, b[0], 2);
    } else {
      ARCORE_UNROLL
      for (int t = 0; t < kTiles; ++t)
        multiply(c[t], a, b[t / 2], t % 2 * 2);
    }
  }
};

// The sum over the four lanes that share a row, and over the eight that share a column.
ARCORE_DEVICE float sum_of_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}
ARCORE_DEVICE float sum_of_column(float value) {
  value += shuffle_xor(value, 4);
  value += shuffle_xor(value, 8);
  return value + shuffle_xor(value, 16);
}

// What a block sees of one cell and head.
struct CellOfHead {
  const float *dt, *high, *low, *slope;
  const CellMarks* marks;
};

// From the gradients of C B^T (c, and `scores` are C B^T itself): M, the gradients of C B^T of all heads, and
// the sums of dM M over the blocks' columns and rows.
template <typename S>
ARCORE_DEVICE void through_triangle(const float (&c)[Triangle<S::kSteps, kGradientWarps>::kMine][2][4],
                                    const float (&scores)[Triangle<S::kSteps, kGradientWarps>::kMine][2][4],
                                    float (&grad_scores)[Triangle<S::kSteps, kGradientWarps>::kMine][2][4],
                                    const CellOfHead& cell, bfloat16* triangle, float* floats, int warp) {
  using Layout = GradientLayout<S>;
  using Blocks = Triangle<S::kSteps, kGradientWarps>;
  const int lane = lane_index();
  const uint64_t starts = cell.marks->starts;
  ARCORE_UNROLL
  for (int m = 0; m < Blocks::kMine; ++m) {
    int number, i, j;
    if (!Blocks::block(warp, m, number, i, j)) continue;
    float weights[2][4], of_columns[2][2] = {};
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row_in_block(2 * half), t = 16 * i + row, first = first_of(starts, t);
      float of_row = 0.0f;
      ARCORE_UNROLL
      for (int n = 0; n < 2; ++n) {
        ARCORE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int column = column_in_block(n, e), s = 16 * j + column, at = 2 * half + e;
          const bool seen = first <= s && s <= t;
          const float decay = seen ? decay_between(cell.high, cell.low, s, t) : 0.0f;
          const float weight = seen ? scores[m][n][at] * decay : 0.0f;
          const float through = seen ? c[m][n][at] * weight : 0.0f, of_step = through * cell.dt[s];
          weights[n][at] = weight;
          if (seen) grad_scores[m][n][at] += c[m][n][at] * (decay * cell.dt[s]);
          of_columns[n][e] += through;
          of_row += of_step;
          if (i == j) floats[Layout::kDiagonal + (16 * i + row) * Layout::kPitchD + column] += of_step;
        }
      }
      of_row = sum_of_row(of_row);
      if (lane % 4 == 0) floats[Layout::kRowSums + 16 * number + row] += of_row;
    }
    ARCORE_UNROLL
    for (int n = 0; n < 2; ++n) {
      ARCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float sum = sum_of_column(of_columns[n][e]);
        if (lane < 4) floats[Layout::kColumns + 16 * number + column_in_block(n, e)] += sum;
      }
    }
    store_block<S::kSplit, S::kSteps>(triangle, i, j, weights);
  }
}

// What dt A of step j owes to the pairs of steps s < j <= t, from the sums over blocks: a share of it, one of
// kShares that neighbouring threads have. Sums of such parts, never differences.
template <typename S, int kShares>
ARCORE_DEVICE float pairs_across(const float* floats, const float* dt, int j, int share) {
  using Layout = GradientLayout<S>;
  const int own = j / 16, place = j % 16;
  float sum = 0.0f;
  for (int i = own; i < S::kRows; ++i) {
    for (int k = 0; k <= own; ++k) {
      const int number = i * (i + 1) / 2 + k;
      const float *rows = floats + Layout::kRowSums + 16 * number,
                  *columns = floats + Layout::kColumns + 16 * number;
      if (i > own && k < own) {
        for (int t = share; t < 16; t += kShares)
          sum += rows[t];
      } else if (i > own) {
        for (int s = share; s < place; s += kShares)
          sum = fused_multiply_add(columns[s], dt[16 * k + s], sum);
      } else if (k < own) {
        for (int t = place + share; t < 16; t += kShares)
          sum += rows[t];
      } else {
        for (int t = place + share; t < 16; t += kShares)
          for (int s = 0; s < place; ++s)
            sum += floats[Layout::kDiagonal + (16 * i + t) * Layout::kPitchD + s];
      }
    }
  }
  return sum;
}

template <typename S>
ARCORE_LAUNCH_BOUNDS(kGradientThreads, 1)
ARCORE_KERNEL cell_gradients(ARCORE_KERNEL_ARGS GradientCuda a) {
  using Layout = GradientLayout<S>;
  using Blocks = typename Layout::Blocks;
  constexpr int kSteps = S::kSteps, kRows = S::kRows;
  const Args& p = a.in;
  const CudaLayout& layout = a.layout;
  const int warp = warp_index(), lane = lane_index(), thread = thread_index();
  // 32 bits: registers are short, and a grid has no more blocks.
  const auto narrow = [](int64_t x) { return static_cast<int>(x); };
  const int block = narrow(block_x()), slices = narrow(a.slices), groups = narrow(p.groups),
            heads = narrow(p.heads), cells = narrow(a.end - a.begin);
  const int slice = block % slices, group = block / slices % groups, place = block / slices / groups;
  const int cell = narrow(a.begin) + place % cells, batch = place / cells;
  const int of_group = heads / groups, first_head = group * of_group + slice * narrow(a.heads);
  const int next_group = (group + 1) * of_group, next_slice = first_head + narrow(a.heads);
  const int last_head = next_slice < next_group ? next_slice : next_group;
  const int64_t begin = static_cast<int64_t>(cell) * kSteps;
  const int states = static_cast<int>(p.states);
  bfloat16* numbers = reinterpret_cast<bfloat16*>(shared_memory());
  const bfloat16 *B = numbers + Layout::kB, *C = numbers + Layout::kC, *x = numbers + Layout::kX,
                 *g = numbers + Layout::kG;
  bfloat16 *triangle = numbers + Layout::kM, *W = numbers + Layout::kW;
  float* floats = reinterpret_cast<float*>(numbers + Layout::kNumbers);
  static_assert((Layout::kNumbers * 2 + Layout::kMarks * 4) % 8 == 0);
  auto* own_marks = reinterpret_cast<CellMarks*>(floats + Layout::kMarks);
  if (thread == 0) *own_marks = layout.cell_marks[static_cast<int64_t>(batch) * layout.cells + cell];
  sync_threads();
  const CellMarks& marks = *own_marks;
  const CellOfHead sizes{floats, floats + kSteps, floats + 2 * kSteps, floats + 3 * kSteps, &marks};
  const bool x_aligned = rows_aligned(p.x), g_aligned = rows_aligned(a.grad_y);
  const bool paired = rows_paired(a.grad_x);

  load_tile<S::kInputs, kSteps, S::kStates, kGradientThreads>(numbers + Layout::kB, p.B, batch, group, begin,
                                                              0, states, marks.skipped, rows_aligned(p.B));
  load_tile<S::kInputs, kSteps, S::kStates, kGradientThreads>(numbers + Layout::kC, p.C, batch, group, begin,
                                                              0, states, marks.skipped, rows_aligned(p.C));
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
  float scores[Blocks::kMine][2][4] = {}, grad_scores[Blocks::kMine][2][4] = {};
  multiply_triangle<S::kInputs, S::kInputs, kSteps, S::kStates, kGradientWarps>(scores, C, B, warp);

  const OwnStates<S> own(warp);
  float grad_B[kRows][OwnStates<S>::kTiles][4] = {}, grad_C[kRows][OwnStates<S>::kTiles][4] = {};
  // This warp's part of the gradient of x: 16 steps by some channels.
  const int row_tile = warp % kRows, share = warp / kRows, own_channel = share * Layout::kChannelTiles * 8;

  ARCORE_NO_UNROLL
  for (int head = first_head; head < last_head; ++head) {
    const int batch_row = hide(batch);
    ARCORE_NO_UNROLL
    for (int tile = 0; tile < narrow(layout.tiles); ++tile) {
      const int64_t column = static_cast<int64_t>(tile) * kTileChannels;
      const int columns = static_cast<int>(p.dim - column < kTileChannels ? p.dim - column : kTileChannels);
      sync_threads();  // nobody reads what follows any more
      load_tile<S::kInputs, kSteps, kTileChannels, kGradientThreads>(
          numbers + Layout::kX, p.x, batch_row, head, begin, column, columns, marks.skipped, x_aligned);
      load_tile<S::kLeft, kSteps, kTileChannels, kGradientThreads>(
          numbers + Layout::kG, a.grad_y, batch_row, head, begin, column, columns, marks.skipped, g_aligned);
      if (tile == 0) {
        load_vectors<kSteps, 4, kGradientThreads>(
            floats, layout.dt, layout.sizes, (batch_row * p.heads + head) * layout.cells * kSteps + begin);
        for (int i = Layout::kColumns + thread; i < Layout::kSkip; i += kGradientThreads)
          store_shared(floats + i, 0.0f);
      }
      copy_async_commit();
      const auto row_of_state = [&](int64_t row) {
        return ((row * p.heads + head) * p.dim + column) * p.states;
      };
      const int64_t kept = row_of_state(static_cast<int64_t>(batch_row) * cells + cell - a.begin);

      const int runs = layout.packed ? count_bits64(marks.starts) + 1 : 1;
      ARCORE_NO_UNROLL
      for (int r = 0; r < runs; ++r) {
        // The steps that read the state before the cell, and those that the state after it holds.
        Run reads, writes;
        const float *before = a.states + kept, *after = a.grad_states + kept;
        bool passes = marks.starts == 0;
        if (layout.packed) {
          reads = writes = run_of(marks.starts, r, kSteps);
          passes = true;
          if (reads.begin < reads.end) {
            const int64_t row = row_of_state(layout.marks[batch_row * p.length + begin + reads.begin] >> 8);
            if (r > 0) before = p.initial_state == nullptr ? nullptr : p.initial_state + row;
            if ((marks.ends & reads.bits()) != 0)
              after = a.grad_last_state == nullptr ? nullptr : a.grad_last_state + row;
          }
        } else {
          reads = {0, first_start(marks.starts, kSteps)};
          writes = {first_of(marks.starts, kSteps - 1), kSteps};
        }
        if (r > 0) sync_threads();  // W is no longer read
        stage_states<S, false>(W, after, columns, states);
        if (before != nullptr)
          for (int i = 32 * thread; i < columns * states; i += 32 * kGradientThreads)
            prefetch(before + i);
        if (r == 0) copy_async_wait<0>();
        sync_threads();
        if (r == 0) {
          float c[Blocks::kMine][2][4] = {};
          multiply_triangle<S::kLeft, S::kInputs, kSteps, kTileChannels, kGradientWarps>(c, g, x, warp);
          through_triangle<S>(c, scores, grad_scores, sizes, triangle, floats, warp);
        }
        if (writes.begin < writes.end) {
          // To B: x G, states of this warp, half of the steps at a time: registers are short.
          ARCORE_UNROLL
          for (int first = 0; first < kRows; first += kRows / 2) {
            float through[kRows / 2][OwnStates<S>::kTiles][4] = {};
            own.template multiply_rows<kTileChannels / 16, S::kInputs, S::kSplit>(
                through, x + first * 16 * S::kPitchP, S::kPitchP, S::kTileP, W, Layout::kPitchW,
                Layout::kTileW);
            ARCORE_UNROLL
            for (int m = 0; m < kRows / 2; ++m) {
              ARCORE_UNROLL
              for (int half = 0; half < 2; ++half) {
                const int s = 16 * (first + m) + row_in_block(2 * half);
                if (!writes.holds(s)) continue;
                const float weight = decay_between(sizes.high, sizes.low, s, writes.end - 1) * sizes.dt[s];
                ARCORE_UNROLL
                for (int n = 0; n < OwnStates<S>::kTiles; ++n) {
                  ARCORE_UNROLL
                  for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    float& sum = grad_B[first + m][n][e];
                    sum = fused_multiply_add(weight, through[m][n][e], sum);
                  }
                }
              }
            }
          }
        }
        float grad_x[1][Layout::kChannelTiles][4] = {};
        if (writes.begin < writes.end) {
          // Through the state after the cell to x: B G^T, rows of this warp.
          float through[Layout::kChannelTiles][4] = {};
          ARCORE_UNROLL
          for (int k = 0; k < S::kStates / 16; ++k) {
            uint32_t rows[S::kInputs][4];
            load_rows<S::kInputs>(rows, B + row_tile * 16 * S::kPitchN + k * 16, S::kPitchN, S::kTileN);
            ARCORE_UNROLL
            for (int n = 0; n < Layout::kChannelTiles; n += 2) {
              uint32_t b[S::kSplit][4];
              load_columns_transposed<S::kSplit>(b, W + (own_channel + 8 * n) * Layout::kPitchW + k * 16,
                                                 Layout::kPitchW, Layout::kTileW);
              multiply(through[n], rows, b, 0);
              multiply(through[n + 1], rows, b, 2);
            }
          }
          ARCORE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int s = 16 * row_tile + row_in_block(2 * half);
            const bool held = writes.holds(s);
            const float decay = held ? decay_between(sizes.high, sizes.low, s, writes.end - 1) : 0.0f;
            float sum = 0.0f;
            ARCORE_UNROLL
            for (int n = 0; n < Layout::kChannelTiles; ++n) {
              float input[2];
              load_two<S::kInputs>(x, s * S::kPitchP + own_channel + column_in_block(n, 0), S::kTileP,
                                   input[0], input[1]);
              ARCORE_UNROLL
              for (int e = 0; e < 2; ++e) {
                if (!held) continue;
                const float value = decay * through[n][2 * half + e];
                grad_x[0][n][2 * half + e] = value;
                sum = fused_multiply_add(value, input[e], sum);
              }
            }
            sum = sum_of_row(sum);
            if (lane % 4 == 0 && held) floats[Layout::kWritten + share * kSteps + s] += sum;
          }
        }
        sync_threads();
        const float product = warp_sum(stage_states<S, true>(W, before, columns, states));
        if (lane == 0) floats[Layout::kScratch + warp] = product;
        sync_threads();
        if (passes) {
          // The part that goes through the whole cell.
          float total = 0.0f;
          ARCORE_UNROLL
          for (int w = 0; w < kGradientWarps; ++w)
            total += floats[Layout::kScratch + w];
          for (int t = reads.begin + thread; t < reads.end; t += kGradientThreads)
            floats[Layout::kKept + t] += exp2_approx(sizes.high[reads.end - 1]) * total;
        }
        // Packed rows: of this run alone.
        const Run stored = layout.packed ? reads : Run{0, kSteps};
        // Within the cell: M^T g. With what came through the state after it this is the gradient of dt x.
        bool found = false;
        ARCORE_UNROLL
        for (int k = 0; k < kRows; ++k) {
          if (k < row_tile) continue;
          uint32_t rows[S::kSplit][4];
          load_rows_transposed<S::kSplit>(rows, triangle + k * 16 * S::kPitchS + row_tile * 16, S::kPitchS,
                                          S::kTileS);
          ARCORE_UNROLL
          for (int n = 0; n < Layout::kChannelTiles; n += 2) {
            uint32_t b[S::kLeft][4];
            load_columns<S::kLeft>(b, g + k * 16 * S::kPitchP + own_channel + 8 * n, S::kPitchP, S::kTileP);
            ARCORE_UNROLL
            for (int i = 0; i < 4; ++i) {
              const uint32_t finite = finite_bits(b[0][i]);
              found |= finite != 0xffffffffu;
              b[0][i] &= finite;
            }
            multiply(grad_x[0][n], rows, b, 0);
            multiply(grad_x[0][n + 1], rows, b, 2);
          }
        }
        if (any_lane(found))
          add_not_finite<S::kSplit, kSteps, true>(grad_x, triangle, row_tile, g + own_channel, S::kPitchP,
                                                  marks.starts);
        ARCORE_UNROLL
        for (int n = 0; n < Layout::kChannelTiles; ++n) {
          const int c = own_channel + column_in_block(n, 0);
          float skip[2] = {}, grad_skip[2] = {};
          if (p.D != nullptr && c < columns) {
            const float* D = p.D + head * p.dim + column + c;
            skip[0] = D[0];
            if (c + 1 < columns) skip[1] = D[1];
          }
          ARCORE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int s = 16 * row_tile + row_in_block(2 * half);
            float of_y[2], input[2], value[2];
            load_two<S::kLeft>(g, s * S::kPitchP + c, S::kTileP, of_y[0], of_y[1]);
            load_two<S::kInputs>(x, s * S::kPitchP + c, S::kTileP, input[0], input[1]);
            ARCORE_UNROLL
            for (int e = 0; e < 2; ++e) {
              if (stored.holds(s)) grad_skip[e] = fused_multiply_add(of_y[e], input[e], grad_skip[e]);
              value[e] = sizes.dt[s] * grad_x[0][n][2 * half + e];
              if (p.D != nullptr) value[e] = fused_multiply_add(skip[e], of_y[e], value[e]);
              if ((marks.skipped >> s & 1) != 0) value[e] = 0.0f;
            }
            if (begin + s >= p.length || c >= columns || !stored.holds(s)) continue;
            const View& to = a.grad_x;
            const int64_t at =
                batch_row * to.batch + (begin + s) * to.time + head * to.head + (column + c) * to.last;
            store_two(to, at, value[0], value[1], c + 1 < columns, paired);
          }
          ARCORE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const float sum = sum_of_column(grad_skip[e]);
            float& total = floats[Layout::kSkip + row_tile * kTileChannels + c + e];
            if (lane < 4) total = r == 0 ? sum : total + sum;
          }
        }
        if (reads.begin < reads.end) {
          // Through the state before the cell to C: g H.
          constexpr int kAtOnce = S::kLeft == 3 ? 1 : kRows / 2;
          ARCORE_UNROLL
          for (int first = 0; first < kRows; first += kAtOnce) {
            float through[kAtOnce][OwnStates<S>::kTiles][4] = {};
            own.template multiply_rows<kTileChannels / 16, S::kLeft, S::kSplit>(
                through, g + first * 16 * S::kPitchP, S::kPitchP, S::kTileP, W, Layout::kPitchW,
                Layout::kTileW);
            ARCORE_UNROLL
            for (int m = 0; m < kAtOnce; ++m) {
              ARCORE_UNROLL
              for (int half = 0; half < 2; ++half) {
                const int t = 16 * (first + m) + row_in_block(2 * half);
                const bool read = reads.holds(t);
                const float decay = read ? exp2_approx(sizes.high[t]) : 0.0f;
                float sum = 0.0f;
                ARCORE_UNROLL
                for (int n = 0; n < OwnStates<S>::kTiles; ++n) {
                  float of_C[2];
                  load_two<S::kInputs>(C, t * S::kPitchN + own.first() + column_in_block(n, 0), S::kTileN,
                                       of_C[0], of_C[1]);
                  ARCORE_UNROLL
                  for (int e = 0; e < 2; ++e) {
                    if (!read) continue;
                    const float value = decay * through[m][n][2 * half + e];
                    grad_C[first + m][n][2 * half + e] += value;
                    sum = fused_multiply_add(value, of_C[e], sum);
                  }
                }
                sum = sum_of_row(sum);
                if (lane % 4 == 0 && read) floats[Layout::kRead + warp * kSteps + t] += sum;
              }
            }
          }
        }
      }
      sync_threads();
      if (a.partial_D != nullptr && thread < columns) {
        float sum = 0.0f;
        ARCORE_UNROLL
        for (int m = 0; m < kRows; ++m)
          sum += floats[Layout::kSkip + m * kTileChannels + thread];
        store_global(
            a.partial_D + ((batch_row * layout.cells + cell) * p.heads + head) * p.dim + column + thread,
            sum);
      }
    }

    // Step sizes. kShares neighbouring threads have a step.
    constexpr int kShares = kGradientThreads / kSteps;
    const int j = thread / kShares, mine = thread % kShares, first = first_of(marks.starts, j);
    const auto sum_shares = [](float value) {
      for (int mask = 1; mask < kShares; mask *= 2)
        value += shuffle_xor(value, mask);
      return value;
    };
    // What step s writes, and what it reads.
    const auto written = [&](int s) {
      float sum = 0.0f;
      ARCORE_UNROLL
      for (int w = 0; w < Layout::kShares; ++w)
        sum += floats[Layout::kWritten + w * kSteps + s];
      return sum;
    };
    const auto read = [&](int t) {
      float sum = 0.0f;
      ARCORE_UNROLL
      for (int w = 0; w < kGradientWarps; ++w)
        sum += floats[Layout::kRead + w * kSteps + t];
      return sum;
    };
    float log = pairs_across<S, kShares>(floats, sizes.dt, j, mine);
    for (int s = first + mine; s < j; s += kShares)
      log = fused_multiply_add(sizes.dt[s], written(s), log);
    for (int t = j + mine; t < kSteps && first_of(marks.starts, t) == first; t += kShares)
      log += read(t);
    log = sum_shares(log) + floats[Layout::kKept + j];
    float step = 0.0f;
    for (int i = j / 16 + mine; i < kRows; i += kShares)
      step += floats[Layout::kColumns + 16 * (i * (i + 1) / 2 + j / 16) + j % 16];
    step = sum_shares(step) + written(j);
    const bool off = (marks.skipped >> j & 1) != 0;
    // Where the decay of one step is out of bounds, nothing depends on it.
    const double exact =
        static_cast<double>(sizes.dt[j]) * static_cast<double>(p.A[head]) * 1.4426950408889634;
    const bool bounded = !(exact < -kLargestLog || exact > kLargestLog);
    float grad_A = 0.0f, grad_bias = 0.0f;
    if (!off) {
      if (bounded) step = fused_multiply_add(log, p.A[head], step);
      step *= sizes.slope[j];
      if (mine == 0) {
        grad_A = bounded ? log * sizes.dt[j] : 0.0f;
        grad_bias = step;
      }
    }
    if (mine == 0 && begin + j < p.length) {
      const View& to = a.grad_dt;
      store_any(to.data, to.dtype, batch_row * to.batch + (begin + j) * to.time + head * to.head,
                off ? 0.0f : step);
    }
    grad_A = warp_sum(grad_A);
    grad_bias = warp_sum(grad_bias);
    if (lane == 0) {
      floats[Layout::kScratch + warp] = grad_A;
      floats[Layout::kScratch + kGradientWarps + warp] = grad_bias;
    }
    sync_threads();
    if (thread < 2) {
      float sum = 0.0f;
      ARCORE_UNROLL
      for (int w = 0; w < kGradientWarps; ++w)
        sum += floats[Layout::kScratch + thread * kGradientWarps + w];
      float* to = thread == 0 ? a.partial_A : a.partial_bias;
      store_global(to + (batch_row * layout.cells + cell) * p.heads + head, sum);
    }
  }

  // The rest of the gradients of B and C, through C B^T of all heads.
  sync_threads();
  ARCORE_UNROLL
  for (int m = 0; m < Blocks::kMine; ++m) {
    int number, i, j;
    if (Blocks::block(warp, m, number, i, j)) store_block<S::kSplit, kSteps>(triangle, i, j, grad_scores[m]);
  }
  sync_threads();
  own.template multiply_steps<true>(grad_B, triangle, C, marks.starts);
  own.template multiply_steps<false>(grad_C, triangle, B, marks.starts);
  const int64_t first_row =
      ((batch * p.groups + group) * a.slices + slice) * cells * kSteps + (cell - a.begin) * kSteps;
  ARCORE_UNROLL
  for (int m = 0; m < kRows; ++m) {
    ARCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int t = 16 * m + row_in_block(2 * half);
      const bool off = (marks.skipped >> t & 1) != 0;
      ARCORE_UNROLL
      for (int n = 0; n < OwnStates<S>::kTiles; ++n) {
        ARCORE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int state = own.first() + column_in_block(n, e);
          if (state >= states) continue;
          const int64_t at = (first_row + t) * p.states + state;
          store_global(a.partial_B + at, off ? 0.0f : grad_B[m][n][2 * half + e]);
          store_global(a.partial_C + at, off ? 0.0f : grad_C[m][n][2 * half + e]);
        }
      }
    }
  }
}

// A file each, for the time that nvcc takes.
int launch_gradients_of_one_part_sm80(const GradientCuda&, void* stream);
int launch_gradients_of_two_parts_sm80(const GradientCuda&, void* stream);
int launch_gradients_of_three_parts_sm80(const GradientCuda&, void* stream);

template <typename S>
int launch_cells(const GradientCuda& call, void* stream) {
  const int64_t blocks = call.in.batch * (call.end - call.begin) * call.in.groups * call.slices;
  return launch(cell_gradients<S>, {blocks, 1, 1, kGradientThreads, GradientLayout<S>::kBytes}, stream, call);
}

}  // namespace arcore::ssd
