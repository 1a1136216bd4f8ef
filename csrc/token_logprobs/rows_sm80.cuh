// Forward and backward for GPUs from sm_80 on: a block per row, or per slice of a long row.
#pragma once

#include "common/sm80/device.h"
#include "common/sm80/launch.h"
#include "common/sm80/row_sums.cuh"
#include "token_logprobs/params.h"

namespace arcore::token_logprobs {

ARCORE_DEVICE int64_t offset_of(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset + row * rows.strides[0];
}

// One row as y values: softcapped logits, -inf where the mask drops the column.
struct RowView {
  MaskKind kind;
  const void* mask;  // at column 0 of the whole row
  int64_t first_column;
  float cap;  // 0: none

  ARCORE_DEVICE float y(int64_t column, float x) const {
    if (cap != 0.0f) x = cap * tanhf(x / cap);
    const int64_t at = first_column + column;
    bool kept = true;
    if (kind == MaskKind::kBool) kept = static_cast<const uint8_t*>(mask)[at] != 0;
    if (kind == MaskKind::kBits) kept = (static_cast<const uint32_t*>(mask)[at >> 5] >> (at & 31) & 1u) != 0u;
    return kept ? x : -HUGE_VALF;
  }
};

ARCORE_DEVICE RowView row_view(const Problem& p, int64_t row) {
  RowView view{p.mask_kind, nullptr, p.first_column, static_cast<float>(p.softcap)};
  if (p.mask_kind != MaskKind::kNone)
    view.mask = static_cast<const char*>(p.mask.data) +
                offset_of(p.mask, row) * (p.mask_kind == MaskKind::kBits ? 4 : 1);
  return view;
}

// NaN, which makes the row's results NaN, where a temperature leaves no room for float32 scores: nobody reads
// the tensor before a GPU does.
ARCORE_DEVICE double temperature_of(const Problem& p, int64_t row) {
  if (p.temperature_rows == nullptr) return p.temperature;
  const float value = p.temperature_rows[row];
  return value >= 1e-30f && value <= 1e30f ? static_cast<double>(value) : static_cast<double>(NAN);
}

ARCORE_DEVICE void finish_row(const FinishArgs& args, int64_t row, const RowState& s) {
  const Problem& p = args.problem;
  const double inverse_temperature = 1.0 / temperature_of(p, row);
  float logp = -HUGE_VALF, logsumexp = -HUGE_VALF, entropy = 0.0f;
  if (p.target[row] == p.ignore_index) {
    logp = logsumexp = 0.0f;
  } else if (s.sum != 0.0) {
    const double log_sum = log(s.sum), value = log_sum - s.weighted / s.sum;
    logp = static_cast<float>(log_prob(s, inverse_temperature));
    logsumexp = static_cast<float>(s.max * inverse_temperature + log_sum);
    entropy = static_cast<float>(value < 0.0 ? 0.0 : value);
  }
  args.logp[row] = logp;
  args.logsumexp[row] = logsumexp;
  if (args.entropy != nullptr) args.entropy[row] = entropy;
}

template <typename T>
ARCORE_LAUNCH_BOUNDS(kRowThreads, 2)
ARCORE_KERNEL update_rows(ARCORE_KERNEL_ARGS UpdateCuda cuda) {
  const UpdateArgs& args = cuda.args;
  const Problem& p = args.problem;
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t row = block_x() / cuda.slices, slice = block_x() % cuda.slices;
  const bool ignored = p.target[row] == p.ignore_index;
  const double inverse_temperature = 1.0 / temperature_of(p, row);
  RowState state = empty_row();
  if (!ignored) {
    const T* logits = static_cast<const T*>(args.logits.data) + offset_of(args.logits, row);
    const RowView view = row_view(p, row);
    const int64_t begin = cuda.slices == 1 ? 0 : slice * kRowSlice;
    const int64_t end = cuda.slices == 1 || begin + kRowSlice > p.columns ? p.columns : begin + kRowSlice;
    auto for_each = [&](const auto& f) {
      for_each_column(logits, begin, end, [&](int64_t column, float x) { f(view.y(column, x)); });
    };
    state = sum_row(for_each, static_cast<float>(inverse_temperature), args.entropy, scratch);
    const int64_t target = p.target[row] - p.first_column;
    if (target >= begin && target < end)
      state.target = static_cast<double>(view.y(target, to_float(logits[target])));
  }
  if (thread_index() != 0) return;
  if (cuda.slices > 1) {
    cuda.partial[row * cuda.slices + slice] = state;
    return;
  }
  if (p.first_column != 0) {
    const RowState before = args.state[row];
    state = ignored ? before : merge_rows(before, state, inverse_temperature);
  }
  args.state[row] = state;
  if (cuda.finish.logp != nullptr) finish_row(cuda.finish, row, state);
}

// A thread per row puts its slices together, in their order.
ARCORE_KERNEL merge_slices(ARCORE_KERNEL_ARGS UpdateCuda cuda) {
  const UpdateArgs& args = cuda.args;
  const Problem& p = args.problem;
  const int64_t row = block_x() * block_threads() + thread_index();
  if (row >= p.rows) return;
  const double inverse_temperature = 1.0 / temperature_of(p, row);
  RowState state = p.first_column == 0 ? empty_row() : args.state[row];
  if (p.target[row] != p.ignore_index)
    for (int64_t s = 0; s < cuda.slices; ++s)
      state = merge_rows(state, cuda.partial[row * cuda.slices + s], inverse_temperature);
  args.state[row] = state;
  if (cuda.finish.logp != nullptr) finish_row(cuda.finish, row, state);
}

ARCORE_KERNEL finish_rows(ARCORE_KERNEL_ARGS FinishArgs args) {
  const int64_t row = block_x() * block_threads() + thread_index();
  if (row < args.problem.rows) finish_row(args, row, args.state[row]);
}

ARCORE_DEVICE double value_or_zero(const float* values, int64_t row) {
  return values != nullptr ? static_cast<double>(values[row]) : 0.0;
}

// Per column e^d (constant - slope d) (1 - (y / cap)^2); the target's own element apart, in float64.
template <typename T>
ARCORE_LAUNCH_BOUNDS(kRowThreads, 2)
ARCORE_KERNEL backward_rows(ARCORE_KERNEL_ARGS BackwardArgs args) {
  const Problem& p = args.problem;
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  const int64_t row = block_x();
  const T* logits = static_cast<const T*>(args.logits.data) + offset_of(args.logits, row);
  T* grad = static_cast<T*>(args.grad.data) + offset_of(args.grad, row);
  const RowState s = args.state[row];
  const double temperature = temperature_of(p, row), inverse_temperature = 1.0 / temperature;
  const double grad_logp = s.target == -HUGE_VAL ? 0.0 : value_or_zero(args.grad_logp, row);
  const double grad_lse = value_or_zero(args.grad_logsumexp, row);
  const double grad_entropy = value_or_zero(args.grad_entropy, row);
  const bool unused = grad_logp == 0.0 && grad_lse == 0.0 && grad_entropy == 0.0;
  if (p.target[row] == p.ignore_index || s.sum == 0.0 || unused) {
    clear_columns(grad, p.columns);
    if (thread_index() == 0 && args.grad_temperature != nullptr) args.grad_temperature[row] = 0.0f;
    return;
  }
  const double log_sum = log(s.sum);
  const double level =
      grad_lse - grad_logp - (grad_entropy == 0.0 ? 0.0 : grad_entropy * (log_sum - s.weighted / s.sum));
  const double scale = inverse_temperature / s.sum;
  const float shift = static_cast<float>(s.max), over_temperature = static_cast<float>(inverse_temperature);
  const float constant = static_cast<float>((level + grad_entropy * log_sum) * scale);
  const float slope = static_cast<float>(grad_entropy * scale);
  const float inverse_cap = p.softcap != 0.0 ? static_cast<float>(1.0 / p.softcap) : 0.0f;
  const RowView view = row_view(p, row);
  const int64_t target = p.target[row] - p.first_column;
  const bool own = grad_logp != 0.0 && target >= 0 && target < p.columns;
  float moment = 0.0f;
  transform_columns(logits, grad, p.columns, [&](int64_t column, float x) {
    const float y = view.y(column, x);
    const float d = (y - shift) * over_temperature, bounded = d < kExpIsZero ? kExpIsZero : d;
    float out = expf(d) * fmaf(-slope, bounded, constant);
    moment = fmaf(bounded, out, moment);
    if (inverse_cap != 0.0f) {
      const float ratio = fmaxf(-1.0f, y * inverse_cap);
      out *= fmaf(-ratio, ratio, 1.0f);
    }
    return out;
  });
  double target_share = 0.0;
  if (own) {
    const double logp = log_prob(s, inverse_temperature), ratio = s.target * static_cast<double>(inverse_cap);
    const double dz = exp(logp) * (level - grad_entropy * logp) + grad_logp;
    sync_threads();  // another thread has written there
    if (thread_index() == 0)
      grad[target] = from_float<T>(static_cast<float>(dz * inverse_temperature * (1.0 - ratio * ratio)));
    target_share = grad_logp * (s.target - s.max) * inverse_temperature;
  }
  if (args.grad_temperature == nullptr) return;
  auto add = [](double a, double b) { return a + b; };
  const double blocks = combine_block(static_cast<double>(moment), scratch, add);
  // sum dz z: the target's share, what the columns added (they carry 1 / temperature), and, once per row, the
  // shift by max, since all dz of a row add up to grad_lse.
  double total = target_share + blocks * temperature;
  if (p.first_column == 0) total += grad_lse * s.max * inverse_temperature;
  if (thread_index() == 0) args.grad_temperature[row] = static_cast<float>(-total * inverse_temperature);
}

template <typename T>
int launch_update(const UpdateCuda& cuda, void* stream) {
  const int64_t rows = cuda.args.problem.rows;
  const int error =
      launch(update_rows<T>, {rows * cuda.slices, 1, 1, kRowThreads, kRowWarps * 8}, stream, cuda);
  if (error != 0 || cuda.slices == 1) return error;
  return launch(merge_slices, {(rows + 31) / 32, 1, 1, 32, 0}, stream, cuda);
}

template <typename T>
int launch_backward(const BackwardArgs& args, void* stream) {
  return launch(backward_rows<T>, {args.problem.rows, 1, 1, kRowThreads, kRowWarps * 8}, stream, args);
}

}  // namespace arcore::token_logprobs
