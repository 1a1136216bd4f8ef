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

// log(1 + t) for 0 <= t <= 1, relative error below 3e-7, also for tiny t: 2 atanh(t / (2 + t)).
ARCORE_DEVICE float log1p_unit(float t) {
  const float s = t * reciprocal_approx(2.0f + t), s2 = s * s;
  float p = 1.0f / 13;
  ARCORE_UNROLL
  for (int k = 11; k >= 1; k -= 2)
    p = fused_multiply_add(p, s2, 1.0f / static_cast<float>(k));
  return 2.0f * s * p;
}
ARCORE_DEVICE float softplus(float x) {
  return fmaxf(x, 0.0f) + log1p_unit(expf(-fabsf(x)));
}
// The derivative of softplus where its value is y: 1 - exp(-y), relative error below 1e-6 for every y >= 0.
ARCORE_DEVICE float softplus_slope(float y) {
  constexpr float kFactorials[8] = {1.0f, 2.0f, 6.0f, 24.0f, 120.0f, 720.0f, 5040.0f, 40320.0f};
  // For small y: y - y^2 / 2! + y^3 / 3! - ...
  float p = 0.0f;
  ARCORE_UNROLL
  for (int k = 7; k >= 0; --k)
    p = fused_multiply_add(p, y, (k % 2 == 0 ? 1.0f : -1.0f) / kFactorials[k]);
  return y < 0.4f ? y * p : 1.0f - exp2_approx(y * -1.4426950408889634f);
}
ARCORE_DEVICE float sigmoid(float x) {
  return reciprocal_approx(1.0f + expf(-x));
}

}  // namespace arcore
