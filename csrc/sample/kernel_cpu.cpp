// Sampling without a sort: see README.md beside this file for the algorithm.
//
// The loops are plain loops that the compiler vectorises for each instruction set. They may be split and
// reordered at will, since every sum is one of integers; only `compact` needs intrinsics.
#include <cmath>

#include "common/inverse_cdf.h"
#include "common/philox.h"
#include "common/row_state_vec.h"
#include "common/vec.h"
#include "sample/compact.h"
#include "sample/exact.h"
#include "sample/params.h"

namespace arcore::sample {
namespace ARCORE_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // tokens that are loaded and mixed at once
constexpr int64_t kFew = 16;      // entries that are compared one with another
constexpr int64_t kSpan = 256;    // keys that are cut into groups
constexpr int64_t kGroups = 16;   // groups of a span: every 16th key

int64_t padded(int64_t n) {
  return round_up(n, 16);
}

// What one thread works in; arrays have padded(vocab) entries.
struct Workspace {
  int32_t *key, *index, *keep, *other_key, *active_key;
  float *e, *active_e;
  uint64_t* mass;
  int32_t* count;  // of each token in the history; all zero between rows

  Workspace(void* memory, int64_t vocab) {
    const int64_t n = padded(vocab);
    mass = static_cast<uint64_t*>(memory);
    key = reinterpret_cast<int32_t*>(mass + n);
    index = key + n;
    keep = index + n;
    other_key = keep + n;
    active_key = other_key + n;
    e = reinterpret_cast<float*>(active_key + n);
    active_e = e + n;
    count = reinterpret_cast<int32_t*>(active_e + n);
  }
};

int64_t workspace_bytes(int64_t vocab) {
  return round_up(padded(vocab) * (8 + 8 * 4), 64);
}

// The tokens of a row that are still possible, in vocabulary order.
struct Row {
  int64_t n;
  int32_t low, high;  // smallest and largest key
  float top;          // the logit whose e is 1
  float steepness;    // exact.h
  bool whole;         // no token has gone: token i is entry i, and `index` is not written
  bool grouped;       // other_key holds the largest keys of groups
  bool weighed;       // e, sum and top are those of the current tokens
  bool infinite;      // the tokens are those whose logits are +inf
  int64_t sum;        // of the masses
};

struct Scalars {
  double temperature, top_p, min_p, typical_p, epsilon, eta;
  int64_t top_k;
  float steepness, repetition, presence, frequency;
  bool greedy, valid;
  const double* weights;
};

Scalars scalars_of(const Problem& p, int64_t row) {
  const double* s = p.settings + row * p.settings_stride;
  Scalars out;
  out.temperature = s[kTemperature];
  out.greedy = out.temperature < kLowestTemperature;
  out.valid = settings_hold(s, p.num_sources);
  out.steepness = steepness_of(out.greedy ? 1.0 : out.temperature);
  out.top_k = s[kTopK] >= 1.0 && s[kTopK] < static_cast<double>(p.vocab) ? static_cast<int64_t>(s[kTopK]) : 0;
  out.top_p = s[kTopP];
  out.min_p = s[kMinP];
  out.typical_p = s[kTypicalP];
  out.epsilon = s[kEpsilon];
  out.eta = s[kEta];
  out.repetition = static_cast<float>(s[kRepetition]);
  out.presence = static_cast<float>(s[kPresence]);
  out.frequency = static_cast<float>(s[kFrequency]);
  out.weights = s + kWeights;
  return out;
}

struct Place {
  int64_t outer, inner;
};

template <typename T>
const T* row_of(const View& view, Place at) {
  return static_cast<const T*>(view.data) + at.outer * view.outer + at.inner * view.inner;
}

template <typename T>
const float* load_as(const T* row, int64_t stride, int64_t begin, int64_t n, float* buffer) {
  if (stride == 1) {
    to_float(row + begin, buffer, n);
    return buffer;
  }
  for (int64_t i = 0; i < n; ++i)
    buffer[i] = static_cast<float>(row[(begin + i) * stride]);
  return buffer;
}

// n numbers from `begin` on, in place if they lie there as they are wanted.
const float* load_source(const View& view, Place at, int64_t begin, int64_t n, float* buffer) {
  switch (view.dtype) {
    case StorageType::kBFloat16:
      return load_as(row_of<BFloat16>(view, at), view.last, begin, n, buffer);
    case StorageType::kFloat16:
      return load_as(row_of<Half>(view, at), view.last, begin, n, buffer);
    default:
      if (view.last == 1) return row_of<float>(view, at) + begin;
      return load_as(row_of<float>(view, at), view.last, begin, n, buffer);
  }
}

void mix_guided(const float* ARCORE_RESTRICT first, const float* ARCORE_RESTRICT other, int64_t n, float w0,
                float w1, float* ARCORE_RESTRICT mixed) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = other[i] == -INFINITY ? first[i] : other[i];
    const float y = __builtin_fmaf(w1, x, w0 * first[i]);
    mixed[i] = first[i] == -INFINITY ? -INFINITY : y;
  }
}

