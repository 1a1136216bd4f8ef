// Lets a test read how the sampling kernels divide rows between blocks.
#include "sample/params.h"

extern "C" __attribute__((visibility("default"))) int blocks_of_row(int64_t rows, int64_t vocab, int limit,
                                                                    int64_t multiprocessors) {
  return arcore::sample::blocks_of_row(rows, vocab, limit, multiprocessors);
}
