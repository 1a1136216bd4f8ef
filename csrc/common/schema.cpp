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

#if defined(ARCORE_WITH_CUDA)
int cuda_arch_probe();  // arch_probe_sm80.cu
#endif

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

#if defined(ARCORE_WITH_CUDA)
int64_t probe_arch() {
  const int result = cuda_arch_probe();
  ARCORE_CHECK(result > 0, "cuda_arch_probe", "no kernel of this build ran on the current GPU (CUDA error ",
               -result, "); build with TORCH_CUDA_ARCH_LIST set to its compute capability");
  return result;
}
#endif

}  // namespace
}  // namespace arcore::machine

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_supported() -> str");
  m.def("run_fma(int iterations) -> float");
#if defined(ARCORE_WITH_CUDA)
  m.def("cuda_arch_probe() -> int");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&arcore::machine::isa_in_use));
  m.impl("cpu_isa_supported", TORCH_BOX(&arcore::machine::isa_supported));
  m.impl("run_fma", TORCH_BOX(&arcore::machine::run_fma));
#if defined(ARCORE_WITH_CUDA)
  m.impl("cuda_arch_probe", TORCH_BOX(&arcore::machine::probe_arch));
#endif
}
