// CUDA side of torch.ops.arcore.ssd: marks of packed rows, step sizes, allocation, launches.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/cuda_call.h"
#include "common/mark_rows.h"
#include "common/sum_first.h"
#include "ssd/checks.h"
#include "ssd/params.h"

namespace arcore::ssd {

namespace {

float* floats(Call& call, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  call.held.push_back(torch::stable::new_empty(like, shape, ScalarType::Float));
  return static_cast<float*>(call.held.back().data_ptr());
}

// Of the numbers that the kernels multiply: see tiles_sm80.cuh.
int parts_of(const View& v) {
  if (v.data == nullptr || v.dtype == StorageType::kBFloat16) return 1;
  return v.dtype == StorageType::kFloat16 ? 2 : 3;
}
int parts_of(const Args& p) {
  return std::max({parts_of(p.x), parts_of(p.B), parts_of(p.C)});
}

// Marks and step sizes, of a call that is not empty.
CudaLayout prepare(const char* op, Call& call, const Tensor& x, const OptionalTensor& cu_seqlens,
                   const OptionalTensor& seq_idx, bool reverse, bool slopes, void* stream) {
  const Args& p = call.args;
  CudaLayout layout{};
  layout.steps = cell_steps(p.states, parts_of(p));
  layout.cells = (p.length + layout.steps - 1) / layout.steps;
  layout.tiles = (p.dim + kTileChannels - 1) / kTileChannels;
  layout.multiprocessors = multiprocessors();
  layout.shared_of_multiprocessor = shared_of_multiprocessor();
  const MarkedRows rows =
      mark_rows(op, x, p.length, cu_seqlens, seq_idx, reverse, call.held, stream, launch_marks_sm80);
  layout.marks = rows.marks;
  layout.packed = rows.packed;
  constexpr int64_t kWords = sizeof(CellMarks) / sizeof(float);
  layout.cell_marks = reinterpret_cast<CellMarks*>(floats(call, x, {p.batch, layout.cells, kWords}));
  layout.sizes = p.batch * p.heads * layout.cells * layout.steps;
  layout.slopes = slopes;
  layout.dt = floats(call, x, {slopes ? 4 : 3, layout.sizes});
  check_launch(op, launch_steps_sm80({p, layout}, stream));
  return layout;
}

// Whether the cells of a row are worked on side by side: where there are too few heads to fill half of the
// device. The bits are the same.
bool side_by_side(const CudaLayout& layout, const Args& p) {
  constexpr int64_t kFewCells = 4;
  return layout.cells > kFewCells && 2 * p.batch * p.heads * layout.tiles <= layout.multiprocessors;
}

// Cells of which states are kept at once, `tensors` of them; a row that has more is gone through in parts.
int64_t window_of(const CudaLayout& layout, const Args& p, int64_t tensors) {
  const int64_t bytes = p.batch * p.heads * p.dim * p.states * 4 * tensors;
  return std::min(layout.cells, std::max<int64_t>(workspace_bytes() / bytes, 4));
}

// How many blocks a row and head have where cells are worked on side by side, each with as many cells.
void cut_into_segments(ScanCuda& scan) {
  const int64_t cells = scan.end - scan.begin, heads = scan.in.batch * scan.in.heads * scan.layout.tiles;
  scan.segment_cells = std::max<int64_t>(cells * heads / (4 * scan.layout.multiprocessors), 1);
  scan.segments = (cells + scan.segment_cells - 1) / scan.segment_cells;
}

// The states before the cells [begin, end), side by side: first what each cell adds, then the sums over them.
void states_side_by_side(const char* op, ScanCuda scan, void* stream) {
  const Args& p = scan.in;
  const int64_t cells = scan.end - scan.begin;
  const FoldCuda fold{p.batch,    cells,      p.heads,     p.dim * p.states, scan.backwards,
                      scan.enter, scan.leave, scan.states, scan.passes};
  scan.outputs = false;
  scan.use = StateUse::kOwn;
  scan.leave = nullptr;
  scan.segments = cells;
  scan.segment_cells = 1;
  check_launch(op, launch_scan_sm80(scan, stream));
  check_launch(op, launch_fold_sm80(fold, stream));
}

// Outputs and last states of all cells.
void scan_outputs(const char* op, Call& call, const Tensor& x, ScanCuda scan, void* stream) {
  const Args& p = scan.in;
  scan.outputs = true;
  scan.left = p.x;
  scan.right = p.B;
  scan.parts = scan.left_parts = parts_of(p);
  (scan.layout.packed ? scan.run_enter : scan.enter) = p.initial_state;
  (scan.layout.packed ? scan.run_leave : scan.leave) = p.last_state;
  scan.end = scan.segment_cells = scan.layout.cells;
  scan.segments = 1;
  if (!side_by_side(scan.layout, p)) return check_launch(op, launch_scan_sm80(scan, stream));
  const int64_t cells = scan.layout.cells, window = window_of(scan.layout, p, 1);
  scan.states = floats(call, x, {p.batch, window, p.heads, p.dim, p.states});
  scan.passes = floats(call, x, {p.batch, window, p.heads});
  float* const leave = scan.leave;
  float* const between = window < cells ? floats(call, x, {p.batch, p.heads, p.dim, p.states}) : nullptr;
  for (scan.begin = 0; scan.begin < cells; scan.begin = scan.end) {
    scan.end = std::min(scan.begin + window, cells);
    scan.leave = scan.end < cells ? between : leave;
    states_side_by_side(op, scan, stream);
    ScanCuda outputs = scan;
    outputs.use = StateUse::kEnter;
    outputs.leave = nullptr;
    cut_into_segments(outputs);
    check_launch(op, launch_scan_sm80(outputs, stream));
    scan.enter = between;
  }
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                        const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                        const OptionalTensor& dt_bias, const OptionalTensor& initial_state,
                                        const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx,
                                        bool dt_softplus, double dt_low, double dt_high, bool reverse) {
  Call call(kOp, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, seq_idx, dt_softplus, dt_low,
            dt_high, reverse, false);
  Args& args = call.args;
  const CudaScope scope(x);
  Tensor out = torch::stable::empty_like(x);
  Tensor last_state =
      torch::stable::new_empty(x, {call.rows, args.heads, args.dim, args.states}, ScalarType::Float);
  args.last_state = static_cast<float*>(last_state.data_ptr());
  // Sequences without steps end as they start.
  if (cu_seqlens.has_value() || args.length == 0)
    check_launch(
        kOp, launch_carry_sm80({args.initial_state, args.last_state, last_state.numel()}, scope.stream()));
  if (call.empty() || args.length == 0) return {out, last_state};
  args.out = view(kOp, "out", out, reverse);
  ScanCuda scan{};
  scan.layout = prepare(kOp, call, x, cu_seqlens, seq_idx, reverse, false, scope.stream());
  scan.in = args;
  scan_outputs(kOp, call, x, scan, scope.stream());
  return {out, last_state};
}

// The states before the cells of a launch of gradients, and the gradients of those after them.
struct CellStates {
  ScanCuda states{}, grads{};
  int64_t window;
  std::vector<float*> before;  // what enters each window

