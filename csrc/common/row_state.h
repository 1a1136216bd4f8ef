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

ARCORE_HOST_DEVICE double log_prob(const RowState& s, double inverse_temperature) {
  const double logp = (s.target - s.max) * inverse_temperature - std::log(s.sum);
  return logp > 0.0 ? 0.0 : logp;
}

}  // namespace arcore
