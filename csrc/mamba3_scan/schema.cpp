// torch.ops.arcore.mamba3_scan, its backward, and mamba3_update: checks, views, chunks, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/chunk_list.h"
#include "common/cpu_dispatch.h"
#include "common/new_tensor.h"
#include "common/overlap.h"
#include "common/workspace.h"
#include "mamba3_scan/params.h"

namespace arcore::mamba3_scan {

ARCORE_DISPATCH_CPU(CpuKernels, cpu_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "mamba3_scan";
constexpr const char* kBackwardOp = "mamba3_scan_backward";
constexpr const char* kUpdateOp = "mamba3_update";
constexpr int64_t kMaxState = 256, kMaxRank = 16;
// Floating-point operations below which a second thread costs more than it saves.
constexpr double kFlopsPerThread = 1e7;

// What the dimensions of a tensor are, in order: b(atch), t(ime), h(ead or group), r(ank), l(ast).
View view(const char* op, const char* name, const Tensor& t, const char* dims, bool reverse = false) {
  View v{t.data_ptr(), 0, 0, 0, 0, 0, storage_type(t, op, name)};
  for (int64_t i = 0; dims[i] != '\0'; ++i) {
    int64_t& stride = dims[i] == 'b'   ? v.batch
                      : dims[i] == 't' ? v.time
                      : dims[i] == 'h' ? v.head
                      : dims[i] == 'r' ? v.rank
                                       : v.last;
    stride = t.stride(i);
    if (dims[i] == 't' && reverse && t.size(i) > 0) {
      v.data =
          static_cast<char*>(v.data) + (t.size(i) - 1) * stride * (v.dtype == StorageType::kFloat32 ? 4 : 2);
      stride = -stride;
    }
  }
  return v;
}

const float* hold(std::vector<Tensor>& held, const char* op, const char* name, const Tensor& t) {
  storage_type(t, op, name);
  held.push_back(as_floats(t));
  return static_cast<const float*>(held.back().data_ptr());
}

// The sizes that both ops take from x and B, with their limits.
template <typename Sizes>
void check_sizes(const char* op, const Tensor& B, int64_t group_dim, const Tensor& turn, Sizes& args) {
  const int64_t last = group_dim + 1;
  ARCORE_CHECK(B.dim() == last + 1 && B.size(last) >= 2 && B.size(last) <= kMaxState && B.size(last) % 2 == 0,
               op, "expected B with groups and d_state last, and an even d_state of 2 to ", kMaxState,
               ", but got ", shape_of(B));
  ARCORE_CHECK(args.rank >= 1 && args.rank <= kMaxRank, op, "expected x with 1 to ", kMaxRank,
               " inputs per head but got ", args.rank);
  args.groups = B.size(group_dim);
  args.states = B.size(last);
  ARCORE_CHECK(args.groups >= 1 && args.heads % args.groups == 0, op,
               "expected B with groups that divide the ", args.heads, " heads but got ", args.groups);
  ARCORE_CHECK(turn.dim() >= 1 && turn.size(turn.dim() - 1) <= args.states / 2, op,
               "expected turn with at most half the ", args.states, " states as angles but got ",
               shape_of(turn));
  args.angles = turn.size(turn.dim() - 1);
}

// Checks the arguments and owns what the raw pointers of Args point at; the results are left to the caller.
struct __attribute__((visibility("hidden"))) Call {
  Args args{};
  std::vector<Tensor> held;
  ChunkList list;
  int64_t rows;  // of the state tensors

  Call(const char* op, const Tensor& x, const Tensor& log_decay, const Tensor& kept, const Tensor& own,
       const Tensor& B, const Tensor& C, const Tensor& turn, const OptionalTensor& B_bias,
       const OptionalTensor& C_bias, const OptionalTensor& D, const OptionalTensor& z,
       const OptionalTensor& initial_state, const OptionalTensor& initial_angle,
       const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx, bool halves, bool reverse) {
    ARCORE_CHECK(x.dim() == 5, op, "expected x of shape (batch, length, heads, rank, dim) but got ",
                 shape_of(x));
    for (const auto& [name, t] : {std::pair{"log_decay", &log_decay},
                                  {"kept", &kept},
                                  {"own", &own},
                                  {"B", &B},
                                  {"C", &C},
                                  {"turn", &turn}})
      check_device(op, name, *t, x);
    for (const auto& [name, t] : {std::pair{"B_bias", &B_bias},
                                  {"C_bias", &C_bias},
                                  {"D", &D},
                                  {"z", &z},
                                  {"initial_state", &initial_state},
                                  {"initial_angle", &initial_angle},
                                  {"cu_seqlens", &cu_seqlens},
                                  {"seq_idx", &seq_idx}})
      if (t->has_value()) check_device(op, name, **t, x);
    args.batch = x.size(0);
    args.length = x.size(1);
    args.heads = x.size(2);
    args.rank = x.size(3);
    args.dim = x.size(4);
    args.halves = halves;
    check_sizes(op, B, 3, turn, args);
    for (const auto& [name, t] : {std::pair{"log_decay", &log_decay}, {"kept", &kept}, {"own", &own}})
      check_shape(op, name, *t, {args.batch, args.length, args.heads});
    for (const auto& [name, t] : {std::pair{"B", &B}, {"C", &C}})
      check_shape(op, name, *t, {args.batch, args.length, args.rank, args.groups, args.states});
    check_shape(op, "turn", turn, {args.batch, args.length, args.heads, args.angles});
    for (const auto& [name, t, to] :
         {std::tuple{"B_bias", &B_bias, &args.B_bias}, std::tuple{"C_bias", &C_bias, &args.C_bias}}) {
      if (!t->has_value()) continue;
      check_shape(op, name, **t, {args.heads, args.rank, args.states});
      *to = hold(held, op, name, **t);
    }
    if (D.has_value()) {
      check_shape(op, "D", *D, {args.heads});
      args.D = hold(held, op, "D", *D);
    }
    if (z.has_value()) {
      check_shape(op, "z", *z, {args.batch, args.length, args.heads, args.rank, args.dim});
      args.z = view(op, "z", *z, "bthrl", reverse);
    }
    list = chunk_list(op, args.batch, args.length, cu_seqlens, seq_idx, reverse, kChunk / args.rank);
    args.chunk_rows = seq_idx.has_value() ? args.batch : 1;
    args.chunks = list.chunks.data();
    args.first_chunk = list.first.data();
    rows = cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : args.batch;
    if (initial_state.has_value()) {
      check_shape(op, "initial_state", *initial_state, {rows, args.heads, args.dim, args.states});
      args.initial_state = hold(held, op, "initial_state", *initial_state);
    }
    if (initial_angle.has_value()) {
      check_shape(op, "initial_angle", *initial_angle, {rows, args.heads, args.angles});
      args.initial_angle = hold(held, op, "initial_angle", *initial_angle);
    }
    args.x = view(op, "x", x, "bthrl", reverse);
    args.B = view(op, "B", B, "btrhl", reverse);
    args.C = view(op, "C", C, "btrhl", reverse);
    args.log_decay = view(op, "log_decay", log_decay, "bth", reverse);
    args.kept = view(op, "kept", kept, "bth", reverse);
    args.own = view(op, "own", own, "bth", reverse);
    args.turn = view(op, "turn", turn, "bthl", reverse);
    // Strides of single elements, which are read as rows of one.
    args.log_decay.last = args.kept.last = args.own.last = 1;
  }

  bool empty() const { return args.batch == 0 || args.heads == 0; }
  double products() const {
    return static_cast<double>(args.batch) * static_cast<double>(args.length) *
           static_cast<double>(args.heads) * static_cast<double>(args.rank) * static_cast<double>(args.dim) *
           static_cast<double>(args.states);
  }
};

using Results = std::tuple<Tensor, Tensor, Tensor>;

Results forward_cpu(const Tensor& x, const Tensor& log_decay, const Tensor& kept, const Tensor& own,
                    const Tensor& B, const Tensor& C, const Tensor& turn, const OptionalTensor& B_bias,
                    const OptionalTensor& C_bias, const OptionalTensor& D, const OptionalTensor& z,
                    const OptionalTensor& initial_state, const OptionalTensor& initial_angle,
                    const OptionalTensor& cu_seqlens, const OptionalTensor& seq_idx, bool halves,
                    bool reverse) {
  Call call(kOp, x, log_decay, kept, own, B, C, turn, B_bias, C_bias, D, z, initial_state, initial_angle,
            cu_seqlens, seq_idx, halves, reverse);
  Args& args = call.args;
  Tensor out = make_empty_like(x);
  Tensor last_state = make_empty(x, {call.rows, args.heads, args.dim, args.states}, ScalarType::Float);
  Tensor last_angle = make_empty(x, {call.rows, args.heads, args.angles}, ScalarType::Float);
  if (call.empty()) return {out, last_state, last_angle};
  args.last_state = static_cast<float*>(last_state.data_ptr());
  args.last_angle = static_cast<float*>(last_angle.data_ptr());
  args.out = view(kOp, "out", out, "bthrl", reverse);
  const CpuKernels& kernels = cpu_kernels();
  run_with_workspace(
      x, kernels.tasks(args), threads_for(4.0 * call.products(), kFlopsPerThread), kernels.workspace(args),
      [&](float* workspace, int64_t begin, int64_t end) { kernels.forward(args, workspace, begin, end); });
  return {out, last_state, last_angle};
}

// Absent optional inputs get an empty gradient.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor>;

Gradients backward_cpu(const OptionalTensor& grad_out, const OptionalTensor& grad_last_state,
                       const OptionalTensor& grad_last_angle, const Tensor& x, const Tensor& log_decay,
                       const Tensor& kept, const Tensor& own, const Tensor& B, const Tensor& C,
                       const Tensor& turn, const OptionalTensor& B_bias, const OptionalTensor& C_bias,
                       const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& initial_state,
                       const OptionalTensor& initial_angle, const OptionalTensor& cu_seqlens,
                       const OptionalTensor& seq_idx, bool halves, bool reverse) {
  Call call(kBackwardOp, x, log_decay, kept, own, B, C, turn, B_bias, C_bias, D, z, initial_state,
            initial_angle, cu_seqlens, seq_idx, halves, reverse);
  const Args& in = call.args;
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return make_empty(x, shape, ScalarType::Float);
  };
  const auto like = [&](const OptionalTensor& t) {
    return t.has_value() ? make_empty_like(*t) : floats({0});
  };
  // Tensors that are expanded get gradients of their whole shape, which autograd sums.
  Tensor grad_x = make_empty_like(x), grad_log_decay = make_empty_like(log_decay),
         grad_kept = make_empty_like(kept);
  Tensor grad_own = make_empty_like(own), grad_B = make_empty_like(B), grad_C = make_empty_like(C);
  Tensor grad_turn = make_empty_like(turn), grad_z = like(z);
  Tensor grad_state =
      initial_state.has_value() ? floats({call.rows, in.heads, in.dim, in.states}) : floats({0});
  Tensor grad_angle = initial_angle.has_value() ? floats({call.rows, in.heads, in.angles}) : floats({0});
  const CpuKernels& kernels = cpu_kernels();
  const int64_t tasks = call.empty() ? 0 : kernels.tasks(in);
  Tensor partial_B_bias = floats({in.batch, in.heads, in.rank, in.states});
  Tensor partial_C_bias = floats({in.batch, in.heads, in.rank, in.states});
  Tensor partial_D = floats({in.batch, in.heads});
  Tensor partial_B = floats({tasks, in.length, in.rank, in.states});
  Tensor partial_C = floats({tasks, in.length, in.rank, in.states});
  if (call.empty()) {
    for (Tensor* t : {&grad_B, &grad_C, &grad_log_decay, &grad_kept, &grad_own, &grad_turn, &grad_state,
                      &grad_angle, &partial_B_bias, &partial_C_bias, &partial_D})
      torch::stable::zero_(*t);
  } else {
    BackwardArgs args{};
    args.in = in;
    if (grad_out.has_value()) {
      check_device(kBackwardOp, "grad_out", *grad_out, x);
      check_shape(kBackwardOp, "grad_out", *grad_out, {in.batch, in.length, in.heads, in.rank, in.dim});
      args.grad_out = view(kBackwardOp, "grad_out", *grad_out, "bthrl", reverse);
    }
    if (grad_last_state.has_value()) {
      check_device(kBackwardOp, "grad_last_state", *grad_last_state, x);
      check_shape(kBackwardOp, "grad_last_state", *grad_last_state, {call.rows, in.heads, in.dim, in.states});
      args.grad_last_state = hold(call.held, kBackwardOp, "grad_last_state", *grad_last_state);
    }
    if (grad_last_angle.has_value()) {
      check_device(kBackwardOp, "grad_last_angle", *grad_last_angle, x);
      check_shape(kBackwardOp, "grad_last_angle", *grad_last_angle, {call.rows, in.heads, in.angles});
      args.grad_last_angle = hold(call.held, kBackwardOp, "grad_last_angle", *grad_last_angle);
    }
    const auto out = [&](const Tensor& t, const char* dims) {
      View v = view(kBackwardOp, "grad", t, dims, reverse);
      if (dims[2] == 'h' && dims[3] == '\0') v.last = 1;
      return v;
    };
    args.grad_x = out(grad_x, "bthrl");
    args.grad_log_decay = out(grad_log_decay, "bth");
    args.grad_kept = out(grad_kept, "bth");
    args.grad_own = out(grad_own, "bth");
    args.grad_turn = out(grad_turn, "bthl");
    args.grad_B = out(grad_B, "btrhl");
    args.grad_C = out(grad_C, "btrhl");
    if (z.has_value()) args.grad_z = out(grad_z, "bthrl");
    const auto data = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
    args.grad_initial_state = initial_state.has_value() ? data(grad_state) : nullptr;
    args.grad_initial_angle = initial_angle.has_value() ? data(grad_angle) : nullptr;
    args.partial_B_bias = data(partial_B_bias);
    args.partial_C_bias = data(partial_C_bias);
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
  const auto parameter = [&](const Tensor& partial, const OptionalTensor& t) {
    return t.has_value() ? sum_rows(partial, *t) : floats({0});
  };
  const auto state = [&](const Tensor& grad, const OptionalTensor& t) {
    return t.has_value() && t->scalar_type() != ScalarType::Float ? torch::stable::to(grad, t->scalar_type())
                                                                  : grad;
  };
  return {grad_x,
          grad_log_decay,
          grad_kept,
          grad_own,
          grad_B,
          grad_C,
          grad_turn,
          parameter(partial_B_bias, B_bias),
          parameter(partial_C_bias, C_bias),
          parameter(partial_D, D),
          grad_z,
          state(grad_state, initial_state),
          state(grad_angle, initial_angle)};
}

// Whether two tensors [batch, head, ...] lie beside each other in the rows of one, as the parts of a cache
// do. False says nothing.
bool beside(const Tensor& a, const Tensor& b) {
  if (a.stride(0) != b.stride(0) || a.stride(1) != b.stride(1) || a.element_size() != b.element_size())
    return false;
  const auto inside = [](const Tensor& t) {
    int64_t elements = 1;
    for (int64_t i = 2; i < t.dim(); ++i)
      elements += (t.size(i) - 1) * t.stride(i);
    return elements * bytes_of(t);
  };
  const auto x = reinterpret_cast<std::uintptr_t>(a.data_ptr()),
             y = reinterpret_cast<std::uintptr_t>(b.data_ptr());
  const bool first = x <= y;
  const auto gap = static_cast<int64_t>(first ? y - x : x - y);
  const int64_t whole = gap + inside(first ? b : a), head = a.stride(1) * bytes_of(a);
  return inside(first ? a : b) <= gap && (a.size(1) == 1 || whole <= head) &&
         (a.size(0) == 1 || (a.size(1) - 1) * head + whole <= a.stride(0) * bytes_of(a));
}

Tensor update_cpu(Tensor state, Tensor angle, Tensor last_B, Tensor last_x, const Tensor& x,
                  const Tensor& log_decay, const Tensor& before, const Tensor& now, const Tensor& B,
                  const Tensor& C, const Tensor& turn, const OptionalTensor& B_bias,
                  const OptionalTensor& C_bias, const OptionalTensor& D, bool halves) {
  UpdateArgs args{};
  std::vector<Tensor> held;
  ARCORE_CHECK(x.dim() == 4, kUpdateOp, "expected x of shape (batch, heads, rank, dim) but got ",
               shape_of(x));
  for (const auto& [name, t] :
       {std::pair{"state", &state}, {"angle", &angle}, {"last_B", &last_B}, {"last_x", &last_x}})
    check_device(kUpdateOp, name, *t, x);
  for (const auto& [name, t] : {std::pair{"log_decay", &log_decay},
                                {"before", &before},
                                {"now", &now},
                                {"B", &B},
                                {"C", &C},
                                {"turn", &turn}})
    check_device(kUpdateOp, name, *t, x);
  for (const auto& [name, t] : {std::pair{"B_bias", &B_bias}, {"C_bias", &C_bias}, {"D", &D}})
    if (t->has_value()) check_device(kUpdateOp, name, **t, x);
  args.batch = x.size(0);
  args.heads = x.size(1);
  args.rank = x.size(2);
  args.dim = x.size(3);
  args.halves = halves;
  check_sizes(kUpdateOp, B, 2, turn, args);
  check_shape(kUpdateOp, "state", state, {args.batch, args.heads, args.dim, args.states});
  check_shape(kUpdateOp, "angle", angle, {args.batch, args.heads, args.angles});
  check_shape(kUpdateOp, "last_B", last_B, {args.batch, args.heads, args.rank, args.states});
  check_shape(kUpdateOp, "last_x", last_x, {args.batch, args.heads, args.rank, args.dim});
  ARCORE_CHECK(state.stride(3) == 1 || args.states == 1, kUpdateOp,
               "expected state with its last dimension contiguous; make it so with .contiguous()");
  for (const auto& [name, t] : {std::pair{"log_decay", &log_decay}, {"before", &before}, {"now", &now}})
    check_shape(kUpdateOp, name, *t, {args.batch, args.heads});
  for (const auto& [name, t] : {std::pair{"B", &B}, {"C", &C}})
    check_shape(kUpdateOp, name, *t, {args.batch, args.rank, args.groups, args.states});
  check_shape(kUpdateOp, "turn", turn, {args.batch, args.heads, args.angles});
  for (const auto& [name, t, to] :
       {std::tuple{"B_bias", &B_bias, &args.B_bias}, std::tuple{"C_bias", &C_bias, &args.C_bias}}) {
    if (!t->has_value()) continue;
    check_shape(kUpdateOp, name, **t, {args.heads, args.rank, args.states});
    *to = hold(held, kUpdateOp, name, **t);
  }
  if (D.has_value()) {
    check_shape(kUpdateOp, "D", *D, {args.heads});
    args.D = hold(held, kUpdateOp, "D", *D);
  }
  const std::pair<const char*, const Tensor*> written[] = {
      {"state", &state}, {"angle", &angle}, {"last_B", &last_B}, {"last_x", &last_x}};
  for (const auto& [name, t] : written)
    check_written(kUpdateOp, name, *t);
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < i; ++j)
      if (!beside(*written[i].second, *written[j].second))
        check_not_written(kUpdateOp, written[i].first, *written[i].second, written[j].first,
                          *written[j].second);
    for (const auto& [name, t] : {std::pair{"x", &x},
                                  {"log_decay", &log_decay},
                                  {"before", &before},
                                  {"now", &now},
                                  {"B", &B},
                                  {"C", &C},
                                  {"turn", &turn}})
      check_not_written(kUpdateOp, name, *t, written[i].first, *written[i].second);
  }
  Tensor out = make_empty_like(x);
  if (args.batch == 0 || args.heads == 0) return out;
  args.state = view(kUpdateOp, "state", state, "bhrl");
  args.angle = view(kUpdateOp, "angle", angle, "bhl");
  args.last_B = view(kUpdateOp, "last_B", last_B, "bhrl");
  args.last_x = view(kUpdateOp, "last_x", last_x, "bhrl");
  args.x = view(kUpdateOp, "x", x, "bhrl");
  args.out = view(kUpdateOp, "out", out, "bhrl");
  args.B = view(kUpdateOp, "B", B, "brhl");
  args.C = view(kUpdateOp, "C", C, "brhl");
  args.turn = view(kUpdateOp, "turn", turn, "bhl");
  args.log_decay = view(kUpdateOp, "log_decay", log_decay, "bh");
  args.before = view(kUpdateOp, "before", before, "bh");
  args.now = view(kUpdateOp, "now", now, "bh");
  args.log_decay.last = args.before.last = args.now.last = 1;
  const CpuKernels& kernels = cpu_kernels();
  const int64_t tasks = args.batch * args.heads;
  const double work =
      8.0 * static_cast<double>(tasks * args.rank) * static_cast<double>(args.dim * args.states);
  run_with_workspace(
      x, tasks, threads_for(work, kFlopsPerThread), kernels.update_workspace(args),
      [&](float* workspace, int64_t begin, int64_t end) { kernels.update(args, workspace, begin, end); });
  return out;
}

}  // namespace
}  // namespace arcore::mamba3_scan