  // `grads` has all but what a launch decides.
  CellStates(Call& call, const Tensor& x, const ScanCuda& gradients) : grads(gradients) {
    const Args& p = grads.in;
    window = window_of(grads.layout, p, 2);
    for (ScanCuda* scan : {&states, &grads}) {
      scan->in = p;
      scan->layout = gradients.layout;
      scan->parts = parts_of(p);
      scan->states = floats(call, x, {p.batch, window, p.heads, p.dim, p.states});
      scan->passes = floats(call, x, {p.batch, window, p.heads});
    }
    states.left_parts = states.parts;
    states.left = p.x;
    states.right = p.B;
    if (states.layout.packed) states.run_enter = p.initial_state;
    grads.right = p.C;
    grads.backwards = true;
    before.assign(static_cast<size_t>((states.layout.cells + window - 1) / window), nullptr);
    for (size_t i = 1; i < before.size(); ++i)
      before[i] = floats(call, x, {p.batch, p.heads, p.dim, p.states});
  }
  int64_t windows() const { return static_cast<int64_t>(before.size()); }
  void cut(int64_t number) {
    for (ScanCuda* scan : {&states, &grads}) {
      scan->begin = number * window;
      scan->end = std::min(scan->begin + window, scan->layout.cells);
    }
  }
  // The states, and what leaves the window.
  void run_states(int64_t number, bool keep, void* stream) {
    cut(number);
    states.enter = number > 0             ? before[static_cast<size_t>(number)]
                   : states.layout.packed ? nullptr
                                          : states.in.initial_state;
    states.leave = number + 1 < windows() ? before[static_cast<size_t>(number + 1)] : nullptr;
    run(states, keep, stream);
  }
  // Their gradients. `between` is what leaves one window for the one before it.
  void run_grads(int64_t number, const float* enter, float* leave, float* between, void* stream) {
    cut(number);
    grads.enter = number + 1 < windows() ? between : enter;
    grads.leave = number > 0 ? between : leave;
    run(grads, true, stream);
  }

