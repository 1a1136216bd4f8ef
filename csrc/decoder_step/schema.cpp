// torch.ops.arcore.decoder_step: checks, scratch, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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
#include "decoder_step/params.h"

namespace arcore::decoder_step {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "decoder_step";

// Whether all heads of a cache's texts, keys and values, have memory of their own. The tokens of a head lie
// side by side, so each is one range; the two caches may be interleaved.
bool heads_apart(const Tensor& keys, const Tensor& values) {
  const ByteRange a = byte_range(keys), b = byte_range(values);
  if ((a.end <= b.begin || b.end <= a.begin) && has_own_memory(keys) && has_own_memory(values)) return true;
  std::vector<std::pair<int64_t, int64_t>> heads;
  for (const Tensor* t : {&keys, &values}) {
    const auto first = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(t->data_ptr()));
    const int64_t length = t->size(2) * t->size(3) * bytes_of(*t);
    for (int64_t text = 0; text < t->size(0); ++text)
      for (int64_t head = 0; head < t->size(1); ++head) {
        const int64_t begin = first + (text * t->stride(0) + head * t->stride(1)) * bytes_of(*t);
        heads.emplace_back(begin, begin + length);
      }
  }
  std::sort(heads.begin(), heads.end());
  for (size_t i = 1; i < heads.size(); ++i)
    if (heads[i].first < heads[i - 1].second) return false;
  return true;
}

// What is written, x and the cache, must be read by nothing else.
void check_memory(const Tensor& x, const Tensor& keys, const Tensor& values,
                  std::initializer_list<std::pair<const char*, const Tensor*>> read) {
  ARCORE_CHECK(heads_apart(keys, values), kOp,
               "expected keys and values whose heads have memory of their own but some share it, as expand() "
               "makes; pass clones");
  check_not_written(kOp, "keys", keys, "x", x);
  check_not_written(kOp, "values", values, "x", x);
  for (const auto& [name, t] : read) {
    if (t == nullptr) continue;
    check_not_written(kOp, name, *t, "x", x);
    check_not_written(kOp, name, *t, "keys", keys);
    check_not_written(kOp, name, *t, "values", values);
  }
}

const Tensor* given(const OptionalTensor& t) {
  return t.has_value() ? &*t : nullptr;
}

