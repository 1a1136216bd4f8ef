// torch.ops.arcore.selective_state_update: checks, views, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/parallel.h"
#include "selective_state_update/checks.h"
#include "selective_state_update/params.h"

namespace arcore::selective_state_update {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

// State updates below which a second thread costs more than it saves.
constexpr double kUpdatesPerThread = 2e5;

Tensor run(Call& call, const Tensor& state, const Tensor& x, const OptionalTensor& state_batch_indices,
           bool stepped) {
  Args& args = call.args;
  if (state_batch_indices.has_value()) {
    call.held.push_back(torch::stable::contiguous(torch::stable::to(*state_batch_indices, ScalarType::Long)));
    args.rows = static_cast<const int64_t*>(call.held.back().data_ptr());
    for (int64_t b = 0; b < args.batch; ++b)
      ARCORE_CHECK(args.rows[b] == args.pad || args.rows[b] < state.size(0), kOp,
                   "expected state_batch_indices from 0 to ", state.size(0) - 1,
                   ", or negative or pad_slot_id=", args.pad, " for padding, but got ", args.rows[b]);
  }
  Tensor out = make_empty_like(x);
  if (args.batch == 0 || args.heads == 0 || args.dim == 0) return out;
  args.out = view("out", out, stepped);
  const CpuKernels& kernels = cpu_kernels();
  const int64_t tasks = args.heads * ((args.dim + kernels.slice - 1) / kernels.slice);
  const double updates = static_cast<double>(args.batch) * static_cast<double>(args.steps) *
                         static_cast<double>(args.heads) * static_cast<double>(args.dim) *
                         static_cast<double>(args.states);
  run_tasks(tasks, threads_for(updates, kUpdatesPerThread),
            [&](int64_t begin, int64_t end) { kernels.update(args, begin, end); });
  return out;
}

Tensor update_cpu(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                  const OptionalTensor& dt_bias, bool dt_softplus, const OptionalTensor& state_batch_indices,
                  int64_t pad_slot_id) {
  Call call(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id);
  return run(call, state, x, state_batch_indices, false);
}

Tensor update_steps_cpu(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                        const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                        const OptionalTensor& dt_bias, bool dt_softplus,
                        const OptionalTensor& state_batch_indices, int64_t pad_slot_id,
                        const OptionalTensor& num_steps, OptionalTensor snapshots) {
  Call call(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id, true);
  Args& args = call.args;
  if (num_steps.has_value()) {
    check_device(kOp, "num_steps", *num_steps, state);
    args.counts = step_counts(kOp, *num_steps, args.batch, args.steps, &call.held);
  }
  if (snapshots.has_value()) {
    const Tensor& s = *snapshots;
    check_device(kOp, "snapshots", s, state);
    const bool headed = state.dim() == 4;
    if (headed)
      check_shape(kOp, "snapshots", s, {args.batch, args.steps + 1, args.heads, args.dim, args.states});
    else
      check_shape(kOp, "snapshots", s, {args.batch, args.steps + 1, args.dim, args.states});
    ARCORE_CHECK(s.scalar_type() == state.scalar_type(), kOp, "expected snapshots of state's dtype ",
                 torch::headeronly::toString(state.scalar_type()), " but got ",
                 torch::headeronly::toString(s.scalar_type()));
    check_written(kOp, "snapshots", s);
    check_not_written(kOp, "snapshots", s, "state", state);
    check_not_written(kOp, "x", x, "snapshots", s);
    const int64_t last = s.dim() - 1;
    args.snapshots = {s.data_ptr(),       s.stride(0),   s.stride(1), headed ? s.stride(2) : 0,
                      s.stride(last - 1), s.stride(last)};
  }
  return run(call, state, x, state_batch_indices, true);
}

}  // namespace
}  // namespace arcore::selective_state_update

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? "
      "D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, int pad_slot_id) -> Tensor");
  m.def(
      "selective_state_update_steps(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, int "
      "pad_slot_id, "
      "Tensor? num_steps, Tensor(b!)? snapshots) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("selective_state_update", TORCH_BOX(&arcore::selective_state_update::update_cpu));
  m.impl("selective_state_update_steps", TORCH_BOX(&arcore::selective_state_update::update_steps_cpu));
}
