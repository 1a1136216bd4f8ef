// A [batch, channel, time] tensor as kernels see it, without any torch type.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace arcore {

// Strides in elements; data is null where an optional tensor is absent. A reversed view has a negative time
// stride and points at the last step, so kernels know one direction only.
struct Sequence {
  void* data;
  int64_t batch, channel, time;
  StorageType dtype;
};

}  // namespace arcore
