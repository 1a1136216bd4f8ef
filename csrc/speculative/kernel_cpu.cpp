// Verification of drafts on the CPU: the walks over the vocabulary that verify.h leaves to its team.
//
// A row of the batch is one thread's work from start to end, so no result depends on the number of threads or
// on the other rows. Sums of probabilities are sums of integers (common/inverse_cdf.h), the same in every
// order.
#include "common/inverse_cdf_vec.h"
#include "common/vec.h"
#include "speculative/params.h"
#include "speculative/verify.h"

namespace arcore::speculative {
namespace ARCORE_ISA {

const CpuKernels& cpu_kernels();

namespace {

// Tokens that are converted to float at a time; a buffer of them stays in the first-level cache.
constexpr int64_t kChunk = 512;
static_assert(kChunk % kWalkBlock == 0);
constexpr int kSumLanes = 16;
constexpr double kNaN = __builtin_nan("");

double from_fixed(uint64_t sum) {
  return static_cast<double>(sum) * 0x1p-62;
}

#if defined(__FMA__)
inline float muladd(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
#else
inline float muladd(float a, float b, float c) {
  return a * b + c;
}
#endif

// sum of x log(x + 1e-5) over n >= 0 numbers, n at most kChunk; logarithms are right to about 1e-7. With
// x + 1e-5 = 2^e (1 + f) and 1 + f between sqrt(1/2) and sqrt(2), log is e log 2 + f P(f), P of degree 7.
double sum_x_log_x(const float* ARCORE_RESTRICT x, int64_t n) {
  float terms[kChunk];
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = __builtin_bit_cast(int32_t, x[i] + 1e-5f);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of (x + 1e-5) / sqrt(1/2), rounded down
    const float f = __builtin_bit_cast(float, bits - (exponent << 23)) - 1.0f;
    float series = muladd(-0.10134057f, f, 0.16234189f);
    series = muladd(series, f, -0.17247014f);
    series = muladd(series, f, 0.19898566f);
    series = muladd(series, f, -0.24970071f);
    series = muladd(series, f, 0.33335114f);
    series = muladd(series, f, -0.50000364f);
    series = muladd(series, f, 0.99999994f);
    terms[i] = x[i] * muladd(static_cast<float>(exponent), 0.69314718f, f * series);
  }
  float lanes[kSumLanes] = {};
  const int64_t whole = n / kSumLanes * kSumLanes;
  for (int64_t i = 0; i < whole; i += kSumLanes)
    for (int lane = 0; lane < kSumLanes; ++lane)
      lanes[lane] += terms[i + lane];
  for (int64_t i = whole; i < n; ++i)
    lanes[i - whole] += terms[i];
  double sum = 0.0;
  for (int lane = 0; lane < kSumLanes; ++lane)
    sum += static_cast<double>(lanes[lane]);
  return sum;
}

// One row of V probabilities of any storage type and stride.
template <typename T>
struct Row {
  const T* data;
  int64_t stride;

  float at(int64_t token) const { return static_cast<float>(data[token * stride]); }
  // Tokens [begin, begin + n) as floats, in place or in `buffer`.
  const float* chunk(int64_t begin, int64_t n, float* buffer) const {
    if (stride == 1) {
      if constexpr (sizeof(T) == sizeof(float)) {
        return data + begin;
      } else {
        to_float(data + begin, buffer, n);
        return buffer;
      }
    }
    for (int64_t i = 0; i < n; ++i)
      buffer[i] = at(begin + i);
    return buffer;
  }
};

struct Scratch {
  float* weights;
  uint64_t* block_sums;  // integer sums of kWalkBlock tokens each
  uint64_t* removed;     // a bit per token
  double* score;
  int64_t* depth;
  int32_t* neighbours;  // of one token
};

int64_t bytes_of_weights(const Problem& p) {
  return round_up(p.vocab * static_cast<int64_t>(sizeof(float)), 64);
}
// Of one word for every 64 tokens: a bit each, or the sum of a block.
int64_t bytes_of_words(const Problem& p) {
  static_assert(kWalkBlock == 64);
  return round_up((p.vocab + 63) / 64 * static_cast<int64_t>(sizeof(uint64_t)), 64);
}
int64_t bytes_of_nodes(const Problem& p) {
  return round_up(p.nodes * static_cast<int64_t>(sizeof(int64_t)), 64);
}
int64_t scratch_bytes(const Problem& p) {
  return bytes_of_weights(p) + 2 * bytes_of_words(p) + 2 * bytes_of_nodes(p) +
         round_up(p.neighbours.stored * static_cast<int64_t>(sizeof(int32_t)), 64);
}
Scratch divide(const Problem& p, void* scratch) {
  char* at = static_cast<char*>(scratch);
  Scratch s{};
  s.weights = reinterpret_cast<float*>(at);
  s.block_sums = reinterpret_cast<uint64_t*>(at += bytes_of_weights(p));
  s.removed = reinterpret_cast<uint64_t*>(at += bytes_of_words(p));
  s.score = reinterpret_cast<double*>(at += bytes_of_words(p));
  s.depth = reinterpret_cast<int64_t*>(at += bytes_of_nodes(p));
  s.neighbours = reinterpret_cast<int32_t*>(at + bytes_of_nodes(p));
  return s;
}

template <typename T>
class CpuTeam {
 public:
  CpuTeam(const Problem& p, const Scratch& scratch, int64_t b) : p_(p), s_(scratch), b_(b) {}

