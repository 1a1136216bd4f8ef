// Ceilings of one core, fused multiply-adds and exponentials, for the fractions that benchmarks print.
#include "common/params.h"
#include "common/vec.h"

namespace arcore::machine {
namespace ARCORE_ISA {
namespace {

double run_fma(int64_t iterations, float* sink) {
  // Enough independent chains to hide the latency of two pipes, few enough to stay in registers.
  constexpr int kChains = 12;
  const Vec factor(0.999f), addend(1e-3f);
  Vec chain[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c)
    chain[c] = Vec(static_cast<float>(c));
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c)
      chain[c] = fma(chain[c], factor, addend);
  Vec sum = chain[0];
#pragma GCC unroll 12
  for (int c = 1; c < kChains; ++c)
    sum = sum + chain[c];
  *sink += reduce_add(sum);
  return 2.0 * kChains * kLanes * static_cast<double>(iterations);
}

double run_exp(int64_t count, float* sink) {
  // Independent arguments, as a scan or a softmax has them.
  constexpr int kChains = 8;
  Vec argument[kChains], sum(0.0f);
  for (int c = 0; c < kChains; ++c)
    argument[c] = Vec(-0.1f * static_cast<float>(c + 1));
  int64_t done = 0;
  for (; done < count; done += kChains * kLanes)
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      sum = sum + exp2(argument[c]);
      argument[c] = argument[c] - Vec(1e-6f);
    }
  *sink += reduce_add(sum);
  return static_cast<double>(done);
}

}  // namespace

extern const CpuKernels& cpu_kernels();
const CpuKernels& cpu_kernels() {
  static constexpr CpuKernels kKernels{run_fma, run_exp, kLanes};
  return kKernels;
}

}  // namespace ARCORE_ISA
}  // namespace arcore::machine