void decoder_step_cpu(Tensor x, const Tensor& norm1, const Tensor& qkv, const OptionalTensor& qkv_bias,
                      const Tensor& out, const OptionalTensor& out_bias, const Tensor& norm2,
                      const Tensor& gate_up, const OptionalTensor& gate_up_bias, const Tensor& down,
                      const OptionalTensor& down_bias, Tensor keys, Tensor values, const Tensor& cos,
                      const Tensor& sin, const Tensor& lengths, int64_t heads, int64_t window, double eps,
                      int64_t drafts, const OptionalTensor& seen) {
  ARCORE_CHECK(x.dim() == 2, kOp, "expected x of shape (batch, dim) but got ", shape_of(x));
  ARCORE_CHECK(keys.dim() == 4, kOp, "expected keys of shape (batch, kv_heads, length, head_dim) but got ",
               shape_of(keys));
  Args args{};
  args.batch = x.size(0);
  args.drafts = drafts;
  ARCORE_CHECK(drafts >= 1 && args.batch % drafts == 0, kOp,
               "expected drafts of at least 1 that divide the rows of x but got ", drafts, " for ",
               args.batch);
  const int64_t texts = args.batch / drafts;
  args.dim = x.size(1);
  args.heads = heads;
  args.kv_heads = keys.size(1);
  args.head_dim = keys.size(3);
  const int64_t room = keys.size(2);
  ARCORE_CHECK(args.batch <= kMaxTokens, kOp, "expected at most ", kMaxTokens, " rows but got ", args.batch);
  ARCORE_CHECK(args.kv_heads > 0 && heads > 0 && heads % args.kv_heads == 0, kOp,
               "expected heads to be a multiple of kv_heads=", args.kv_heads, " but got ", heads);
  ARCORE_CHECK(gate_up.dim() == (has_blocks(gate_up) ? 3 : 2) && gate_up.size(0) % 2 == 0, kOp,
               "expected gate_up of shape (2 * hidden, dim), or that in blocks, but got ", shape_of(gate_up));
  args.hidden = gate_up.size(0) / 2;
  const int64_t width = heads * args.head_dim;
  ARCORE_CHECK(args.head_dim > 0 && args.head_dim % 2 == 0, kOp, "expected head_dim to be even but got ",
               args.head_dim);
  for (const auto& [name, size] : {std::pair{"dim", args.dim}, {"hidden", args.hidden}})
    ARCORE_CHECK(size > 0, kOp, "expected ", name, " of at least 1 but got ", size);
  ARCORE_CHECK(window >= 0, kOp, "expected window >= 0 but got ", window);
  ARCORE_CHECK(std::isfinite(eps) && eps >= 0, kOp, "expected eps to be finite and at least 0 but got ", eps);
  const ScalarType type = x.scalar_type();
  check_step_dtype(kOp, "x", x);
  check_type(kOp, "x", x, type, {args.batch, args.dim});
  check_type(kOp, "norm1", norm1, type, {args.dim});
  check_type(kOp, "norm2", norm2, type, {args.dim});
  check_type(kOp, "keys", keys, type, {texts, args.kv_heads, room, args.head_dim});
  check_type(kOp, "values", values, type, {texts, args.kv_heads, room, args.head_dim});
  ARCORE_CHECK(x.is_contiguous() && norm1.is_contiguous() && norm2.is_contiguous(), kOp,
               "expected x, norm1 and norm2 to be contiguous");
  for (const Tensor* t : {&keys, &values})
    ARCORE_CHECK(t->stride(3) == 1 && t->stride(2) == args.head_dim, kOp,
                 "expected the tokens of keys and values to lie side by side");
  args.window = window;
  args.eps = static_cast<float>(eps);
  args.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(args.head_dim)));
  args.dtype = storage_type(x, kOp, "x");
  args.given = x.data_ptr();
  args.norm1 = norm1.data_ptr();
  args.norm2 = norm2.data_ptr();
  std::vector<Tensor> held;
  held.reserve(4);
  args.qkv =
      weights(kOp, "qkv", qkv, qkv_bias, type, width + 2 * args.kv_heads * args.head_dim, args.dim, held);
  args.out = weights(kOp, "out", out, out_bias, type, args.dim, width, held);
  args.gate_up = weights(kOp, "gate_up", gate_up, gate_up_bias, type, 2 * args.hidden, args.dim, held);
  args.down = weights(kOp, "down", down, down_bias, type, args.dim, args.hidden, held);
  args.keys = keys.data_ptr();
  args.values = values.data_ptr();
  args.key_row = keys.stride(0);
  args.key_head = keys.stride(1);
  args.value_row = values.stride(0);
  args.value_head = values.stride(1);
  const int64_t angles = cos.dim() == 2 ? cos.size(0) : 0;
  ARCORE_CHECK(angles == 1 || angles == args.batch, kOp, "expected cos of shape (1 or ", args.batch, ", ",
               args.head_dim, ") but got ", shape_of(cos));
  check_type(kOp, "cos", cos, ScalarType::Float, {angles, args.head_dim});
  check_type(kOp, "sin", sin, ScalarType::Float, {angles, args.head_dim});
  ARCORE_CHECK(cos.is_contiguous() && sin.is_contiguous(), kOp, "expected cos and sin to be contiguous");
  args.cos = floats(cos);
  args.sin = floats(sin);
  args.angle_row = angles == 1 ? 0 : args.head_dim;
  ARCORE_CHECK(lengths.is_cpu() && lengths.scalar_type() == ScalarType::Long && lengths.is_contiguous(), kOp,
               "expected lengths to be contiguous int64 on the CPU");
  check_shape(kOp, "lengths", lengths, {texts});
  args.lengths = static_cast<const int64_t*>(lengths.data_ptr());
  for (int64_t b = 0; b < texts; ++b) {
    ARCORE_CHECK(args.lengths[b] >= 0 && args.lengths[b] <= room - drafts, kOp, "expected lengths from 0 to ",
                 room - drafts, ", the room of the cache less the new tokens, but got ", args.lengths[b]);
    args.longest = std::max(args.longest, args.lengths[b] + drafts);
  }
  if (seen.has_value()) {
    ARCORE_CHECK(seen->is_cpu() && seen->scalar_type() == ScalarType::Long && seen->is_contiguous(), kOp,
                 "expected seen to be contiguous int64 on the CPU");
    check_shape(kOp, "seen", *seen, {args.batch});
    ARCORE_CHECK(window == 0, kOp, "expected no window together with seen");
    args.seen = static_cast<const int64_t*>(seen->data_ptr());
    for (int64_t b = 0; b < args.batch; ++b) {
      // The own bit is the highest one.
      const int64_t own = b % drafts;
      ARCORE_CHECK(static_cast<uint64_t>(args.seen[b]) >> own == 1, kOp, "expected seen[", b,
                   "] to have the bit ", own, " of the token itself and none above it but got ",
                   args.seen[b]);
    }
  }
  check_memory(x, keys, values,
               {{"norm1", &norm1},
                {"qkv", &qkv},
                {"qkv_bias", given(qkv_bias)},
                {"out", &out},
                {"out_bias", given(out_bias)},
                {"norm2", &norm2},
                {"gate_up", &gate_up},
                {"gate_up_bias", given(gate_up_bias)},
                {"down", &down},
                {"down_bias", given(down_bias)},
                {"cos", &cos},
                {"sin", &sin}});
  if (args.batch == 0) return;
  const bool wide = args.dtype == StorageType::kFloat32;
  const int64_t packed = padded(args.dim) + padded(width) + padded(args.hidden);
  const int64_t per_row = packed + args.qkv.rows + heads * args.longest + (wide ? 0 : args.dim);
  const Tensor scratch = make_empty(x, {args.batch * per_row}, ScalarType::Float);
  args.normed = floats(scratch);
  args.mixed = args.normed + args.batch * padded(args.dim);
  args.activated = args.mixed + args.batch * padded(width);
  args.projected = args.activated + args.batch * padded(args.hidden);
  args.scores = args.projected + args.batch * args.qkv.rows;
  args.x = wide ? floats(x) : args.scores + args.batch * heads * args.longest;

  const CpuKernels& kernels = cpu_kernels();
  const auto multiply = [&](const Weights& w, const float* in, float* result, bool add) {
    const auto rows = [&](int64_t begin, int64_t end) {
      kernels.multiply(w, args.batch, in, result, add, begin, end);
    };
    run_tasks(w.rows, threads_of(w, args.batch), rows, kWeightPieces);
  };
  if (!wide) kernels.widen(args);
  kernels.normalise(args, args.norm1);
  multiply(args.qkv, args.normed, args.projected, false);
  const double pairs = static_cast<double>(args.batch * heads) * static_cast<double>(args.longest) *
                       static_cast<double>(2 * args.head_dim);
  run_tasks(texts * args.kv_heads, threads_for(pairs, kProductsPerThread),
            [&](int64_t begin, int64_t end) { kernels.attend(args, begin, end); });
  kernels.pack(StorageType::kFloat32, args.projected, args.qkv.rows, args.batch, width, args.mixed);
  multiply(args.out, args.mixed, args.x, true);
  kernels.normalise(args, args.norm2);
  const auto gate = [&](int64_t begin, int64_t end) { kernels.gate(args, begin, end); };
  run_tasks((args.hidden + kGroup - 1) / kGroup, threads_of(args.gate_up, args.batch), gate,
            {.unit = 1, .per_thread = 4});
  multiply(args.down, args.activated, args.x, true);
  if (!wide) kernels.narrow(args.dtype, args.x, args.given, args.batch * args.dim);
}

