// CPU forward and backward; compiled once per instruction set. The formulas and the numerics are in README.md
// beside this file.
#include <cmath>
#include <cstring>
#include <limits>

#include "common/row_state_vec.h"
#include "common/vec.h"
#include "token_logprobs/params.h"

namespace arcore::token_logprobs {
namespace ARCORE_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t offset_of(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset + row * rows.strides[0];
}

// kLanes bits that tell which columns from `column` on are kept; all of them must exist.
template <MaskKind kMask>
uint32_t kept_bits(const void* mask, int64_t column) {
  if constexpr (kMask == MaskKind::kBool) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; i += 8) {
      uint64_t bytes;
      std::memcpy(&bytes, static_cast<const char*>(mask) + column + i, 8);
      // The product moves the low bit of byte j to bit 56 + j.
      bits |= static_cast<uint32_t>((bytes & 0x0101010101010101u) * 0x0102040810204080u >> 56) << i;
    }
    return bits;
  } else {
    static_assert(32 % kLanes == 0);
    return static_cast<const uint32_t*>(mask)[column >> 5] >> (column & 31);
  }
}

template <MaskKind kMask>
bool is_kept(const void* mask, int64_t column) {
  if constexpr (kMask == MaskKind::kNone) return true;
  if constexpr (kMask == MaskKind::kBool) return static_cast<const bool*>(mask)[column];
  return static_cast<const uint32_t*>(mask)[column >> 5] >> (column & 31) & 1u;
}

// dst[i] = y of column `begin + i` for i in [0, n), -inf where it is not kept and up to a multiple of kLanes;
// returns the maximum, where a NaN may be overlooked. `logits` starts at the tile's first column, `mask` at
// the row's.
template <typename T, bool kSoftcap, MaskKind kMask>
float stage(const Problem& p, const void* logits, const void* mask, int64_t begin, int64_t n, float* dst) {
  const T* src = static_cast<const T*>(logits) + begin;
  const int64_t column = p.first_column + begin;
  const Vec cap(static_cast<float>(p.softcap)), inverse_cap(static_cast<float>(1.0 / p.softcap));
  const Vec none(-kInfinity);
  Vec highest = none;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec y = load_lanes(src + i);
    if constexpr (kSoftcap) y = cap * tanh(y * inverse_cap);
    if constexpr (kMask != MaskKind::kNone) y = keep_bits(kept_bits<kMask>(mask, column + i), y, none);
    store(dst + i, y);
    highest = max(highest, y);
  }
  if (i < n) {
    float rest[kLanes] = {};
    for (int64_t j = i; j < n; ++j)
      rest[j - i] = static_cast<float>(src[j]);
    Vec y = load(rest);
    if constexpr (kSoftcap) y = cap * tanh(y * inverse_cap);
    y = keep_lanes(y, 0, n - i, none);
    y.store(rest);
    for (int64_t j = i; j < n; ++j)
      if (!is_kept<kMask>(mask, column + j)) rest[j - i] = -kInfinity;
    y = load(rest);
    store(dst + i, y);
    highest = max(highest, y);
  }
  return reduce_max(highest);
}

using Stage = float (*)(const Problem&, const void*, const void*, int64_t, int64_t, float*);

template <typename T, bool kSoftcap>
Stage stage_for_mask(MaskKind kind) {
  switch (kind) {
    case MaskKind::kBool:
      return stage<T, kSoftcap, MaskKind::kBool>;
    case MaskKind::kBits:
      return stage<T, kSoftcap, MaskKind::kBits>;
    default:
      return stage<T, kSoftcap, MaskKind::kNone>;
  }
}

template <typename T>
Stage stage_for(const Problem& p) {
  return p.softcap != 0.0 ? stage_for_mask<T, true>(p.mask_kind) : stage_for_mask<T, false>(p.mask_kind);
}

Stage stage_for(const Problem& p) {
  switch (p.dtype) {
    case StorageType::kBFloat16:
      return stage_for<BFloat16>(p);
    case StorageType::kFloat16:
      return stage_for<Half>(p);
    default:
      return stage_for<float>(p);
  }
}

// The columns of one row, block by block, as y values.
struct RowReader {
  const Problem& problem;
  const Stage stage;
  const bool in_place;  // whole vectors of float32 logits need no staging
  const char* logits = nullptr;
  const char* mask = nullptr;
  int64_t element;
  alignas(64) float staged[kRowBlock];

