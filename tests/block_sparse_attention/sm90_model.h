// A model of the hardware under the sm_90a kernels, for the CPU: fibers that switch at random, mbarriers,
// buffers in shared memory and asynchronous copies into them. A copy spoils its target at once and arrives at
// a random later time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "block_sparse_attention/tile_loop_sm90.h"

namespace sm90_model {

using namespace arcore;
using namespace arcore::block_sparse_attention;
using namespace arcore::block_sparse_attention::sm90;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline float round_to(bool half, float x) {
  if (half) return static_cast<float>(static_cast<_Float16>(x));
  if (std::isnan(x)) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits += 0x7fff + (bits >> 16 & 1);
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// ---- fibers that switch at random ----

class Fibers {
 public:
  explicit Fibers(uint64_t seed) : random_(seed) {}

  void add(std::function<void()> body) {
    auto fiber = std::make_unique<Fiber>();
    fiber->body = std::move(body);
    fiber->stack.resize(1 << 18);
    fibers_.push_back(std::move(fiber));
  }
  // Something that happens by itself at a random time.
  void later(std::function<void()> event) { events_.push_back(std::move(event)); }

  // Runs all fibers to their end; the message of the first failure, or empty.
  std::string run() {
    for (auto& f : fibers_) {
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.data();
      f->context.uc_stack.ss_size = f->stack.size();
      f->context.uc_link = &main_;
      current_ = f.get();
      const auto self = reinterpret_cast<uintptr_t>(this);
      makecontext(&f->context, reinterpret_cast<void (*)()>(&Fibers::enter), 2, static_cast<unsigned>(self),
                  static_cast<unsigned>(self >> 32));
    }
    while (failure_.empty()) {
      std::vector<Fiber*> ready;
      bool alive = false;
      for (auto& f : fibers_) {
        alive |= !f->done;
        if (!f->done && (!f->until || f->until())) ready.push_back(f.get());
      }
      const size_t choices = ready.size() + events_.size();
      if (choices == 0) {
        if (alive) failure_ = "deadlock";
        break;
      }
      // Copies are slow more often than not.
      const size_t choice = random_() % (ready.empty() || random_() % 4 == 0 ? choices : ready.size());
      if (choice < ready.size()) {
        current_ = ready[choice];
        current_->until = nullptr;
        swapcontext(&main_, &current_->context);
      } else {
        const size_t at = choice - ready.size();
        const auto event = std::move(events_[at]);
        events_.erase(events_.begin() + static_cast<std::ptrdiff_t>(at));
        event();
      }
    }
    return failure_;
  }

  void wait(std::function<bool()> until) {
    current_->until = std::move(until);
    swapcontext(&current_->context, &main_);
  }
  void maybe_switch() {
    if (random_() % 2 == 0) wait(nullptr);
  }
  // The failing fiber never runs again.
  void fail(const std::string& what) {
    if (failure_.empty()) failure_ = what;
    swapcontext(&current_->context, &main_);
  }
  // For events, which have no fiber to leave.
  void fail_event(const std::string& what) {
    if (failure_.empty()) failure_ = what;
  }

 private:
  struct Fiber {
    std::function<void()> body;
    std::function<bool()> until;
    std::vector<char> stack;
    ucontext_t context;
    bool done = false;
  };

  static void enter(unsigned low, unsigned high) {
    auto* self = reinterpret_cast<Fibers*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32);
    Fiber* fiber = self->current_;
    fiber->body();
    fiber->done = true;
  }

  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::function<void()>> events_;
  ucontext_t main_;
  Fiber* current_ = nullptr;
  std::string failure_;
};

// Which block takes which units where a counter hands them out: rising numbers, whoever comes first.
inline std::vector<std::vector<int64_t>> share_units(int64_t units, int64_t blocks, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<int64_t>> shares(static_cast<size_t>(blocks));
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t block =
        unit < blocks ? unit : static_cast<int64_t>(random() % static_cast<uint64_t>(blocks));
    shares[static_cast<size_t>(block)].push_back(unit);
  }
  return shares;
}

// ---- the block's shared state ----

// An mbarrier: a phase ends when all arrivals and all announced bytes are in.
struct Barrier {
  int count, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;

  explicit Barrier(int arrivals) : count(arrivals), pending(arrivals) {}
  void settle() {
    if (pending != 0 || bytes != 0) return;
    ++phase;
    pending = count;
  }
  void arrive(int times = 1) {
    for (int i = 0; i < times; ++i) {
      --pending;
      settle();
    }
  }
  void arrive_expecting(int64_t more) {
    bytes += more;
    arrive();
  }
  void complete(int64_t copied) {
    bytes -= copied;
    settle();
  }
  bool passed(uint32_t parity) const { return phase % 2 != parity; }
};

struct Buffer {
  std::vector<float> data;
  uint64_t loads = 0;  // copies started
  bool arrived = false;
};

// Starts a copy of `rows` rows of `columns` from row `first` on; zeros beyond the tensor. The barrier has
// been told of its bytes.
inline void start_copy(Fibers& fibers, Buffer& to, Barrier& full, const Tensor4& from, const CopyMap& map,
                       int64_t batch, int64_t head, int64_t first, int64_t rows, int64_t columns) {
  to.arrived = false;
  const uint64_t load = ++to.loads;
  to.data.assign(to.data.size(), kNaN);
  fibers.later([=, &fibers, &to, &full, &map, data = static_cast<const float*>(from.data)] {
    if (to.loads != load) return fibers.fail_event("two copies into one buffer at once");
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < columns; ++d) {
        const int64_t at[4] = {d, first + r, head * map.head_step, batch * map.batch_step};
        bool inside = true;
        uint64_t byte = static_cast<uint64_t>(2 * d);
        for (int i = 0; i < 4; ++i) {
          inside &= static_cast<uint64_t>(at[i]) < map.sizes[i];
          if (i > 0) byte += static_cast<uint64_t>(at[i]) * map.strides[i - 1];
        }
        to.data[static_cast<size_t>(r * columns + d)] = inside ? data[byte / 2] : 0.0f;
      }
    }
    to.arrived = true;
    full.complete(rows * columns * 2);
  });
}

}  // namespace sm90_model
