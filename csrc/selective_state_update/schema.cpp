// torch.ops.arcore.selective_state_update: checks, views, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cpu_dispatch.h"
#include "common/parallel.h"
#include "selective_state_update/checks.h"
#include "selective_state_update/params.h"

namespace arcore::selective_state_update {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

// State updates below which a second thread costs more than it saves.
constexpr double kUpdatesPerThread = 2e5;

Tensor update_cpu(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                  const OptionalTensor& dt_bias, bool dt_softplus, const OptionalTensor& state_batch_indices,
                  int64_t pad_slot_id) {
  Call call(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id);
  Args& args = call.args;
  if (state_batch_indices.has_value()) {
    call.held.push_back(torch::stable::contiguous(torch::stable::to(*state_batch_indices, ScalarType::Long)));
    args.rows = static_cast<const int64_t*>(call.held.back().data_ptr());
    for (int64_t b = 0; b < args.batch; ++b)
      ARCORE_CHECK(args.rows[b] == pad_slot_id || (args.rows[b] >= 0 && args.rows[b] < state.size(0)), kOp,
                   "expected state_batch_indices from 0 to ", state.size(0) - 1,
                   ", or pad_slot_id=", pad_slot_id, ", but got ", args.rows[b]);
  }
  Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  args.out = view("out", out);
  const CpuKernels& kernels = cpu_kernels();
  const int64_t tasks = args.heads * ((args.dim + kernels.slice - 1) / kernels.slice);
  const double updates = static_cast<double>(args.batch) * static_cast<double>(args.heads) *
                         static_cast<double>(args.dim) * static_cast<double>(args.states);
  run_tasks(tasks, threads_for(updates, kUpdatesPerThread),
            [&](int64_t begin, int64_t end) { kernels.update(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace arcore::selective_state_update

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? "
      "D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, int pad_slot_id) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("selective_state_update", TORCH_BOX(&arcore::selective_state_update::update_cpu));
}
