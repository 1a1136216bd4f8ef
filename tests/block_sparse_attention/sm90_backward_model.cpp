// Runs both sm_90a backward kernels on the CPU: their order of events (produce_gradient_units,
// consume_gradient_units), masks, weights and register coordinates, with the model of the hardware of
// sm90_model.h.
#include "sm90_backward_model.h"

namespace {

using namespace sm90_model;

template <int kDim, bool kByKey>
std::string run(Call& call, int64_t blocks, uint64_t seed) {
  constexpr int kStages = gradient_stages(kDim);
  const Problem& p = call.args.problem;
  const TilePlan& plan = kByKey ? call.by_key : call.by_query;
  const int64_t pairs = p.batch * (kByKey ? p.kv_heads : p.heads);
  const Schedule schedule{pairs, plan.rows, std::min(call.section, pairs)};
  call.done.assign(static_cast<size_t>(pairs * plan.rows), 0);
  const auto shares = share_units(pairs * plan.rows, blocks, seed);
  for (int64_t block = 0; block < blocks; ++block) {
    Fibers fibers(seed + static_cast<uint64_t>(block));
    Block<kDim, kByKey> shared(call, fibers);
    shared.units = shares[static_cast<size_t>(block)];
    TileProducer<kDim, kByKey> tiles{shared};
    Consumer<kDim, kByKey> first{shared, 0}, second{shared, 1};
    fibers.add([&] { produce_gradient_units<kStages, kByKey>(tiles, p, plan, schedule); });
    if constexpr (kByKey) {
      fibers.add([&] {
        NumbersProducer<Block<kDim, true>> numbers{shared};
        produce_gradient_units<kStages, kByKey>(numbers, p, plan, schedule);
      });
    }
    fibers.add([&] { consume_gradient_units<kStages, kByKey>(first); });
    fibers.add([&] { consume_gradient_units<kStages, kByKey>(second); });
    const std::string failure = fibers.run();
    if (!failure.empty()) return failure;
  }
  for (int times : call.done)
    if (times != kConsumers) return "a unit was not stored exactly once by each consumer";
  return "";
}

template <int kDim>
std::string run_both(Call& call, int64_t blocks, uint64_t seed) {
  const std::string failure = run<kDim, true>(call, blocks, seed);
  return failure.empty() ? run<kDim, false>(call, blocks, seed) : failure;
}

}  // namespace

extern "C" void arcore_model_backward_sm90(const Given* given, char* message, int64_t capacity) {
  Call call = call_of(*given);
  const std::string failure = run_padded(
      call, [&](auto dim) { return run_both<decltype(dim)::value>(call, given->blocks, given->seed); });
  std::strncpy(message, failure.c_str(), static_cast<size_t>(capacity) - 1);
}
