// torch.ops.arcore.ssd: checks, views, chunks, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/chunk_list.h"
#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/workspace.h"
#include "ssd/params.h"

namespace arcore::ssd {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "ssd";
constexpr const char* kBackwardOp = "ssd_backward";
constexpr int64_t kMaxState = 256;
// Floating-point operations below which a second thread costs more than it saves.
constexpr double kFlopsPerThread = 1e7;

View view(const char* op, const char* name, const Tensor& t, bool reverse) {
  const StorageType dtype = storage_type(t, op, name);
  View v{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 0, dtype};
  if (reverse && t.size(1) > 0) {
    v.data = static_cast<char*>(v.data) + (t.size(1) - 1) * v.time * (dtype == StorageType::kFloat32 ? 4 : 2);
    v.time = -v.time;
  }
  return v;
}

// Checks the arguments and owns what the raw pointers of Args point at; the results are left to the caller.
struct __attribute__((visibility("hidden"))) Call {
  Args args{};
  std::vector<Tensor> held;
  ChunkList list;
  int64_t rows;  // of the state tensors

  Call(const char* op, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
       bool dt_softplus, double dt_low, double dt_high, bool reverse) {
    ARCORE_CHECK(x.dim() == 4, op, "expected x of shape (batch, length, heads, dim) but got ", shape_of(x));
    for (const auto& [name, t] : {std::pair{"dt", &dt}, {"A", &A}, {"B", &B}, {"C", &C}})
      check_device(op, name, *t, x);
    for (const auto& [name, t] : {std::pair{"D", &D},
                                  {"z", &z},
                                  {"dt_bias", &dt_bias},
                                  {"initial_state", &initial_state},
                                  {"cu_seqlens", &cu_seqlens},
                                  {"seq_idx", &seq_idx}})
      if (t->has_value()) check_device(op, name, **t, x);
    args.batch = x.size(0);
    args.length = x.size(1);
    args.heads = x.size(2);
    args.dim = x.size(3);
    check_shape(op, "dt", dt, {args.batch, args.length, args.heads});
    check_shape(op, "A", A, {args.heads});
    ARCORE_CHECK(B.dim() == 4 && B.size(2) >= 1 && B.size(3) >= 1 && B.size(3) <= kMaxState, op,
                 "expected B of shape (batch, length, groups, d_state) but got ", shape_of(B),
                 "; d_state must be 1 to ", kMaxState);
    args.groups = B.size(2);
    args.states = B.size(3);
    ARCORE_CHECK(args.heads % args.groups == 0, op, "expected B with groups that divide the ", args.heads,
                 " heads but got ", args.groups);
    check_shape(op, "B", B, {args.batch, args.length, args.groups, args.states});
    check_shape(op, "C", C, {args.batch, args.length, args.groups, args.states});
    args.A = hold(op, "A", A);
    if (D.has_value()) {
      check_shape(op, "D", *D, {args.heads, args.dim});
      args.D = hold(op, "D", *D);
    }
    if (dt_bias.has_value()) {
      check_shape(op, "dt_bias", *dt_bias, {args.heads});
      args.dt_bias = hold(op, "dt_bias", *dt_bias);
    }
    if (z.has_value()) {
      check_shape(op, "z", *z, {args.batch, args.length, args.heads, args.dim});
      args.z = view(op, "z", *z, reverse);
    }
    list = chunk_list(op, args.batch, args.length, cu_seqlens, seq_idx, reverse);
    args.chunk_rows = seq_idx.has_value() ? args.batch : 1;
    args.chunks = list.chunks.data();
    args.first_chunk = list.first.data();
    rows = cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : args.batch;
    if (initial_state.has_value()) {
      check_shape(op, "initial_state", *initial_state, {rows, args.heads, args.dim, args.states});
      args.initial_state = hold(op, "initial_state", *initial_state);
    }
    args.softplus = dt_softplus;
    args.dt_low = static_cast<float>(dt_low);
    args.dt_high = static_cast<float>(dt_high);
    args.x = view(op, "x", x, reverse);
    args.dt = view(op, "dt", dt, reverse);
    args.B = view(op, "B", B, reverse);
    args.C = view(op, "C", C, reverse);
  }

  const float* hold(const char* op, const char* name, const Tensor& t) {
    storage_type(t, op, name);
    held.push_back(as_floats(t));
    return static_cast<const float*>(held.back().data_ptr());
  }
  bool empty() const { return args.batch == 0 || args.heads == 0 || args.dim == 0; }
  double products() const {
    return static_cast<double>(args.batch) * static_cast<double>(args.length) *
           static_cast<double>(args.heads) * static_cast<double>(args.dim) * static_cast<double>(args.states);
  }
};

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
  const CpuKernels& kernels = cpu_kernels();
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
  const CpuKernels& kernels = cpu_kernels();
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
