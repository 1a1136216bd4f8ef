// torch.ops.arcore.token_logprobs, its backward, and the pieces of both that linear_logprobs runs on one tile
// of columns at a time: schema, checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/cpu_dispatch.h"
#include "common/parallel.h"
#include "token_logprobs/params.h"

namespace arcore::token_logprobs {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "token_logprobs";
constexpr const char* kBackwardOp = "token_logprobs_backward";
constexpr const char* kUpdateOp = "token_logprobs_update_";
constexpr const char* kFinishOp = "token_logprobs_finish";
constexpr const char* kTileBackwardOp = "token_logprobs_tile_backward_";

// Below this many elements a second thread costs more than it saves.
constexpr double kElementsPerThread = 1e5;

// The rows of t, whose last dimension the kernels read as contiguous.
Rows rows_of(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  ARCORE_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, "expected ", name,
               " whose last dimension has stride 1 but got stride ", t.stride(last),
               "; make it contiguous first");
  Rows rows{t.data_ptr(), 0, {}, {}};
  for (int64_t d = 0; d < last; ++d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    if (rows.dims > 0 && rows.strides[rows.dims - 1] == size * stride) {
      rows.sizes[rows.dims - 1] *= size;
      rows.strides[rows.dims - 1] = stride;
      continue;
    }
    ARCORE_CHECK(rows.dims < kMaxRowDims, op, "expected ", name, " of at most ", kMaxRowDims + 1,
                 " dimensions but got ", shape_of(t));
    rows.sizes[rows.dims] = size;
    rows.strides[rows.dims] = stride;
    ++rows.dims;
  }
  return rows;
}

bool same_rows(const Tensor& t, const Tensor& logits) {
  bool same = t.dim() == logits.dim();
  for (int64_t d = 0; same && d + 1 < t.dim(); ++d)
    same = t.size(d) == logits.size(d);
  return same;
}

int64_t count_rows(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d)
    rows *= logits.size(d);
  return rows;
}

template <typename T>
T* row_values(const char* op, const char* name, const Tensor& t, int64_t rows, ScalarType dtype) {
  ARCORE_CHECK(t.scalar_type() == dtype && t.numel() == rows && t.is_contiguous() && t.is_cpu(), op,
               "expected ", name, " as a contiguous CPU tensor of ", rows, " ",
               torch::headeronly::toString(dtype), " but got ", torch::headeronly::toString(t.scalar_type()),
               " ", shape_of(t));
  return static_cast<T*>(t.data_ptr());
}

// The part of the arguments that every op shares; `vocab` is the number of columns that targets may name.
Problem check_rows(const char* op, int64_t rows, int64_t vocab, const Tensor& target,
                   const OptionalTensor& temperature_rows, double temperature, double softcap,
                   int64_t ignore_index) {
  Problem p{};
  p.rows = rows;
  p.columns = vocab;
  p.target = row_values<const int64_t>(op, "target", target, rows, ScalarType::Long);
  p.ignore_index = ignore_index;
  ARCORE_CHECK(std::isfinite(softcap) && softcap >= 0.0, op,
               "expected softcap to be positive, or 0 for none, but got ", softcap);
  p.softcap = softcap;
  ARCORE_CHECK(std::isfinite(temperature) && temperature > 0.0, op,
               "expected temperature to be positive and finite but got ", temperature);
  p.temperature = temperature;
  if (temperature_rows.has_value()) {
    p.temperature_rows =
        row_values<const float>(op, "temperature_rows", *temperature_rows, rows, ScalarType::Float);
    for (int64_t r = 0; r < rows; ++r)
      ARCORE_CHECK(std::isfinite(p.temperature_rows[r]) && p.temperature_rows[r] > 0.0f, op,
                   "expected temperature to be positive and finite but got ", p.temperature_rows[r],
                   " in row ", r);
  }
  for (int64_t r = 0; r < rows; ++r)
    ARCORE_CHECK(p.target[r] == ignore_index || (p.target[r] >= 0 && p.target[r] < vocab), op,
                 "expected targets in [0, ", vocab, ") or ignore_index=", ignore_index, " but got ",
                 p.target[r], " in row ", r);
  return p;
}

