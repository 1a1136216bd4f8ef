// What csrc/common/sm80/device.h means on the CPU: each thread of a block is a fiber, the functions below
// hand over to the executor where threads meet, and every use that the hardware would not forgive is an
// error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define ARCORE_DEVICE inline
#define ARCORE_KERNEL static void
#define ARCORE_KERNEL_ARGS const
#define ARCORE_LAUNCH_BOUNDS(threads, blocks_per_multiprocessor)
#define ARCORE_UNROLL
#define ARCORE_NO_UNROLL

namespace arcore::cuda_host {

using Where = std::source_location;

// Counts since the last launch began; tests read them.
struct Statistics {
  int64_t blocks, barriers, collectives, matrix_products, async_copies;
  // Rows of ldmatrix that wait because another row of the same 8 lies in the same 16 bytes of the 128-byte
  // line.
  int64_t bank_conflicts;
  int64_t all_async_copies;  // since the library was loaded
};

struct Index {
  int thread, threads;
  int rank, cluster;  // the block's place in its cluster of blocks, and their number
  int64_t block[3], grid[3];
};

// Of the thread that runs, and the shared memory of its block; the scheduler sets them before it switches.
struct Running {
  Index index;
  unsigned char *shared, *shared_end;
};
extern Running running;

inline const Index& index() {
  return running.index;
}
inline unsigned char* shared_memory() {
  return running.shared;
}

// All 32 lanes of the warp meet; `combine` reads in[lane] and writes out[lane].
using Combine = void (*)(const void* const* in, void* const* out);
void meet_warp(const char* what, const void* in, void* out, Combine combine, const Where& where);

// `threads` threads meet at barrier `id`; returns how many came with `value`. id 0 is that of the whole
// block.
int meet_block(int id, int threads, bool value, const Where& where);

// All threads of all blocks of the cluster meet.
void meet_cluster(const Where& where);
// The address in the shared memory of the block `rank` that corresponds to `p` in this block's.
const void* cluster_address(const void* p, size_t bytes, int rank, const Where& where);
// Blocks that a cluster may have here; tests set it, 0 is a GPU without clusters.
int cluster_limit();

void begin_copy(void* shared, const void* global, int bytes, bool valid, const Where& where);
void commit_copies();
void wait_copies(int pending);

// Stops the launch, which throws this message with the thread and the place.
[[noreturn]] void fail(const char* message, const Where& where);

// load_readonly of what store_global writes in the same launch, by whatever thread, is an error.
void note_readonly(const void* p, size_t bytes, const Where& where);
void note_store(const void* p, size_t bytes, const Where& where);

[[noreturn]] void fail_outside_shared(const char* what, const Where& where);
inline void check_shared(const void* p, size_t bytes, const char* what, const Where& where) {
  const auto* begin = static_cast<const unsigned char*>(p);
  if (begin < running.shared || begin + bytes > running.shared_end) fail_outside_shared(what, where);
}
void count_matrix_product();
void count_bank_conflicts(int conflicts);

int launch_erased(void (*run)(const void*), int64_t x, int64_t y, int64_t z, int threads,
                  int64_t shared_bytes, int cluster, const void* closure);

template <typename Args>
int launch(void (*kernel)(Args), int64_t x, int64_t y, int64_t z, int threads, int64_t shared_bytes,
           int cluster, const Args& args) {
  struct Closure {
    void (*kernel)(Args);
    const Args* args;
  } closure{kernel, &args};
  return launch_erased(
      [](const void* p) {
        const Closure& c = *static_cast<const Closure*>(p);
        c.kernel(*c.args);
      },
      x, y, z, threads, shared_bytes, cluster, &closure);
}

template <typename T>
void check_aligned(const T* p, const Where& where) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    fail("an address that is not a multiple of the size of what is accessed", where);
}

