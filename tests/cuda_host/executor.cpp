// Runs a launch cluster by cluster (a block by itself is a cluster of one): threads are fibers, a scheduler
// in the launching context picks the warp that runs next from a seed, and nothing moves between fibers except
// where threads meet.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_host/device.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ARCORE_ASAN 1
#else
#define ARCORE_ASAN 0
#endif

#if !defined(__x86_64__)
#error "the executor switches stacks with x86-64 instructions"
#endif

// void arcore_switch_stack(void** save, void* load): callee-saved registers go to the old stack, those of the
// new one come back.
asm(R"(
.text
.type arcore_switch_stack, @function
arcore_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size arcore_switch_stack, .-arcore_switch_stack
)");
extern "C" void arcore_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));

namespace arcore::cuda_host {

namespace {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxCluster = 16, kBarriers = 16;
#if ARCORE_ASAN
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kFilledBytes = 0;
#else
constexpr size_t kStackBytes = 64 * 1024;
// What a kernel reads from its stack before writing it is NaN, as far down as kernels' frames reach.
constexpr size_t kFilledBytes = 12 * 1024;
#endif
// More than a multiprocessor can give to one block.
constexpr int64_t kMaxSharedBytes = 227 * 1024;
constexpr unsigned char kSlackPattern = 0xa5;

enum class State { kReady, kInWarp, kInBarrier, kInCluster, kReturned };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  int64_t group;
};

struct Thread {
  void* stack_pointer;
  unsigned char* stack;
  void* fake_stack;
  State state;
  Where where;
  const char* what;
  const void* in;
  void* out;
  Combine combine;
  int barrier, result;
  int64_t open_group;
  std::vector<Copy> copies;
};

struct Warp {
  int arrived, ready;
};

struct Barrier {
  int arrived, expected, count;
};

struct Block {
  int64_t place[3];
  unsigned char* shared;
  int returned;
  Barrier barriers[kBarriers];
};

struct Random {
  uint64_t state;
  uint64_t next() {
    state += 0x9e3779b97f4a7c15u;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
};

// Which bytes of global memory load_readonly has read and store_global has written: a hash table of pieces of
// 32 bytes with a bit per byte, that forgets all at the start of a launch.
class Uses {
 public:
  void forget() {
    ++launch_;
    used_ = 0;
  }
  // Marks bytes [at, at + bytes) as read or written; whether one of them is marked as the other.
  bool mark(uintptr_t at, size_t bytes, bool written) {
    bool clash = false;
    for (const uintptr_t end = at + bytes; at < end;) {
      const uintptr_t piece = at / 32, until = std::min(end, (piece + 1) * 32);
      const uint32_t bits =
          static_cast<uint32_t>((uint64_t{1} << (until - piece * 32)) - (uint64_t{1} << at % 32));
      Piece& p = find(piece);
      p.bits[written] |= bits;
      clash |= (p.bits[!written] & bits) != 0;
      at = until;
    }
    return clash;
  }

 private:
  struct Piece {
    uintptr_t piece;
    uint64_t launch;
    uint32_t bits[2];
  };
  Piece& find(uintptr_t piece) {
    if (2 * used_ >= pieces_.size()) grow();
    for (size_t i = piece * 0x9e3779b97f4a7c15u >> 20;; ++i) {
      Piece& p = pieces_[i & (pieces_.size() - 1)];
      if (p.launch != launch_) {
        ++used_;
        return p = {piece, launch_, {0, 0}}, p;
      }
      if (p.piece == piece) return p;
    }
  }
  void grow() {
    std::vector<Piece> old(std::max<size_t>(1024, 4 * pieces_.size()));
    old.swap(pieces_);
    used_ = 0;
    for (const Piece& p : old)
      if (p.launch == launch_) find(p.piece) = p;
  }

  std::vector<Piece> pieces_;
  uint64_t launch_ = 0;
  size_t used_ = 0;
};

struct Executor {
  std::mutex mutex;
  uint64_t seed = 0;
  Statistics statistics{};

