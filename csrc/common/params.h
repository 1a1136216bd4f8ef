// Kernels that measure the machine instead of computing something.
#pragma once

#include <cstdint>

namespace arcore::machine {

struct CpuKernels {
  // Runs `iterations` rounds of independent fused multiply-adds in registers; returns the floating-point
  // operations done. `sink` keeps the compiler from removing them.
  double (*run_fma)(int64_t iterations, float* sink);
  // Runs at least `count` independent exponentials in registers; returns how many.
  double (*run_exp)(int64_t count, float* sink);
  int lanes;
};

}  // namespace arcore::machine