// The mixed logits of n tokens from `begin` on. A token that source 0 forbids (-inf) stays forbidden; one
// that a source of negative weight forbids gets source 0's logit in its place, for its own would be infinite.
const float* load_mixed(const Problem& p, const double* weights, Place at, int64_t begin, int64_t n,
                        float* ARCORE_RESTRICT mixed, float* first_buffer, float* buffer) {
  const float* first = load_source(p.sources[0], at, begin, n, first_buffer);
  const float w0 = static_cast<float>(weights[0]);
  bool changed = w0 != 1.0f;
  for (int s = 1; s < p.num_sources; ++s)
    changed |= weights[s] != 0.0;
  if (!changed) return first;
  if (p.num_sources == 2 && weights[1] < 0.0) {
    // Guidance: the same in one pass.
    const float* x = load_source(p.sources[1], at, begin, n, buffer);
    mix_guided(first, x, n, w0, static_cast<float>(weights[1]), mixed);
    return mixed;
  }
  for (int64_t i = 0; i < n; ++i)
    mixed[i] = w0 * first[i];
  for (int s = 1; s < p.num_sources; ++s) {
    const float w = static_cast<float>(weights[s]);
    if (w == 0.0f) continue;
    const float* x = load_source(p.sources[s], at, begin, n, buffer);
    if (w < 0.0f)
      for (int64_t i = 0; i < n; ++i)
        mixed[i] = __builtin_fmaf(w, x[i] == -INFINITY ? first[i] : x[i], mixed[i]);
    else
      for (int64_t i = 0; i < n; ++i)
        mixed[i] = __builtin_fmaf(w, x[i], mixed[i]);
  }
  for (int64_t i = 0; i < n; ++i)
    mixed[i] = first[i] == -INFINITY ? -INFINITY : mixed[i];
  return mixed;
}

float mixed_logit(const Problem& p, const double* weights, Place at, int64_t token) {
  float mixed, first, other;
  return *load_mixed(p, weights, at, token, 1, &mixed, &first, &other);
}

float bias_of(const Problem& p, Place at, int64_t token) {
  return p.bias.data == nullptr ? 0.0f : row_of<float>(p.bias, at)[token * p.bias.last];
}

bool is_allowed(const Problem& p, Place at, int64_t token) {
  if (p.mask.data == nullptr) return true;
  if (!p.mask_is_packed) return row_of<uint8_t>(p.mask, at)[token * p.mask.last] != 0;
  return row_of<uint32_t>(p.mask, at)[(token / 32) * p.mask.last] >> (token % 32) & 1;
}

// load_mixed plus bias; the result may lie in `mixed`.
const float* load_biased(const Problem& p, const double* weights, Place at, int64_t begin, int64_t n,
                         float* mixed, float* first_buffer, float* buffer) {
  const float* x = load_mixed(p, weights, at, begin, n, mixed, first_buffer, buffer);
  if (p.bias.data == nullptr) return x;
  const float* bias = row_of<float>(p.bias, at) + begin * p.bias.last;
  for (int64_t i = 0; i < n; ++i)
    mixed[i] = x[i] + bias[i * p.bias.last];
  return mixed;
}

void apply_mask(const Problem& p, Place at, int64_t begin, int64_t n, int32_t* ARCORE_RESTRICT key) {
  if (!p.mask_is_packed) {
    const uint8_t* allowed = row_of<uint8_t>(p.mask, at) + begin * p.mask.last;
    if (p.mask.last == 1)
      for (int64_t i = 0; i < n; ++i)
        key[i] = allowed[i] ? key[i] : kKeyNegInf;
    else
      for (int64_t i = 0; i < n; ++i)
        key[i] = allowed[i * p.mask.last] ? key[i] : kKeyNegInf;
    return;
  }
  const uint32_t* words = row_of<uint32_t>(p.mask, at);
  for (int64_t i = 0; i < n; i += 32) {
    const uint32_t word = words[(begin + i) / 32 * p.mask.last];
    const int64_t end = min_of<int64_t>(n - i, 32);
    for (int64_t j = 0; j < end; ++j)
      key[i + j] = word >> j & 1 ? key[i + j] : kKeyNegInf;
  }
}

// Repetition, frequency and presence penalties: the few tokens that occur are computed anew and written by
// `write(token, logit)`.
template <typename Write>
void apply_penalties(const Problem& p, const Scalars& s, Place at, int32_t* count, const Write& write) {
  // The low bit says that a token occurs anywhere; the others count it in the history.
  const auto scan = [&](const View& ids, int64_t length, const auto& visit) {
    if (ids.data == nullptr) return;
    const int64_t* id = row_of<int64_t>(ids, at);
    for (int64_t i = 0; i < length; ++i)
      if (const int64_t token = id[i * ids.last]; token >= 0 && token < p.vocab) visit(token);
  };
  scan(p.prompt, p.prompt_length, [&](int64_t token) { count[token] |= 1; });
  scan(p.history, p.history_length, [&](int64_t token) { count[token] = (count[token] | 1) + 2; });
  const auto penalise = [&](int64_t token) {
    if (count[token] == 0) return;
    const int32_t times = count[token] >> 1;
    count[token] = 0;
    if (!is_allowed(p, at, token)) return;
    float x = mixed_logit(p, s.weights, at, token) + bias_of(p, at, token);
    x = x < 0.0f ? x * s.repetition : x / s.repetition;
    x = x - s.frequency * static_cast<float>(times);
    x = x - (times > 0 ? s.presence : 0.0f);
    write(token, x);
  };
  scan(p.prompt, p.prompt_length, penalise);
  scan(p.history, p.history_length, penalise);
}