// c += a b for lane-distributed operands; numbers decode with `decode`.
struct ProductIn {
  float c[4];
  uint32_t a[4], b[2];
};
template <typename T>
float decode(uint16_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t word = uint32_t{bits} << 16;
    float out;
    std::memcpy(&out, &word, 4);
    return out;
  } else {
#ifdef __F16C__
    return _cvtsh_ss(bits);
#else
    T x;
    std::memcpy(&x, &bits, 2);
    return __half2float(x);
#endif
  }
}
template <typename T>
void combine_product(const void* const* in, void* const* out) {
  typedef double Half __attribute__((vector_size(32)));  // of a row of b
  double a[16][16];
  Half b[16][2], sums[16][2];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const ProductIn*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + (i % 2) * 8, column = 2 * t + (i / 2) * 8;
      a[row][column] = decode<T>(static_cast<uint16_t>(p.a[i]));
      a[row][column + 1] = decode<T>(static_cast<uint16_t>(p.a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g / 4][g % 4] = decode<T>(static_cast<uint16_t>(p.b[i]));
      b[2 * t + 8 * i + 1][g / 4][g % 4] = decode<T>(static_cast<uint16_t>(p.b[i] >> 16));
    }
  }
  for (int row = 0; row < 16; ++row) {
    Half left{}, right{};
    for (int k = 0; k < 16; ++k) {
      left += a[row][k] * b[k][0];
      right += a[row][k] * b[k][1];
    }
    sums[row][0] = left;
    sums[row][1] = right;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const ProductIn*>(in[lane]);
    float* c = static_cast<float*>(out[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      c[i] =
          static_cast<float>(static_cast<double>(p.c[i]) + sums[g + (i / 2) * 8][t / 2][t % 2 * 2 + i % 2]);
  }
  count_matrix_product();
}

template <bool kTransposed>
void combine_load_matrix(const void* const* in, void* const* out) {
  uint16_t rows[32][8];
  for (int lane = 0; lane < 32; ++lane)
    std::memcpy(rows[lane], *static_cast<const unsigned char* const*>(in[lane]), 16);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t taken = 0;
    for (int r = 0; r < 8; ++r)
      taken |=
          1u << (reinterpret_cast<uintptr_t>(*static_cast<const unsigned char* const*>(in[8 * matrix + r])) /
                 16 % 8);
    count_bank_conflicts(8 - __builtin_popcount(taken));
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint16_t low = kTransposed ? rows[8 * matrix + t][g] : rows[8 * matrix + g][t];
      const uint16_t high = kTransposed ? rows[8 * matrix + t + 1][g] : rows[8 * matrix + g][t + 1];
      static_cast<uint32_t*>(out[lane])[matrix] = static_cast<uint32_t>(low) | static_cast<uint32_t>(high)
                                                                                   << 16;
    }
  }
}

template <typename T>
struct ShuffleIn {
  T value;
  int lane;
};
template <typename T>
T shuffle_from(const char* what, T value, int source, const Where& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (source < 0 || source > 31) fail("a shuffle from a lane outside 0 to 31", where);
  ShuffleIn<T> in{value, source};
  T out;
  meet_warp(
      what, &in, &out,
      [](const void* const* from, void* const* to) {
        for (int lane = 0; lane < 32; ++lane) {
          const int source_lane = static_cast<const ShuffleIn<T>*>(from[lane])->lane;
          std::memcpy(to[lane], &static_cast<const ShuffleIn<T>*>(from[source_lane])->value, sizeof(T));
        }
      },
      where);
  return out;
}

inline float flush(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

}  // namespace arcore::cuda_host

