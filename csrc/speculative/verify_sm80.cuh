// Verification on GPUs from sm_80 on: a block per row of the batch is the team of verify.h. All its threads
// take the same way through the rules; the walks over the vocabulary are shared among them.
#pragma once

#include "common/inverse_cdf.h"
#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "speculative/params.h"

#if defined(__CUDACC__)
// The rules are functions of host and device, the team's members of the device alone.
#pragma nv_diag_suppress 20011, 20014
#endif
#include "speculative/verify.h"

namespace arcore::speculative {

constexpr int kVerifyThreads = 256, kVerifyWarps = kVerifyThreads / 32;

// Of one batch row, in global memory.
struct RowScratch {
  float* weights;     // [vocab]
  uint32_t* removed;  // a bit per token
  double* score;      // [nodes]
  int64_t* depth;
};

ARCORE_HOST_DEVICE int64_t whole_lines(int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}
ARCORE_HOST_DEVICE int64_t removed_words(const Problem& p) {
  return (p.vocab + 31) / 32;
}
ARCORE_HOST_DEVICE int64_t bytes_of_row(const Problem& p) {
  return whole_lines(p.vocab * 4) + whole_lines(removed_words(p) * 4) + 2 * whole_lines(p.nodes * 8);
}

struct SharedScratch {
  uint64_t runs[kVerifyWarps];  // sums of the runs of tokens that warps own
  uint64_t words[kVerifyWarps];
  int64_t token;
};

template <typename T>
class BlockTeam {
 public:
  ARCORE_DEVICE BlockTeam(const Problem& p, const RowScratch& row, SharedScratch& shared, int64_t b)
      : p_(p),
        row_(row),
        shared_(shared),
        b_(b),
        run_(((p.vocab + kVerifyWarps - 1) / kVerifyWarps + 31) / 32 * 32) {
    for (int64_t i = thread_index(); i < removed_words(p); i += kVerifyThreads)
      row_.removed[i] = 0u;
    sync_threads();
  }

  ARCORE_DEVICE bool leads() const { return thread_index() == 0; }
  ARCORE_DEVICE float target(int64_t row, int64_t token) const { return at(p_.target, row, token); }
  ARCORE_DEVICE float draft(int64_t row, int64_t token) const { return at(p_.draft, row, token); }

  ARCORE_DEVICE int64_t draw_target(int64_t row, uint64_t bits) {
    auto get = [&](int64_t i) { return target(row, i); };
    return sum_tokens(get) > 0.0 ? draw(get, bits) : -1;
  }
  ARCORE_DEVICE int64_t draw_weights(uint64_t bits) {
    return draw([&](int64_t i) { return row_.weights[i]; }, bits);
  }
  ARCORE_DEVICE int64_t argmax_target(int64_t row) {
    // The order of numbers that are not negative is that of their bits; of equals the lowest token wins.
    uint64_t best = 0;
    bool number = true;
    for (int64_t i = thread_index(); i < p_.vocab; i += kVerifyThreads) {
      const float x = target(row, i);
      number &= x == x;
      if (!(x >= 0.0f)) continue;
      const uint64_t key =
          static_cast<uint64_t>(float_bits(x + 0.0f)) << 32 | (0xffffffffu - static_cast<uint32_t>(i));
      best = key > best ? key : best;
    }
    best = combine(best, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
    if (sync_threads_or(!number) || best == 0) return -1;
    return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(best));
  }
  ARCORE_DEVICE double entropy_target(int64_t row, double) {
    double sum = 0.0;
    for (int64_t i = thread_index(); i < p_.vocab; i += kVerifyThreads) {
      const float x = target(row, i);
      sum -= static_cast<double>(x) * static_cast<double>(logf(x + 1e-5f));
    }
    for (int mask = 16; mask > 0; mask >>= 1)
      sum += shuffle_xor(sum, mask);
    const int warp = warp_index();
    if (lane_index() == 0) memcpy(&shared_.words[warp], &sum, 8);
    sync_threads();
    double total = 0.0;
    for (int w = 0; w < kVerifyWarps; ++w) {
      double part;
      memcpy(&part, &shared_.words[w], 8);
      total += part;
    }
    sync_threads();
    return total;
  }
  ARCORE_DEVICE int64_t neighbour(int64_t token, int64_t i) const {
    const Neighbours& n = p_.neighbours;
    if (token < 0 || token >= p_.vocab) return -1;
    const int64_t place = token * n.token + i * n.item;
    int64_t near = 0;
    switch (n.type) {
      case IndexType::kInt32:
        near = static_cast<const int32_t*>(n.data)[place];
        break;
      case IndexType::kInt64:
        near = static_cast<const int64_t*>(n.data)[place];
        break;
      case IndexType::kUInt16:
        near = static_cast<const uint16_t*>(n.data)[place];
        break;
    }
    return near >= 0 && near < p_.vocab && near != token ? near : -1;
  }