void find_range(const int32_t* key, int64_t n, Row& row) {
  int32_t low = 0x7fffffff, high = kKeyPad;
  for (int64_t i = 0; i < n; ++i) {
    low = key[i] < low ? key[i] : low;
    high = key[i] > high ? key[i] : high;
  }
  row.low = low;
  row.high = high;
}

// The largest key of each group of spans.
void find_largest(const int32_t* ARCORE_RESTRICT key, int64_t spans, int32_t* ARCORE_RESTRICT largest) {
  for (int64_t b = 0; b < spans; ++b) {
    int32_t top[kGroups];
    for (int64_t j = 0; j < kGroups; ++j)
      top[j] = key[b * kSpan + j];
    for (int64_t i = kGroups; i < kSpan; i += kGroups)
      for (int64_t j = 0; j < kGroups; ++j) {
        const int32_t x = key[b * kSpan + i + j];
        top[j] = x > top[j] ? x : top[j];
      }
    for (int64_t j = 0; j < kGroups; ++j)
      largest[b * kGroups + j] = top[j];
  }
}

// Whether the largest keys of groups say enough about the k largest keys of n.
bool groups_help(int64_t n, int64_t k) {
  return n / kSpan * kGroups >= 8 * k;
}

void load_row(const Problem& p, const Scalars& s, Place at, const Workspace& w, Row& row) {
  alignas(64) float mixed[kBlock], first[kBlock], other[kBlock];
  row = {p.vocab, 0x7fffffff, kKeyPad, 0.0f, s.steepness, true, false, false, false, 0};
  row.grouped = s.top_k > 0 && !s.greedy && groups_help(p.vocab, s.top_k);
  for (int64_t begin = 0; begin < p.vocab; begin += kBlock) {
    const int64_t n = min_of(kBlock, p.vocab - begin);
    const float* x = load_biased(p, s.weights, at, begin, n, mixed, first, other);
    int32_t* ARCORE_RESTRICT key = w.key + begin;
    for (int64_t i = 0; i < n; ++i)
      key[i] = key_of(x[i]);
    if (p.mask.data != nullptr) apply_mask(p, at, begin, n, key);
    Row part;
    find_range(key, n, part);
    row.low = min_of(row.low, part.low);
    row.high = max_of(row.high, part.high);
    // While the keys are in the cache.
    if (row.grouped) find_largest(key, n / kSpan, w.other_key + begin / kSpan * kGroups);
  }
  if (p.history.data != nullptr || p.prompt.data != nullptr) {
    apply_penalties(p, s, at, w.count, [&](int64_t token, float x) { w.key[token] = key_of(x); });
    find_range(w.key, p.vocab, row);
    if (row.grouped) find_largest(w.key, p.vocab / kSpan, w.other_key);
  }
}

int64_t mass_of(float e, float scale) {
  return static_cast<int64_t>(e * scale);
}

int64_t sum_masses(const float* e, int64_t n, float scale) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i)
    sum += mass_of(e[i], scale);
  return sum;
}

// e[i] = exp((logit - top) / temperature), where top is the largest logit of the row.
void weigh(Row& row, const Workspace& w, float scale) {
  if (row.weighed) return;
  row.top = value_of(row.high);
  row.sum = 0;
  const float top = kQuarter * row.top, steepness = row.steepness;
  // A block at a time, so that its sum finds it in the cache.
  for (int64_t begin = 0; begin < row.n; begin += kBlock) {
    const int64_t n = min_of(kBlock, row.n - begin);
    const int32_t* ARCORE_RESTRICT key = w.key + begin;
    float* ARCORE_RESTRICT e = w.e + begin;
    for (int64_t i = 0; i < n; ++i)
      e[i] = exp_of((kQuarter * value_of(key[i]) - top) * steepness);
    row.sum += sum_masses(e, n, scale);
  }
  row.weighed = true;
}

// -log(e), up to rounding. Beyond 88, where e is 0, the distance may overflow.
float surprise_of(const Row& row, int32_t key) {
  return min_of((kQuarter * row.top - kQuarter * value_of(key)) * row.steepness, 88.0f);
}

// Drops the tokens that `select` does not keep. The others keep their e unless the likeliest has gone.
template <typename Select>
void drop(Row& row, const Workspace& w, float scale, const Select& select) {
  const int64_t before = row.n;
  const int32_t* index = row.whole ? nullptr : w.index;
  if (row.weighed)
    row.n = compact<3>(before, select, {w.key, index, reinterpret_cast<const int32_t*>(w.e)},
                       {w.key, w.index, reinterpret_cast<int32_t*>(w.e)});
  else
    row.n = compact<2>(before, select, {w.key, index}, {w.key, w.index});
  row.whole = false;
  row.grouped = false;
  if (row.n == before) return;
  find_range(w.key, row.n, row);
  if (!row.weighed) return;
  row.weighed = value_of(row.high) == row.top;
  if (row.weighed) row.sum = sum_masses(w.e, row.n, scale);
  weigh(row, w, scale);
}

int64_t token_of(const Row& row, const Workspace& w, int64_t i) {
  return row.whole ? i : w.index[i];
}

struct Above {
  int64_t count, mass;
};

