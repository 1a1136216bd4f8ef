// Asking for memory before it is read.
#pragma once

#include <cstdint>

namespace arcore {
inline namespace ARCORE_ISA {

// Brings the cache lines of [data, data + bytes) to the second-level cache. Hardware does so by itself within
// a page of 4 KiB; at the next page a processor waits for memory, up to half a microsecond in a virtual
// machine. A few dozen lines at a time: more than it keeps on the way make it wait as well. Inlined, since a
// function that does nothing else is left out by compilers.
__attribute__((always_inline)) static inline void ask_for(const void* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(data) + at, 0, 2);
}

// One line to the first-level cache, to be read or to be written. Any address may be asked for.
__attribute__((always_inline)) static inline void ask_for_reading(const void* data) {
  __builtin_prefetch(data, 0, 3);
}
__attribute__((always_inline)) static inline void ask_for_writing(const void* data) {
  __builtin_prefetch(data, 1, 3);
}

}  // namespace ARCORE_ISA
}  // namespace arcore
