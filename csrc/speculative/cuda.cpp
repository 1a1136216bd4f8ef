// CUDA side of torch.ops.arcore.verify_*.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_call.h"
#include "speculative/checks.h"
#include "speculative/params.h"

namespace arcore::speculative {

namespace {

VerifiedWindow run(const Problem& p, const Tensor& like) {
  const CudaScope scope(like);
  const ResultTensors results(p, like);
  const int64_t bytes = scratch_bytes_sm80(p);
  const Tensor scratch = torch::stable::new_empty(like, {p.batch * bytes}, ScalarType::Byte);
  const VerifyCuda cuda{p, results.pointers, static_cast<char*>(scratch.data_ptr()), bytes};
  check_launch("verify", launch_verify_sm80(cuda, scope.stream()));
  return results.all();
}

}  // namespace
}  // namespace arcore::speculative

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("verify_chain", TORCH_BOX(&arcore::speculative::verify_chain));
  m.impl("verify_tree", TORCH_BOX(&arcore::speculative::verify_tree));
  m.impl("verify_typical", TORCH_BOX(&arcore::speculative::verify_typical));
  m.impl("verify_relaxed", TORCH_BOX(&arcore::speculative::verify_relaxed));
  m.impl("verify_jacobi", TORCH_BOX(&arcore::speculative::verify_jacobi));
}
