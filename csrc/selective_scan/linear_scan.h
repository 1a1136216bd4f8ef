// The first-order recurrence h[t] = a[t] h[t - 1] + b[t] over contiguous rows, in the rows' own type.
#pragma once

#include <algorithm>
#include <cstdint>

namespace arcore::selective_scan {

// Rows whose chains of dependent operations overlap.
constexpr int64_t kScanRows = 8;

// `initial` is null (zero before the first step) or one value per row. Each row is computed as it would be
// alone.
template <typename T>
void scan_rows(const T* a, const T* b, const T* initial, T* out, int64_t length, bool reverse, int64_t begin,
               int64_t end) {
  for (int64_t first = begin; first < end; first += kScanRows) {
    const int64_t rows = std::min(kScanRows, end - first);
    T state[kScanRows] = {};
    if (initial != nullptr) std::copy(initial + first, initial + first + rows, state);
    for (int64_t step = 0; step < length; ++step) {
      const int64_t at = first * length + (reverse ? length - 1 - step : step);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = at + r * length;
        state[r] = a[place] * state[r] + b[place];
        out[place] = state[r];
      }
    }
  }
}

}  // namespace arcore::selective_scan