void check_mask(const char* op, Problem& p, const OptionalTensor& mask, const Tensor& logits, int64_t vocab) {
  if (!mask.has_value()) return;
  const bool bits = mask->scalar_type() == ScalarType::Int;
  ARCORE_CHECK(bits || mask->scalar_type() == ScalarType::Bool, op,
               "expected mask of dtype bool, or int32 with 32 columns a word, but got ",
               torch::headeronly::toString(mask->scalar_type()));
  const int64_t width = bits ? (vocab + 31) / 32 : vocab;
  ARCORE_CHECK(mask->is_cpu() && same_rows(*mask, logits) && mask->size(mask->dim() - 1) == width, op,
               "expected mask with the rows of logits ", shape_of(logits), " and a last dimension of ", width,
               " but got ", shape_of(*mask));
  p.mask_kind = bits ? MaskKind::kBits : MaskKind::kBool;
  p.mask = rows_of(op, "mask", *mask);
}

Problem check_logits(const char* op, const Tensor& logits, const Tensor& target,
                     const OptionalTensor& temperature_rows, const OptionalTensor& mask, double temperature,
                     double softcap, int64_t ignore_index) {
  ARCORE_CHECK(logits.dim() >= 1 && logits.is_cpu(), op,
               "expected logits of shape [..., V] on the CPU but got ", shape_of(logits));
  const int64_t vocab = logits.size(logits.dim() - 1);
  Problem p =
      check_rows(op, count_rows(logits), vocab, target, temperature_rows, temperature, softcap, ignore_index);
  p.dtype = storage_type(logits, op, "logits");
  check_mask(op, p, mask, logits, vocab);
  return p;
}

// As check_logits, for columns [first_column, first_column + tile.size(1)) of rows that are `vocab` wide.
Problem check_tile(const char* op, const Tensor& tile, const Tensor& target,
                   const OptionalTensor& temperature_rows, const OptionalTensor& mask, double temperature,
                   double softcap, int64_t ignore_index, int64_t first_column, int64_t vocab) {
  ARCORE_CHECK(
      tile.dim() == 2 && tile.is_cpu() && first_column >= 0 && first_column % 32 == 0 &&
          first_column + tile.size(1) <= vocab,
      op, "expected a tile [rows, columns] that starts at a multiple of 32 columns and ends by vocab=", vocab,
      " but got ", shape_of(tile), " from column ", first_column);
  Problem p =
      check_rows(op, tile.size(0), vocab, target, temperature_rows, temperature, softcap, ignore_index);
  p.dtype = storage_type(tile, op, "tile");
  check_mask(op, p, mask, tile, vocab);
  p.first_column = first_column;
  p.columns = tile.size(1);
  return p;
}

RowState* state_of(const char* op, const Tensor& state, int64_t rows) {
  return reinterpret_cast<RowState*>(
      row_values<double>(op, "state", state, rows * kStateDoubles, ScalarType::Double));
}

int64_t threads_of(const Problem& p) {
  return threads_for(static_cast<double>(p.rows) * static_cast<double>(p.columns), kElementsPerThread);
}

void run_update(const UpdateArgs& args) {
  const CpuKernels& kernels = cpu_kernels();
  run_tasks(args.problem.rows, threads_of(args.problem),
            [&](int64_t begin, int64_t end) { kernels.update(args, begin, end); });
}

