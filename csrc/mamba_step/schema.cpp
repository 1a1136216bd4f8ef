// torch.ops.arcore.mamba_step: checks, scratch, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/overlap.h"
#include "common/parallel.h"
#include "common/sequence_view.h"
#include "common/weight_checks.h"
#include "mamba_step/params.h"

namespace arcore::mamba_step {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Named = std::pair<const char*, const Tensor*>;

constexpr const char* kOp = "mamba_step";

const Tensor* given(const OptionalTensor& t) {
  return t.has_value() ? &*t : nullptr;
}

// Owns what the raw pointers of Args point at.
struct __attribute__((visibility("hidden"))) Held {
  std::vector<Tensor> tensors;

  // A small parameter as contiguous floats.
  const float* small(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    ARCORE_CHECK(t.is_cpu(), kOp, "expected ", name, " on the CPU");
    check_step_dtype(kOp, name, t);
    check_shape(kOp, name, t, shape);
    tensors.push_back(as_floats(t));
    return floats(tensors.back());
  }

  const float* small(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) {
    return t.has_value() ? small(name, *t, shape) : nullptr;
  }

  // A matrix of float32, bfloat16 or in blocks, whatever the others are.
  Weights matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
    if (!has_blocks(t)) check_step_dtype(kOp, name, t);
    return weights(kOp, name, t, std::nullopt, t.scalar_type(), rows, cols, tensors);
  }
};

// Columns of a matrix, of which blocks hold 32 each.
int64_t columns_of(const char* name, const Tensor& t) {
  ARCORE_CHECK(t.dim() == (has_blocks(t) ? 3 : 2), kOp, "expected ", name,
               " of shape (rows, columns), or that in blocks, but got ", shape_of(t));
  return t.size(1) * (has_blocks(t) ? kBlockValues : 1);
}

bool touch(const ByteRange& a, const ByteRange& b) {
  return a.begin < b.end && b.begin < a.end;
}

// What is written must be read by nothing else.
void check_memory(std::initializer_list<Named> written, std::initializer_list<Named> read) {
  std::vector<std::pair<Named, ByteRange>> targets;
  for (const Named& target : written) {
    check_written(kOp, target.first, *target.second);
    const ByteRange range = byte_range(*target.second);
    for (const auto& [other, of_other] : targets)
      if (touch(range, of_other))
        check_not_written(kOp, target.first, *target.second, other.first, *other.second);
    targets.emplace_back(target, range);
  }
  for (const auto& [name, t] : read) {
    if (t == nullptr) continue;
    const ByteRange range = byte_range(*t);
    for (const auto& [target, of_target] : targets)
      if (touch(range, of_target)) check_not_written(kOp, name, *t, target.first, *target.second);
  }
}