// weight x + bias for a few rows: the products of a step alone, for layers that are not of Llama's kind.
Tensor linear_step_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  constexpr const char* kName = "linear_step";
  const bool blocks = has_blocks(weight);
  if (blocks) block_type(kName, "weight", weight);
  ARCORE_CHECK(x.dim() == 2 && weight.dim() == (blocks ? 3 : 2) &&
                   x.size(1) == weight.size(1) * (blocks ? kBlockValues : 1),
               kName, "expected x of shape (rows, columns of weight) but got ", shape_of(x),
               " for a weight of ", shape_of(weight), blocks ? " in blocks of 32 columns" : "");
  const int64_t batch = x.size(0), cols = x.size(1), rows = weight.size(0);
  ARCORE_CHECK(batch <= kMaxTokens, kName, "expected at most ", kMaxTokens, " rows but got ", batch);
  ARCORE_CHECK(cols > 0, kName, "expected at least 1 column but got ", cols);
  const ScalarType type = x.scalar_type();
  check_step_dtype(kName, "x", x);
  ARCORE_CHECK(x.is_contiguous(), kName, "expected x to be contiguous");
  std::vector<Tensor> held;
  const Weights w = weights(kName, "weight", weight, bias, type, rows, cols, held);
  Tensor out = make_empty(x, {batch, rows});
  if (batch == 0 || rows == 0) return out;
  const CpuKernels& kernels = cpu_kernels();
  const bool wide = type == ScalarType::Float;
  const Tensor scratch = make_empty(x, {batch * (padded(cols) + (wide ? 0 : rows))}, ScalarType::Float);
  float* packed = floats(scratch);
  float* result = wide ? floats(out) : packed + batch * padded(cols);
  const StorageType storage = storage_type(x, kName, "x");
  kernels.pack(storage, x.data_ptr(), cols, batch, cols, packed);
  const auto share = [&](int64_t begin, int64_t end) {
    kernels.multiply(w, batch, packed, result, false, begin, end);
  };
  run_tasks(rows, threads_of(w, batch), share, kWeightPieces);
  if (!wide) kernels.narrow(storage, result, out.data_ptr(), batch * rows);
  return out;
}