  explicit RowReader(const Problem& p)
      : problem(p),
        stage(stage_for(p)),
        in_place(p.dtype == StorageType::kFloat32 && p.softcap == 0.0 && p.mask_kind == MaskKind::kNone),
        element(p.dtype == StorageType::kFloat32 ? 4 : 2) {}

  void open(const Rows& rows, int64_t row) {
    logits = static_cast<const char*>(rows.data) + offset_of(rows, row) * element;
    if (problem.mask_kind != MaskKind::kNone)
      mask = static_cast<const char*>(problem.mask.data) +
             offset_of(problem.mask, row) * (problem.mask_kind == MaskKind::kBits ? 4 : 1);
  }

  bool reads_in_place(int64_t n) const { return in_place && n % kLanes == 0; }

  // n columns from `begin` on, padded with -inf to whole vectors, and their maximum.
  const float* block(int64_t begin, int64_t n, float* highest) {
    if (reads_in_place(n)) {
      const float* y = reinterpret_cast<const float*>(logits) + begin;
      *highest = max_of_block(y, n);
      return y;
    }
    *highest = stage(problem, logits, mask, begin, n, staged);
    return staged;
  }
  const float* block(int64_t begin, int64_t n) {
    if (reads_in_place(n)) return reinterpret_cast<const float*>(logits) + begin;
    stage(problem, logits, mask, begin, n, staged);
    return staged;
  }
  float at(int64_t column) {
    stage(problem, logits, mask, column, 1, staged);
    return staged[0];
  }
};

// A row whose temperature or softcap has no room in float32, column by column in float64.
template <typename T>
struct ExactRow {
  const Problem& p;
  const T* logits;
  const void* mask;

  ExactRow(const Problem& problem, const Rows& rows, int64_t row)
      : p(problem), logits(static_cast<const T*>(rows.data) + offset_of(rows, row)), mask(nullptr) {
    if (p.mask_kind != MaskKind::kNone)
      mask = static_cast<const char*>(p.mask.data) +
             offset_of(p.mask, row) * (p.mask_kind == MaskKind::kBits ? 4 : 1);
  }

  double logit(int64_t column) const { return static_cast<double>(static_cast<float>(logits[column])); }
  double y(int64_t column) const {
    const int64_t at = p.first_column + column;
    if (p.mask_kind == MaskKind::kBool && !is_kept<MaskKind::kBool>(mask, at)) return -HUGE_VAL;
    if (p.mask_kind == MaskKind::kBits && !is_kept<MaskKind::kBits>(mask, at)) return -HUGE_VAL;
    return p.softcap != 0.0 ? p.softcap * std::tanh(logit(column) / p.softcap) : logit(column);
  }
  // Of y by the logit.
  double slope(int64_t column) const {
    const double t = p.softcap != 0.0 ? std::tanh(logit(column) / p.softcap) : 0.0;
    return 1.0 - t * t;
  }
};

bool is_moderate(const Problem& p, double inverse_temperature) {
  return arcore::is_moderate(inverse_temperature) && (p.softcap == 0.0 || arcore::is_moderate(p.softcap));
}

template <typename T>
void update_exact(const UpdateArgs& args, int64_t row, double inverse_temperature, RowState* state) {
  const Problem& p = args.problem;
  const ExactRow<T> exact(p, args.logits, row);
  double y[kRowBlock];
  for (int64_t at = 0; at < p.columns; at += kRowBlock) {
    const int64_t n = min_of(kRowBlock, p.columns - at);
    for (int64_t i = 0; i < n; ++i)
      y[i] = exact.y(at + i);
    add_block_exact(y, n, inverse_temperature, args.entropy, state);
  }
  const int64_t target = p.target[row] - p.first_column;
  if (target >= 0 && target < p.columns) state->target = exact.y(target);
}

double temperature_of(const Problem& p, int64_t row) {
  return p.temperature_rows != nullptr ? static_cast<double>(p.temperature_rows[row]) : p.temperature;
}

