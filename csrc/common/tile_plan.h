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

// Appends the tiles that `kinds` [rows, columns] names; the strides choose the direction.
inline void append_lists(const std::vector<TileKind>& kinds, int64_t rows, int64_t columns,
                         int64_t row_stride, int64_t column_stride, TileLists& lists) {
  std::vector<int32_t> lengths(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    lists.ptr.push_back(static_cast<int32_t>(lists.idx.size()));
    for (int64_t c = 0; c < columns; ++c) {
      const TileKind kind = kinds[static_cast<size_t>(r * row_stride + c * column_stride)];
      if (kind == TileKind::kEmpty) continue;
      lists.idx.push_back(static_cast<int32_t>(c));
      lists.full.push_back(kind == TileKind::kFull);
    }
    if (lists.idx.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
      throw std::invalid_argument(
          "arcore.masks: the tile plan has more than 2^31 - 1 tiles; take larger tiles");
    }
    lengths[static_cast<size_t>(r)] = static_cast<int32_t>(lists.idx.size()) - lists.ptr.back();
  }
  lists.ptr.push_back(static_cast<int32_t>(lists.idx.size()));
  const size_t first = lists.order.size();
  lists.order.resize(first + static_cast<size_t>(rows));
  const auto begin = lists.order.begin() + static_cast<std::ptrdiff_t>(first);
  std::iota(begin, lists.order.end(), 0);
  std::stable_sort(begin, lists.order.end(), [&](int32_t a, int32_t b) {
    return lengths[static_cast<size_t>(a)] > lengths[static_cast<size_t>(b)];
  });
}

}  // namespace detail

inline TilePlan plan_tiles(const IntervalMaskView& mask, int64_t tile_q, int64_t tile_k) {
  const int64_t rows = (mask.nq + tile_q - 1) / tile_q, columns = (mask.nk + tile_k - 1) / tile_k;
  TilePlan plan;
  std::vector<TileKind> kinds(static_cast<size_t>(rows * columns));
  for (int64_t b = 0; b < mask.batch(); ++b) {
    const int32_t* keys = mask.keys(b);
    for (int64_t h = 0; h < mask.heads; ++h) {
      const int32_t* ranges = mask.rows(b, h);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          const Tile tile{r * tile_q, std::min((r + 1) * tile_q, mask.nq), c * tile_k,
                          std::min((c + 1) * tile_k, mask.nk)};
          kinds[static_cast<size_t>(r * columns + c)] = classify_tile(ranges, mask.intervals, keys, tile);
        }
      }
      detail::append_lists(kinds, rows, columns, columns, 1, plan.by_query);
      detail::append_lists(kinds, columns, rows, 1, columns, plan.by_key);
    }
  }
  return plan;
}

}  // namespace arcore
