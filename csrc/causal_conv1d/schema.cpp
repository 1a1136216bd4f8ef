// torch.ops.arcore.causal_conv1d, its backward, and causal_conv1d_update: checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "causal_conv1d/checks.h"
#include "causal_conv1d/params.h"
#include "common/chunk_list.h"
#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/workspace.h"

namespace arcore::causal_conv1d {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

// Outputs below which a second thread costs more than it saves.
constexpr double kOutputsPerThread = 2e5;
// Few: a piece of channels side by side is read in blocks.
constexpr Pieces kPieces{.unit = 1, .per_thread = 4};

// Which taps an output may use, and which of the last inputs the final state keeps, where a row holds several
// sequences: a tap counts if the input it reads has the id of the output, and an output is real if its id is
// not negative. The inputs before the row belong to its first real id, the final state to its last.
struct Masks {
  std::vector<uint32_t> taps;        // [batch, width, length]
  std::vector<uint32_t> final_keep;  // [batch, width - 1]

  Masks(const Tensor& seq_idx, const Problem& p, bool reverse) {
    const int64_t before = p.width - 1;
    taps.resize(static_cast<size_t>(p.batch * p.width * p.length));
    final_keep.resize(static_cast<size_t>(p.batch * before));
    std::vector<int32_t> ids(static_cast<size_t>(p.length + before));
    for (int64_t b = 0; b < p.batch; ++b) {
      const int32_t* row = static_cast<const int32_t*>(seq_idx.data_ptr()) + b * seq_idx.stride(0);
      int32_t first = -1, last = -1;
      for (int64_t t = 0; t < p.length; ++t) {
        const int32_t id = row[(reverse ? p.length - 1 - t : t) * seq_idx.stride(1)];
        ids[static_cast<size_t>(before + t)] = id;
        if (id >= 0 && first < 0) first = id;
        if (id >= 0) last = id;
      }
      std::fill(ids.begin(), ids.begin() + before, first);
      for (int64_t j = 0; j < p.width; ++j)
        for (int64_t t = 0; t < p.length; ++t) {
          const int32_t own = ids[static_cast<size_t>(before + t)];
          const bool use = own >= 0 && ids[static_cast<size_t>(t + j)] == own;
          taps[static_cast<size_t>((b * p.width + j) * p.length + t)] = use ? ~uint32_t{0} : 0;
        }
      for (int64_t j = 0; j < before; ++j)
        final_keep[static_cast<size_t>(b * before + j)] =
            ids[static_cast<size_t>(p.length + j)] == last && last >= 0 ? ~uint32_t{0} : 0;
    }
  }
};

// Sequences of a packed row, -1: whole rows.
int64_t sequences_of(const char* op, const Tensor& x, const OptionalTensor& seq_idx,
                     const OptionalTensor& cu_seqlens) {
  if (!cu_seqlens.has_value()) return -1;
  ARCORE_CHECK(x.dim() == 3, op, "expected x of shape (batch, dim, length) but got ", shape_of(x));
  check_device(op, "cu_seqlens", *cu_seqlens, x);
  check_sequences(op, x.size(0), x.size(2), cu_seqlens, seq_idx);
  return cu_seqlens->size(0) - 1;
}

// A checked call with its masks, or its sequences.
struct Call : CheckedInputs {
  std::optional<Masks> masks;
  std::vector<Span> spans;

  Call(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
       const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu, bool reverse,
       const OptionalTensor& cu_seqlens)
      : CheckedInputs(op, x, weight, bias, seq_idx, initial_states, silu, reverse,
                      sequences_of(op, x, seq_idx, cu_seqlens)) {
    if (cu_seqlens.has_value()) {
      spans.resize(static_cast<size_t>(problem.batch));
      for_each_sequence(op, problem.length, *cu_seqlens, reverse,
                        [&](int64_t sequence, int64_t begin, int64_t length) {
                          spans[static_cast<size_t>(sequence)] = {begin, length};
                        });
      problem.spans = spans.data();
    }
    if (!seq_idx.has_value()) return;
    masks.emplace(*seq_idx, problem, reverse);
    in.masks = masks->taps.data();
  }

