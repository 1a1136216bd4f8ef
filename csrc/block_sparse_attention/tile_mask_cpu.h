// Which pairs of a query tile and a key tile are allowed, for the CPU kernels.
//
// Included by kernel_cpu.cpp, which is compiled once per instruction set.
#pragma once

#include "block_sparse_attention/params.h"
#include "common/vec.h"

namespace arcore::block_sparse_attention {
namespace ARCORE_ISA {
namespace {

// Query rows and keys of one tile: its packed keys and values stay in the second-level cache while the row
// groups of the query tile pass over them. The backward also keeps two tiles of logits there. Rows of a group
// are computed together, in steps of columns.
#if defined(ARCORE_BF16_UNIT)
constexpr int kTileQ = 192, kForwardTileK = 512, kTileK = 256;
#if defined(ARCORE_AMX)
constexpr int kGroupRows = 16;
#else
constexpr int kGroupRows = 12;
#endif
constexpr int kColumnStep = 32;
#else
constexpr int kTileQ = 96, kTileK = 256;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kForwardTileK = 512;
#else
constexpr int kForwardTileK = 256;
#endif
constexpr int kGroupRows = kMaxRows, kColumnStep = kLanes;
#endif
static_assert(kTileQ % kGroupRows == 0 && kTileK % kPanel == 0 && kForwardTileK % kPanel == 0);
// One cache line more than a power of two, so that the rows of a tile do not compete for the same cache sets.
constexpr int kForwardTileStride = kForwardTileK + 16;
constexpr int kTileStride = kTileK + 16;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Span {
  int64_t lo = 0, hi = 0;
  bool empty() const { return lo >= hi; }
  bool covers(int64_t begin, int64_t end) const { return lo <= begin && hi >= end; }
};

Span intersect(Span a, Span b) {
  const Span s{max_of(a.lo, b.lo), min_of(a.hi, b.hi)};
  return s.empty() ? Span{} : s;
}
Span hull(Span a, Span b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {min_of(a.lo, b.lo), max_of(a.hi, b.hi)};
}

// The key ranges of one query row: disjoint, ascending.
struct RowSpans {
  Span first, second;
};

RowSpans row_spans(const Problem& p, int64_t b, int64_t h, int64_t row) {
  const MaskBounds& m = p.mask;
  const int32_t* bounds = m.bounds + b * m.batch + h * m.head + row * 2 * m.intervals;
  const Span keys{0, p.nk};
  RowSpans spans{intersect({bounds[0], bounds[1]}, keys), {}};
  if (m.intervals == 2) {
    Span other = intersect({bounds[2], bounds[3]}, keys);
    if (spans.first.empty() || (!other.empty() && other.lo < spans.first.lo)) {
      const Span swapped = spans.first;
      spans.first = other;
      other = swapped;
    }
    if (!other.empty() && other.lo <= spans.first.hi)
      spans.first.hi = max_of(spans.first.hi, other.hi);
    else
      spans.second = other;
  }
  return spans;
}

// What one query tile and one key tile have in common. Key positions are relative to the key tile.
struct TileMask {
  const Problem* problem;
  int64_t batch;
  int64_t q0, k0;
  int rows, keys;
  RowSpans spans[kTileQ];
  int groups;
  int group_begin[kTileQ + 1];  // rows [group_begin[g], group_begin[g + 1]) are computed together
  Span group_spans[kTileQ][2];  // hulls of the group's first and second spans
  // Set by enter_key_tile:
  Span columns[kTileQ];  // keys that some row of the group may see
  Span any;              // hull of all groups
  bool use_key_bounds;   // some (row, key) of the tile is ruled out by the per-key query ranges
  int64_t tree;          // column of the tree's first node, or no column of the tile

  int group_rows(int g) const { return group_begin[g + 1] - group_begin[g]; }

  void enter_query_tile(const Problem& p, int64_t b, int64_t h, int64_t row) {
    problem = &p;
    batch = b;
    q0 = row;
    rows = static_cast<int>(min_of<int64_t>(kTileQ, p.nq - row));
    for (int r = 0; r < rows; ++r)
      spans[r] = row_spans(p, b, h, q0 + r);
    // A group ends after kGroupRows rows, or before a row at which the spans jump to a new level (a scale, a
    // block, a document) and stay there: one group for both levels would compute the keys of both for all its
    // rows.
    groups = 0;
    group_begin[0] = 0;
    for (int r = 1; r <= rows; ++r) {
      const bool level_begins = r < rows && jumps(r) && (r + 1 == rows || !jumps(r + 1));
      if (r < rows && r - group_begin[groups] < kGroupRows && !level_begins) continue;
      Span first, second;
      for (int i = group_begin[groups]; i < r; ++i) {
        first = hull(first, spans[i].first);
        second = hull(second, spans[i].second);
      }
      group_spans[groups][0] = first;
      group_spans[groups][1] = second;
      group_begin[++groups] = r;
    }
  }

  static bool far(Span a, Span b) {
    return a.lo - b.lo > kLanes || b.lo - a.lo > kLanes || a.hi - b.hi > kLanes || b.hi - a.hi > kLanes;
  }
  bool jumps(int r) const {
    return far(spans[r - 1].first, spans[r].first) || far(spans[r - 1].second, spans[r].second);
  }

  const int32_t* key_ranges() const {
    return problem->mask.key_bounds + batch * problem->mask.key_batch + 2 * k0;
  }