void mamba_step_cpu(Tensor x, const Tensor& norm, const Tensor& in_proj, const OptionalTensor& in_bias,
                    const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& x_proj,
                    const Tensor& dt_proj, const OptionalTensor& dt_bias, const Tensor& A, const Tensor& D,
                    const Tensor& out_proj, const OptionalTensor& out_bias, Tensor conv_state, Tensor state,
                    double eps) {
  ARCORE_CHECK(x.dim() == 2, kOp, "expected x of shape (batch, dim) but got ", shape_of(x));
  ARCORE_CHECK(state.dim() == 3, kOp, "expected state of shape (batch, inner, states) but got ",
               shape_of(state));
  ARCORE_CHECK(conv_weight.dim() == 2, kOp, "expected conv_weight of shape (inner, taps) but got ",
               shape_of(conv_weight));
  Args args{};
  args.batch = x.size(0);
  args.dim = x.size(1);
  args.inner = state.size(1);
  args.states = state.size(2);
  args.taps = conv_weight.size(1);
  args.rank = columns_of("dt_proj", dt_proj);
  ARCORE_CHECK(args.batch <= kMaxTokens, kOp, "expected at most ", kMaxTokens, " rows but got ", args.batch);
  for (const auto& [name, size] : {std::pair{"dim", args.dim}, {"inner", args.inner}, {"rank", args.rank}})
    ARCORE_CHECK(size > 0, kOp, "expected ", name, " of at least 1 but got ", size);
  ARCORE_CHECK(args.states >= 1 && args.states <= kMostStates, kOp, "expected 1 to ", kMostStates,
               " states but got ", args.states);
  ARCORE_CHECK(args.taps >= kFewestTaps && args.taps <= kMostTaps, kOp, "expected conv_weight of ",
               kFewestTaps, " to ", kMostTaps, " taps but got ", args.taps);
  ARCORE_CHECK(std::isfinite(eps) && eps >= 0, kOp, "expected eps to be finite and at least 0 but got ", eps);
  check_step_dtype(kOp, "x", x);
  check_step_dtype(kOp, "conv_state", conv_state);
  ARCORE_CHECK(x.is_cpu(), kOp, "expected x on the CPU");
  ARCORE_CHECK(conv_state.is_cpu(), kOp, "expected conv_state on the CPU");
  check_type(kOp, "state", state, ScalarType::Float, {args.batch, args.inner, args.states});
  check_shape(kOp, "conv_state", conv_state, {args.batch, args.taps - 1, args.inner});
  ARCORE_CHECK(x.is_contiguous(), kOp, "expected x to be contiguous");
  ARCORE_CHECK(conv_state.stride(2) == 1 || args.inner == 1, kOp,
               "expected the channels of conv_state to lie side by side but got a stride of ",
               conv_state.stride(2));
  ARCORE_CHECK(
      (state.stride(2) == 1 || args.states == 1) && (state.stride(1) == args.states || args.inner == 1), kOp,
      "expected the states of a row to lie side by side but got strides of ", state.stride(1), " and ",
      state.stride(2));
  args.eps = static_cast<float>(eps);
  args.dtype = storage_type(x, kOp, "x");
  args.given = x.data_ptr();
  Held held;
  held.tensors.reserve(8);
  args.norm = held.small("norm", norm, {args.dim});
  args.in_proj = held.matrix("in_proj", in_proj, 2 * args.inner, args.dim);
  args.in_proj.bias = held.small("in_bias", in_bias, {2 * args.inner});
  args.x_proj = held.matrix("x_proj", x_proj, args.rank + 2 * args.states, args.inner);
  args.dt_proj = held.matrix("dt_proj", dt_proj, args.inner, args.rank);
  args.dt_proj.bias = held.small("dt_bias", dt_bias, {args.inner});
  args.out_proj = held.matrix("out_proj", out_proj, args.dim, args.inner);
  args.out_proj.bias = held.small("out_bias", out_bias, {args.dim});
  args.A = held.small("A", A, {args.inner, args.states});
  args.D = held.small("D", D, {args.inner});
  args.conv_bias = held.small("conv_bias", conv_bias, {args.inner});
  ARCORE_CHECK(conv_weight.is_cpu(), kOp, "expected conv_weight on the CPU");
  check_step_dtype(kOp, "conv_weight", conv_weight);
  check_shape(kOp, "conv_weight", conv_weight, {args.inner, args.taps});
  // Taps may lie apart: with the channels side by side they are read as vectors.
  const bool as_it_is = conv_weight.scalar_type() == ScalarType::Float;
  const Tensor filter = as_it_is ? conv_weight : as_floats(conv_weight);
  args.conv_weight = floats(filter);
  args.weight_channel = filter.stride(0);
  args.weight_tap = filter.stride(1);
  args.conv_state = conv_state.data_ptr();
  args.conv_dtype = storage_type(conv_state, kOp, "conv_state");
  args.conv_row = conv_state.stride(0);
  args.conv_time = conv_state.stride(1);
  args.state = floats(state);
  args.state_row = state.stride(0);
  check_memory({{"x", &x}, {"conv_state", &conv_state}, {"state", &state}}, {{"norm", &norm},
                                                                             {"in_proj", &in_proj},
                                                                             {"in_bias", given(in_bias)},
                                                                             {"conv_weight", &conv_weight},
                                                                             {"conv_bias", given(conv_bias)},
                                                                             {"x_proj", &x_proj},
                                                                             {"dt_proj", &dt_proj},
                                                                             {"dt_bias", given(dt_bias)},
                                                                             {"A", &A},
                                                                             {"D", &D},
                                                                             {"out_proj", &out_proj},
                                                                             {"out_bias", given(out_bias)}});
  if (args.batch == 0) return;
  const bool wide = args.dtype == StorageType::kFloat32;
  const int64_t packed = padded(args.dim) + padded(args.rank) + padded(args.inner);
  const int64_t per_row = packed + args.in_proj.rows + args.x_proj.rows + args.inner + (wide ? 0 : args.dim);
  const Tensor scratch = make_empty(x, {args.batch * per_row}, ScalarType::Float);
  args.normed = floats(scratch);
  args.low_rank = args.normed + args.batch * padded(args.dim);
  args.mixed = args.low_rank + args.batch * padded(args.rank);
  args.projected = args.mixed + args.batch * padded(args.inner);
  args.selected = args.projected + args.batch * args.in_proj.rows;
  args.delta = args.selected + args.batch * args.x_proj.rows;
  args.x = wide ? floats(x) : args.delta + args.batch * args.inner;

  const CpuKernels& kernels = cpu_kernels();
  const auto multiply = [&](const Weights& w, const float* in, float* out, bool add) {
    const auto rows = [&](int64_t begin, int64_t end) {
      kernels.multiply(w, args.batch, in, out, add, begin, end);
    };
    run_tasks(w.rows, threads_of(w, args.batch), rows, kWeightPieces);
  };
  const double channels = static_cast<double>(args.batch) * static_cast<double>(args.inner);
  if (!wide) kernels.widen(args);
  kernels.normalise(args);
  multiply(args.in_proj, args.normed, args.projected, false);
  run_tasks(
      padded(args.inner) / kGroup, threads_for(channels * static_cast<double>(args.taps), kProductsPerThread),
      [&](int64_t begin, int64_t end) { kernels.convolve(args, begin, end); }, {.unit = 1, .per_thread = 4});
  multiply(args.x_proj, args.mixed, args.selected, false);
  kernels.pack(StorageType::kFloat32, args.selected, args.x_proj.rows, args.batch, args.rank, args.low_rank);
  // An exponential takes as long as several products.
  constexpr int64_t kPerState = 8;
  const double work = channels * static_cast<double>(args.rank + kPerState * args.states);
  run_tasks((args.inner + kernels.slice - 1) / kernels.slice, threads_for(work, kProductsPerThread),
            [&](int64_t begin, int64_t end) { kernels.scan(args, begin, end); },
            {.unit = 1, .per_thread = 4});
  multiply(args.out_proj, args.mixed, args.x, true);
  if (!wide) kernels.narrow(args.dtype, args.x, args.given, args.batch * args.dim);
}

}  // namespace
}  // namespace arcore::mamba_step

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "mamba_step(Tensor(a!) x, Tensor norm, Tensor in_proj, Tensor? in_bias, Tensor conv_weight, "
      "Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, Tensor? dt_bias, Tensor A, Tensor D, "
      "Tensor out_proj, Tensor? out_bias, Tensor(b!) conv_state, Tensor(c!) state, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("mamba_step", TORCH_BOX(&arcore::mamba_step::mamba_step_cpu));
}