  int64_t tasks() const {
    const int64_t lanes = cpu_kernels().lanes;
    return problem.batch * ((problem.dim + lanes - 1) / lanes);
  }
  int64_t threads() const {
    const double rows = problem.spans != nullptr ? 1.0 : static_cast<double>(problem.batch);
    return threads_for(rows * static_cast<double>(problem.dim) * static_cast<double>(problem.length),
                       kOutputsPerThread);
  }
  // Steps of a row of states.
  Span span(int64_t batch) const {
    return problem.spans != nullptr ? problem.spans[batch] : Span{0, problem.length};
  }
  // Whether the final state keeps its entry j, in scan order.
  bool keeps(int64_t batch, int64_t j) const {
    return !masks.has_value() || masks->final_keep[static_cast<size_t>(batch * (problem.width - 1) + j)] != 0;
  }
};

template <typename F>
void with_elements(const Sequence& s, const F& f) {
  switch (s.dtype) {
    case StorageType::kFloat32:
      return f(static_cast<float*>(s.data));
    case StorageType::kBFloat16:
      return f(static_cast<c10::BFloat16*>(s.data));
    case StorageType::kFloat16:
      return f(static_cast<c10::Half*>(s.data));
  }
}

// The last width - 1 inputs, those before x included.
void store_final(const Call& call, const Sequence& final_states) {
  const Problem& p = call.problem;
  const int64_t before = p.width - 1;
  with_elements(call.in.x, [&](auto* x) {
    auto* out = static_cast<decltype(x)>(final_states.data);
    using T = std::remove_pointer_t<decltype(x)>;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t c = 0; c < p.dim; ++c)
        for (int64_t j = 0; j < before; ++j) {
          const int64_t t = call.span(b).length - before + j;
          T value = static_cast<T>(0.0f);
          if (!call.keeps(b, j))
            value = static_cast<T>(0.0f);
          else if (t >= 0)
            value =
                x[b * call.in.x.batch + c * call.in.x.channel + (call.span(b).begin + t) * call.in.x.time];
          else if (call.in.history != nullptr)
            value = static_cast<T>(call.in.history[(b * p.dim + c) * before + before + t]);
          out[b * final_states.batch + c * final_states.channel + j * final_states.time] = value;
        }
  });
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                                       bool silu, bool reverse, const OptionalTensor& cu_seqlens) {
  const Call call(kOp, x, weight, bias, seq_idx, initial_states, silu, reverse, cu_seqlens);
  const Problem& p = call.problem;
  Tensor out = make_empty_like(x);
  Tensor final_states = make_empty(x, {p.batch, p.dim, p.width - 1});
  if (call.empty()) return {out, final_states};
  store_final(call, view(kOp, "final_states", final_states));
  ForwardArgs args{p, call.in, view(kOp, "out", out, reverse)};
  if (p.spans != nullptr) args.out.batch = 0;
  const CpuKernels& kernels = cpu_kernels();
  run_with_workspace(
      x, call.tasks(), call.threads(), kernels.forward_workspace(p),
      [&](float* workspace, int64_t begin, int64_t end) { kernels.forward(args, workspace, begin, end); },
      kPieces);
  return {out, final_states};
}