// For three pivots, what lies above each.
template <bool kMass>
void count_above(const int32_t* ARCORE_RESTRICT key, const uint64_t* ARCORE_RESTRICT mass, int64_t n,
                 const int32_t (&pivot)[3], Above (&above)[3]) {
  const int32_t p0 = pivot[0], p1 = pivot[1], p2 = pivot[2];
  int64_t c0 = 0, c1 = 0, c2 = 0, m0 = 0, m1 = 0, m2 = 0;
  // Counts of a block fit into 32 bits, of which a vector holds twice as many.
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = min_of(begin + kBlock, n);
    int32_t b0 = 0, b1 = 0, b2 = 0;
    for (int64_t i = begin; i < end; ++i) {
      b0 += key[i] > p0;
      b1 += key[i] > p1;
      b2 += key[i] > p2;
    }
    c0 += b0;
    c1 += b1;
    c2 += b2;
    if constexpr (kMass)
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = static_cast<int64_t>(mass[i]);
        m0 += key[i] > p0 ? m : 0;
        m1 += key[i] > p1 ? m : 0;
        m2 += key[i] > p2 ? m : 0;
      }
  }
  above[0] = {c0, kMass ? m0 : c0};
  above[1] = {c1, kMass ? m1 : c1};
  above[2] = {c2, kMass ? m2 : c2};
}

// Three pivots that quarter [low, high): by value while that narrows the range fast, then by bits, which ends
// after 16 rounds whatever the numbers are.
void choose_pivots(int32_t low, int32_t high, int round, int32_t (&pivot)[3]) {
  const float x = value_of(low), width = value_of(high) - x;
  const bool by_value = round < 4 && width > 0.0f && width < INFINITY;
  for (int j = 0; j < 3; ++j) {
    const float part = 0.25f * static_cast<float>(j + 1);
    const int64_t bits = low + (static_cast<int64_t>(high) - low) * (j + 1) / 4;
    const int64_t wanted = by_value ? key_of(x + width * part) : bits;
    pivot[j] = static_cast<int32_t>(min_of<int64_t>(max_of<int64_t>(wanted, low), int64_t{high} - 1));
  }
}

// The threshold among a few entries, one by one; see find_threshold. `limit` is what may lie above it of
// these.
template <bool kMass>
int32_t threshold_of_few(const int32_t* ARCORE_RESTRICT key, const uint64_t* ARCORE_RESTRICT mass, int64_t n,
                         int32_t low, int64_t limit) {
  int32_t threshold = 0x7fffffff;
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    total += kMass ? static_cast<int64_t>(mass[i]) : 1;
    int64_t above = 0;
    for (int64_t j = 0; j < n; ++j)
      above += key[j] > key[i] ? (kMass ? static_cast<int64_t>(mass[j]) : 1) : 0;
    if (above < limit && key[i] < threshold) threshold = key[i];
  }
  return total < limit ? low : threshold;
}

// The smallest threshold t in [low, high], or an equivalent one, such that the tokens with key > t weigh less
// than `limit` >= 1: with kMass their masses, else their number. A token is in if key >= t, that is, if what
// is strictly above it weighs less than the limit; ties are in or out together. All n keys lie in [low,
// high]; key and e are not changed.
template <bool kMass>
int32_t find_threshold(const int32_t* key, const float* e, int64_t n, int32_t low, int32_t high,
                       int64_t limit, float scale, const Workspace& w) {
  int64_t outside = 0;     // weight of what was set aside, all of it above `high`
  int64_t from_low = n;    // entries with key >= low
  Above above_high{0, 0};  // entries with key > high
  bool fresh = true;       // the entries have changed
  for (int round = 0; low < high; ++round) {
    if (kMass && fresh)
      for (int64_t i = 0; i < n; ++i)
        w.mass[i] = static_cast<uint64_t>(mass_of(e[i], scale));
    fresh = false;
    if (n <= kFew) return threshold_of_few<kMass>(key, w.mass, n, low, limit - outside);
    int32_t pivot[3];
    choose_pivots(low, high, round, pivot);
    Above above[3];
    count_above<kMass>(key, w.mass, n, pivot, above);
    int below = 0;  // how many pivots are below the threshold
    while (below < 3 && outside + above[below].mass >= limit)
      ++below;
    if (below > 0) {
      low = pivot[below - 1] + 1;
      from_low = above[below - 1].count;
    }
    if (below < 3) {
      high = pivot[below];
      above_high = above[below];
    }
    const int64_t inside = from_low - above_high.count;
    if (inside == 0) return low;
    if (inside * 4 > n) continue;
    const Between range{key, n, low, high};
    if constexpr (kMass)
      compact<2>(n, range, {key, reinterpret_cast<const int32_t*>(e)},
                 {w.active_key, reinterpret_cast<int32_t*>(w.active_e)});
    else
      compact<1>(n, range, {key}, {w.active_key});
    key = w.active_key;
    e = w.active_e;
    outside += above_high.mass;
    above_high = {0, 0};
    n = from_low = inside;
    fresh = true;
  }
  return low;
}