  bool leads() const { return true; }
  float target(int64_t row, int64_t token) const { return target_row(row).at(token); }
  float draft(int64_t row, int64_t token) const { return draft_row(row).at(token); }

  int64_t draw_target(int64_t row, uint64_t bits) {
    const Row<T> r = target_row(row);
    if constexpr (sizeof(T) == sizeof(float))
      if (r.stride == 1) return sum_blocks(r.data) > 0.0 ? draw(r.data, bits) : -1;
    load(row);
    return total() > 0.0 ? draw_weights(bits) : -1;
  }
  int64_t draw_weights(uint64_t bits) const { return draw(s_.weights, bits); }

  int64_t argmax_target(int64_t row) const {
    const Row<T> r = target_row(row);
    float buffer[kChunk];
    float best = -1.0f;
    int64_t at = -1;
    for (int64_t i = 0; i < p_.vocab; i += kChunk) {
      const int64_t n = min_of(kChunk, p_.vocab - i);
      const float* x = r.chunk(i, n, buffer);
      float most = -1.0f;
      bool number = true;
      for (int64_t j = 0; j < n; ++j) {
        most = x[j] > most ? x[j] : most;
        number &= x[j] == x[j];
      }
      if (!number) return -1;
      if (!(most > best)) continue;
      best = most;
      int64_t j = 0;
      while (x[j] != most)
        ++j;
      at = i + j;
    }
    return at;
  }

  double entropy_target(int64_t row, double enough) const {
    const Row<T> r = target_row(row);
    float buffer[kChunk];
    double entropy = 0.0;
    for (int64_t i = 0; i < p_.vocab; i += kChunk) {
      const int64_t n = min_of(kChunk, p_.vocab - i);
      entropy -= sum_x_log_x(r.chunk(i, n, buffer), n);
      // What is left takes away 1e-5 at most; rounding, less.
      if (entropy > enough + 1e-3) break;
    }
    return entropy;
  }

  // The ids of a token's neighbours are brought to one type once, as they are looked at several times.
  int64_t neighbour(int64_t token, int64_t i) {
    if (token != listed_token_) list_neighbours(token);
    return s_.neighbours[i];
  }

  void load(int64_t row) {
    const Row<T> r = target_row(row);
    for (int64_t i = 0; i < p_.vocab; i += kChunk) {
      const int64_t n = min_of(kChunk, p_.vocab - i);
      float* out = s_.weights + i;
      const float* x = r.chunk(i, n, out);
      if (x != out) std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
    }
  }
  Totals residual(int64_t row, float scale, bool sum_draft) {
    return subtract_from(target_row(row), draft_row(row), scale, 1.0f, sum_draft);
  }
  Totals subtract(int64_t row, float scale, float draft_scale, bool sum_draft) {
    return subtract_from(Row<float>{s_.weights, 1}, draft_row(row), scale, draft_scale, sum_draft);
  }
  double total() { return sum_blocks(s_.weights); }
  float weight(int64_t token) const { return s_.weights[token]; }
  void set_weight(int64_t token, float value) { s_.weights[token] = value; }
  void fill(float value) {
    for (int64_t i = 0; i < p_.vocab; ++i)
      s_.weights[i] = value;
  }

  bool removed(int64_t token) const {
    return any_removed_ && (s_.removed[token / 64] >> (token % 64) & 1) != 0;
  }
  void remove(int64_t token) {
    s_.removed[token / 64] |= uint64_t{1} << (token % 64);
    any_removed_ = true;
  }
  void restore_removed() {
    if (any_removed_) std::memset(s_.removed, 0, static_cast<size_t>(bytes_of_words(p_)));
    any_removed_ = false;
  }

  double& score(int64_t node) const { return s_.score[node]; }
  int64_t& depth(int64_t node) const { return s_.depth[node]; }