STABLE_TORCH_LIBRARY_FRAGMENT(arcore, m) {
  m.def(
      "mamba3_scan(Tensor x, Tensor log_decay, Tensor kept, Tensor own, Tensor B, Tensor C, Tensor turn, "
      "Tensor? "
      "B_bias, Tensor? C_bias, Tensor? D, Tensor? z, Tensor? initial_state, Tensor? initial_angle, Tensor? "
      "cu_seqlens, Tensor? seq_idx, bool halves, bool reverse) -> (Tensor out, Tensor last_state, Tensor "
      "last_angle)");
  m.def(
      "mamba3_scan_backward(Tensor? grad_out, Tensor? grad_last_state, Tensor? grad_last_angle, Tensor x, "
      "Tensor "
      "log_decay, Tensor kept, Tensor own, Tensor B, Tensor C, Tensor turn, Tensor? B_bias, Tensor? C_bias, "
      "Tensor? "
      "D, Tensor? z, Tensor? initial_state, Tensor? initial_angle, Tensor? cu_seqlens, Tensor? seq_idx, bool "
      "halves, "
      "bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, "
      "Tensor, Tensor)");
  m.def(
      "mamba3_update(Tensor(a!) state, Tensor(b!) angle, Tensor(c!) last_B, Tensor(d!) last_x, Tensor x, "
      "Tensor "
      "log_decay, Tensor before, Tensor now, Tensor B, Tensor C, Tensor turn, Tensor? B_bias, Tensor? "
      "C_bias, Tensor? "
      "D, bool halves) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(arcore, CPU, m) {
  m.impl("mamba3_scan", TORCH_BOX(&arcore::mamba3_scan::forward_cpu));
  m.impl("mamba3_scan_backward", TORCH_BOX(&arcore::mamba3_scan::backward_cpu));
  m.impl("mamba3_update", TORCH_BOX(&arcore::mamba3_scan::update_cpu));
}