void update(const UpdateArgs& args, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  RowReader reader(p);
  for (int64_t row = begin; row < end; ++row) {
    RowState state = p.first_column == 0 ? kEmptyRow : args.state[row];
    const double inverse_temperature = inverse_of(temperature_of(p, row));
    if (p.target[row] == p.ignore_index) {
      args.state[row] = state;
      continue;
    }
    if (is_moderate(p, inverse_temperature)) {
      reader.open(args.logits, row);
      for (int64_t at = 0; at < p.columns; at += kRowBlock) {
        const int64_t n = min_of(kRowBlock, p.columns - at);
        float highest;
        const float* y = reader.block(at, n, &highest);
        add_block(y, round_up(n, kLanes), highest, inverse_temperature, args.entropy, &state);
      }
      const int64_t target = p.target[row] - p.first_column;
      if (target >= 0 && target < p.columns) state.target = reader.at(target);
    } else if (p.dtype == StorageType::kBFloat16) {
      update_exact<BFloat16>(args, row, inverse_temperature, &state);
    } else if (p.dtype == StorageType::kFloat16) {
      update_exact<Half>(args, row, inverse_temperature, &state);
    } else {
      update_exact<float>(args, row, inverse_temperature, &state);
    }
    args.state[row] = state;
  }
}

double entropy_of(const RowState& s) {
  const double entropy = std::log(s.sum) - s.weighted / s.sum;
  return entropy < 0.0 ? 0.0 : entropy;
}
// Nothing kept, or everything -inf.
bool is_empty(const RowState& s) {
  return s.sum == 0.0;
}

void finish(const FinishArgs& args, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  for (int64_t row = begin; row < end; ++row) {
    const RowState& s = args.state[row];
    const double inverse_temperature = inverse_of(temperature_of(p, row));
    float logp = -kInfinity, logsumexp = -kInfinity, entropy = 0.0f;
    if (p.target[row] == p.ignore_index) {
      logp = logsumexp = 0.0f;
    } else if (!is_empty(s)) {
      logp = static_cast<float>(log_prob(s, inverse_temperature));
      logsumexp = static_cast<float>(s.max * inverse_temperature + std::log(s.sum));
      entropy = static_cast<float>(entropy_of(s));
    }
    args.logp[row] = logp;
    args.logsumexp[row] = logsumexp;
    if (args.entropy != nullptr) args.entropy[row] = entropy;
  }
}

// Adds a block of at most kRowBlock values, padded with -inf to whole vectors, with its maximum.
void add_tally(const float* y, int64_t n, int64_t first_column, float highest, Tally* tally) {
  const Vec lowest(std::numeric_limits<float>::lowest()), zero(0.0f), one(1.0f);
  Vec sum[4] = {zero, zero, zero, zero}, count[4] = {zero, zero, zero, zero};
  auto add = [&](int j, const float* from) {
    const Vec value = load(from);
    sum[j] = sum[j] + where_less(value, lowest, zero, value);
    count[j] = count[j] + where_less(value, lowest, zero, one);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j)
      add(j, y + i + j * kLanes);
  for (; i < n; i += kLanes)
    add(0, y + i);
  tally->sum += static_cast<double>(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])));
  tally->count += static_cast<double>(reduce_add((count[0] + count[1]) + (count[2] + count[3])));
  if (static_cast<double>(highest) > tally->best) {
    int64_t at = 0;
    while (at + 1 < n && y[at] != highest)
      ++at;
    tally->best = static_cast<double>(highest);
    tally->column = static_cast<double>(first_column + at);
  }
}

template <typename T>
void tally_exact(const TallyArgs& args, int64_t row, Tally* tally) {
  const Problem& p = args.problem;
  const ExactRow<T> exact(p, args.logits, row);
  for (int64_t column = 0; column < p.columns; ++column) {
    const double y = exact.y(column);
    if (y == -HUGE_VAL) continue;
    tally->sum += y;
    tally->count += 1.0;
    if (y > tally->best) {
      tally->best = y;
      tally->column = static_cast<double>(p.first_column + column);
    }
  }
}

void tally(const TallyArgs& args, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  RowReader reader(p);
  for (int64_t row = begin; row < end; ++row) {
    Tally found = p.first_column == 0 ? Tally{0.0, 0.0, -HUGE_VAL, -1.0} : args.tally[row];
    if (p.target[row] != p.ignore_index) {
      if (p.softcap == 0.0 || arcore::is_moderate(p.softcap)) {
        reader.open(args.logits, row);
        for (int64_t at = 0; at < p.columns; at += kRowBlock) {
          const int64_t n = min_of(kRowBlock, p.columns - at);
          float highest;
          const float* y = reader.block(at, n, &highest);
          add_tally(y, round_up(n, kLanes), p.first_column + at, highest, &found);
        }
      } else if (p.dtype == StorageType::kBFloat16) {
        tally_exact<BFloat16>(args, row, &found);
      } else if (p.dtype == StorageType::kFloat16) {
        tally_exact<Half>(args, row, &found);
      } else {
        tally_exact<float>(args, row, &found);
      }
    }
    args.tally[row] = found;
  }
}