// A key that at least k of the row's tokens reach, for a k that is small beside their number; else row.low: k
// of the groups have a largest key that is not below the k-th largest of the largest keys.
int32_t at_least_largest(const Row& row, int64_t k, const Workspace& w) {
  if (!groups_help(row.n, k)) return row.low;
  const int64_t spans = row.n / kSpan;
  if (!row.grouped) find_largest(w.key, spans, w.other_key);
  Row range;
  find_range(w.other_key, spans * kGroups, range);
  return find_threshold<false>(w.other_key, nullptr, spans * kGroups, range.low, range.high, k, 0.0f, w);
}

// Drops the tokens below `low` of a row that is whole, grouped and not weighed. Spans without any other are
// not read.
void drop_below(Row& row, const Workspace& w, int32_t low) {
  int64_t kept = 0;
  for (int64_t begin = 0; begin < row.n; begin += kSpan) {
    const int64_t n = min_of(kSpan, row.n - begin);
    bool some = n < kSpan;  // the last keys have no groups
    for (int64_t j = 0; j < kGroups && !some; ++j)
      some = w.other_key[begin / kSpan * kGroups + j] >= low;
    if (!some) continue;
    const int32_t* key = w.key + begin;
    kept += compact<2>(n, Between{key, n, low, 0x7fffffff}, {key, nullptr}, {w.key + kept, w.index + kept},
                       begin);
  }
  row.n = kept;
  row.whole = false;
  row.grouped = false;
  find_range(w.key, row.n, row);
}

// The weight that a nucleus of share p reaches: the first integer not below p * sum, at least 1.
int64_t limit_of(double p, int64_t sum) {
  const double wanted = std::ceil(p * static_cast<double>(sum));
  return wanted > 1.0 ? static_cast<int64_t>(wanted) : 1;
}

// What a filter does with its verdict: drop the rejected tokens at once, so that the next one sees the rest,
// or only note them, so that all see the same tokens.
struct Verdict {
  const Workspace& w;
  float scale;
  bool joint;

  void require_key(Row& row, const int32_t* key, int32_t threshold) const {
    if (!joint) return drop(row, w, scale, Between{key, row.n, threshold, 0x7fffffff});
    for (int64_t i = 0; i < row.n; ++i)
      w.keep[i] &= key[i] >= threshold ? -1 : 0;
  }

  // Keeps e >= threshold, and the likeliest tokens in any case.
  void require_weight(Row& row, double threshold) const {
    float at_least = static_cast<float>(threshold);
    if (static_cast<double>(at_least) < threshold) at_least = std::nextafter(at_least, INFINITY);
    if (!joint) mark_all(row);
    for (int64_t i = 0; i < row.n; ++i)
      w.keep[i] &= (w.e[i] >= at_least || w.key[i] == row.high) ? -1 : 0;
    if (!joint) drop(row, w, scale, Marked{w.keep, row.n});
  }

  void mark_all(const Row& row) const {
    for (int64_t i = 0; i < row.n; ++i)
      w.keep[i] = -1;
  }
};

void filter_top_k(Row& row, const Workspace& w, const Scalars& s, const Verdict& verdict) {
  if (s.top_k >= row.n) return;
  const int32_t low = at_least_largest(row, s.top_k, w);
  if (low > row.low && !verdict.joint) {
    // Few are left, all of the k largest among them.
    if (row.grouped && row.whole && !row.weighed)
      drop_below(row, w, low);
    else
      drop(row, w, verdict.scale, Between{w.key, row.n, low, 0x7fffffff});
  }
  verdict.require_key(row, w.key,
                      find_threshold<false>(w.key, nullptr, row.n, row.low, row.high, s.top_k, 0.0f, w));
}

void filter_top_p(Row& row, const Workspace& w, const Scalars& s, const Verdict& verdict) {
  weigh(row, w, verdict.scale);
  const int64_t limit = limit_of(s.top_p, row.sum);
  verdict.require_key(row, w.key,
                      find_threshold<true>(w.key, w.e, row.n, row.low, row.high, limit, verdict.scale, w));
}

void filter_min_p(Row& row, const Workspace& w, const Scalars& s, const Verdict& verdict) {
  weigh(row, w, verdict.scale);
  verdict.require_weight(row, s.min_p);
}

// Sum of the masses of e * -log(e), the part of the entropy that depends on the tokens: the entropy is
// log(sum) + this / sum.
int64_t sum_surprises(const Row& row, const Workspace& w, float scale) {
  int64_t sum = 0;
  for (int64_t i = 0; i < row.n; ++i)
    sum += mass_of(w.e[i] * surprise_of(row, w.key[i]), scale);
  return sum;
}

float mean_surprise(const Row& row, const Workspace& w, float scale) {
  return static_cast<float>(static_cast<double>(sum_surprises(row, w, scale)) / static_cast<double>(row.sum));
}

// |-log p - entropy| is |log e + mean surprise|: the logarithm of the sum cancels.
void filter_typical(Row& row, const Workspace& w, const Scalars& s, const Verdict& verdict) {
  weigh(row, w, verdict.scale);
  const float mean = mean_surprise(row, w, verdict.scale);
  for (int64_t i = 0; i < row.n; ++i)
    w.other_key[i] =
        -bits_of(std::fabs((kQuarter * value_of(w.key[i]) - kQuarter * row.top) * row.steepness + mean));
  Row range;
  find_range(w.other_key, row.n, range);
  const int64_t limit = limit_of(s.typical_p, row.sum);
  verdict.require_key(
      row, w.other_key,
      find_threshold<true>(w.other_key, w.e, row.n, range.low, range.high, limit, verdict.scale, w));
}

