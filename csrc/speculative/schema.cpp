// torch.ops.arcore.verify_{chain,tree,typical,relaxed,jacobi}: schemas, checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"
#include "speculative/checks.h"
#include "speculative/params.h"

namespace arcore::speculative {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

// Below this many bytes of probabilities a second thread costs more than it saves.
constexpr double kBytesPerThread = 4e6;
constexpr std::size_t kAlignment = 64;

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

VerifiedWindow run(const Problem& p, const Tensor& like) {
  const ResultTensors results(p, like);
  const CpuKernels& kernels = cpu_kernels();
  const auto bytes = static_cast<std::size_t>(kernels.scratch_bytes(p));
  // A row reads about one target and one draft row, whatever it accepts.
  const double work = 8.0 * static_cast<double>(p.batch) * static_cast<double>(p.vocab);
  run_tasks(p.batch, threads_for(work, kBytesPerThread), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, FreeAligned> scratch(::operator new(bytes, std::align_val_t{kAlignment}));
    kernels.verify(p, results.pointers, scratch.get(), begin, end);
  });
  return results.all();
}

}  // namespace
}  // namespace arcore::speculative

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "verify_chain(Tensor target_probs, Tensor draft_tokens, Tensor? draft_probs, Tensor? lengths, Tensor "
      "seed,"
      " Tensor offset, bool block) -> (Tensor tokens, Tensor accepted, Tensor path, Tensor valid)");
  m.def(
      "verify_tree(Tensor target_probs, Tensor draft_tokens, Tensor parents, Tensor? draft_probs, Tensor? "
      "lengths,"
      " Tensor seed, Tensor offset, bool replacement)"
      " -> (Tensor tokens, Tensor accepted, Tensor path, Tensor valid)");
  m.def(
      "verify_typical(Tensor target_probs, Tensor draft_tokens, Tensor? parents, Tensor? lengths, Tensor "
      "seed,"
      " Tensor offset, float epsilon, float delta, bool greedy_bonus)"
      " -> (Tensor tokens, Tensor accepted, Tensor path, Tensor valid)");
  m.def(
      "verify_relaxed(Tensor target_probs, Tensor draft_tokens, Tensor neighbours, Tensor? parents,"
      " Tensor? draft_probs, Tensor? lengths, Tensor seed, Tensor offset, float delta, int k, bool "
      "multiplicative,"
      " bool coarse, bool replacement) -> (Tensor tokens, Tensor accepted, Tensor path, Tensor valid)");
  m.def(
      "verify_jacobi(Tensor target_probs, Tensor draft_tokens, Tensor? draft_probs, Tensor? lengths, Tensor "
      "seed,"
      " Tensor offset) -> (Tensor tokens, Tensor accepted, Tensor path, Tensor valid, Tensor drafts)");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("verify_chain", TORCH_BOX(&arcore::speculative::verify_chain));
  m.impl("verify_tree", TORCH_BOX(&arcore::speculative::verify_tree));
  m.impl("verify_typical", TORCH_BOX(&arcore::speculative::verify_typical));
  m.impl("verify_relaxed", TORCH_BOX(&arcore::speculative::verify_relaxed));
  m.impl("verify_jacobi", TORCH_BOX(&arcore::speculative::verify_jacobi));
}
