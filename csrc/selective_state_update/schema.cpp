// torch.ops.arcore.selective_state_update: checks, views, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"
#include "common/sequence_view.h"
#include "selective_state_update/params.h"

namespace arcore::selective_state_update {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "selective_state_update";
// State updates below which a second thread costs more than it saves.
constexpr double kUpdatesPerThread = 2e5;

// [batch, last] or [batch, heads, last].
View view(const char* name, const Tensor& t) {
  const bool headed = t.dim() == 3;
  return {t.data_ptr(), t.stride(0), headed ? t.stride(1) : 0, t.stride(headed ? 2 : 1),
          storage_type(t, kOp, name)};
}

Tensor update_cpu(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                  const OptionalTensor& dt_bias, bool dt_softplus, const OptionalTensor& state_batch_indices,
                  int64_t pad_slot_id) {
  Args args{};
  const bool headed = state.dim() == 4;
  ARCORE_CHECK(state.dim() == 3 || headed, kOp,
               "expected state of shape (rows, dim, d_state) or (rows, heads, dim, d_state) but got ",
               shape_of(state));
  args.heads = headed ? state.size(1) : 1;
  args.dim = state.size(headed ? 2 : 1);
  args.states = state.size(headed ? 3 : 2);
  ARCORE_CHECK(args.states >= 1 && args.states <= 256, kOp, "expected a d_state of 1 to 256 but got ",
               args.states);
  args.batch = x.dim() > 0 ? x.size(0) : 0;
  const auto check = [&](const char* name, const Tensor& t, int64_t first, int64_t last) {
    headed ? check_shape(kOp, name, t, {first, args.heads, last}) : check_shape(kOp, name, t, {first, last});
  };
  const auto check_parameter = [&](const char* name, const Tensor& t) {
    headed ? check_shape(kOp, name, t, {args.heads, args.dim}) : check_shape(kOp, name, t, {args.dim});
  };
  check("x", x, args.batch, args.dim);
  check("dt", dt, args.batch, args.dim);
  if (headed)
    check_shape(kOp, "A", A, {args.heads, args.dim, args.states});
  else
    check_shape(kOp, "A", A, {args.dim, args.states});
  args.groups = headed && B.dim() == 3 ? B.size(1) : 1;
  for (const auto& [name, t] : {std::pair{"B", &B}, std::pair{"C", &C}})
    headed ? check_shape(kOp, name, *t, {args.batch, args.groups, args.states})
           : check_shape(kOp, name, *t, {args.batch, args.states});
  ARCORE_CHECK(args.groups > 0 && args.heads % args.groups == 0, kOp,
               "expected B with groups that divide the ", args.heads, " heads but got ", args.groups);

  std::vector<Tensor> held;
  held.reserve(4);
  const auto hold = [&](const char* name, const Tensor& t) {
    storage_type(t, kOp, name);
    held.push_back(as_floats(t));
    return static_cast<const float*>(held.back().data_ptr());
  };
  // Mamba-2 expands one number per head.
  args.tied = headed && A.stride(1) == 0 && A.stride(2) == 0;
  args.A = hold("A", args.tied ? torch::stable::select(torch::stable::select(A, 2, 0), 1, 0) : A);
  if (D.has_value()) {
    check_parameter("D", *D);
    args.D = hold("D", *D);
  }
  if (dt_bias.has_value()) {
    check_parameter("dt_bias", *dt_bias);
    args.dt_bias = hold("dt_bias", *dt_bias);
  }
  if (z.has_value()) {
    check("z", *z, args.batch, args.dim);
    args.z = view("z", *z);
  }
  if (state_batch_indices.has_value()) {
    check_shape(kOp, "state_batch_indices", *state_batch_indices, {args.batch});
    ARCORE_CHECK(state_batch_indices->scalar_type() == ScalarType::Int ||
                     state_batch_indices->scalar_type() == ScalarType::Long,
                 kOp, "expected state_batch_indices of dtype int32 or int64 but got ",
                 torch::headeronly::toString(state_batch_indices->scalar_type()));
    held.push_back(torch::stable::contiguous(torch::stable::to(*state_batch_indices, ScalarType::Long)));
    args.rows = static_cast<const int64_t*>(held.back().data_ptr());
    for (int64_t b = 0; b < args.batch; ++b)
      ARCORE_CHECK(args.rows[b] == pad_slot_id || (args.rows[b] >= 0 && args.rows[b] < state.size(0)), kOp,
                   "expected state_batch_indices from 0 to ", state.size(0) - 1,
                   ", or pad_slot_id=", pad_slot_id, ", but got ", args.rows[b]);
  } else {
    ARCORE_CHECK(state.size(0) == args.batch, kOp, "expected state with one row per row of x (", args.batch,
                 ") but got ", state.size(0), "; give state_batch_indices to pick rows");
  }
  args.pad = pad_slot_id;
  args.softplus = dt_softplus;

  Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  args.state = {state.data_ptr(),
                state.stride(0),
                headed ? state.stride(1) : 0,
                state.stride(headed ? 2 : 1),
                state.stride(headed ? 3 : 2),
                storage_type(state, kOp, "state")};
  args.x = view("x", x);
  args.dt = view("dt", dt);
  args.out = view("out", out);
  args.B = view("B", B);
  args.C = view("C", C);
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
