// Threads of the CPU ops. Only schema.cpp files include this: kernels receive task ranges.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace arcore {

// How many threads `work` is worth, when one thread should get at least `work_per_thread` of it: below that a
// second thread costs more than it saves.
inline int64_t threads_for(double work, double work_per_thread) {
  const int64_t available = torch::stable::get_num_threads();
  return std::clamp<int64_t>(static_cast<int64_t>(work / work_per_thread), 1, available);
}

// Runs f(share, begin, end) over tasks [0, tasks) on at most `threads` threads, in equal consecutive shares;
// `share` < threads tells which workspace a share may use.
template <typename F>
void run_shares(int64_t tasks, int64_t threads, const F& f) {
  if (tasks == 0) return;
  const int64_t shares = std::min(tasks, threads);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    f(begin, tasks * begin / shares, tasks * end / shares);
  });
}

// Runs f(begin, end), where a share needs no workspace of its own.
template <typename F>
void run_tasks(int64_t tasks, int64_t threads, const F& f) {
  run_shares(tasks, threads, [&](int64_t, int64_t begin, int64_t end) { f(begin, end); });
}

}  // namespace arcore