// Adds the gradient of the final state to that of the inputs it was copied from.
void add_final(const Call& call, const Tensor& grad_final, const Sequence& grad_x, float* grad_history) {
  const Problem& p = call.problem;
  const int64_t before = p.width - 1;
  const Tensor held = as_floats(grad_final);
  const float* grad = static_cast<const float*>(held.data_ptr());
  with_elements(grad_x, [&](auto* dx) {
    using T = std::remove_pointer_t<decltype(dx)>;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t c = 0; c < p.dim; ++c)
        for (int64_t j = 0; j < before; ++j) {
          if (!call.keeps(b, j)) continue;
          const int64_t t = call.span(b).length - before + j;
          const float add = grad[(b * p.dim + c) * before + j];
          if (t >= 0) {
            T& to = dx[b * grad_x.batch + c * grad_x.channel + (call.span(b).begin + t) * grad_x.time];
            to = static_cast<T>(static_cast<float>(to) + add);
          } else if (grad_history != nullptr) {
            grad_history[(b * p.dim + c) * before + before + t] += add;
          }
        }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients backward_cpu(const OptionalTensor& grad_out, const OptionalTensor& grad_final_states,
                       const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states, bool silu,
                       bool reverse, const OptionalTensor& cu_seqlens) {
  const Call call(kBackwardOp, x, weight, bias, seq_idx, initial_states, silu, reverse, cu_seqlens);
  const Problem& p = call.problem;
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return make_empty(x, shape, ScalarType::Float);
  };
  if (grad_out.has_value()) {
    check_device(kBackwardOp, "grad_out", *grad_out, x);
    check_shape(kBackwardOp, "grad_out", *grad_out, {x.size(0), p.dim, p.length});
    ARCORE_CHECK(grad_out->scalar_type() == x.scalar_type(), kBackwardOp, "expected grad_out of x's dtype ",
                 torch::headeronly::toString(x.scalar_type()), " but got ",
                 torch::headeronly::toString(grad_out->scalar_type()));
  }
  if (grad_final_states.has_value())
    check_shape(kBackwardOp, "grad_final_states", *grad_final_states, {p.batch, p.dim, p.width - 1});
  Tensor grad_x = make_empty_like(x);
  Tensor partial_weight = floats({p.batch, p.dim, p.width}), partial_bias = floats({p.batch, p.dim});
  Tensor grad_history = initial_states.has_value() ? floats({p.batch, p.dim, p.width - 1}) : floats({0});
  if (!call.empty()) {
    BackwardArgs args{};
    args.problem = p;
    args.in = call.in;
    args.grad_out = sequence_view(kBackwardOp, "grad_out", grad_out, reverse);
    args.grad_x = view(kBackwardOp, "x", grad_x, reverse);
    if (p.spans != nullptr) args.grad_out.batch = args.grad_x.batch = 0;
    args.partial_weight = static_cast<float*>(partial_weight.data_ptr());
    args.partial_bias = static_cast<float*>(partial_bias.data_ptr());
    args.grad_history = initial_states.has_value() ? static_cast<float*>(grad_history.data_ptr()) : nullptr;
    const CpuKernels& kernels = cpu_kernels();
    run_with_workspace(
        x, call.tasks(), call.threads(), kernels.backward_workspace(p),
        [&](float* workspace, int64_t begin, int64_t end) { kernels.backward(args, workspace, begin, end); },
        kPieces);
    if (grad_final_states.has_value()) add_final(call, *grad_final_states, args.grad_x, args.grad_history);
  }
  return {grad_x, sum_rows(partial_weight, weight),
          bias.has_value() ? sum_rows(partial_bias, *bias) : floats({0}),
          initial_states.has_value() && initial_states->scalar_type() != ScalarType::Float
              ? torch::stable::to(grad_history, initial_states->scalar_type())
              : grad_history};
}

const int64_t* row_numbers(const OptionalTensor& t, std::vector<Tensor>* held) {
  if (!t.has_value()) return nullptr;
  held->push_back(torch::stable::contiguous(torch::stable::to(*t, ScalarType::Long)));
  return static_cast<const int64_t*>(held->back().data_ptr());
}

// `counts` and `snapshots` are those of update_steps_cpu.
Tensor update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices, bool silu,
              int64_t pad_slot_id, const OptionalTensor& counts, const OptionalTensor& snapshots) {
  CheckedUpdate call(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu);
  UpdateArgs& args = call.args;
  args.write_at = row_numbers(cache_seqlens, &call.held);
  std::vector<int64_t> rows;
  if (conv_state_indices.has_value()) {
    args.rows = row_numbers(conv_state_indices, &call.held);
    if (pad_slot_id >= 0) {
      rows.assign(args.rows, args.rows + args.batch);
      std::replace(rows.begin(), rows.end(), pad_slot_id, int64_t{-1});
      args.rows = rows.data();
    }
  }
  for (int64_t b = 0; b < args.batch; ++b) {
    ARCORE_CHECK(args.rows == nullptr || args.rows[b] < conv_state.size(0), kUpdateOp,
                 "expected conv_state_indices below the rows of conv_state (", conv_state.size(0),
                 ") but got ", args.rows[b]);
    ARCORE_CHECK(args.write_at == nullptr || args.write_at[b] >= 0, kUpdateOp,
                 "expected cache_seqlens >= 0 but got ", args.write_at[b]);
  }
  if (counts.has_value()) {
    check_device(kUpdateOp, "num_steps", *counts, x);
    args.counts = step_counts(kUpdateOp, *counts, args.batch, args.steps, &call.held);
  }
  if (snapshots.has_value()) {
    const Tensor& s = *snapshots;
    check_device(kUpdateOp, "snapshots", s, x);
    check_shape(kUpdateOp, "snapshots", s, {args.batch, args.steps + 1, args.dim, args.state_length});
    ARCORE_CHECK(s.scalar_type() == conv_state.scalar_type(), kUpdateOp,
                 "expected snapshots of conv_state's dtype ",
                 torch::headeronly::toString(conv_state.scalar_type()), " but got ",
                 torch::headeronly::toString(s.scalar_type()));
    check_written(kUpdateOp, "snapshots", s);
    check_not_written(kUpdateOp, "snapshots", s, "conv_state", conv_state);
    check_not_written(kUpdateOp, "x", x, "snapshots", s);
    args.snapshots = {s.data_ptr(), s.stride(0), s.stride(1), s.stride(2), s.stride(3)};
  }
  Tensor out = make_empty_like(x);
  args.out = view_of_steps("out", out);
  if (args.batch == 0 || args.dim == 0) return out;
  // Rows may share a state row, so they run in order, on one thread: a step is a few microseconds.
  cpu_kernels().update(args, 0, args.batch);
  return out;
}