  ARCORE_DEVICE void load(int64_t row) {
    sync_threads();  // others may still read what was there
    for (int64_t i = thread_index(); i < p_.vocab; i += kVerifyThreads)
      row_.weights[i] = target(row, i);
    sync_threads();
  }
  ARCORE_DEVICE Totals residual(int64_t row, float scale, bool sum_draft) {
    return subtract_from([&](int64_t i) { return target(row, i); }, row, scale, 1.0f, sum_draft);
  }
  ARCORE_DEVICE Totals subtract(int64_t row, float scale, float draft_scale, bool sum_draft) {
    return subtract_from([&](int64_t i) { return row_.weights[i]; }, row, scale, draft_scale, sum_draft);
  }
  ARCORE_DEVICE double total() {
    return sum_tokens([&](int64_t i) { return row_.weights[i]; });
  }
  ARCORE_DEVICE float weight(int64_t token) const { return inside(token) ? row_.weights[token] : nan(); }
  ARCORE_DEVICE void set_weight(int64_t token, float value) {
    sync_threads();  // others may still read what was there
    if (leads() && inside(token)) row_.weights[token] = value;
    sync_threads();
  }
  ARCORE_DEVICE void fill(float value) {
    sync_threads();
    for (int64_t i = thread_index(); i < p_.vocab; i += kVerifyThreads)
      row_.weights[i] = value;
    sync_threads();
  }

  ARCORE_DEVICE bool removed(int64_t token) const {
    return any_removed_ && inside(token) && (row_.removed[token / 32] >> (token % 32) & 1u) != 0u;
  }
  ARCORE_DEVICE void remove(int64_t token) {
    sync_threads();
    if (leads() && inside(token)) row_.removed[token / 32] |= 1u << (token % 32);
    any_removed_ = true;
    sync_threads();
  }
  ARCORE_DEVICE void restore_removed() {
    sync_threads();
    for (int64_t i = thread_index(); any_removed_ && i < removed_words(p_); i += kVerifyThreads)
      row_.removed[i] = 0u;
    any_removed_ = false;
    sync_threads();
  }

  // All threads write the same; the barrier keeps a late one from writing what was true before.
  ARCORE_DEVICE double& score(int64_t node) const {
    sync_threads();
    return row_.score[node];
  }
  ARCORE_DEVICE int64_t& depth(int64_t node) const {
    sync_threads();
    return row_.depth[node];
  }

 private:
  static ARCORE_DEVICE float nan() { return bits_float(0x7fc00000u); }
  ARCORE_DEVICE bool inside(int64_t token) const { return token >= 0 && token < p_.vocab; }
  ARCORE_DEVICE float at(const Probabilities& x, int64_t row, int64_t token) const {
    if (!inside(token)) return nan();
    return to_float(static_cast<const T*>(x.data)[b_ * x.batch + row * x.row + token * x.token]);
  }

  template <typename F>
  ARCORE_DEVICE uint64_t combine(uint64_t value, const F& f) {
    for (int mask = 16; mask > 0; mask >>= 1)
      value = f(value, shuffle_xor(value, mask));
    const int warp = warp_index();
    if (lane_index() == 0) shared_.words[warp] = value;
    sync_threads();
    uint64_t total = shared_.words[0];
    for (int w = 1; w < kVerifyWarps; ++w)
      total = f(total, shared_.words[w]);
    sync_threads();
    return total;
  }

  // f(token) for the run of neighbouring tokens that this thread's warp owns.
  template <typename F>
  ARCORE_DEVICE void each_of_run(const F& f) const {
    const int64_t begin = warp_index() * run_;
    for (int64_t i = begin + lane_index(); i < begin + run_ && i < p_.vocab; i += 32)
      f(i);
  }

