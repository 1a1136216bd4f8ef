// The sums of one row of logits from which its log-probabilities follow, and the rule by which they follow.
//
// Every op that returns a log-probability takes it from here, so that the number a sampler returns and the
// one that is computed again for training are the same to the last bit.
#pragma once

#include <cmath>
#include <limits>

#include "common/host_device.h"

namespace arcore {

// y are logits after softcap, before temperature, and d = (y - max) / temperature.
struct RowState {
  double max;       // of y
  double sum;       // of exp(d)
  double weighted;  // of d * exp(d); 0 where no entropy is asked for
  double target;    // y of the target; -inf when it is not in the kept set
};

constexpr RowState kEmptyRow{-std::numeric_limits<double>::infinity(), 0.0, 0.0,
                             -std::numeric_limits<double>::infinity()};

// 1 / temperature for any positive temperature: finite and no denormal number, so that products with it are
// never NaN for finite and for negative infinite numbers.
ARCORE_HOST_DEVICE double inverse_of(double temperature) {
  const double inverse = 1.0 / temperature;
  return inverse > 1e307 ? 1e307 : inverse < 1e-307 ? 1e-307 : inverse;
}
// Numbers that float32 holds with room for products. Rows with a temperature or a softcap beyond are computed
// in float64, element by element.
ARCORE_HOST_DEVICE bool is_moderate(double x) {
  return x >= 1e-30 && x <= 1e30;
}

ARCORE_HOST_DEVICE double log_prob(const RowState& s, double inverse_temperature) {
  const double logp = (s.target - s.max) * inverse_temperature - std::log(s.sum);
  return logp > 0.0 ? 0.0 : logp;
}

}  // namespace arcore