void filter_epsilon(Row& row, const Workspace& w, const Scalars& s, const Verdict& verdict) {
  weigh(row, w, verdict.scale);
  verdict.require_weight(row,
                         s.epsilon * (static_cast<double>(row.sum) / static_cast<double>(verdict.scale)));
}

void filter_eta(Row& row, const Workspace& w, const Scalars& s, const Verdict& verdict) {
  weigh(row, w, verdict.scale);
  const double total = static_cast<double>(row.sum) / static_cast<double>(verdict.scale);
  // exp(-entropy) = exp(-mean surprise) / total.
  const float mean = mean_surprise(row, w, verdict.scale);
  const double flat = std::sqrt(s.eta) * (static_cast<double>(exp_of(-mean)) / total);
  verdict.require_weight(row, (flat < s.eta ? flat : s.eta) * total);
}

void filter_row(const Problem& p, const Scalars& s, Row& row, const Workspace& w, float scale) {
  const bool joint = p.order == Order::kJoint, min_p_first = p.order == Order::kVllm;
  const Verdict verdict{w, scale, joint};
  if (joint) {
    weigh(row, w, scale);
    verdict.mark_all(row);
  }
  if (min_p_first && s.min_p > 0.0) filter_min_p(row, w, s, verdict);
  if (s.top_k > 0) filter_top_k(row, w, s, verdict);
  if (s.top_p < 1.0) filter_top_p(row, w, s, verdict);
  if (!min_p_first && s.min_p > 0.0) filter_min_p(row, w, s, verdict);
  if (s.typical_p < 1.0) filter_typical(row, w, s, verdict);
  if (s.epsilon > 0.0) filter_epsilon(row, w, s, verdict);
  if (s.eta > 0.0) filter_eta(row, w, s, verdict);
  if (!joint) return;
  int32_t any = 0;
  for (int64_t i = 0; i < row.n; ++i)
    any |= w.keep[i];
  // Filters that are tested apart may have no token in common; then the likeliest stay.
  if (any == 0) return drop(row, w, scale, Between{w.key, row.n, row.high, row.high});
  drop(row, w, scale, Marked{w.keep, row.n});
}

int64_t first_with_key(const Row& row, const Workspace& w, int32_t key) {
  int64_t i = 0;
  while (i < row.n && w.key[i] != key)
    ++i;
  return i;
}

// From the logits to the tokens that may be drawn, weighed. False: the row has no distribution.
bool process_row(const Problem& p, const Scalars& s, Place at, const Workspace& w, float scale, Row& row) {
  if (!s.valid || p.vocab == 0) return false;
  load_row(p, s, at, w, row);
  if (row.high > kKeyPosInf || row.low < kKeyNegInf || row.high == kKeyNegInf) return false;
  if (row.high == kKeyPosInf) {
    // The limit of ever larger logits: those that are infinite share the mass.
    row.infinite = true;
    row.grouped = false;
    for (int64_t i = 0; i < row.n; ++i)
      w.key[i] = w.key[i] == kKeyPosInf ? kKeyZero : kKeyNegInf;
    find_range(w.key, row.n, row);
  }
  if (s.greedy) {
    const int64_t best = first_with_key(row, w, row.high);
    w.index[0] = static_cast<int32_t>(token_of(row, w, best));
    w.key[0] = row.high;
    row.n = 1;
    row.whole = false;
  } else {
    if (row.low == kKeyNegInf) drop(row, w, scale, Between{w.key, row.n, kKeyNegInf + 1, 0x7fffffff});
    filter_row(p, s, row, w, scale);
  }
  weigh(row, w, scale);
  return true;
}

// The sum of e[i] * norm in fixed point; that of block b also goes to blocks[b].
uint64_t total_mass(const float* e, int64_t n, float norm, uint64_t* blocks) {
  uint64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = min_of(begin + kBlock, n);
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; ++i)
      sum += fixed_point(e[i] * norm);
    blocks[begin / kBlock] = sum;
    total += sum;
  }
  return total;
}

// inverse_cdf over the numbers e[i] * norm, of which it holds a block at a time.
int64_t draw_by_inverse_cdf(const Row& row, const Workspace& w, float norm, const uint64_t* blocks,
                            uint64_t level) {
  int64_t begin = 0;
  for (; blocks[begin / kBlock] <= level; begin += kBlock)
    level -= blocks[begin / kBlock];
  alignas(64) float prob[kBlock];
  const int64_t n = min_of(kBlock, row.n - begin);
  for (int64_t i = 0; i < n; ++i)
    prob[i] = w.e[begin + i] * norm;
  return begin + walk_to_level(prob, n, level);
}

// The first of exponential waiting times of rates p: the same law as the Gumbel maximum, one logarithm less.
int64_t draw_by_noise(const Problem& p, const Row& row, const Workspace& w, float norm, int64_t seed,
                      int64_t offset, int64_t draw) {
  int64_t best = 0;
  double shortest = INFINITY;
  for (int64_t i = 0; i < row.n; ++i) {
    const double prob = static_cast<double>(w.e[i] * norm);
    if (prob == 0.0) continue;
    const uint64_t bits = random_bits(seed, offset, Stream::kGumbel, draw * p.vocab + token_of(row, w, i));
    const double time = -std::log(uniform_open(bits)) / prob;
    if (time < shortest) {
      shortest = time;
      best = i;
    }
  }
  return best;
}

