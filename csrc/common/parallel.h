// Threads of the CPU ops. Only schema.cpp files include this: kernels receive task ranges.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace arcore {

// How many threads `work` is worth, when one thread should get at least `work_per_thread` of it: below that a
// second thread costs more than it saves.
inline int64_t threads_for(double work, double work_per_thread) {
  const int64_t available = torch::stable::get_num_threads();
  return std::clamp<int64_t>(static_cast<int64_t>(work / work_per_thread), 1, available);
}

// How tasks are cut: pieces begin at multiples of `unit`, and a thread finds about `per_thread` of them, so
// that what the last piece takes alone is at most that share of its time.
struct Pieces {
  int64_t unit = 1, per_thread = 16;
};

// Runs f(share, begin, end) over tasks [0, tasks) on at most `threads` threads; `share` < threads tells which
// workspace the call may use. One thread gets all tasks in one call. Several take consecutive pieces as they
// come free, the last ones first, since under a causal mask those cost most: tasks may differ in cost, and a
// thread that the machine holds up takes fewer. What a task computes must not depend on its piece.
template <typename F>
void run_shares(int64_t tasks, int64_t threads, const F& f, Pieces cut = {}) {
  if (tasks == 0) return;
  const int64_t unit = cut.unit, units = (tasks + unit - 1) / unit, shares = std::min(units, threads);
  const int64_t pieces = shares == 1 ? 1 : std::min(units, shares * cut.per_thread);
  std::atomic<int64_t> taken{0};
  torch::stable::parallel_for(0, shares, 1, [&](int64_t share, int64_t) {
    for (int64_t left = pieces - taken.fetch_add(1, std::memory_order_relaxed); left > 0;
         left = pieces - taken.fetch_add(1, std::memory_order_relaxed))
      f(share, units * (left - 1) / pieces * unit, std::min(tasks, units * left / pieces * unit));
  });
}

// Runs f(begin, end), where a call needs no workspace of its own.
template <typename F>
void run_tasks(int64_t tasks, int64_t threads, const F& f, Pieces cut = {}) {
  run_shares(tasks, threads, [&](int64_t, int64_t begin, int64_t end) { f(begin, end); }, cut);
}

}  // namespace arcore