// Gradient of one row without its target's own term: (e^d * (constant - slope * d) + flat) * (1 - (y /
// cap)^2), with flat where y is above -inf.
struct RowGrad {
  float shift, inverse_temperature, constant, slope, inverse_cap, flat;
};

// Returns the sum of d times the gradient before softcap and without flat, if kMoment.
template <bool kEntropy, bool kSoftcap, bool kMoment, bool kFlat>
double grad_block(const RowGrad& g, const float* y, int64_t n, float* grad) {
  const Vec center(g.shift), scale(g.inverse_temperature), lowest(kExpIsZero);
  const Vec constant(g.constant), slope(-g.slope), inverse_cap(g.inverse_cap), one(1.0f);
  const Vec flat(g.flat), none(std::numeric_limits<float>::lowest());
  Vec moment(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec value = load(y + i);
    const Vec d = (value - center) * scale;
    Vec out = exp(d) * (kEntropy ? fma(slope, max(lowest, d), constant) : constant);
    if constexpr (kMoment) moment = fma(max(lowest, d), out, moment);
    if constexpr (kFlat) out = out + where_less(value, none, Vec(0.0f), flat);
    if constexpr (kSoftcap) {
      const Vec t = max(Vec(-1.0f), value * inverse_cap);
      out = out * fma(Vec(0.0f) - t, t, one);
    }
    store(grad + i, out);
  }
  return kMoment ? static_cast<double>(reduce_add(moment)) : 0.0;
}

using GradBlock = double (*)(const RowGrad&, const float*, int64_t, float*);

template <bool kFlat>
GradBlock grad_block_for(bool entropy, bool softcap, bool moment) {
  static constexpr GradBlock kTable[2][2][2] = {
      {{grad_block<false, false, false, kFlat>, grad_block<false, false, true, kFlat>},
       {grad_block<false, true, false, kFlat>, grad_block<false, true, true, kFlat>}},
      {{grad_block<true, false, false, kFlat>, grad_block<true, false, true, kFlat>},
       {grad_block<true, true, false, kFlat>, grad_block<true, true, true, kFlat>}}};
  return kTable[entropy][softcap][moment];
}

double value_or_zero(const float* values, int64_t row) {
  return values != nullptr ? static_cast<double>(values[row]) : 0.0;
}

// Below, in float64. dz is 0 where p is; products with the others are finite or beyond float32.
template <typename T>
void backward_exact(const BackwardArgs& args, int64_t row, T* grad, double level, double grad_logp,
                    double grad_lse, double grad_entropy, double grad_mean, double inverse_temperature) {
  const Problem& p = args.problem;
  const RowState& s = args.state[row];
  const double flat = grad_mean == 0.0 ? 0.0 : grad_mean / args.tally[row].count;
  const ExactRow<T> exact(p, args.logits, row);
  const double log_sum = std::log(s.sum);
  const int64_t target = p.target[row] - p.first_column;
  double moment = p.first_column == 0 ? (grad_lse + grad_mean) * s.max * inverse_temperature : 0.0;
  for (int64_t column = 0; column < p.columns; ++column) {
    const double y = exact.y(column);
    const double d = (y - s.max) * inverse_temperature, probability = std::exp(d) / s.sum;
    double dz = probability == 0.0 ? 0.0 : probability * (level - grad_entropy * (d - log_sum));
    if (y != -HUGE_VAL) dz += flat;
    if (column == target) dz += grad_logp;
    if (dz != 0.0) moment += dz * d;
    const double slope = exact.slope(column);
    grad[column] = static_cast<T>(
        static_cast<float>(dz == 0.0 || slope == 0.0 ? 0.0 : dz * slope * inverse_temperature));
  }
  if (args.grad_temperature != nullptr)
    args.grad_temperature[row] = static_cast<float>(moment == 0.0 ? 0.0 : -moment * inverse_temperature);
}

