// Where a producer or a consumer stands in a ring of buffers, each guarded by a "full" and an "empty" barrier
// that count phases by parity. Compiled for CPU and GPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace arcore {

struct StageClock {
  int stage;
  uint32_t parity;  // of the phase to wait for
};

// Consumers wait for "full" barriers, whose first phase is 0.
ARCORE_HOST_DEVICE StageClock consumer_clock() {
  return {0, 0};
}
// Producers wait for "empty" barriers. All buffers are empty at first: the phase before the first has parity
// 1 and counts as ended.
ARCORE_HOST_DEVICE StageClock producer_clock() {
  return {0, 1};
}

template <int kStages>
ARCORE_HOST_DEVICE void advance(StageClock& clock) {
  if (++clock.stage == kStages) {
    clock.stage = 0;
    clock.parity ^= 1;
  }
}

}  // namespace arcore