Tensor update_cpu(const Tensor& x, Tensor conv_state, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices, bool silu,
                  int64_t pad_slot_id) {
  return update(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu, pad_slot_id, {}, {});
}

Tensor update_steps_cpu(const Tensor& x, Tensor conv_state, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices,
                        bool silu, int64_t pad_slot_id, const OptionalTensor& num_steps,
                        OptionalTensor snapshots) {
  return update(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu, pad_slot_id, num_steps,
                snapshots);
}

}  // namespace
}  // namespace arcore::causal_conv1d

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool "
      "silu, "
      "bool reverse, Tensor? cu_seqlens=None) -> (Tensor out, Tensor final_states)");
  m.def(
      "causal_conv1d_backward(Tensor? grad_out, Tensor? grad_final_states, Tensor x, Tensor weight, Tensor? "
      "bias, "
      "Tensor? seq_idx, Tensor? initial_states, bool silu, bool reverse, Tensor? cu_seqlens=None) -> "
      "(Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? "
      "cache_seqlens, "
      "Tensor? conv_state_indices, bool silu, int pad_slot_id=-1) -> Tensor");
  m.def(
      "causal_conv1d_update_steps(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? "
      "cache_seqlens, Tensor? conv_state_indices, bool silu, int pad_slot_id, Tensor? num_steps, "
      "Tensor(b!)? snapshots) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&arcore::causal_conv1d::forward_cpu));
  m.impl("causal_conv1d_backward", TORCH_BOX(&arcore::causal_conv1d::backward_cpu));
  m.impl("causal_conv1d_update", TORCH_BOX(&arcore::causal_conv1d::update_cpu));
  m.impl("causal_conv1d_update_steps", TORCH_BOX(&arcore::causal_conv1d::update_steps_cpu));
}