  // The launch that runs.
  void (*run)(const void*) = nullptr;
  const void* closure = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;  // of the cluster that runs
  int current = -1, returned = 0, at_cluster_barrier = 0;
  // The warp that has its turn, the lane that began it plus 31, how many lanes are left.
  int turn_warp = 0, turn_first = 0, turns_left = 0;
  // Of the device that is played: blocks of a cluster, 0: none.
  int cluster_limit = 0;
  Random random{0};
  void* scheduler_stack = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  std::string error;
  sigjmp_buf fault;

  Uses uses;

  // A stack for each thread of each block, and a map of shared memory for each block, where they were needed.
  std::vector<unsigned char*> stacks, shared_maps;
  int64_t shared_bytes = 0, shared_rounded = 0;
};

Executor executor;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

unsigned char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("cuda_host: no memory for the executor");
  return static_cast<unsigned char*>(p);
}

void switch_to_thread(Thread& t) {
#if ARCORE_ASAN
  __sanitizer_start_switch_fiber(&executor.scheduler_fake_stack, t.stack, kStackBytes);
#endif
  arcore_switch_stack(&executor.scheduler_stack, t.stack_pointer);
#if ARCORE_ASAN
  __sanitizer_finish_switch_fiber(executor.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void switch_to_scheduler(Thread& t, [[maybe_unused]] bool for_good) {
#if ARCORE_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &t.fake_stack, executor.scheduler_bottom,
                                 executor.scheduler_size);
#endif
  arcore_switch_stack(&t.stack_pointer, executor.scheduler_stack);
#if ARCORE_ASAN
  __sanitizer_finish_switch_fiber(t.fake_stack, &executor.scheduler_bottom, &executor.scheduler_size);
#endif
}

Thread& self() {
  return executor.threads[static_cast<size_t>(executor.current)];
}

size_t block_of_current() {
  return static_cast<size_t>(running.index.rank);
}
Block& own_block() {
  return executor.blocks[block_of_current()];
}

// What the functions of device.h look up, for thread `thread` of the cluster.
void set_running(int thread) {
  Executor& e = executor;
  e.current = thread;
  const int threads = running.index.threads, rank = e.blocks.size() == 1 ? 0 : thread / threads;
  running.index.thread = thread - rank * threads;
  running.index.rank = rank;
  const Block& block = e.blocks[static_cast<size_t>(rank)];
  std::memcpy(running.index.block, block.place, sizeof(block.place));
  running.shared = block.shared;
  running.shared_end = block.shared + e.shared_bytes;
}

// The next thread that is ready of those of the warp that are not run yet in this turn, or -1.
int take_turn() {
  Executor& e = executor;
  while (e.turns_left > 0) {
    --e.turns_left;
    const int thread = e.turn_warp * kLanes + (e.turn_first - e.turns_left) % kLanes;
    if (e.threads[static_cast<size_t>(thread)].state != State::kReady) continue;
    --e.warps[static_cast<size_t>(e.turn_warp)].ready;
    set_running(thread);
    return thread;
  }
  return -1;
}

// On to the next thread, or to the scheduler when the warp has had its turn.
void suspend() {
  Thread& me = self();
  const int next = ARCORE_ASAN ? -1 : take_turn();
  if (next < 0)
    switch_to_scheduler(me, false);
  else
    arcore_switch_stack(&me.stack_pointer, executor.threads[static_cast<size_t>(next)].stack_pointer);
}

bool same_place(const Where& a, const Where& b) {
  return std::memcmp(&a, &b, sizeof(Where)) == 0 ||  // the same object of the compiler
         (a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string place(const Where& where) {
  std::string file = where.file_name();
  const size_t cut = file.rfind("csrc/");
  if (cut != std::string::npos) file = file.substr(cut);
  return file + ":" + std::to_string(where.line());
}

std::string block_name(const Block& block) {
  return "block (" + std::to_string(block.place[0]) + ", " + std::to_string(block.place[1]) + ", " +
         std::to_string(block.place[2]) + ")";
}
// Of the thread that runs.
std::string block_name() {
  return block_name(own_block());
}
std::string thread_name() {
  return "thread " + std::to_string(executor.current % running.index.threads) + " of " + block_name();
}

void set_error(const std::string& message) {
  if (executor.error.empty()) executor.error = message;
}

[[noreturn]] void give_up() {
  switch_to_scheduler(self(), true);
  __builtin_unreachable();
}

void make_ready(Thread& t, size_t thread) {
  t.state = State::kReady;
  ++executor.warps[thread / kLanes].ready;
}

void fiber_main() {
  {
#if ARCORE_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &executor.scheduler_bottom, &executor.scheduler_size);
#endif
    executor.run(executor.closure);
  }
  Thread& t = self();
  if (!t.copies.empty()) {
    set_error(thread_name() + " returned while its copy_async was not waited for");
  }
  t.state = State::kReturned;
  ++executor.returned;
  ++own_block().returned;
  give_up();
}

void prepare_fiber(Thread& t) {
#if ARCORE_ASAN
  __asan_unpoison_memory_region(t.stack, kStackBytes);
#endif
  unsigned char* top = t.stack + kStackBytes;
  if (kFilledBytes > 0) std::memset(top - kFilledBytes, 0xff, kFilledBytes);
  // As if fiber_main had been called: the address below is what `ret` takes, after six registers.
  auto* frame = reinterpret_cast<void**>(top) - 2;
  *frame = reinterpret_cast<void*>(&fiber_main);
  frame -= 6;
  std::memset(frame, 0, 6 * sizeof(void*));
  t.stack_pointer = frame;
  t.fake_stack = nullptr;
  t.state = State::kReady;
  t.copies.clear();
  t.open_group = 0;
}

void on_fault(int, siginfo_t* info, void*) {
  char text[160];
  std::snprintf(text, sizeof(text), "an access outside all buffers, at address %p", info->si_addr);
  set_error(std::string(text) + " (" + thread_name() + ")");
  siglongjmp(executor.fault, 1);
}

// Who waits where, when nobody can go on.
std::string deadlock() {
  const auto threads = static_cast<size_t>(running.index.threads);
  const bool alone = executor.blocks.size() == 1;
  std::string text = "threads of " + block_name(executor.blocks[0]) + (alone ? "" : " and of its cluster") +
                     " wait for each other: ";
  std::vector<std::string> seen;
  for (size_t i = 0; i < executor.threads.size(); ++i) {
    const Thread& t = executor.threads[i];
    std::string line;
    if (t.state == State::kInWarp) line = std::string(t.what) + " at " + place(t.where);
    if (t.state == State::kInBarrier) line = "barrier " + std::to_string(t.barrier) + " at " + place(t.where);
    if (t.state == State::kInCluster) line = "the cluster's barrier at " + place(t.where);
    if (t.state == State::kReturned) line = "returned";
    if (std::find(seen.begin(), seen.end(), line) != seen.end()) continue;
    seen.push_back(line);
    text += (seen.size() > 1 ? "; thread " : "thread ") + std::to_string(i % threads) +
            (alone ? "" : " of block " + std::to_string(i / threads)) + ": " + line;
  }
  return text;
}

void run_cluster() {
  Executor& e = executor;
  e.statistics.blocks += static_cast<int64_t>(e.blocks.size());
  for (Block& b : e.blocks) {
    std::memset(b.shared, 0xff, static_cast<size_t>(e.shared_bytes));
    std::memset(b.shared + e.shared_bytes, kSlackPattern,
                static_cast<size_t>(e.shared_rounded - e.shared_bytes));
    b.returned = 0;
    for (Barrier& barrier : b.barriers)
      barrier = {};
  }
  for (Thread& t : e.threads)
    prepare_fiber(t);
  for (Warp& w : e.warps)
    w = {0, kLanes};
  e.returned = e.at_cluster_barrier = 0;
  const int count = static_cast<int>(e.warps.size());
  // From even steps of all warps to one warp running as far ahead as barriers let it.
  constexpr int kChances[] = {0, 8, 60, 1000};
  const int stay = kChances[e.random.below(4)];
  int warp = e.random.below(count);
  while (e.returned < static_cast<int>(e.threads.size())) {
    if (e.warps[static_cast<size_t>(warp)].ready == 0 || e.random.below(1000) >= stay) {
      int tries = 0;
      warp = e.random.below(count);
      while (tries < count && e.warps[static_cast<size_t>(warp)].ready == 0) {
        warp = (warp + 1) % count;
        ++tries;
      }
      if (tries == count) {
        set_error(deadlock());
        return;
      }
    }
    e.turn_warp = warp;
    e.turn_first = e.random.below(kLanes) + kLanes - 1;
    e.turns_left = kLanes;
    for (int thread = take_turn(); thread >= 0; thread = take_turn()) {
      switch_to_thread(e.threads[static_cast<size_t>(thread)]);
      if (!e.error.empty()) return;
    }
  }
  for (const Block& b : e.blocks) {
    for (int64_t i = e.shared_bytes; i < e.shared_rounded; ++i) {
      if (b.shared[i] != kSlackPattern) {
        set_error("a write past the end of the shared memory of " + block_name(b));
        return;
      }
    }
  }
}

void make_room(int threads, int64_t shared_bytes, int cluster) {
  Executor& e = executor;
  const size_t page = page_bytes();
  const size_t stack = kStackBytes + page;
  const size_t most = (static_cast<size_t>(kMaxSharedBytes) + 2 * page + page - 1) / page * page;
  // A stack that overflows, and an index below the shared memory or past it, hit a page that is not there.
  while (e.shared_maps.size() < static_cast<size_t>(cluster)) {
    e.shared_maps.push_back(map_pages(most + page));
    mprotect(e.shared_maps.back() + most, page, PROT_NONE);
  }
  const auto all = static_cast<size_t>(threads) * static_cast<size_t>(cluster);
  while (e.stacks.size() < all) {
    unsigned char* block = map_pages(kMaxThreads * stack);
    for (size_t i = 0; i < static_cast<size_t>(kMaxThreads); ++i) {
      mprotect(block + i * stack, page, PROT_NONE);
      e.stacks.push_back(block + i * stack + page);
    }
  }
  e.shared_bytes = shared_bytes;
  e.shared_rounded = (shared_bytes + 127) / 128 * 128;
  e.blocks.resize(static_cast<size_t>(cluster));
  for (size_t i = 0; i < e.blocks.size(); ++i)
    e.blocks[i].shared = e.shared_maps[i] + most - e.shared_rounded;
  e.threads.resize(all);
  e.warps.resize(all / kLanes);
  for (size_t i = 0; i < all; ++i)
    e.threads[i].stack = e.stacks[i];
}

}  // namespace

Running running;

int cluster_limit() {
  return executor.cluster_limit;
}

void fail(const char* message, const Where& where) {
  set_error(std::string(message) + " (" + thread_name() + ", " + place(where) + ")");
  give_up();
}

void fail_outside_shared(const char* what, const Where& where) {
  fail((std::string(what) + " outside the shared memory of the block").c_str(), where);
}

const void* cluster_address(const void* p, size_t bytes, int rank, const Where& where) {
  check_shared(p, bytes, "a load from a block of the cluster", where);
  if (rank < 0 || static_cast<size_t>(rank) >= executor.blocks.size())
    fail("a load from a block that the cluster does not have", where);
  const Block& other = executor.blocks[static_cast<size_t>(rank)];
  // One that has returned in part may have returned as a whole on a GPU.
  if (other.returned > 0) fail("a load from the shared memory of a block that returns", where);
  return other.shared + (static_cast<const unsigned char*>(p) - own_block().shared);
}

void note_readonly(const void* p, size_t bytes, const Where& where) {
  if (executor.uses.mark(reinterpret_cast<uintptr_t>(p), bytes, false))
    fail("load_readonly of what the launch has written", where);
}

void note_store(const void* p, size_t bytes, const Where& where) {
  if (executor.uses.mark(reinterpret_cast<uintptr_t>(p), bytes, true))
    fail("a store to what the launch reads by load_readonly", where);
}

void meet_warp(const char* what, const void* in, void* out, Combine combine, const Where& where) {
  Executor& e = executor;
  Thread& me = self();
  const auto warp = static_cast<size_t>(e.current / kLanes);
  me.what = what;
  me.where = where;
  me.in = in;
  me.out = out;
  me.combine = combine;
  me.state = State::kInWarp;
  if (++e.warps[warp].arrived < kLanes) {
    suspend();
    return;
  }
  Thread* lanes = &e.threads[warp * kLanes];
  const void* inputs[kLanes];
  void* outputs[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (lanes[l].combine != combine || !same_place(lanes[l].where, where)) {
      fail(("lanes of a warp are at different places: lane " + std::to_string(l) + " at " + lanes[l].what +
            ", " + place(lanes[l].where) + ", another at " + what)
               .c_str(),
           where);
    }
    inputs[l] = lanes[l].in;
    outputs[l] = lanes[l].out;
  }
  ++e.statistics.collectives;
  combine(inputs, outputs);
  e.warps[warp].arrived = 0;
  for (int l = 0; l < kLanes; ++l)
    make_ready(lanes[l], warp * kLanes + static_cast<size_t>(l));
  suspend();
}

int meet_block(int id, int expected, bool value, const Where& where) {
  Executor& e = executor;
  Thread& me = self();
  Barrier& b = own_block().barriers[id];
  if (b.arrived == 0) b = {0, expected, 0};
  if (b.expected != expected)
    fail("threads that come to one barrier expect different numbers of threads", where);
  ++b.arrived;
  b.count += value;
  me.state = State::kInBarrier;
  me.barrier = id;
  me.where = where;
  if (b.arrived < expected) {
    suspend();
    return self().result;
  }
  const size_t first = block_of_current() * static_cast<size_t>(running.index.threads);
  for (size_t i = first; i < first + static_cast<size_t>(running.index.threads); ++i) {
    Thread& t = e.threads[i];
    if (t.state != State::kInBarrier || t.barrier != id) continue;
    if (id == 0 && !same_place(t.where, where))
      fail(("threads of a block are at different barriers: thread " + std::to_string(i - first) + " at " +
            place(t.where))
               .c_str(),
           where);
    t.result = b.count;
    make_ready(t, i);
  }
  b = {};
  ++e.statistics.barriers;
  suspend();
  return self().result;
}

void meet_cluster(const Where& where) {
  Executor& e = executor;
  // An instruction of whole warps.
  meet_warp("sync_cluster", nullptr, nullptr, [](const void* const*, void* const*) {}, where);
  Thread& me = self();
  me.state = State::kInCluster;
  me.where = where;
  if (++e.at_cluster_barrier < static_cast<int>(e.threads.size())) {
    suspend();
    return;
  }
  e.at_cluster_barrier = 0;
  for (size_t i = 0; i < e.threads.size(); ++i)
    make_ready(e.threads[i], i);
  ++e.statistics.barriers;
  suspend();
}

void begin_copy(void* shared, const void* global, int bytes, bool valid, const Where& where) {
  const auto size = static_cast<uintptr_t>(bytes);
  if (reinterpret_cast<uintptr_t>(shared) % size != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % size != 0))
    fail("a copy_async whose addresses are not multiples of its bytes", where);
  check_shared(shared, static_cast<size_t>(bytes), "a copy_async", where);
  ++executor.statistics.async_copies;
  ++executor.statistics.all_async_copies;
  Thread& me = self();
  // The data may come at any moment from now on; who reads it before the wait, or still needs what was there,
  // reads NaN.
  std::memset(shared, 0xff, static_cast<size_t>(bytes));
  me.copies.push_back({shared, global, bytes, valid, me.open_group});
}

void commit_copies() {
  ++self().open_group;
}

void wait_copies(int pending) {
  Thread& me = self();
  const int64_t done = me.open_group - pending;  // groups below this have arrived
  size_t kept = 0;
  for (const Copy& c : me.copies) {
    if (c.group >= done) {
      me.copies[kept++] = c;
      continue;
    }
    if (c.valid)
      std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    else
      std::memset(c.to, 0, static_cast<size_t>(c.bytes));
  }
  me.copies.resize(kept);
}

void count_matrix_product() {
  ++executor.statistics.matrix_products;
}
void count_bank_conflicts(int conflicts) {
  executor.statistics.bank_conflicts += conflicts;
}

int launch_erased(void (*run)(const void*), int64_t x, int64_t y, int64_t z, int threads,
                  int64_t shared_bytes, int cluster, const void* closure) {
  constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
  if (threads < kLanes || threads > kMaxThreads || threads % kLanes != 0 || shared_bytes < 0 ||
      shared_bytes > kMaxSharedBytes || x >= int64_t{1} << 31 || y > 65535 || z > 65535 || cluster < 1 ||
      cluster > kMaxCluster || x % cluster != 0 || (cluster > 1 && cluster > executor.cluster_limit))
    return kInvalidValue;
  std::lock_guard<std::mutex> lock(executor.mutex);
  Executor& e = executor;
  make_room(threads, shared_bytes, cluster);
  e.run = run;
  e.closure = closure;
  e.error.clear();
  e.random.state = e.seed;
  const int64_t all_async_copies = e.statistics.all_async_copies;
  e.statistics = {};
  e.statistics.all_async_copies = all_async_copies;
  e.uses.forget();
  running.index = {0, threads, 0, cluster, {0, 0, 0}, {x, y, z}};

#if !ARCORE_ASAN
  struct sigaction action{};
  struct sigaction old_segv, old_bus;
  alignas(16) static unsigned char signal_stack[64 * 1024];
  stack_t stack{signal_stack, 0, sizeof(signal_stack)}, old_stack;
  sigaltstack(&stack, &old_stack);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
#endif
  const int64_t wide = x / cluster, blocks = wide * y * z;  // clusters
  if (sigsetjmp(e.fault, 1) == 0) {
    // Blocks in an order that has nothing to do with their numbers.
    int64_t stride =
        blocks == 1 ? 1 : 1 + static_cast<int64_t>(e.random.next() % static_cast<uint64_t>(blocks - 1));
    auto common = [](int64_t a, int64_t b) {
      while (b != 0) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
      }
      return a;
    };
    while (common(stride, blocks) != 1)
      ++stride;
    int64_t block = static_cast<int64_t>(e.random.next() % static_cast<uint64_t>(blocks));
    for (int64_t i = 0; i < blocks && e.error.empty(); ++i, block = (block + stride) % blocks) {
      for (int rank = 0; rank < cluster; ++rank) {
        int64_t (&place)[3] = e.blocks[static_cast<size_t>(rank)].place;
        place[0] = block % wide * cluster + rank;
        place[1] = block / wide % y;
        place[2] = block / wide / y;
      }
      run_cluster();
    }
  }
#if !ARCORE_ASAN
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
#endif
  if (!e.error.empty()) throw std::runtime_error("cuda_host: " + e.error);
  return 0;
}

extern "C" {

__attribute__((visibility("default"))) void arcore_cuda_host_set_seed(uint64_t seed) {
  executor.seed = seed;
}

__attribute__((visibility("default"))) void arcore_cuda_host_set_cluster_limit(int limit) {
  executor.cluster_limit = limit;
}

__attribute__((visibility("default"))) void arcore_cuda_host_statistics(int64_t* out) {
  std::memcpy(out, &executor.statistics, sizeof(Statistics));
}

}  // extern "C"

}  // namespace arcore::cuda_host