void run_backward(const BackwardArgs& args) {
  const CpuKernels& kernels = cpu_kernels();
  run_tasks(args.problem.rows, threads_of(args.problem),
            [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

struct Outputs {
  Tensor logp, logsumexp, entropy;
};

Outputs run_finish(const Problem& p, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                   const RowState* state, bool entropy) {
  auto rows = [&] { return torch::stable::new_empty(like, shape, ScalarType::Float); };
  Outputs out{rows(), rows(), entropy ? rows() : torch::stable::new_empty(like, {0}, ScalarType::Float)};
  const FinishArgs args{p, state, static_cast<float*>(out.logp.data_ptr()),
                        static_cast<float*>(out.logsumexp.data_ptr()),
                        entropy ? static_cast<float*>(out.entropy.data_ptr()) : nullptr};
  cpu_kernels().finish(args, 0, p.rows);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& logits, const Tensor& target,
                                                       const OptionalTensor& temperature_rows,
                                                       const OptionalTensor& mask, double temperature,
                                                       double softcap, int64_t ignore_index, bool entropy) {
  const Problem p =
      check_logits(kOp, logits, target, temperature_rows, mask, temperature, softcap, ignore_index);
  Tensor state = torch::stable::new_empty(logits, {p.rows, kStateDoubles}, ScalarType::Double);
  RowState* states = static_cast<RowState*>(state.data_ptr());
  if (p.rows > 0) run_update({p, rows_of(kOp, "logits", logits), states, entropy});
  Outputs out = run_finish(p, logits, target.sizes(), states, entropy);
  return {out.logp, out.logsumexp, out.entropy, state};
}

struct RowGrads {
  const float *logp = nullptr, *logsumexp = nullptr, *entropy = nullptr;
};

RowGrads check_grads(const char* op, const OptionalTensor& logp, const OptionalTensor& logsumexp,
                     const OptionalTensor& entropy, int64_t rows) {
  RowGrads grads;
  if (logp.has_value()) grads.logp = row_values<const float>(op, "grad_logp", *logp, rows, ScalarType::Float);
  if (logsumexp.has_value())
    grads.logsumexp = row_values<const float>(op, "grad_logsumexp", *logsumexp, rows, ScalarType::Float);
  if (entropy.has_value())
    grads.entropy = row_values<const float>(op, "grad_entropy", *entropy, rows, ScalarType::Float);
  return grads;
}

std::tuple<Tensor, Tensor> backward_cpu(const OptionalTensor& grad_logp, const OptionalTensor& grad_logsumexp,
                                        const OptionalTensor& grad_entropy, const Tensor& logits,
                                        const Tensor& target, const OptionalTensor& temperature_rows,
                                        const OptionalTensor& mask, const Tensor& state, double temperature,
                                        double softcap, int64_t ignore_index) {
  BackwardArgs args{};
  args.problem =
      check_logits(kBackwardOp, logits, target, temperature_rows, mask, temperature, softcap, ignore_index);
  const Problem& p = args.problem;
  args.state = state_of(kBackwardOp, state, p.rows);
  const RowGrads grads = check_grads(kBackwardOp, grad_logp, grad_logsumexp, grad_entropy, p.rows);
  args.grad_logp = grads.logp;
  args.grad_logsumexp = grads.logsumexp;
  args.grad_entropy = grads.entropy;
  Tensor grad = torch::stable::empty_like(logits);
  Tensor grad_temperature =
      torch::stable::new_empty(logits, {temperature_rows.has_value() ? p.rows : 0}, ScalarType::Float);
  if (temperature_rows.has_value()) args.grad_temperature = static_cast<float*>(grad_temperature.data_ptr());
  if (p.rows > 0) {
    args.logits = rows_of(kBackwardOp, "logits", logits);
    args.grad = rows_of(kBackwardOp, "the gradient", grad);
    run_backward(args);
  }
  return {grad, grad_temperature};
}

void update_cpu(const Tensor& tile, const Tensor& target, const OptionalTensor& temperature_rows,
                const OptionalTensor& mask, double temperature, double softcap, int64_t ignore_index,
                int64_t first_column, int64_t vocab, bool entropy, Tensor state) {
  const Problem p = check_tile(kUpdateOp, tile, target, temperature_rows, mask, temperature, softcap,
                               ignore_index, first_column, vocab);
  RowState* states = state_of(kUpdateOp, state, p.rows);
  if (p.rows > 0) run_update({p, rows_of(kUpdateOp, "tile", tile), states, entropy});
}

std::tuple<Tensor, Tensor, Tensor> finish_cpu(const Tensor& state, const Tensor& target,
                                              const OptionalTensor& temperature_rows, double temperature,
                                              int64_t ignore_index, int64_t vocab, bool entropy) {
  const Problem p =
      check_rows(kFinishOp, target.numel(), vocab, target, temperature_rows, temperature, 0.0, ignore_index);
  Outputs out = run_finish(p, state, target.sizes(), state_of(kFinishOp, state, p.rows), entropy);
  return {out.logp, out.logsumexp, out.entropy};
}

Tensor tile_backward_cpu(const OptionalTensor& grad_logp, const OptionalTensor& grad_logsumexp,
                         const OptionalTensor& grad_entropy, Tensor tile, const Tensor& target,
                         const OptionalTensor& temperature_rows, const OptionalTensor& mask,
                         const Tensor& state, double temperature, double softcap, int64_t ignore_index,
                         int64_t first_column, int64_t vocab, bool need_temperature) {
  BackwardArgs args{};
  args.problem = check_tile(kTileBackwardOp, tile, target, temperature_rows, mask, temperature, softcap,
                            ignore_index, first_column, vocab);
  args.state = state_of(kTileBackwardOp, state, args.problem.rows);
  const RowGrads grads =
      check_grads(kTileBackwardOp, grad_logp, grad_logsumexp, grad_entropy, args.problem.rows);
  args.grad_logp = grads.logp;
  args.grad_logsumexp = grads.logsumexp;
  args.grad_entropy = grads.entropy;
  Tensor grad_temperature =
      torch::stable::new_empty(state, {need_temperature ? args.problem.rows : 0}, ScalarType::Float);
  if (need_temperature) args.grad_temperature = static_cast<float*>(grad_temperature.data_ptr());
  if (args.problem.rows > 0) {
    args.logits = args.grad = rows_of(kTileBackwardOp, "tile", tile);
    run_backward(args);
  }
  return grad_temperature;
}

}  // namespace
}  // namespace arcore::token_logprobs

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "token_logprobs(Tensor logits, Tensor target, Tensor? temperature_rows, Tensor? mask, float "
      "temperature, "
      "float softcap, int ignore_index, bool entropy)"
      " -> (Tensor logp, Tensor logsumexp, Tensor entropy, Tensor state)");
  m.def(
      "token_logprobs_backward(Tensor? grad_logp, Tensor? grad_logsumexp, Tensor? grad_entropy, Tensor "
      "logits, "
      "Tensor target, Tensor? temperature_rows, Tensor? mask, Tensor state, float temperature, float "
      "softcap, "
      "int ignore_index) -> (Tensor grad_logits, Tensor grad_temperature_rows)");
  m.def(
      "token_logprobs_update_(Tensor tile, Tensor target, Tensor? temperature_rows, Tensor? mask, "
      "float temperature, float softcap, int ignore_index, int first_column, int vocab, bool entropy, "
      "Tensor(a!) state) -> ()");
  m.def(
      "token_logprobs_finish(Tensor state, Tensor target, Tensor? temperature_rows, float temperature, "
      "int ignore_index, int vocab, bool entropy) -> (Tensor logp, Tensor logsumexp, Tensor entropy)");
  m.def(
      "token_logprobs_tile_backward_(Tensor? grad_logp, Tensor? grad_logsumexp, Tensor? grad_entropy, "
      "Tensor(a!) tile, Tensor target, Tensor? temperature_rows, Tensor? mask, Tensor state, float "
      "temperature, "
      "float softcap, int ignore_index, int first_column, int vocab, bool need_temperature) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&arcore::token_logprobs::forward_cpu));
  m.impl("token_logprobs_backward", TORCH_BOX(&arcore::token_logprobs::backward_cpu));
  m.impl("token_logprobs_update_", TORCH_BOX(&arcore::token_logprobs::update_cpu));
  m.impl("token_logprobs_finish", TORCH_BOX(&arcore::token_logprobs::finish_cpu));
  m.impl("token_logprobs_tile_backward_", TORCH_BOX(&arcore::token_logprobs::tile_backward_cpu));
}