  // The sum of all tokens; NaN if one is no probability. Keeps the sums of runs for `draw`.
  template <typename Get>
  ARCORE_DEVICE double sum_tokens(const Get& get) {
    uint64_t sum = 0;
    bool good = true;
    each_of_run([&](int64_t i) {
      const float x = get(i);
      good &= is_probability(x);
      sum += fixed_point(x);
    });
    return keep_sums(sum, good);
  }
  ARCORE_DEVICE double keep_sums(uint64_t sum, bool good) {
    sum = warp_sum(sum);
    const int warp = warp_index();
    sync_threads();  // `draw` may still read the sums before
    if (lane_index() == 0) shared_.runs[warp] = sum;
    const bool bad = sync_threads_or(!good);
    total_ = 0;
    for (int w = 0; w < kVerifyWarps; ++w)
      total_ += shared_.runs[w];
    return bad ? static_cast<double>(nan()) : from_fixed(total_);
  }
  static ARCORE_DEVICE double from_fixed(uint64_t sum) { return static_cast<double>(sum) * 0x1p-62; }

  // inverse_cdf of what was summed last.
  template <typename Get>
  ARCORE_DEVICE int64_t draw(const Get& get, uint64_t bits) {
    if (total_ == 0) return -1;
    uint64_t level = level_of(bits, total_);
    int owner = 0;
    while (owner < kVerifyWarps - 1 && shared_.runs[owner] <= level)
      level -= shared_.runs[owner++];
    sync_threads();  // the token of the draw before has been read
    if (warp_index() == owner) {
      const int lane = lane_index();
      for (int64_t begin = owner * run_; begin < p_.vocab; begin += 32) {
        const int64_t i = begin + lane;
        uint64_t upto = i < p_.vocab ? fixed_point(get(i)) : 0;  // of this lane and those before it
        for (int delta = 1; delta < 32; delta *= 2) {
          const uint64_t before = shuffle_up(upto, delta);
          if (lane >= delta) upto += before;
        }
        const uint32_t found = ballot(upto > level);
        if (found == 0u) {
          level -= shuffle(upto, 31);
          continue;
        }
        if (lane == lowest_bit(found)) shared_.token = i;
        break;
      }
    }
    sync_threads();
    return shared_.token;
  }

  // w = max(a * x - b * y, 0), NaN where one of them is; y is the draft.
  template <typename Get>
  ARCORE_DEVICE Totals subtract_from(const Get& get, int64_t row, float a, float b, bool sum_draft) {
    uint64_t sum = 0, sum_y = 0;
    bool good = true;
    sync_threads();  // others may still read what was there
    each_of_run([&](int64_t i) {
      const float y = draft(row, i);
      const float difference = add_rounded(multiply_rounded(a, get(i)), -multiply_rounded(b, y));
      const float w = difference < 0.0f ? 0.0f : difference;
      row_.weights[i] = w;
      good &= is_probability(w);
      sum += fixed_point(w);
      if (sum_draft) {
        good &= is_probability(y);
        sum_y += fixed_point(y);
      }
    });
    const uint64_t total_y = sum_draft ? combine(sum_y, [](uint64_t x, uint64_t y) { return x + y; }) : 0;
    return {keep_sums(sum, good), from_fixed(total_y)};
  }

  const Problem& p_;
  const RowScratch& row_;
  SharedScratch& shared_;
  int64_t b_, run_;
  uint64_t total_ = 0;
  bool any_removed_ = false;
};

template <typename T>
ARCORE_LAUNCH_BOUNDS(kVerifyThreads, 2)
ARCORE_KERNEL verify_rows(ARCORE_KERNEL_ARGS VerifyCuda cuda) {
  const Problem& p = cuda.problem;
  const int64_t b = block_x();
  char* at = cuda.scratch + b * cuda.scratch_bytes;
  RowScratch row{};
  row.weights = reinterpret_cast<float*>(at);
  row.removed = reinterpret_cast<uint32_t*>(at += whole_lines(p.vocab * 4));
  row.score = reinterpret_cast<double*>(at += whole_lines(removed_words(p) * 4));
  row.depth = reinterpret_cast<int64_t*>(at + whole_lines(p.nodes * 8));
  BlockTeam<T> team(p, row, *reinterpret_cast<SharedScratch*>(shared_memory()), b);
  verify_row(p, cuda.results, b, team);
}

template <typename T>
int launch_verify(const VerifyCuda& cuda, void* stream) {
  return launch(verify_rows<T>,
                {cuda.problem.batch, 1, 1, kVerifyThreads, static_cast<int64_t>(sizeof(SharedScratch))},
                stream, cuda);
}

}  // namespace arcore::speculative