 private:
  static void run(ScanCuda scan, bool keep, void* stream) {
    const bool beside = side_by_side(scan.layout, scan.in);
    if (beside) {
      states_side_by_side(kBackwardOp, scan, stream);
      // Inside of cells packed rows begin, whose gradients the sums over cells do not have.
      if (scan.run_leave == nullptr) return;
      scan.use = StateUse::kEnter;
      scan.leave = nullptr;
      cut_into_segments(scan);
    } else {
      scan.use = keep ? StateUse::kKeep : StateUse::kNone;
      scan.segment_cells = scan.end - scan.begin;
      scan.segments = 1;
    }
    check_launch(kBackwardOp, launch_scan_sm80(scan, stream));
  }
};

// Absent optional inputs get an empty gradient.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward_cuda(const OptionalTensor& grad_out, const OptionalTensor& grad_last_state,
                        const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                        const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                        const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                        const OptionalTensor& seq_idx, bool dt_softplus, double dt_low, double dt_high,
                        bool reverse) {
  Call call(kBackwardOp, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, seq_idx, dt_softplus,
            dt_low, dt_high, reverse, false);
  const Args& p = call.args;
  const int parts = parts_of(p);
  ARCORE_CHECK(parts < 3 || p.states <= kMostStatesOfThreeParts, kBackwardOp, "expected d_state of at most ",
               kMostStatesOfThreeParts, " with float32 inputs on a GPU but got ", p.states);
  const CudaScope scope(x);
  void* const stream = scope.stream();
  const auto fresh = [&](torch::headeronly::IntHeaderOnlyArrayRef shape) {
    return torch::stable::new_empty(x, shape, ScalarType::Float);
  };
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  Tensor grad_x = torch::stable::empty_like(x), grad_dt = torch::stable::empty_like(dt);
  Tensor grad_B = torch::stable::empty_like(B), grad_C = torch::stable::empty_like(C);
  Tensor grad_z = z.has_value() ? torch::stable::empty_like(*z) : fresh({0});
  Tensor grad_initial = initial_state.has_value() ? fresh({call.rows, p.heads, p.dim, p.states}) : fresh({0});
  const bool nothing = call.empty() || p.length == 0;
  const int64_t cells =
      nothing ? 0 : (p.length + cell_steps(p.states, parts) - 1) / cell_steps(p.states, parts);
  Tensor partial_A = fresh({p.batch * cells, p.heads}), partial_bias = fresh({p.batch * cells, p.heads});
  Tensor partial_D = D.has_value() ? fresh({p.batch * cells, p.heads, p.dim}) : fresh({0, p.heads, p.dim});
  if (grad_out.has_value())
    check_shape(kBackwardOp, "grad_out", *grad_out, {p.batch, p.length, p.heads, p.dim});
  const float* grad_last = nullptr;
  if (grad_last_state.has_value()) {
    check_shape(kBackwardOp, "grad_last_state", *grad_last_state, {call.rows, p.heads, p.dim, p.states});
    grad_last = call.hold(kBackwardOp, "grad_last_state", *grad_last_state);
  }
  // Sequences without steps end as they start.
  if (initial_state.has_value() && (cu_seqlens.has_value() || p.length == 0))
    check_launch(kBackwardOp,
                 launch_carry_sm80({grad_last, data(grad_initial), grad_initial.numel()}, stream));
  if (nothing) {
    for (Tensor* t : {&grad_B, &grad_C, &grad_dt})
      torch::stable::zero_(*t);
  } else {
    const CudaLayout layout = prepare(kBackwardOp, call, x, cu_seqlens, seq_idx, reverse, true, stream);
    View grad_y{};
    if (grad_out.has_value()) grad_y = view(kBackwardOp, "grad_out", *grad_out, reverse);
    if (z.has_value()) {
      // y again, and through the gate to its gradient.
      call.held.push_back(fresh({p.batch, p.length, p.heads, p.dim}));
      ScanCuda scan{};
      scan.layout = layout;
      scan.in = p;
      scan.in.z = {};
      scan.in.out = view(kBackwardOp, "y", call.held.back(), reverse);
      scan.in.last_state = nullptr;
      const GateCuda gate{p, layout, grad_y, view(kBackwardOp, "z", grad_z, reverse), scan.in.out};
      scan_outputs(kBackwardOp, call, x, scan, stream);
      check_launch(kBackwardOp, launch_gate_sm80(gate, stream));
      grad_y = gate.y;
    }
    ScanCuda grads{};
    grads.in = p;
    grads.layout = layout;
    grads.left = grad_y;
    grads.left_parts = std::max(parts, parts_of(grad_y));
    // Two parts of a gradient have to do where three do not fit.
    if (parts == 2 && p.states > kMostStatesOfThreeParts) grads.left_parts = 2;
    float* const to_initial = initial_state.has_value() ? data(grad_initial) : nullptr;
    if (layout.packed) {
      grads.run_enter = grad_last;
      grads.run_leave = to_initial;
    }
    CellStates around(call, x, grads);
    float* const between =
        around.windows() > 1 ? floats(call, x, {p.batch, p.heads, p.dim, p.states}) : nullptr;

    GradientCuda cuda{};
    cuda.in = p;
    cuda.layout = layout;
    cuda.parts = parts;
    cuda.left_parts = grads.left_parts;
    cuda.states = around.states.states;
    cuda.grad_states = around.grads.states;
    cuda.grad_last_state = layout.packed ? grad_last : nullptr;
    cuda.grad_y = grad_y;
    cuda.grad_x = view(kBackwardOp, "x", grad_x, reverse);
    cuda.grad_dt = view(kBackwardOp, "dt", grad_dt, reverse);
    cuda.grad_B = view(kBackwardOp, "B", grad_B, reverse);
    cuda.grad_C = view(kBackwardOp, "C", grad_C, reverse);
    cuda.partial_A = data(partial_A);
    cuda.partial_bias = data(partial_bias);
    cuda.partial_D = D.has_value() ? data(partial_D) : nullptr;
    // A function of one row, so that its sums do not depend on the others of a batch.
    const int64_t of_group = p.heads / p.groups, wanted = (128 + cells * p.groups - 1) / (cells * p.groups);
    cuda.slices = std::max((of_group + 7) / 8, std::min(of_group, wanted));
    cuda.heads = (of_group + cuda.slices - 1) / cuda.slices;
    cuda.slices = (of_group + cuda.heads - 1) / cuda.heads;
    const int64_t steps = around.window * layout.steps;
    cuda.partial_B = floats(call, x, {p.batch, p.groups * cuda.slices, steps, p.states});
    cuda.partial_C = floats(call, x, {p.batch, p.groups * cuda.slices, steps, p.states});
    for (int64_t i = 0; i + 1 < around.windows(); ++i)
      around.run_states(i, false, stream);
    for (int64_t i = around.windows() - 1; i >= 0; --i) {
      around.run_states(i, true, stream);
      around.run_grads(i, layout.packed ? nullptr : grad_last, layout.packed ? nullptr : to_initial, between,
                       stream);
      cuda.begin = around.states.begin;
      cuda.end = around.states.end;
      check_launch(kBackwardOp, launch_gradients_sm80(cuda, stream));
    }
  }
  return {grad_x,
          grad_dt,
          sum_first(partial_A, A),
          grad_B,
          grad_C,
          D.has_value() ? sum_first(partial_D, *D) : fresh({0}),
          grad_z,
          dt_bias.has_value() ? sum_first(partial_bias, *dt_bias) : fresh({0}),
          initial_state.has_value() && initial_state->scalar_type() != ScalarType::Float
              ? torch::stable::to(grad_initial, initial_state->scalar_type())
              : grad_initial};
}

}  // namespace
}  // namespace arcore::ssd

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("ssd", TORCH_BOX(&arcore::ssd::forward_cuda));
  m.impl("ssd_backward", TORCH_BOX(&arcore::ssd::backward_cuda));
}
