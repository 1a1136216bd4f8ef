// CUDA side of torch.ops.arcore.ssd: marks of packed rows, step sizes, allocation, launches.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "common/cuda_call.h"
#include "common/mark_rows.h"
#include "ssd/checks.h"
#include "ssd/params.h"

namespace arcore::ssd {

namespace {

float* floats(Call& call, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  call.held.push_back(torch::stable::new_empty(like, shape, ScalarType::Float));
  return static_cast<float*>(call.held.back().data_ptr());
}

// Of the numbers that the kernels multiply: see tiles_sm80.cuh.
int parts_of(const Args& p) {
  int parts = 1;
  for (const View* v : {&p.x, &p.B, &p.C})
    parts = std::max(parts, v->dtype == StorageType::kFloat32   ? 3
                            : v->dtype == StorageType::kFloat16 ? 2
                                                                : 1);
  return parts;
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

// Cells of which states are kept at once; a row that has more is gone through in parts.
int64_t window_of(const CudaLayout& layout, const Args& p) {
  const int64_t bytes = p.batch * p.heads * p.dim * p.states * 4;
  return std::min(layout.cells, std::max<int64_t>(workspace_bytes() / bytes, 4));
}

// Scans the cells of `scan`, in parts whose states fit: first what each cell adds, then the states before
// them, then the cells in segments.
void scan_side_by_side(const char* op, Call& call, const Tensor& x, ScanCuda scan, void* stream) {
  const Args& p = scan.in;
  const int64_t window = window_of(scan.layout, p), heads = p.batch * p.heads * scan.layout.tiles;
  scan.states = floats(call, x, {p.batch, window, p.heads, p.dim, p.states});
  scan.passes = floats(call, x, {p.batch, window, p.heads});
  float* const leave = scan.leave;
  float* between = nullptr;
  for (int64_t begin = 0; begin < scan.layout.cells; begin += window) {
    scan.begin = begin;
    scan.end = std::min(begin + window, scan.layout.cells);
    const int64_t cells = scan.end - scan.begin;
    if (scan.end < scan.layout.cells && between == nullptr)
      between = floats(call, x, {p.batch, p.heads, p.dim, p.states});
    ScanCuda own = scan;
    own.outputs = false;
    own.use = StateUse::kOwn;
    own.leave = nullptr;
    own.segments = cells;
    own.segment_cells = 1;
    check_launch(op, launch_scan_sm80(own, stream));
    const FoldCuda fold{p.batch,
                        cells,
                        p.heads,
                        p.dim * p.states,
                        false,
                        scan.enter,
                        scan.end < scan.layout.cells ? between : leave,
                        scan.states,
                        scan.passes};
    check_launch(op, launch_fold_sm80(fold, stream));
    scan.use = StateUse::kEnter;
    scan.leave = nullptr;
    scan.segment_cells = std::max<int64_t>(cells * heads / (4 * scan.layout.multiprocessors), 1);
    scan.segments = (cells + scan.segment_cells - 1) / scan.segment_cells;
    check_launch(op, launch_scan_sm80(scan, stream));
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
  scan.left = args.x;
  scan.right = args.B;
  scan.outputs = true;
  scan.parts = scan.left_parts = parts_of(args);
  (scan.layout.packed ? scan.run_enter : scan.enter) = args.initial_state;
  (scan.layout.packed ? scan.run_leave : scan.leave) = args.last_state;
  if (side_by_side(scan.layout, args)) {
    scan_side_by_side(kOp, call, x, scan, scope.stream());
  } else {
    scan.end = scan.segment_cells = scan.layout.cells;
    scan.segments = 1;
    check_launch(kOp, launch_scan_sm80(scan, scope.stream()));
  }
  return {out, last_state};
}

}  // namespace
}  // namespace arcore::ssd

ARCORE_CUDA_LIBRARY_IMPL(m) {
  m.impl("ssd", TORCH_BOX(&arcore::ssd::forward_cuda));
}