// Adds up a row that lies in `y`, which has room for padded(vocab) numbers.
RowState sum_row(float* y, int64_t vocab, double inverse_temperature) {
  for (int64_t i = vocab; i < padded(vocab); ++i)
    y[i] = -INFINITY;
  RowState state = kEmptyRow;
  for (int64_t begin = 0; begin < vocab; begin += kRowBlock) {
    const int64_t n = round_up(min_of(kRowBlock, vocab - begin), kLanes);
    add_block(y + begin, n, max_of_block(y + begin, n), inverse_temperature, false, &state);
  }
  return state;
}

// Log-probabilities of drawn tokens, by the rule that token_logprobs has: it gives the same bits for the same
// logits, kept set and temperature. Only arrays that the search alone uses are written.
struct LogProbs {
  const float* y;
  double inverse_temperature;
  RowState state;

  float of(int64_t token) const {
    RowState s = state;
    s.target = y[token];
    return static_cast<float>(log_prob(s, inverse_temperature));
  }
};

// Of the mixed logits.
LogProbs raw_logprobs(const Problem& p, const Scalars& s, Place at, const Workspace& w) {
  alignas(64) float mixed[kBlock], first[kBlock], other[kBlock];
  auto* y = reinterpret_cast<float*>(w.active_key);
  for (int64_t begin = 0; begin < p.vocab; begin += kBlock) {
    const int64_t n = min_of(kBlock, p.vocab - begin);
    const float* x = load_mixed(p, s.weights, at, begin, n, mixed, first, other);
    std::memcpy(y + begin, x, static_cast<size_t>(n) * sizeof(float));
  }
  return {y, 1.0, sum_row(y, p.vocab, 1.0)};
}

// Of the kept tokens, from their logits before temperature.
LogProbs processed_logprobs(const Problem& p, const Scalars& s, Place at, const Row& row,
                            const Workspace& w) {
  alignas(64) float mixed[kBlock], first[kBlock], other[kBlock];
  float *all = w.active_e, *kept = all;
  for (int64_t begin = 0; begin < p.vocab; begin += kBlock) {
    const int64_t n = min_of(kBlock, p.vocab - begin);
    const float* x = load_biased(p, s.weights, at, begin, n, mixed, first, other);
    std::memcpy(all + begin, x, static_cast<size_t>(n) * sizeof(float));
  }
  if (p.history.data != nullptr || p.prompt.data != nullptr)
    apply_penalties(p, s, at, w.count, [&](int64_t token, float x) { all[token] = x; });
  if (!row.whole) {
    kept = reinterpret_cast<float*>(w.mass);
    for (int64_t i = 0; i < p.vocab; ++i)
      kept[i] = -INFINITY;
    for (int64_t i = 0; i < row.n; ++i)
      kept[w.index[i]] = all[w.index[i]];
  }
  const double inverse_temperature = inverse_of(s.temperature);
  return {kept, inverse_temperature, sum_row(kept, p.vocab, inverse_temperature)};
}

void write_invalid(const Problem& p, const Draws& draws, const Outputs& out, int64_t row_number) {
  const int64_t words = (p.vocab + 31) / 32;
  out.valid[row_number] = 0;
  if (out.entropy) out.entropy[row_number] = NAN;
  if (out.kept) std::memset(out.kept + row_number * words, 0, static_cast<size_t>(words) * 4);
  if (out.probs) std::memset(out.probs + row_number * p.vocab, 0, static_cast<size_t>(p.vocab) * 4);
  for (int64_t d = 0; d < draws.count; ++d) {
    const int64_t at = row_number * draws.count + d;
    if (out.tokens) out.tokens[at] = -1;
    if (out.prob) out.prob[at] = NAN;
    if (out.logprob) out.logprob[at] = NAN;
    if (out.raw_logprob) out.raw_logprob[at] = NAN;
  }
}

void write_distribution(const Problem& p, const Outputs& out, const Row& row, const Workspace& w, float norm,
                        float scale, int64_t row_number) {
  out.valid[row_number] = 1;
  if (out.entropy) {
    const double total = static_cast<double>(row.sum) / static_cast<double>(scale);
    const double surprises = static_cast<double>(sum_surprises(row, w, scale)) / static_cast<double>(scale);
    out.entropy[row_number] = static_cast<float>(std::log(total) + surprises / total);
  }
  if (out.kept) {
    const int64_t words = (p.vocab + 31) / 32;
    auto* kept = reinterpret_cast<uint32_t*>(out.kept + row_number * words);
    std::memset(kept, 0, static_cast<size_t>(words) * 4);
    for (int64_t i = 0; i < row.n; ++i) {
      const int64_t token = token_of(row, w, i);
      kept[token / 32] |= 1u << (token % 32);
    }
  }
  if (out.probs == nullptr) return;
  float* probs = out.probs + row_number * p.vocab;
  if (row.whole) {
    for (int64_t i = 0; i < row.n; ++i)
      probs[i] = w.e[i] * norm;
    return;
  }
  std::memset(probs, 0, static_cast<size_t>(p.vocab) * 4);
  for (int64_t i = 0; i < row.n; ++i)
    probs[w.index[i]] = w.e[i] * norm;
}