// The numbers that blocks stand for, [rows, columns].
Tensor block_values_cpu(const Tensor& blocks) {
  constexpr const char* kName = "block_values";
  ARCORE_CHECK(has_blocks(blocks), kName, "expected blocks of dtype uint8 but got ",
               torch::headeronly::toString(blocks.scalar_type()));
  const WeightType type = block_type(kName, "blocks", blocks);
  ARCORE_CHECK(blocks.is_cpu() && blocks.is_contiguous(), kName,
               "expected blocks to be contiguous, on the CPU");
  const int64_t rows = blocks.size(0), cols = blocks.size(1) * kBlockValues;
  const Tensor out = make_empty(blocks, {rows, cols}, ScalarType::Float);
  if (rows == 0 || cols == 0) return out;
  const Weights w{blocks.data_ptr(), type, nullptr, rows, cols};
  const CpuKernels& kernels = cpu_kernels();
  run_tasks(rows, threads_of(w, 1),
            [&](int64_t begin, int64_t end) { kernels.expand(w, floats(out) + begin * cols, begin, end); });
  return out;
}

}  // namespace
}  // namespace arcore::decoder_step

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "decoder_step(Tensor(a!) x, Tensor norm1, Tensor qkv, Tensor? qkv_bias, Tensor out, Tensor? out_bias, "
      "Tensor norm2, Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor(b!) keys, "
      "Tensor(c!) values, Tensor cos, Tensor sin, Tensor lengths, int heads, int window, float eps, "
      "int drafts=1, Tensor? seen=None) -> ()");
  m.def("linear_step(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("block_values(Tensor blocks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("decoder_step", TORCH_BOX(&arcore::decoder_step::decoder_step_cpu));
  m.impl("linear_step", TORCH_BOX(&arcore::decoder_step::linear_step_cpu));
  m.impl("block_values", TORCH_BOX(&arcore::decoder_step::block_values_cpu));
}
