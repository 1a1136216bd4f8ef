// CUDA side of torch.ops.arcore.selective_state_update: allocation and the launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/cuda_call.h"
#include "selective_state_update/checks.h"
#include "selective_state_update/params.h"

namespace arcore::selective_state_update {

namespace {

Tensor update_cuda(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                   const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& dt_bias, bool dt_softplus, const OptionalTensor& state_batch_indices,
                   int64_t pad_slot_id) {
  const CudaScope scope(state);
  Call call(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id);
  UpdateCuda cuda{};
  cuda.args = call.args;
  cuda.state_rows = state.size(0);
  Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  cuda.args.out = view("out", out);
  Tensor rows = out;  // keeps the indices until the kernel is queued
  if (state_batch_indices.has_value()) {
    rows = torch::stable::contiguous(*state_batch_indices);
    cuda.rows = {rows.data_ptr(), rows.scalar_type() == ScalarType::Int};
  }
  check_launch(kOp, launch_update_sm80(cuda, scope.stream()));
  return out;
}

}  // namespace
}  // namespace arcore::selective_state_update

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("selective_state_update", TORCH_BOX(&arcore::selective_state_update::update_cuda));
}