void write_draws(const Problem& p, const Scalars& s, const Draws& draws, const Outputs& out, Place at,
                 const Row& row, const Workspace& w, float norm, int64_t row_number) {
  const int64_t seed = draws.seeds[row_number * draws.seed_stride];
  const int64_t offset = draws.offsets[row_number * draws.offset_stride];
  // Sums of blocks; only an array that the search alone uses is written.
  auto* blocks = reinterpret_cast<uint64_t*>(w.other_key);
  const uint64_t total = draws.mode == Mode::kInverseCdf ? total_mass(w.e, row.n, norm, blocks) : 0;
  // Tokens that share all the mass, whatever their logits are.
  const bool even = row.infinite || s.greedy;
  const auto even_logprob = static_cast<float>(std::log(1.0 / static_cast<double>(row.n)));
  const LogProbs raw = out.raw_logprob ? raw_logprobs(p, s, at, w) : LogProbs{};
  const LogProbs processed = out.logprob && !even ? processed_logprobs(p, s, at, row, w) : LogProbs{};
  for (int64_t d = 0; d < draws.count; ++d) {
    int64_t i = 0;
    switch (draws.mode) {
      case Mode::kInverseCdf:
        i = draw_by_inverse_cdf(row, w, norm, blocks,
                                level_of(random_bits(seed, offset, Stream::kSample, d), total));
        break;
      case Mode::kGumbel:
        i = draw_by_noise(p, row, w, norm, seed, offset, d);
        break;
      case Mode::kGreedy:
        i = first_with_key(row, w, row.high);
        break;
    }
    const int64_t token = token_of(row, w, i), place = row_number * draws.count + d;
    out.tokens[place] = token;
    if (out.prob) out.prob[place] = w.e[i] * norm;
    if (out.logprob) out.logprob[place] = even ? even_logprob : processed.of(token);
    if (out.raw_logprob) out.raw_logprob[place] = raw.of(token);
  }
}

void run(const Problem& p, const Draws& draws, const Outputs& out, void* workspace, int64_t begin,
         int64_t end) {
  const Workspace w(workspace, p.vocab);
  const auto scale = static_cast<float>(static_cast<double>(int64_t{1} << mass_bits(p.vocab)));
  if (p.history.data != nullptr || p.prompt.data != nullptr)
    std::memset(w.count, 0, static_cast<size_t>(p.vocab) * 4);
  for (int64_t r = begin; r < end; ++r) {
    const Place at{r / p.inner, r % p.inner};
    const Scalars s = scalars_of(p, r);
    Row row;
    if (!process_row(p, s, at, w, scale, row)) {
      write_invalid(p, draws, out, r);
      continue;
    }
    const auto norm = static_cast<float>(static_cast<double>(scale) / static_cast<double>(row.sum));
    write_distribution(p, out, row, w, norm, scale, r);
    if (out.tokens) write_draws(p, s, draws, out, at, row, w, norm, r);
  }
}

// NaN is the least confident of all.
int32_t confidence_key(float x) {
  return x != x ? kKeyPad + 1 : key_of(x);
}

void select_least(const Selection& sel, void* workspace, int64_t begin, int64_t end) {
  const Workspace w(workspace, sel.length);
  for (int64_t r = begin; r < end; ++r) {
    const float* confidence = sel.confidence + r * sel.length;
    uint8_t* chosen = sel.chosen + r * sel.length;
    const uint8_t* candidate = sel.candidates == nullptr ? nullptr : sel.candidates + r * sel.length;
    // Complements, so that the least confident has the largest key.
    Row row{};
    for (int64_t i = 0; i < sel.length; ++i) {
      float x = confidence[i];
      if (sel.temperature != 0.0) {
        const uint64_t bits = random_bits(sel.seeds[r * sel.seed_stride], sel.offsets[r * sel.offset_stride],
                                          Stream::kConfidence, i);
        x = static_cast<float>(x - sel.temperature * std::log(-std::log(uniform_open(bits))));
      }
      w.key[row.n] = ~confidence_key(x);
      w.index[row.n] = static_cast<int32_t>(i);
      row.n += candidate == nullptr || candidate[i] != 0;
    }
    for (int64_t i = 0; i < sel.length; ++i)
      chosen[i] = 0;
    const int64_t wanted = min_of(max_of<int64_t>(sel.count[r * sel.count_stride], 0), row.n);
    if (wanted == 0) continue;
    find_range(w.key, row.n, row);
    const int32_t cut = find_threshold<false>(w.key, nullptr, row.n, row.low, row.high, wanted, 0.0f, w);
    int64_t above = 0, tied = 0;
    for (int64_t i = 0; i < row.n; ++i) {
      above += w.key[i] > cut;
      tied += w.key[i] == cut;
    }
    int64_t of_tied = wanted - above;
    if (sel.ties == Ties::kAll) of_tied = tied;
    if (sel.ties == Ties::kNone && of_tied < tied) of_tied = 0;
    for (int64_t i = 0; i < row.n; ++i) {
      const bool is_tied = w.key[i] == cut;
      chosen[w.index[i]] = w.key[i] > cut || (is_tied && of_tied > 0);
      of_tied -= is_tied;
    }
  }
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{workspace_bytes, run, select_least};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::sample
