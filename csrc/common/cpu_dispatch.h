// Picks the instruction set of the CPU kernels at run time.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace arcore {

enum class CpuIsa { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

#if defined(__x86_64__)
// Half precision conversions, which not every compiler's __builtin_cpu_supports knows by name.
inline bool cpu_has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// The best instruction set that this CPU and its operating system support.
inline CpuIsa best_cpu_isa() {
#if defined(__x86_64__)
  // gcc's builtin also checks that the operating system saves the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma"))
    return CpuIsa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c()) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kDefault;
}

// ATEN_CPU_CAPABILITY=default|avx2|avx512, torch's own variable, lowers the choice; it never raises it above
// what the CPU can run.
inline CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    const CpuIsa best = best_cpu_isa();
    const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
    if (wish == nullptr) return best;
    CpuIsa wanted = best;
    if (std::strcmp(wish, "default") == 0) wanted = CpuIsa::kDefault;
    if (std::strcmp(wish, "avx2") == 0) wanted = CpuIsa::kAvx2;
    if (std::strcmp(wish, "avx512") == 0) wanted = CpuIsa::kAvx512;
    return wanted < best ? wanted : best;
  }();
  return chosen;
}

// Units for products of bfloat16 beside AVX-512: dot products of pairs, or AMX tiles.
enum class CpuBf16 { kNone = 0, kDot = 1, kTiles = 2 };

inline bool cpu_has_bf16(CpuBf16 unit) {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (unit == CpuBf16::kNone) return true;
  if (best_cpu_isa() != CpuIsa::kAvx512 || __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((eax >> 5 & 1u) == 0) return false;
  if (unit == CpuBf16::kDot) return true;
#if defined(ARCORE_EMULATED_TILES)  // tests/bf16_tiles
  return true;
#elif defined(__linux__)
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool tiles = (edx >> 22 & 1u) != 0 && (edx >> 24 & 1u) != 0;
  // Linux hands the tile registers (feature 18) to processes that ask.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
#endif
  return unit == CpuBf16::kNone;
}

// Where the dot products are slower than float32's multiply-adds: Intel's cores do one a cycle, AMD's two.
inline bool slow_bf16_dot() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("amd");
#else
  return true;
#endif
}

// The unit in use. ARCORE_BF16=none|dot|tiles asks for another one that this CPU has.
inline CpuBf16 cpu_bf16() {
  static const CpuBf16 chosen = [] {
    if (cpu_isa() != CpuIsa::kAvx512) return CpuBf16::kNone;
    const char* wish = std::getenv("ARCORE_BF16");
    if (wish != nullptr && std::strcmp(wish, "none") == 0) return CpuBf16::kNone;
    const bool tiles = cpu_has_bf16(CpuBf16::kTiles), dot = cpu_has_bf16(CpuBf16::kDot);
    if (wish != nullptr && std::strcmp(wish, "dot") == 0 && dot) return CpuBf16::kDot;
    if (tiles) return CpuBf16::kTiles;
    return dot && !slow_bf16_dot() ? CpuBf16::kDot : CpuBf16::kNone;
  }();
  return chosen;
}

inline const char* cpu_bf16_name(CpuBf16 unit) {
  switch (unit) {
    case CpuBf16::kTiles:
      return "tiles";
    case CpuBf16::kDot:
      return "dot";
    default:
      return "none";
  }
}

// The names of what was built, weakest first.
inline const char* cpu_isas_built() {
#if defined(__x86_64__)
  return "default avx2 avx512";
#else
  return "default";
#endif
}

// How wide the vectors of the variant "default" are, in words.
inline const char* cpu_default_isa() {
#if defined(__x86_64__)
  return "baseline x86-64, no vectors";
#elif defined(__aarch64__)
  return "NEON";
#else
  return "portable, no vectors";
#endif
}

inline const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace arcore

// Declares `const Type& name()` of the compiled variants (CMakeLists.txt has the same list) and defines
// `name()` that returns the chosen one.
#if !defined(__x86_64__)
#define ARCORE_DISPATCH_CPU(Type, name) \
  namespace DEFAULT {                   \
  const Type& name();                   \
  }                                     \
  inline const Type& name() {           \
    return DEFAULT::name();             \
  }
#else
#define ARCORE_DISPATCH_CPU(Type, name) \
  namespace DEFAULT {                   \
  const Type& name();                   \
  }                                     \
  namespace AVX2 {                      \
  const Type& name();                   \
  }                                     \
  namespace AVX512 {                    \
  const Type& name();                   \
  }                                     \
  inline const Type& name() {           \
    switch (::arcore::cpu_isa()) {      \
      case ::arcore::CpuIsa::kAvx512:   \
        return AVX512::name();          \
      case ::arcore::CpuIsa::kAvx2:     \
        return AVX2::name();            \
      default:                          \
        return DEFAULT::name();         \
    }                                   \
  }
#endif

// The same for the kernels that have a version for the bfloat16 units: defines `name(unit)`, the version for
// `unit`, which is not kNone.
#if !defined(__x86_64__)
#define ARCORE_DISPATCH_BF16(Type, name)       \
  inline const Type& name(::arcore::CpuBf16) { \
    return DEFAULT::name();                    \
  }
#else
#define ARCORE_DISPATCH_BF16(Type, name)                                          \
  namespace AVX512_BF16 {                                                         \
  const Type& name();                                                             \
  }                                                                               \
  namespace AMX {                                                                 \
  const Type& name();                                                             \
  }                                                                               \
  inline const Type& name(::arcore::CpuBf16 unit) {                               \
    return unit == ::arcore::CpuBf16::kTiles ? AMX::name() : AVX512_BF16::name(); \
  }
#endif
