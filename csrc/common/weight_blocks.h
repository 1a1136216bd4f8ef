// Weights in blocks of 32 numbers along a row, as GGUF files store them, turned into floats in registers. For
// kernel_cpu.cpp files.
#pragma once

#include <type_traits>

#include "common/vec.h"
#include "common/weights.h"

namespace arcore {
inline namespace ARCORE_ISA {

template <typename T>
constexpr bool kIsBlock =
    std::is_same_v<T, BlockQ8_0> || std::is_same_v<T, BlockQ4_0> || std::is_same_v<T, BlockQ4_1>;

// Elements of T that hold `cols` numbers.
template <typename T>
constexpr int64_t elements(int64_t cols) {
  return kIsBlock<T> ? cols / kBlockValues : cols;
}

// Calls f with a value of the type in which a weight is stored.
template <typename F>
static inline void with_weight(WeightType type, const F& f) {
  switch (type) {
    case WeightType::kFloat32:
      return f(float{});
    case WeightType::kBFloat16:
      return f(BFloat16{});
    case WeightType::kQ8_0:
      return f(BlockQ8_0{});
    case WeightType::kQ4_0:
      return f(BlockQ4_0{});
    case WeightType::kQ4_1:
      return f(BlockQ4_1{});
  }
}

// Scale and lowest number of a block as floats. Eight bytes from `p` on may be read.
struct Halves {
#if defined(CPU_CAPABILITY_AVX512)
  __m128 values;
  explicit Halves(const uint8_t* p) {
    struct __attribute__((packed, may_alias)) Eight {
      uint64_t bits;
    };
    // Compilers load the eight bytes first, which costs the conversion a shuffle.
    asm("vcvtph2ps %1, %0" : "=v"(values) : "m"(*reinterpret_cast<const Eight*>(p)));
  }
  template <int kAt>
  Vec spread() const {
    const __m512 all = _mm512_castps128_ps512(values);
    return kAt == 0 ? _mm512_broadcastss_ps(values) : _mm512_permutexvar_ps(_mm512_set1_epi32(kAt), all);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  __m128 values;
  explicit Halves(const uint8_t* p)
      : values(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))) {}
  template <int kAt>
  Vec spread() const {
    return _mm256_broadcastss_ps(kAt == 0 ? values : _mm_movehdup_ps(values));
  }
#else
  Half values[2];
  explicit Halves(const uint8_t* p) { std::memcpy(values, p, sizeof(values)); }
  template <int kAt>
  Vec spread() const {
    return Vec(static_cast<float>(values[kAt]));
  }
#endif
};

// kLanes whole numbers as floats.
static inline Vec widen_bytes(const int8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return load_lanes(p);
#endif
}

// What all numbers of a block have in common, in registers; `at<i>` gives numbers [i, i + kLanes). Products
// of a scale and a whole number are exact; a lowest number added to them is rounded once.
template <typename T>
struct Opened;

template <>
struct Opened<BlockQ8_0> {
  const int8_t* values;
  Vec scale;
  explicit Opened(const BlockQ8_0& block) : values(block.values), scale(Halves(block.scale).spread<0>()) {}
  template <int64_t kFrom>
  Vec at() const {
    return widen_bytes(values + kFrom) * scale;
  }
};

// Two numbers of four bits to a byte: the low halves are the first 16 numbers.
constexpr int64_t kPairs4 = kBlockValues / 2;

#if defined(CPU_CAPABILITY_AVX512)
// A lane picks one of 16 levels by the low four bits of its index.
struct Levels {
  __m512i pairs;
  __m512 levels;
  Levels(const uint8_t* of, Vec all)
      : pairs(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of)))), levels(all) {}
  template <int64_t kFrom>
  Vec at() const {
    return _mm512_permutexvar_ps(kFrom == 0 ? pairs : _mm512_srli_epi32(pairs, 4), levels);
  }
};
static inline Vec count_from(float first) {
  const __m512 lane = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_ps(lane, _mm512_set1_ps(first));
}
template <>
struct Opened<BlockQ4_0> : Levels {
  explicit Opened(const BlockQ4_0& block)
      : Levels(block.pairs, count_from(-8.0f) * Halves(block.scale).spread<0>()) {}
};
template <>
struct Opened<BlockQ4_1> : Levels {
  // Scale and lowest number lie side by side.
  explicit Opened(const BlockQ4_1& block) : Opened(block.pairs, Halves(block.scale)) {}
  Opened(const uint8_t* of, const Halves& halves)
      : Levels(of, fma(count_from(0.0f), halves.spread<0>(), halves.spread<1>())) {}
};
#else
// Numbers [kFrom, kFrom + kLanes) of 4 bits, less `shift`, as floats.
template <int64_t kFrom>
static inline Vec unpack_pairs(const uint8_t* pairs, int shift) {
  constexpr bool kHigh = kFrom >= kPairs4;
  const uint8_t* from = pairs + (kHigh ? kFrom - kPairs4 : kFrom);
#if defined(CPU_CAPABILITY_AVX2)
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m256i four = kHigh ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(four, _mm256_set1_epi32(shift)));
#else
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i)
    x[i] = static_cast<float>((kHigh ? from[i] >> 4 : from[i] & 15) - shift);
  return Vec::loadu(x);
#endif
}
template <>
struct Opened<BlockQ4_0> {
  const uint8_t* pairs;
  Vec scale;
  explicit Opened(const BlockQ4_0& block) : pairs(block.pairs), scale(Halves(block.scale).spread<0>()) {}
  template <int64_t kFrom>
  Vec at() const {
    return unpack_pairs<kFrom>(pairs, 8) * scale;
  }
};
template <>
struct Opened<BlockQ4_1> {
  const uint8_t* pairs;
  Vec scale, lowest;
  explicit Opened(const BlockQ4_1& block) : Opened(block.pairs, Halves(block.scale)) {}
  Opened(const uint8_t* of, const Halves& halves)
      : pairs(of), scale(halves.spread<0>()), lowest(halves.spread<1>()) {}
  template <int64_t kFrom>
  Vec at() const {
    return fma(unpack_pairs<kFrom>(pairs, 0), scale, lowest);
  }
};
#endif

// Calls f with each first number of the vectors of a block, as a type.
template <int64_t kFrom = 0, typename F>
static inline void each_vector(const F& f) {
  if constexpr (kFrom < kBlockValues) {
    f(std::integral_constant<int64_t, kFrom>{});
    each_vector<kFrom + kLanes>(f);
  }
}

}  // namespace ARCORE_ISA
}  // namespace arcore
