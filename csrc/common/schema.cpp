// torch.ops.arcore.cpu_isa and run_fma: which instruction set the CPU kernels use, and the core's own
// ceiling.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "common/check.h"
#include "common/cpu_dispatch.h"
#include "common/params.h"

namespace arcore::machine {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

std::string isa_in_use() {
  return cpu_isa_name(cpu_isa());
}
std::string isa_supported() {
  return cpu_isa_name(best_cpu_isa());
}

double run_fma(int64_t iterations) {
  ARCORE_CHECK(iterations >= 0, "run_fma", "expected iterations >= 0 but got ", iterations);
  float sink = 0.0f;
  const double flops = cpu_kernels().run_fma(iterations, &sink);
  // Never true; it ties the result to the computation.
  return sink == 12345.678f ? 0.0 : flops;
}

}  // namespace
}  // namespace arcore::machine

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_supported() -> str");
  m.def("run_fma(int iterations) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&arcore::machine::isa_in_use));
  m.impl("cpu_isa_supported", TORCH_BOX(&arcore::machine::isa_supported));
  m.impl("run_fma", TORCH_BOX(&arcore::machine::run_fma));
}
