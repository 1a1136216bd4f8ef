// Asks CuTe, on the CPU, whether what tile_loop_sm90.h and the tensor maps of launch_sm90.cu assume is what
// CuTe's layouts say: which element a register of an accumulator or left operand holds, which byte of shared
// memory, and what the matrix unit makes of the descriptors. Prints what differs; exits with 1 if anything
// does.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "block_sparse_attention/layouts_sm90.h"

namespace {

using namespace arcore::block_sparse_attention::sm90;
using cute::_;

int errors = 0;

void expect(bool good, const char* what, int dim, int a, int b) {
  if (good) return;
  if (++errors <= 20) std::printf("%s: head dim %d, at %d, %d\n", what, dim, a, b);
}

// Byte of element (row, column) of a tile of `rows` rows after one copy per block of columns: PTX's 128-byte
// (64-byte) swizzle xors address bits 4-6 (4-5) with bits 7-9 (7-8).
int copied_to(int rows, int block, int row, int column) {
  const int address = (column / block * rows + row) * block * 2 + column % block * 2;
  return block == 64 ? address ^ (address >> 7 & 7) << 4 : address ^ (address >> 7 & 3) << 4;
}

// Byte that the matrix unit reads for element (row, column) of an operand, relative to the matrix's swizzle
// period, by the canonical layouts of the PTX manual. `along` is the dimension that is contiguous in memory.
int descriptor_reads(const cute::GmmaDescriptor& d, int block, int along, int across, bool k_major) {
  const int start = static_cast<int>(d.bitfield.start_address_) * 16;
  const int stride = static_cast<int>(d.bitfield.stride_byte_offset_) * 16;
  const int leading = static_cast<int>(d.bitfield.leading_byte_offset_) * 16;
  // A row of the swizzle is `block` elements; 8 rows are `stride` apart. In MN-major order blocks are
  // `leading` apart; in K-major order one instruction stays within a block.
  int address = start + across % 8 * block * 2 + across / 8 * stride + along % block * 2;
  if (!k_major) address += along / block * leading;
  return block == 64 ? address ^ (address >> 7 & 7) << 4 : address ^ (address >> 7 & 3) << 4;
}

template <typename Element, int kDim>
void check() {
  using S = Shapes<Element, kDim>;
  constexpr int kBlock = S::kBlock, kStages = S::kStages;

  // Registers.
  auto score_places = cute::make_identity_tensor(cute::Shape<cute::Int<kConsumerRows>, cute::Int<kTileK>>{});
  auto output_places = cute::make_identity_tensor(cute::Shape<cute::Int<kConsumerRows>, cute::Int<kDim>>{});
  typename S::ScoreProduct score_product;
  typename S::OutputProduct output_product;
  static_assert(decltype(cute::size(score_product))::value == 128 &&
                decltype(cute::size(output_product))::value == 128);
  static_assert(decltype(cute::size(typename S::Scores{}))::value == kTileK / 2);
  static_assert(decltype(cute::size(typename S::Output{}))::value == kDim / 2);
  for (int thread = 0; thread < 128; ++thread) {
    auto scores = score_product.get_slice(thread).partition_C(score_places);
    auto weights = output_product.get_slice(thread).partition_A(score_places);
    auto output = output_product.get_slice(thread).partition_C(output_places);
    for (int i = 0; i < kTileK / 2; ++i) {
      const int row = fragment_row(thread) + 8 * fragment_half(i), key = fragment_column(thread, i);
      expect(cute::get<0>(scores(i)) == row && cute::get<1>(scores(i)) == key, "scores", kDim, thread, i);
      expect(cute::get<0>(weights(i)) == row && cute::get<1>(weights(i)) == key, "weights", kDim, thread, i);
    }
    for (int i = 0; i < kDim / 2; ++i) {
      const int row = fragment_row(thread) + 8 * fragment_half(i), column = fragment_column(thread, i);
      expect(cute::get<0>(output(i)) == row && cute::get<1>(output(i)) == column, "output", kDim, thread, i);
    }
  }

  // Shared memory: every element where the copy puts it, tiles one after the other.
  std::vector<Element> memory(static_cast<size_t>(kTileK) * kDim * kStages + 1024);
  const auto aligned = (reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024;
  auto* base = reinterpret_cast<Element*>(aligned);
  const auto byte_of = [&](Element& element) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(&element) - aligned);
  };
  auto queries = cute::make_tensor(cute::make_smem_ptr(base), typename S::Queries{});
  auto keys = cute::make_tensor(cute::make_smem_ptr(base), typename S::Keys{});
  auto values = cute::make_tensor(cute::make_smem_ptr(base), typename S::ValuesTransposed{});
  for (int column = 0; column < kDim; ++column) {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      for (int row = 0; row < kConsumerRows; ++row) {
        const int at = consumer * kConsumerRows * kDim * 2 + copied_to(kConsumerRows, kBlock, row, column);
        expect(byte_of(queries(row, column, consumer)) == at, "queries", kDim, row, column);
      }
    }
    for (int stage = 0; stage < kStages; ++stage) {
      for (int row = 0; row < kTileK; ++row) {
        const int at = stage * kTileK * kDim * 2 + copied_to(kTileK, kBlock, row, column);
        expect(byte_of(keys(row, column, stage)) == at, "keys", kDim, row, column);
        expect(byte_of(values(column, row, stage)) == at, "values", kDim, row, column);
      }
    }
  }

  // Descriptors. CuTe cannot know shared addresses on the CPU and starts them at 0; a step of 16 along the
  // product's inner dimension moves the start.
  const auto check_steps = [&](auto fragment, const char* what, int columns, auto along_of, auto across_of,
                               bool k_major, auto where) {
    for (int step = 0; step < static_cast<int>(cute::size<2>(fragment)); ++step) {
      const cute::GmmaDescriptor d = *fragment(_, _, step).data();
      expect(d.bitfield.layout_type_ == (kBlock == 64 ? 1 : 2), "swizzle of a descriptor", kDim, step, 0);
      for (int n = 0; n < columns; ++n) {
        for (int k = 0; k < 16; ++k) {
          const int reads = descriptor_reads(d, kBlock, along_of(n, k), across_of(n, k), k_major);
          expect(reads == where(n, 16 * step + k), what, kDim, n, 16 * step + k);
        }
      }
    }
  };
  const auto first = [](int n, int) { return n; };
  const auto second = [](int, int k) { return k; };
  auto score_slice = score_product.get_slice(0);
  check_steps(score_slice.partition_fragment_A(queries(_, _, 0)), "query descriptors", kConsumerRows, second,
              first, true, [&](int n, int k) { return byte_of(queries(n, k, 0)); });
  check_steps(score_slice.partition_fragment_B(keys(_, _, 0)), "key descriptors", kTileK, second, first, true,
              [&](int n, int k) { return byte_of(keys(n, k, 0)); });
  check_steps(output_product.get_slice(0).partition_fragment_B(values(_, _, 0)), "value descriptors", kDim,
              first, second, false, [&](int n, int k) { return byte_of(values(n, k, 0)); });
}

template <typename Element>
void check_all() {
  check<Element, 64>();
  check<Element, 96>();
  check<Element, 128>();
}

}  // namespace

int main() {
  check_all<cutlass::bfloat16_t>();
  check_all<cutlass::half_t>();
  std::printf("%d errors\n", errors);
  return errors == 0 ? 0 : 1;
}