namespace arcore {

using cuda_host::Where;

inline int thread_index() {
  return cuda_host::index().thread;
}
inline int block_threads() {
  return cuda_host::index().threads;
}
inline int lane_index() {
  return cuda_host::index().thread % 32;
}
// A shuffle on the hardware, so the lanes meet here too.
inline int warp_index(Where where = Where::current()) {
  cuda_host::meet_warp("warp_index", nullptr, nullptr, [](const void* const*, void* const*) {}, where);
  return cuda_host::index().thread / 32;
}
inline int64_t block_x() {
  return cuda_host::index().block[0];
}
inline int64_t block_y() {
  return cuda_host::index().block[1];
}
inline int64_t block_z() {
  return cuda_host::index().block[2];
}
inline int64_t grid_x() {
  return cuda_host::index().grid[0];
}
inline int64_t grid_y() {
  return cuda_host::index().grid[1];
}
inline unsigned char* shared_memory() {
  return cuda_host::shared_memory();
}

inline void sync_threads(Where where = Where::current()) {
  cuda_host::meet_block(0, block_threads(), false, where);
}
inline bool sync_threads_or(bool value, Where where = Where::current()) {
  return cuda_host::meet_block(0, block_threads(), value, where) > 0;
}
inline int sync_threads_count(bool value, Where where = Where::current()) {
  return cuda_host::meet_block(0, block_threads(), value, where);
}
inline void sync_group(int id, int threads, Where where = Where::current()) {
  if (id < 1 || id > 15) cuda_host::fail("a group barrier whose id is not 1 to 15", where);
  if (threads < 32 || threads % 32 != 0 || threads > block_threads())
    cuda_host::fail("a group barrier of a number of threads that is not whole warps of the block", where);
  // bar.sync is an instruction of whole warps: lanes that come from different places hang.
  cuda_host::meet_warp("sync_group", nullptr, nullptr, [](const void* const*, void* const*) {}, where);
  cuda_host::meet_block(id, threads, false, where);
}
inline void sync_warp(Where where = Where::current()) {
  cuda_host::meet_warp("sync_warp", nullptr, nullptr, [](const void* const*, void* const*) {}, where);
}
inline void fence_device() {}
inline int hide(int x) {
  return x;
}

inline int cluster_size() {
  return cuda_host::index().cluster;
}
inline int cluster_rank() {
  return cuda_host::index().rank;
}
inline void sync_cluster(Where where = Where::current()) {
  cuda_host::meet_cluster(where);
}
template <typename T>
T load_cluster(const T* p, int rank, Where where = Where::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  cuda_host::check_aligned(p, where);
  T out;
  std::memcpy(&out, cuda_host::cluster_address(p, sizeof(T), rank, where), sizeof(T));
  return out;
}

template <typename T>
T shuffle(T value, int source_lane, Where where = Where::current()) {
  return cuda_host::shuffle_from("shuffle", value, source_lane, where);
}
template <typename T>
T shuffle_xor(T value, int lane_mask, Where where = Where::current()) {
  return cuda_host::shuffle_from("shuffle_xor", value, lane_index() ^ lane_mask, where);
}
template <typename T>
T shuffle_up(T value, int delta, Where where = Where::current()) {
  const int lane = lane_index();
  if (delta < 0 || delta > 31) cuda_host::fail("a shuffle by a distance outside 0 to 31", where);
  return cuda_host::shuffle_from("shuffle_up", value, lane >= delta ? lane - delta : lane, where);
}
template <typename T>
T shuffle_down(T value, int delta, Where where = Where::current()) {
  const int lane = lane_index();
  if (delta < 0 || delta > 31) cuda_host::fail("a shuffle by a distance outside 0 to 31", where);
  return cuda_host::shuffle_from("shuffle_down", value, lane + delta < 32 ? lane + delta : lane, where);
}
inline uint32_t ballot(bool value, Where where = Where::current()) {
  uint32_t in = value, out;
  cuda_host::meet_warp(
      "ballot", &in, &out,
      [](const void* const* from, void* const* to) {
        uint32_t word = 0;
        for (int lane = 0; lane < 32; ++lane)
          word |= *static_cast<const uint32_t*>(from[lane]) << lane;
        for (int lane = 0; lane < 32; ++lane)
          *static_cast<uint32_t*>(to[lane]) = word;
      },
      where);
  return out;
}
inline bool any_lane(bool value, Where where = Where::current()) {
  return ballot(value, where) != 0;
}
inline bool all_lanes(bool value, Where where = Where::current()) {
  return ballot(value, where) == 0xffffffffu;
}
inline int count_bits(uint32_t word) {
  return __builtin_popcount(word);
}
inline int count_bits64(uint64_t word) {
  return __builtin_popcountll(word);
}
inline int lowest_bit(uint32_t word) {
  return __builtin_ffs(static_cast<int>(word)) - 1;
}
inline int lowest_bit64(uint64_t word) {
  return __builtin_ffsll(static_cast<long long>(word)) - 1;
}
inline int leading_zeros(uint32_t word) {
  return word == 0 ? 32 : __builtin_clz(word);
}
inline int leading_zeros64(uint64_t word) {
  return word == 0 ? 64 : __builtin_clzll(word);
}

template <typename T>
T load_global(const T* p, Where where = Where::current()) {
  cuda_host::check_aligned(p, where);
  return *p;
}
template <typename T>
T load_readonly(const T* p, Where where = Where::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  cuda_host::check_aligned(p, where);
  cuda_host::note_readonly(p, sizeof(T), where);
  return *p;
}
template <typename T>
void store_global(T* p, T value, Where where = Where::current()) {
  cuda_host::check_aligned(p, where);
  cuda_host::note_store(p, sizeof(T), where);
  *p = value;
}
template <typename T>
T load_shared(const T* p, Where where = Where::current()) {
  cuda_host::check_aligned(p, where);
  cuda_host::check_shared(p, sizeof(T), "a load", where);
  return *p;
}
template <typename T>
void store_shared(T* p, T value, Where where = Where::current()) {
  cuda_host::check_aligned(p, where);
  cuda_host::check_shared(p, sizeof(T), "a store", where);
  *p = value;
}

inline void prefetch(const void*) {}

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid = true, Where where = Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cuda_host::begin_copy(shared, global, kBytes, valid, where);
}
inline void copy_async_commit() {
  cuda_host::commit_copies();
}
template <int kPending>
void copy_async_wait() {
  static_assert(kPending >= 0);
  cuda_host::wait_copies(kPending);
}

