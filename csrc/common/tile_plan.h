// Which tiles of an interval mask hold an allowed pair. Plain pointers, no torch header; `classify_tile` also
// compiles for devices, so that a planner on the GPU is a thread per tile with the same answer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#ifdef __CUDACC__
#define ARCORE_HOST_DEVICE __host__ __device__
#else
#define ARCORE_HOST_DEVICE
#endif

namespace arcore {

// A contiguous IntervalMask in normal form: the key ranges of a row are sorted, disjoint and not adjacent.
// A batch size of 1 broadcasts.
struct IntervalMaskView {
  const int32_t* bounds;      // [bounds_batch, heads, nq, 2 * intervals]
  const int32_t* key_bounds;  // [key_bounds_batch, nk, 2], or null
  int64_t bounds_batch, key_bounds_batch, heads, nq, nk;
  int intervals;

  ARCORE_HOST_DEVICE int64_t batch() const {
    return bounds_batch > key_bounds_batch ? bounds_batch : key_bounds_batch;
  }
  ARCORE_HOST_DEVICE const int32_t* rows(int64_t b, int64_t h) const {
    return bounds + ((bounds_batch == 1 ? 0 : b) * heads + h) * nq * 2 * intervals;
  }
  ARCORE_HOST_DEVICE const int32_t* keys(int64_t b) const {
    return key_bounds == nullptr ? nullptr : key_bounds + (key_bounds_batch == 1 ? 0 : b) * nk * 2;
  }
};

enum class TileKind : int32_t { kEmpty, kPartial, kFull };

// Queries [q0, q1) and keys [k0, k1), within the mask.
struct Tile {
  int64_t q0, q1, k0, k1;
};

// Exact: kEmpty if no pair of the tile is allowed, kFull if all are.
// `rows` and `keys` are what IntervalMaskView::rows and keys return for the tile's batch entry and head.
ARCORE_HOST_DEVICE inline TileKind classify_tile(const int32_t* rows, int intervals, const int32_t* keys,
                                                 const Tile& t) {
  bool keys_open = true;  // every key may be seen from every row of the tile
  if (keys != nullptr) {
    for (int64_t j = t.k0; j < t.k1 && keys_open; ++j)
      keys_open = keys[2 * j] <= t.q0 && keys[2 * j + 1] >= t.q1;
  }
  bool any = false, all = keys_open;
  for (int64_t i = t.q0; i < t.q1; ++i) {
    const int32_t* range = rows + i * 2 * intervals;
    bool covered = false;
    for (int x = 0; x < intervals; ++x, range += 2) {
      const int64_t lo = range[0] > t.k0 ? range[0] : t.k0;
      const int64_t hi = range[1] < t.k1 ? range[1] : t.k1;
      if (lo >= hi) continue;
      // Ranges are not adjacent: a row that sees the whole tile sees it through one range.
      covered |= lo == t.k0 && hi == t.k1;
      any |= keys_open;
      for (int64_t j = lo; j < hi && !any; ++j)
        any = keys[2 * j] <= i && i < keys[2 * j + 1];
    }
    all &= covered;
    if (any && !all) return TileKind::kPartial;
  }
  return any ? TileKind::kFull : TileKind::kEmpty;
}

// One direction of a plan over grids [batch, heads]: for each row of the grid the ascending list of its
// columns.
struct TileLists {
  std::vector<int32_t> ptr;    // [batch, heads, rows + 1], positions in idx
  std::vector<int32_t> idx;    // columns
  std::vector<int32_t> full;   // 1 where every pair of the tile is allowed
  std::vector<int32_t> order;  // [batch, heads, rows], longest list first, ties ascending
};

struct TilePlan {
  TileLists by_query, by_key;
};

namespace detail {

struct KeySpan {
  int64_t lo, hi;
};

// From the first key that a row of [q0, q1) sees to the last; empty if they see none.
inline KeySpan key_span(const int32_t* rows, int intervals, int64_t q0, int64_t q1) {
  KeySpan span{std::numeric_limits<int32_t>::max(), 0};
  for (const int32_t* range = rows + q0 * 2 * intervals; range != rows + q1 * 2 * intervals; range += 2) {
    if (range[0] >= range[1]) continue;
    span.lo = std::min<int64_t>(span.lo, range[0]);
    span.hi = std::max<int64_t>(span.hi, range[1]);
  }
  return span;
}

inline int32_t position(size_t tiles) {
  if (tiles > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::invalid_argument(
        "arcore.masks: the tile plan has more than 2^31 - 1 tiles; take larger tiles");
  }
  return static_cast<int32_t>(tiles);
}

// The last grid of `from`, which has `rows` rows and `columns` columns, is appended to `to` by columns.
inline void append_transposed(const TileLists& from, int64_t rows, int64_t columns, TileLists& to) {
  const int32_t* ptr = from.ptr.data() + from.ptr.size() - static_cast<size_t>(rows) - 1;
  std::vector<int32_t> next(static_cast<size_t>(columns) + 1);
  next[0] = ptr[0];
  for (int32_t t = ptr[0]; t < ptr[rows]; ++t)
    ++next[static_cast<size_t>(from.idx[t]) + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  to.ptr.insert(to.ptr.end(), next.begin(), next.end());
  to.idx.resize(from.idx.size());
  to.full.resize(from.full.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int32_t t = ptr[r]; t < ptr[r + 1]; ++t) {
      const auto at = static_cast<size_t>(next[from.idx[t]]++);
      to.idx[at] = static_cast<int32_t>(r);
      to.full[at] = from.full[t];
    }
  }
}

// The order of the last grid, which has `rows` rows.
inline void append_order(TileLists& lists, int64_t rows) {
  const int32_t* ptr = lists.ptr.data() + lists.ptr.size() - static_cast<size_t>(rows) - 1;
  lists.order.resize(lists.order.size() + static_cast<size_t>(rows));
  const auto begin = lists.order.end() - static_cast<std::ptrdiff_t>(rows);
  std::iota(begin, lists.order.end(), 0);
  std::stable_sort(begin, lists.order.end(),
                   [&](int32_t a, int32_t b) { return ptr[a + 1] - ptr[a] > ptr[b + 1] - ptr[b]; });
}

}  // namespace detail

// Memory is that of the plan; tiles outside the keys that a query tile sees are not looked at.
inline TilePlan plan_tiles(const IntervalMaskView& mask, int64_t tile_q, int64_t tile_k) {
  const int64_t rows = (mask.nq + tile_q - 1) / tile_q, columns = (mask.nk + tile_k - 1) / tile_k;
  TilePlan plan;
  TileLists& lists = plan.by_query;
  for (int64_t b = 0; b < mask.batch(); ++b) {
    const int32_t* keys = mask.keys(b);
    for (int64_t h = 0; h < mask.heads; ++h) {
      const int32_t* ranges = mask.rows(b, h);
      for (int64_t r = 0; r < rows; ++r) {
        lists.ptr.push_back(detail::position(lists.idx.size()));
        const int64_t q0 = r * tile_q, q1 = std::min(q0 + tile_q, mask.nq);
        const detail::KeySpan span = detail::key_span(ranges, mask.intervals, q0, q1);
        for (int64_t c = span.lo / tile_k; c * tile_k < span.hi; ++c) {
          const Tile tile{q0, q1, c * tile_k, std::min((c + 1) * tile_k, mask.nk)};
          const TileKind kind = classify_tile(ranges, mask.intervals, keys, tile);
          if (kind == TileKind::kEmpty) continue;
          lists.idx.push_back(static_cast<int32_t>(c));
          lists.full.push_back(kind == TileKind::kFull);
        }
      }
      lists.ptr.push_back(detail::position(lists.idx.size()));
      detail::append_transposed(lists, rows, columns, plan.by_key);
      detail::append_order(lists, rows);
      detail::append_order(plan.by_key, columns);
    }
  }
  return plan;
}

}  // namespace arcore
