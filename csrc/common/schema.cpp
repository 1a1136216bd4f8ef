// torch.ops.arcore.cpu_isa and run_fma: which instruction set the CPU kernels use, and the core's own
// ceiling; random_bits, inverse_cdf and poison_new_memory: the headers of those names, for tests and
// references.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "common/check.h"
#include "common/cpu_dispatch.h"
#if defined(ARCORE_WITH_CUDA)
#include "common/cuda_call.h"
#endif
#include "common/inverse_cdf.h"
#include "common/new_tensor.h"
#include "common/params.h"
#include "common/philox.h"

namespace arcore::machine {

#if defined(ARCORE_WITH_CUDA)
// arch_probe_sm80.cu
int cuda_arch_probe();
int cuda_event_done(void* event);
#endif

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

std::string isa_in_use() {
  return cpu_isa_name(cpu_isa());
}
std::string isas_built() {
  return cpu_isas_built();
}
std::string default_isa() {
  return cpu_default_isa();
}
std::string bf16_in_use() {
  return cpu_bf16_name(cpu_bf16());
}
std::string bf16_supported() {
  std::string names = "none";
  for (const CpuBf16 unit : {CpuBf16::kDot, CpuBf16::kTiles})
    if (cpu_has_bf16(unit)) names += std::string(" ") + cpu_bf16_name(unit);
  return names;
}
std::string isa_supported() {
  return cpu_isa_name(best_cpu_isa());
}

void poison(bool wanted) {
  poison_new_memory() = wanted;
}

double run_fma(int64_t iterations) {
  ARCORE_CHECK(iterations >= 0, "run_fma", "expected iterations >= 0 but got ", iterations);
  float sink = 0.0f;
  const double flops = cpu_kernels().run_fma(iterations, &sink);
  // Never true; it ties the result to the computation.
  return sink == 12345.678f ? 0.0 : flops;
}

double run_exp(int64_t count) {
  ARCORE_CHECK(count >= 0, "run_exp", "expected count >= 0 but got ", count);
  float sink = 0.0f;
  const double done = cpu_kernels().run_exp(count, &sink);
  return sink == 12345.678f ? 0.0 : done;
}

const int64_t* int64_vector(const torch::stable::Tensor& t, const char* op, const char* name, int64_t size) {
  ARCORE_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Long && t.dim() == 1 && t.size(0) == size,
               op, "expected ", name, " int64 of shape (", size, ") but got ",
               torch::headeronly::toString(t.scalar_type()), " ", shape_of(t));
  return static_cast<const int64_t*>(t.data_ptr());
}

torch::stable::Tensor random_bits_of(const torch::stable::Tensor& seed, const torch::stable::Tensor& position,
                                     int64_t stream, int64_t index) {
  const int64_t rows = seed.dim() == 1 ? seed.size(0) : 0;
  const int64_t* seeds = int64_vector(seed, "random_bits", "seed", rows);
  const int64_t* positions = int64_vector(position, "random_bits", "position", rows);
  ARCORE_CHECK(stream >= 0 && stream < int64_t{1} << 32, "random_bits",
               "expected 0 <= stream < 2^32 but got ", stream);
  ARCORE_CHECK(index >= 0 && index < int64_t{1} << 57, "random_bits", "expected 0 <= index < 2^57 but got ",
               index);
  torch::stable::Tensor out = make_empty(seed, {rows});
  int64_t* bits = static_cast<int64_t*>(out.data_ptr());
  for (int64_t row = 0; row < rows; ++row)
    bits[row] =
        static_cast<int64_t>(random_bits(seeds[row * seed.stride(0)], positions[row * position.stride(0)],
                                         static_cast<Stream>(stream), index));
  return out;
}

torch::stable::Tensor inverse_cdf_of(const torch::stable::Tensor& probs, const torch::stable::Tensor& bits) {
  ARCORE_CHECK(probs.dim() == 2 && probs.scalar_type() == torch::headeronly::ScalarType::Float, "inverse_cdf",
               "expected probs float32 of shape (rows, vocab) but got ",
               torch::headeronly::toString(probs.scalar_type()), " ", shape_of(probs));
  const int64_t rows = probs.size(0);
  const int64_t* words = int64_vector(bits, "inverse_cdf", "bits", rows);
  const float* p = static_cast<const float*>(probs.data_ptr());
  torch::stable::Tensor out = make_empty(bits, {rows});
  int64_t* tokens = static_cast<int64_t*>(out.data_ptr());
  for (int64_t row = 0; row < rows; ++row)
    tokens[row] = inverse_cdf(p + row * probs.stride(0), probs.size(1),
                              static_cast<uint64_t>(words[row * bits.stride(0)]), probs.stride(1));
  return out;
}

#if defined(ARCORE_WITH_CUDA)
int64_t probe_arch() {
  const int result = cuda_arch_probe();
  check_launch("cuda_arch_probe", result > 0 ? 0 : -result);
  return result;
}

bool event_done(int64_t event) {
  const int result = cuda_event_done(reinterpret_cast<void*>(event));
  check_launch("cuda_event_done", result >= 0 ? 0 : -result);
  return result == 1;
}
#endif

}  // namespace
}  // namespace arcore::machine

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_supported() -> str");
  m.def("cpu_isas_built() -> str");
  m.def("cpu_bf16() -> str");
  m.def("cpu_bf16_supported() -> str");
  m.def("cpu_default_isa() -> str");
  m.def("poison_new_memory(bool wanted) -> ()");
  m.def("run_fma(int iterations) -> float");
  m.def("run_exp(int count) -> float");
  m.def("random_bits(Tensor seed, Tensor position, int stream, int index) -> Tensor");
  m.def("inverse_cdf(Tensor probs, Tensor bits) -> Tensor");
#if defined(ARCORE_WITH_CUDA)
  m.def("cuda_arch_probe() -> int");
  m.def("cuda_event_done(int event) -> bool");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&arcore::machine::isa_in_use));
  m.impl("cpu_isa_supported", TORCH_BOX(&arcore::machine::isa_supported));
  m.impl("cpu_bf16", TORCH_BOX(&arcore::machine::bf16_in_use));
  m.impl("cpu_bf16_supported", TORCH_BOX(&arcore::machine::bf16_supported));
  m.impl("cpu_isas_built", TORCH_BOX(&arcore::machine::isas_built));
  m.impl("cpu_default_isa", TORCH_BOX(&arcore::machine::default_isa));
  m.impl("poison_new_memory", TORCH_BOX(&arcore::machine::poison));
  m.impl("run_fma", TORCH_BOX(&arcore::machine::run_fma));
  m.impl("run_exp", TORCH_BOX(&arcore::machine::run_exp));
#if defined(ARCORE_WITH_CUDA)
  m.impl("cuda_arch_probe", TORCH_BOX(&arcore::machine::probe_arch));
  m.impl("cuda_event_done", TORCH_BOX(&arcore::machine::event_done));
#endif
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("random_bits", TORCH_BOX(&arcore::machine::random_bits_of));
  m.impl("inverse_cdf", TORCH_BOX(&arcore::machine::inverse_cdf_of));
}
