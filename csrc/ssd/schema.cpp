// torch.ops.arcore.ssd: checks, views, chunks, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/workspace.h"
#include "ssd/checks.h"

namespace arcore::ssd {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)
ARCORE_DISPATCH_BF16(CpuKernels, cpu_kernels)

namespace {

// Floating-point operations below which a second thread costs more than it saves.
constexpr double kFlopsPerThread = 1e7;

// The version for the processor's bfloat16 units where all factors of the products are bfloat16.
const CpuKernels& kernels_for(const Args& args, const OptionalTensor& grad_out = {}) {
  const CpuBf16 unit = cpu_bf16();
  for (const View* v : {&args.x, &args.B, &args.C})
    if (v->dtype != StorageType::kBFloat16) return cpu_kernels();
  if (grad_out.has_value() && grad_out->scalar_type() != ScalarType::BFloat16) return cpu_kernels();
  return unit == CpuBf16::kNone ? cpu_kernels() : cpu_kernels(unit);
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                       const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
                                       const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
                                       bool dt_softplus, double dt_low, double dt_high, bool reverse) {
  Call call(kOp, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, seq_idx, dt_softplus, dt_low,
            dt_high, reverse);
  Args& args = call.args;
  Tensor out = make_empty_like(x);
  Tensor last_state = make_empty(x, {call.rows, args.heads, args.dim, args.states}, ScalarType::Float);
  if (call.empty()) return {out, last_state};
  args.last_state = static_cast<float*>(last_state.data_ptr());
  args.out = view(kOp, "out", out, reverse);
  const CpuKernels& kernels = kernels_for(args);
  run_with_workspace(
      x, kernels.tasks(args), threads_for(4.0 * call.products(), kFlopsPerThread), kernels.workspace(args),
      [&](float* workspace, int64_t begin, int64_t end) { kernels.forward(args, workspace, begin, end); });
  return {out, last_state};
}

// Absent optional inputs get an empty gradient.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward_cpu(const OptionalTensor& grad_out, const OptionalTensor& grad_last_state, const Tensor& x,
                       const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                       const OptionalTensor& seq_idx, bool dt_softplus, double dt_low, double dt_high,
                       bool reverse) {
  Call call(kBackwardOp, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, seq_idx, dt_softplus,
            dt_low, dt_high, reverse);
  const Args& in = call.args;
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return make_empty(x, shape, ScalarType::Float);
  };
  const auto like = [&](const OptionalTensor& t) {
    return t.has_value() ? make_empty_like(*t) : floats({0});
  };
  Tensor grad_x = make_empty_like(x), grad_dt = make_empty_like(dt);
  Tensor grad_B = make_empty_like(B), grad_C = make_empty_like(C), grad_z = like(z);
  Tensor grad_initial =
      initial_state.has_value() ? floats({call.rows, in.heads, in.dim, in.states}) : floats({0});
  const CpuKernels& kernels = kernels_for(in, grad_out);
  const int64_t tasks = call.empty() ? 0 : kernels.tasks(in);
  Tensor partial_A = floats({in.batch, in.heads}), partial_bias = floats({in.batch, in.heads});
  Tensor partial_D = floats({in.batch, in.heads, in.dim});
  Tensor partial_B = floats({tasks, in.length, in.states}), partial_C = floats({tasks, in.length, in.states});
  if (call.empty()) {
    for (Tensor* t : {&grad_B, &grad_C, &grad_dt, &grad_initial, &partial_A, &partial_bias})
      torch::stable::zero_(*t);
  } else {
    BackwardArgs args{};
    args.in = in;
    if (grad_out.has_value()) {
      check_device(kBackwardOp, "grad_out", *grad_out, x);
      check_shape(kBackwardOp, "grad_out", *grad_out, {in.batch, in.length, in.heads, in.dim});
      args.grad_out = view(kBackwardOp, "grad_out", *grad_out, reverse);
    }
    if (grad_last_state.has_value()) {
      check_device(kBackwardOp, "grad_last_state", *grad_last_state, x);
      check_shape(kBackwardOp, "grad_last_state", *grad_last_state, {call.rows, in.heads, in.dim, in.states});
      args.grad_last_state = call.hold(kBackwardOp, "grad_last_state", *grad_last_state);
    }
    args.grad_x = view(kBackwardOp, "x", grad_x, reverse);
    args.grad_dt = view(kBackwardOp, "dt", grad_dt, reverse);
    args.grad_B = view(kBackwardOp, "B", grad_B, reverse);
    args.grad_C = view(kBackwardOp, "C", grad_C, reverse);
    if (z.has_value()) args.grad_z = view(kBackwardOp, "z", grad_z, reverse);
    const auto data = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
    args.grad_initial_state = initial_state.has_value() ? data(grad_initial) : nullptr;
    args.partial_A = data(partial_A);
    args.partial_bias = data(partial_bias);
    args.partial_D = data(partial_D);
    args.partial_B = data(partial_B);
    args.partial_C = data(partial_C);
    const int64_t threads = threads_for(12.0 * call.products(), kFlopsPerThread);
    run_with_workspace(
        x, tasks, threads, kernels.backward_workspace(args),
        [&](float* workspace, int64_t begin, int64_t end) { kernels.backward(args, workspace, begin, end); });
    run_tasks(in.batch * in.groups, threads,
              [&](int64_t begin, int64_t end) { kernels.backward_reduce(args, begin, end); });
  }
  return {grad_x,
          grad_dt,
          sum_rows(partial_A, A),
          grad_B,
          grad_C,
          D.has_value() ? sum_rows(partial_D, *D) : floats({0}),
          grad_z,
          dt_bias.has_value() ? sum_rows(partial_bias, *dt_bias) : floats({0}),
          initial_state.has_value() && initial_state->scalar_type() != ScalarType::Float
              ? torch::stable::to(grad_initial, initial_state->scalar_type())
              : grad_initial};
}

}  // namespace
}  // namespace arcore::ssd

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? "
      "initial_state, Tensor? cu_seqlens, Tensor? seq_idx, bool dt_softplus, float dt_low, float dt_high, "
      "bool reverse) "
      "-> (Tensor out, Tensor last_state)");
  m.def(
      "ssd_backward(Tensor? grad_out, Tensor? grad_last_state, Tensor x, Tensor dt, Tensor A, Tensor B, "
      "Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor? seq_idx, "
      "bool "
      "dt_softplus, float dt_low, float dt_high, bool reverse) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("ssd", TORCH_BOX(&arcore::ssd::forward_cpu));
  m.impl("ssd_backward", TORCH_BOX(&arcore::ssd::backward_cpu));
}