  // False if the two tiles share no allowed pair (or none that a row group can reach).
  bool enter_key_tile(int64_t key, int64_t tile) {
    k0 = key;
    keys = static_cast<int>(min_of<int64_t>(tile, problem->nk - key));
    any = {};
    Span visible{k0, k0 + keys};
    bool reachable = false;
    for (int g = 0; g < groups && !reachable; ++g)
      reachable =
          !intersect(group_spans[g][0], visible).empty() || !intersect(group_spans[g][1], visible).empty();
    if (!reachable) return false;
    tree = keys_before_tree(key);
    use_key_bounds = false;
    if (problem->mask.key_bounds != nullptr) {
      const int32_t* ranges = key_ranges();
      Span seen;
      for (int j = 0; j < keys; ++j) {
        const Span queries{ranges[2 * j], ranges[2 * j + 1]};
        if (!intersect(queries, {q0, q0 + rows}).empty()) seen = hull(seen, {k0 + j, k0 + j + 1});
        use_key_bounds |= !queries.covers(q0, q0 + rows);
      }
      visible = intersect(visible, seen);
    }
    for (int g = 0; g < groups; ++g) {
      const Span s = hull(intersect(group_spans[g][0], visible), intersect(group_spans[g][1], visible));
      columns[g] = s.empty() ? Span{} : Span{s.lo - k0, s.hi - k0};
      any = hull(any, columns[g]);
    }
    return !any.empty();
  }

  // The group's columns widened to whole steps: what is computed of a row of logits.
  Span computed(int g) const {
    if (columns[g].empty()) return {};
    return {columns[g].lo / kColumnStep * kColumnStep, round_up(columns[g].hi, kColumnStep)};
  }

  bool row_is_full(int r, Span cols) const {
    return !use_key_bounds && cols.hi <= tree &&
           (spans[r].first.covers(k0 + cols.lo, k0 + cols.hi) ||
            spans[r].second.covers(k0 + cols.lo, k0 + cols.hi));
  }

  bool allowed(int r, int64_t column) const {
    const int64_t key = k0 + column;
    const bool in_spans = (key >= spans[r].first.lo && key < spans[r].first.hi) ||
                          (key >= spans[r].second.lo && key < spans[r].second.hi);
    if (!in_spans || (column >= tree && (tree_bits(r, column) & 1u) == 0)) return false;
    if (!use_key_bounds) return true;
    const int32_t* range = key_ranges() + 2 * column;
    return range[0] <= q0 + r && q0 + r < range[1];
  }

  // Whether no key outside of the key tile is allowed for row r.
  bool row_ends_here(int r) const {
    const Span all = hull(spans[r].first, spans[r].second), tile{k0, k0 + keys};
    return all.empty() || tile.covers(all.lo, all.hi);
  }

  // x[column] = value on every column of [cols.lo, cols.hi) that row r may not see; cols holds whole vectors.
  void fill_forbidden(int r, Span cols, float* x, float value) const {
    const Span here{k0 + cols.lo, k0 + cols.hi};
    const Span first = intersect(spans[r].first, here), second = intersect(spans[r].second, here);
    if (first.empty() || second.empty()) {
      fill_outside(hull(first, second), cols, x, value);
    } else {
      // The gap between the two, then what lies outside of both.
      for (int64_t j = first.hi; j < second.lo; ++j)
        x[j - k0] = value;
      fill_outside(hull(first, second), cols, x, value);
    }
    for (int64_t j = max_of(cols.lo, tree / kLanes * kLanes); j < cols.hi; j += kLanes)
      store(x + j, keep_bits(tree_bits(r, j), load(x + j), Vec(value)));
    if (use_key_bounds) {
      const int32_t* ranges = key_ranges();
      const int64_t row = q0 + r, end = min_of<int64_t>(cols.hi, keys);
      for (int64_t j = cols.lo; j < end; ++j) {
        const bool seen = ranges[2 * j] <= row && row < ranges[2 * j + 1];
        x[j] = seen ? x[j] : value;
      }
    }
  }

 private:
  int64_t keys_before_tree(int64_t key) const {
    const MaskBounds& m = problem->mask;
    if (m.words == nullptr) return int64_t{1} << 40;
    return max_of<int64_t>(0, m.prefix[batch * m.prefix_batch] - key);
  }

  // Bit i says whether row r may see column j + i as far as the tree is concerned.
  uint32_t tree_bits(int r, int64_t j) const {
    const MaskBounds& m = problem->mask;
    const int64_t* words = m.words + batch * m.words_batch + (q0 + r) * m.words_per_row;
    const int64_t node = k0 + j - m.prefix[batch * m.prefix_batch];
    if (node < 0) {  // keys of the prefix come first
      if (node <= -32) return ~0u;
      const uint32_t prefix = (1u << -node) - 1u;
      return prefix | static_cast<uint32_t>(words[0]) << -node;
    }
    const int64_t at = node / 64, shift = node % 64;
    if (at >= m.words_per_row) return 0;
    uint64_t bits = static_cast<uint64_t>(words[at]) >> shift;
    if (shift != 0 && at + 1 < m.words_per_row) bits |= static_cast<uint64_t>(words[at + 1]) << (64 - shift);
    return static_cast<uint32_t>(bits);
  }

  // Vector by vector: a scalar store just before a vector load of the same line would stall it.
  void fill_outside(Span keep, Span cols, float* x, float value) const {
    const int64_t lo = keep.empty() ? cols.hi : keep.lo - k0, hi = keep.empty() ? cols.hi : keep.hi - k0;
    int64_t j = cols.lo;
    for (; j < lo; j += kLanes)
      store(x + j, keep_lanes(load(x + j), lo - j, hi - j, Vec(value)));
    for (j = max_of(j, hi / kLanes * kLanes); j < cols.hi; j += kLanes)
      store(x + j, keep_lanes(load(x + j), lo - j, hi - j, Vec(value)));
  }
};

}  // namespace
}  // namespace ARCORE_ISA
}  // namespace arcore::block_sparse_attention