template <typename T>
void backward_rows(const BackwardArgs& args, int64_t begin, int64_t end) {
  const Problem& p = args.problem;
  RowReader reader(p);
  alignas(64) float computed[kRowBlock];
  for (int64_t row = begin; row < end; ++row) {
    T* grad = static_cast<T*>(args.grad.data) + offset_of(args.grad, row);
    const RowState& s = args.state[row];
    const double temperature = temperature_of(p, row), inverse_temperature = inverse_of(temperature);
    // A target outside of the kept set has a log-probability of -inf whatever the logits are.
    const double grad_logp = s.target == -kInfinity ? 0.0 : value_or_zero(args.grad_logp, row);
    const double grad_lse = value_or_zero(args.grad_logsumexp, row);
    const double grad_entropy = value_or_zero(args.grad_entropy, row);
    const double grad_mean = value_or_zero(args.grad_mean, row);
    const bool unused = grad_logp == 0.0 && grad_lse == 0.0 && grad_entropy == 0.0 && grad_mean == 0.0;
    if (p.target[row] == p.ignore_index || is_empty(s) || unused) {
      std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(p.columns) * sizeof(T));
      if (args.grad_temperature != nullptr) args.grad_temperature[row] = 0.0f;
      continue;
    }
    // dz = p * (level - grad_entropy * log p) + grad_logp at the target, with z = y / temperature.
    const double log_sum = std::log(s.sum);
    const double level =
        grad_lse - grad_logp - (grad_entropy == 0.0 ? 0.0 : grad_entropy * (log_sum - s.weighted / s.sum));
    if (!is_moderate(p, inverse_temperature)) {
      backward_exact<T>(args, row, grad, level, grad_logp, grad_lse, grad_entropy, grad_mean,
                        inverse_temperature);
      continue;
    }
    const double scale = inverse_temperature / s.sum;
    const double flat = grad_mean == 0.0 ? 0.0 : grad_mean / args.tally[row].count;
    const RowGrad g{static_cast<float>(s.max),
                    static_cast<float>(inverse_temperature),
                    static_cast<float>((level + grad_entropy * log_sum) * scale),
                    static_cast<float>(grad_entropy * scale),
                    p.softcap != 0.0 ? static_cast<float>(1.0 / p.softcap) : 0.0f,
                    static_cast<float>(flat * inverse_temperature)};
    const bool entropy = grad_entropy != 0.0, softcap = p.softcap != 0.0;
    const bool with_moment = args.grad_temperature != nullptr;
    const GradBlock block = flat != 0.0 ? grad_block_for<true>(entropy, softcap, with_moment)
                                        : grad_block_for<false>(entropy, softcap, with_moment);
    reader.open(args.logits, row);
    double moment = 0.0;
    for (int64_t at = 0; at < p.columns; at += kRowBlock) {
      const int64_t n = min_of(kRowBlock, p.columns - at);
      const float* y = reader.block(at, n);
      if constexpr (sizeof(T) == sizeof(float)) {
        if (n % kLanes == 0) {
          moment += block(g, y, n, grad + at);
          continue;
        }
      }
      moment += block(g, y, round_up(n, kLanes), computed);
      from_float(computed, grad + at, n);
    }
    double target_share = 0.0;
    const int64_t target = p.target[row] - p.first_column;
    if (grad_logp != 0.0 && target >= 0 && target < p.columns) {
      const double logp = log_prob(s, inverse_temperature),
                   ratio = s.target * static_cast<double>(g.inverse_cap);
      const double dz = std::exp(logp) * (level - grad_entropy * logp) + grad_logp + flat;
      grad[target] = static_cast<T>(static_cast<float>(dz * inverse_temperature * (1.0 - ratio * ratio)));
      target_share = grad_logp * (s.target - s.max) * inverse_temperature;
    }
    if (args.grad_temperature != nullptr) {
      // sum dz * z: the target's share, what the blocks added (they carry 1 / temperature), and, once per
      // row, the shift by max, since all dz of a row add up to grad_lse.
      double total = target_share + moment * temperature;
      if (p.first_column == 0) {
        total += grad_lse * s.max * inverse_temperature;
        if (flat != 0.0) total += flat * args.tally[row].sum * inverse_temperature;
      }
      args.grad_temperature[row] = static_cast<float>(-total * inverse_temperature);
    }
  }
}

void backward(const BackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.problem.dtype) {
    case StorageType::kBFloat16:
      return backward_rows<BFloat16>(args, begin, end);
    case StorageType::kFloat16:
      return backward_rows<Half>(args, begin, end);
    default:
      return backward_rows<float>(args, begin, end);
  }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{update, finish, backward, tally};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::token_logprobs
