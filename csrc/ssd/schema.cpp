// torch.ops.arcore.ssd: checks, views, chunks, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/chunk_list.h"
#include "common/cpu_dispatch.h"
#include "common/workspace.h"
#include "ssd/params.h"

namespace arcore::ssd {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "ssd";
constexpr int64_t kMaxState = 256;
// Floating-point operations below which a second thread costs more than it saves.
constexpr double kFlopsPerThread = 1e7;

View view(const char* name, const Tensor& t, bool reverse) {
  const StorageType dtype = storage_type(t, kOp, name);
  View v{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 0, dtype};
  if (reverse && t.size(1) > 0) {
    v.data = static_cast<char*>(v.data) + (t.size(1) - 1) * v.time * (dtype == StorageType::kFloat32 ? 4 : 2);
    v.time = -v.time;
  }
  return v;
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                       const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                       const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
                                       const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
                                       bool dt_softplus, double dt_low, double dt_high, bool reverse) {
  ARCORE_CHECK(x.dim() == 4, kOp, "expected x of shape (batch, length, heads, dim) but got ", shape_of(x));
  Args args{};
  args.batch = x.size(0);
  args.length = x.size(1);
  args.heads = x.size(2);
  args.dim = x.size(3);
  check_shape(kOp, "dt", dt, {args.batch, args.length, args.heads});
  check_shape(kOp, "A", A, {args.heads});
  ARCORE_CHECK(B.dim() == 4 && B.size(2) >= 1 && B.size(3) >= 1 && B.size(3) <= kMaxState, kOp,
               "expected B of shape (batch, length, groups, d_state) but got ", shape_of(B),
               "; d_state must be 1 to ", kMaxState);
  args.groups = B.size(2);
  args.states = B.size(3);
  ARCORE_CHECK(args.heads % args.groups == 0, kOp, "expected B with groups that divide the ", args.heads,
               " heads but got ", args.groups);
  check_shape(kOp, "B", B, {args.batch, args.length, args.groups, args.states});
  check_shape(kOp, "C", C, {args.batch, args.length, args.groups, args.states});

  std::vector<Tensor> held;
  held.reserve(4);
  const auto hold = [&](const char* name, const Tensor& t) {
    storage_type(t, kOp, name);
    held.push_back(as_floats(t));
    return static_cast<const float*>(held.back().data_ptr());
  };
  args.A = hold("A", A);
  if (D.has_value()) {
    check_shape(kOp, "D", *D, {args.heads, args.dim});
    args.D = hold("D", *D);
  }
  if (dt_bias.has_value()) {
    check_shape(kOp, "dt_bias", *dt_bias, {args.heads});
    args.dt_bias = hold("dt_bias", *dt_bias);
  }
  if (z.has_value()) {
    check_shape(kOp, "z", *z, {args.batch, args.length, args.heads, args.dim});
    args.z = view("z", *z, reverse);
  }
  const ChunkList list = chunk_list(kOp, args.batch, args.length, cu_seqlens, seq_idx, reverse);
  args.chunk_rows = seq_idx.has_value() ? args.batch : 1;
  args.chunks = list.chunks.data();
  args.first_chunk = list.first.data();
  const int64_t rows = cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : args.batch;
  if (initial_state.has_value()) {
    check_shape(kOp, "initial_state", *initial_state, {rows, args.heads, args.dim, args.states});
    args.initial_state = hold("initial_state", *initial_state);
  }
  args.softplus = dt_softplus;
  args.dt_low = static_cast<float>(dt_low);
  args.dt_high = static_cast<float>(dt_high);

  Tensor out = torch::stable::empty_like(x);
  Tensor last_state =
      torch::stable::new_empty(x, {rows, args.heads, args.dim, args.states}, ScalarType::Float);
  if (args.batch == 0 || args.heads == 0 || args.dim == 0) return {out, last_state};
  args.last_state = static_cast<float*>(last_state.data_ptr());
  args.x = view("x", x, reverse);
  args.out = view("out", out, reverse);
  args.dt = view("dt", dt, reverse);
  args.B = view("B", B, reverse);
  args.C = view("C", C, reverse);
  const CpuKernels& kernels = cpu_kernels();
  const double flops = 4.0 * static_cast<double>(x.numel()) * static_cast<double>(args.states);
  run_with_workspace(
      x, kernels.tasks(args), threads_for(flops, kFlopsPerThread), kernels.workspace(args),
      [&](float* workspace, int64_t begin, int64_t end) { kernels.forward(args, workspace, begin, end); });
  return {out, last_state};
}

}  // namespace
}  // namespace arcore::ssd

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? "
      "initial_state, Tensor? cu_seqlens, Tensor? seq_idx, bool dt_softplus, float dt_low, float dt_high, "
      "bool reverse) "
      "-> (Tensor out, Tensor last_state)");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("ssd", TORCH_BOX(&arcore::ssd::forward_cpu));
}