 private:
  Row<T> target_row(int64_t row) const { return view(p_.target, row); }
  Row<T> draft_row(int64_t row) const { return view(p_.draft, row); }
  Row<T> view(const Probabilities& x, int64_t row) const {
    return {static_cast<const T*>(x.data) + b_ * x.batch + row * x.row, x.token};
  }

  void list_neighbours(int64_t token) {
    const Neighbours& n = p_.neighbours;
    const auto copy = [&](auto* data) {
      for (int64_t i = 0; i < n.stored; ++i) {
        const int64_t near = data[token * n.token + i * n.item];
        s_.neighbours[i] = near >= 0 && near < p_.vocab && near != token ? static_cast<int32_t>(near) : -1;
      }
    };
    switch (n.type) {
      case IndexType::kInt32:
        copy(static_cast<const int32_t*>(n.data));
        break;
      case IndexType::kInt64:
        copy(static_cast<const int64_t*>(n.data));
        break;
      case IndexType::kUInt16:
        copy(static_cast<const uint16_t*>(n.data));
        break;
    }
    listed_token_ = token;
  }

  // The sum of all tokens; NaN if one is no probability. Keeps the sums of blocks for `draw`.
  double sum_blocks(const float* x) {
    total_ = 0;
    bool good = true;
    for (int64_t i = 0; i < p_.vocab; i += kWalkBlock)
      good &= sum_block(x + i, i, min_of(kWalkBlock, p_.vocab - i));
    return good ? from_fixed(total_) : kNaN;
  }
  bool sum_block(const float* x, int64_t begin, int64_t n) {
    const CheckedSum block = checked_sum(x, n);
    s_.block_sums[begin / kWalkBlock] = block.sum;
    total_ += block.sum;
    return block.good;
  }
  // inverse_cdf of what was summed last: only the block of the token is read again.
  int64_t draw(const float* x, uint64_t bits) const {
    if (total_ == 0) return -1;
    uint64_t level = level_of(bits, total_);
    int64_t block = 0;
    while (s_.block_sums[block] <= level)
      level -= s_.block_sums[block++];
    const int64_t begin = block * kWalkBlock;
    return begin + walk_to_level(x + begin, min_of(kWalkBlock, p_.vocab - begin), level);
  }

  // w = max(a * x - b * y, 0), NaN where one of them is.
  template <typename X>
  Totals subtract_from(const Row<X>& x, const Row<T>& y, float a, float b, bool sum_y) {
    float x_buffer[kChunk], y_buffer[kChunk];
    uint64_t total_y = 0;
    bool good = true;
    total_ = 0;
    for (int64_t i = 0; i < p_.vocab; i += kChunk) {
      const int64_t n = min_of(kChunk, p_.vocab - i);
      const float* xs = x.chunk(i, n, x_buffer);
      const float* ys = y.chunk(i, n, y_buffer);
      float* w = s_.weights + i;
      for (int64_t j = 0; j < n; ++j) {
        const float difference = a * xs[j] - b * ys[j];
        w[j] = difference < 0.0f ? 0.0f : difference;
      }
      for (int64_t j = 0; j < n; j += kWalkBlock)
        good &= sum_block(w + j, i + j, min_of(kWalkBlock, n - j));
      if (sum_y) {
        const CheckedSum sum = checked_sum(ys, n);
        total_y += sum.sum;
        good &= sum.good;
      }
    }
    return {good ? from_fixed(total_) : kNaN, from_fixed(total_y)};
  }

  const Problem& p_;
  const Scratch& s_;
  int64_t b_;
  uint64_t total_ = 0;
  int64_t listed_token_ = -1;
  bool any_removed_ = false;
};

template <typename T>
void verify_rows(const Problem& p, const Results& results, const Scratch& scratch, int64_t begin,
                 int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    CpuTeam<T> team(p, scratch, b);
    verify_row(p, results, b, team);
  }
}

void verify(const Problem& p, const Results& results, void* memory, int64_t begin, int64_t end) {
  const Scratch scratch = divide(p, memory);
  std::memset(scratch.removed, 0, static_cast<size_t>(bytes_of_words(p)));
  switch (p.dtype) {
    case StorageType::kFloat32:
      return verify_rows<float>(p, results, scratch, begin, end);
    case StorageType::kBFloat16:
      return verify_rows<BFloat16>(p, results, scratch, begin, end);
    case StorageType::kFloat16:
      return verify_rows<Half>(p, results, scratch, begin, end);
  }
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kernels{scratch_bytes, verify};
  return kernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::speculative
