// The least confident positions of a row, by a block.
#pragma once

#include "common/philox.h"
#include "common/sm80/launch.h"
#include "sample/row_sm80.cuh"

namespace arcore::sample {

// Keys are complements, so that the least confident has the largest.
template <int kThreads, Home kHome>
ARCORE_DEVICE void select_row(const SelectCuda& cuda) {
  const Selection& sel = cuda.selection;
  auto* scratch = reinterpret_cast<Scratch*>(shared_memory());
  const int64_t number = block_x();
  const float* confidence = sel.confidence + number * sel.length;
  uint8_t* chosen = sel.chosen + number * sel.length;
  int32_t* keys = reinterpret_cast<int32_t*>(scratch + 1);
  if constexpr (kHome == Home::kGlobal) keys = cuda.keys + number * key_stride(sel.length);
  Row<kThreads, kHome> row(keys, 0, sel.length, *scratch, 1.0f, 1.0f);
  for (int i = row.begin + row.lane; i < round_up(row.end, 8); i += 32) {
    if (i >= row.end) {
      // What pads the last eight of the row; elsewhere the next warp's tokens begin at a multiple of 8.
      row.key[i] = kKeyPad;
      continue;
    }
    chosen[i] = 0;
    float x = confidence[i];
    if (sel.temperature != 0.0) {
      const uint64_t bits = random_bits(sel.seeds[number * sel.seed_stride],
                                        sel.offsets[number * sel.offset_stride], Stream::kConfidence, i);
      x = static_cast<float>(add_rounded(static_cast<double>(x),
                                         -multiply_rounded(sel.temperature, log(-log(uniform_open(bits))))));
    }
    const bool candidate = sel.candidates == nullptr || sel.candidates[number * sel.length + i] != 0;
    // NaN is the least confident of all.
    row.key[i] = candidate ? ~(x != x ? kKeyPad + 1 : key_of(x)) : kKeyPad;
  }
  sync_threads();
  row.refresh();
  const int64_t asked = sel.count[number * sel.count_stride];
  const int64_t wanted = asked < 0 ? 0 : asked < row.range.count ? asked : row.range.count;
  if (wanted == 0) return;
  auto limit = [&](uint64_t) { return static_cast<uint64_t>(wanted); };
  // An equivalent threshold need not be a key; the cut is the smallest key that reaches it.
  const int32_t reached = row.find_threshold(row.range, limit, false, {});
  uint64_t least = ~uint64_t{0};
  row.each_left([&](int, int32_t k) {
    const uint64_t biased = static_cast<uint32_t>(k) ^ 0x80000000u;
    if (k >= reached && biased < least) least = biased;
  });
  const int32_t cut = static_cast<int32_t>(static_cast<uint32_t>(row.least_of_all(least)) ^ 0x80000000u);
  uint64_t parts[2] = {0, 0};
  row.each_left([&](int, int32_t k) {
    parts[0] += k > cut;
    parts[1] += k == cut;
  });
  row.combine(parts, [](int, uint64_t a, uint64_t b) { return a + b; });
  const int64_t tied = static_cast<int64_t>(parts[1]);
  int64_t of_tied = wanted - static_cast<int64_t>(parts[0]);
  if (sel.ties == Ties::kAll) of_tied = tied;
  if (sel.ties == Ties::kNone && of_tied < tied) of_tied = 0;
  if (row.warp != 0) return;
  for (int64_t begin = 0; begin < sel.length; begin += 32) {
    const int64_t i = begin + row.lane;
    const int32_t k = i < sel.length ? row.key[i] : kKeyPad;
    const uint32_t ties = ballot(k != kKeyPad && k == cut);
    const int before = count_bits(ties & ((1u << row.lane) - 1u));
    if (i < sel.length && k != kKeyPad && (k > cut || (k == cut && before < of_tied))) chosen[i] = 1;
    of_tied -= count_bits(ties);
  }
}

ARCORE_LAUNCH_BOUNDS(kShortThreads, 2)
ARCORE_KERNEL select_short_rows(ARCORE_KERNEL_ARGS SelectCuda cuda) {
  select_row<kShortThreads, Home::kShared>(cuda);
}
ARCORE_LAUNCH_BOUNDS(kLongThreads, 1)
ARCORE_KERNEL select_rows(ARCORE_KERNEL_ARGS SelectCuda cuda) {
  select_row<kLongThreads, Home::kShared>(cuda);
}
ARCORE_LAUNCH_BOUNDS(kLongThreads, 1)
ARCORE_KERNEL select_long_rows(ARCORE_KERNEL_ARGS SelectCuda cuda) {
  select_row<kLongThreads, Home::kGlobal>(cuda);
}

}  // namespace arcore::sample
