// Elements of tensors whose type is known at run time only, and smooth functions of them; for kernels.
#pragma once

#include "common/dtype.h"
#include "common/sequence.h"
#include "common/sm80/device.h"

namespace arcore {

ARCORE_DEVICE float load_any(const void* data, StorageType dtype, int64_t at) {
  switch (dtype) {
    case StorageType::kBFloat16:
      return to_float(static_cast<const bfloat16*>(data)[at]);
    case StorageType::kFloat16:
      return to_float(static_cast<const float16*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

ARCORE_DEVICE void store_any(void* data, StorageType dtype, int64_t at, float value) {
  switch (dtype) {
    case StorageType::kBFloat16:
      static_cast<bfloat16*>(data)[at] = from_float<bfloat16>(value);
      break;
    case StorageType::kFloat16:
      static_cast<float16*>(data)[at] = from_float<float16>(value);
      break;
    default:
      static_cast<float*>(data)[at] = value;
  }
}

ARCORE_DEVICE int64_t sequence_at(const Sequence& s, int64_t batch, int64_t channel, int64_t time) {
  return batch * s.batch + channel * s.channel + time * s.time;
}
// Neighbours in memory are steps, not channels.
ARCORE_DEVICE bool time_is_inner(const Sequence& s) {
  const int64_t time = s.time < 0 ? -s.time : s.time;
  return time <= (s.channel < 0 ? -s.channel : s.channel);
}

ARCORE_DEVICE float softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}
ARCORE_DEVICE float sigmoid(float x) {
  return reciprocal_approx(1.0f + expf(-x));
}

}  // namespace arcore