inline void load_matrix4(uint32_t (&out)[4], const void* shared_row, Where where = Where::current()) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0)
    cuda_host::fail("an ldmatrix row that is not aligned to 16 bytes", where);
  cuda_host::check_shared(shared_row, 16, "an ldmatrix row", where);
  cuda_host::meet_warp("ldmatrix", &shared_row, out, cuda_host::combine_load_matrix<false>, where);
}
inline void load_matrix4_transposed(uint32_t (&out)[4], const void* shared_row,
                                    Where where = Where::current()) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0)
    cuda_host::fail("an ldmatrix row that is not aligned to 16 bytes", where);
  cuda_host::check_shared(shared_row, 16, "an ldmatrix row", where);
  cuda_host::meet_warp("ldmatrix.trans", &shared_row, out, cuda_host::combine_load_matrix<true>, where);
}
template <typename T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
               Where where = Where::current()) {
  const cuda_host::ProductIn in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  cuda_host::meet_warp("mma", &in, c, cuda_host::combine_product<T>, where);
}

inline float exp2_approx(float x) {
  return cuda_host::flush(std::exp2(cuda_host::flush(x)));
}
inline float log2_approx(float x) {
  return std::log2(cuda_host::flush(x));
}
inline float reciprocal_approx(float x) {
  return cuda_host::flush(1.0f / cuda_host::flush(x));
}
inline float multiply_rounded(float a, float b) {
  return a * b;
}
inline float add_rounded(float a, float b) {
  return a + b;
}
inline float divide_rounded(float a, float b) {
  return a / b;
}
inline double multiply_rounded(double a, double b) {
  return a * b;
}
inline double add_rounded(double a, double b) {
  return a + b;
}
inline float fused_multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double fused_multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline uint32_t float_bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}
inline float bits_float(uint32_t word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(a) * b) >> 64);
}

// Fibers change only where threads meet, so a read and a write in one function are atomic.
template <typename T>
T atomic_add(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomic_max(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = value > old ? value : old;
  return old;
}
template <typename T>
T atomic_min(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = value < old ? value : old;
  return old;
}
inline void atomic_add_words(uint32_t* low, uint32_t* high, uint64_t value) {
  const auto part = static_cast<uint32_t>(value);
  const uint32_t old = *low;
  *low = old + part;
  *high += static_cast<uint32_t>(value >> 32) + (old + part < old ? 1u : 0u);
}
inline uint32_t atomic_or(uint32_t* p, uint32_t value) {
  const uint32_t old = *p;
  *p = old | value;
  return old;
}

}  // namespace arcore
