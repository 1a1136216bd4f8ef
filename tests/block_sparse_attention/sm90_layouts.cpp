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

// What the matrix unit reads through the descriptors of an operand, step by step of 16 along the inner
// dimension of the product, against where(n, k). CuTe cannot know shared addresses on the CPU and starts them
// at 0.
template <int kBlock, typename Fragment, typename Along, typename Across, typename Where>
void check_steps(const Fragment& fragment, const char* what, int dim, int columns, Along along_of,
                 Across across_of, bool k_major, Where where) {
  for (int step = 0; step < static_cast<int>(cute::size<2>(fragment)); ++step) {
    const cute::GmmaDescriptor d = *fragment(_, _, step).data();
    expect(d.bitfield.layout_type_ == (kBlock == 64 ? 1 : 2), "swizzle of a descriptor", dim, step, 0);
    for (int n = 0; n < columns; ++n) {
      for (int k = 0; k < 16; ++k) {
        const int reads = descriptor_reads(d, kBlock, along_of(n, k), across_of(n, k), k_major);
        expect(reads == where(n, 16 * step + k), what, dim, n, 16 * step + k);
      }
    }
  }
}

// Registers of an accumulator, and of a left operand, of kColumns columns.
template <int kColumns, typename Product>
void check_accumulator(Product product, const char* what, int dim) {
  auto places = cute::make_identity_tensor(cute::Shape<cute::Int<kConsumerRows>, cute::Int<kColumns>>{});
  static_assert(decltype(cute::size(product))::value == 128);
  for (int thread = 0; thread < 128; ++thread) {
    auto mine = product.get_slice(thread).partition_C(places);
    static_assert(decltype(cute::size(mine))::value == kColumns / 2);
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = fragment_row(thread) + 8 * fragment_half(i), column = fragment_column(thread, i);
      expect(cute::get<0>(mine(i)) == row && cute::get<1>(mine(i)) == column, what, dim, thread, i);
    }
  }
}
template <int kColumns, typename Product>
void check_left_operand(Product product, const char* what, int dim) {
  auto places = cute::make_identity_tensor(cute::Shape<cute::Int<kConsumerRows>, cute::Int<kColumns>>{});
  for (int thread = 0; thread < 128; ++thread) {
    auto mine = product.get_slice(thread).partition_A(places);
    static_assert(decltype(cute::size(mine))::value == kColumns / 2);
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = fragment_row(thread) + 8 * fragment_half(i), column = fragment_column(thread, i);
      expect(cute::get<0>(mine(i)) == row && cute::get<1>(mine(i)) == column, what, dim, thread, i);
    }
  }
}

// Tiles of kRows x kDim in shared memory: by rows where the copy puts every element, by columns the same
// bytes.
template <int kRows, int kDim, int kTiles, typename Element, typename Layout>
void check_tiles(Element* base, Layout layout, bool transposed, const char* what) {
  constexpr int kBlock = block_columns(kDim);
  auto tiles = cute::make_tensor(cute::make_smem_ptr(base), layout);
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kDim; ++column) {
        Element& element = transposed ? tiles(column, row, tile) : tiles(row, column, tile);
        const auto at =
            static_cast<int>(reinterpret_cast<uintptr_t>(&element) - reinterpret_cast<uintptr_t>(base));
        expect(at == tile * kRows * kDim * 2 + copied_to(kRows, kBlock, row, column), what, kDim, row,
               column);
      }
    }
  }
}

template <typename Element, int kDim>
void check() {
  using S = Shapes<Element, kDim>;
  using G = GradientShapes<Element, kDim>;
  constexpr int kBlock = S::kBlock;

  check_accumulator<kTileK>(typename S::ScoreProduct{}, "scores", kDim);
  check_left_operand<kTileK>(typename S::OutputProduct{}, "weights", kDim);
  check_accumulator<kDim>(typename S::OutputProduct{}, "output", kDim);
  check_accumulator<kOtherRows>(typename G::PairProduct{}, "pairs", kDim);
  check_left_operand<kOtherRows>(typename G::GradientProduct{}, "factors", kDim);
  check_accumulator<kDim>(typename G::GradientProduct{}, "gradient", kDim);
  static_assert(decltype(cute::size(typename S::Scores{}))::value == kTileK / 2);
  static_assert(decltype(cute::size(typename G::Pairs{}))::value == kGradientRegisters);

  constexpr int kMost = S::kStages > G::kStages ? S::kStages : G::kStages;
  std::vector<Element> memory(static_cast<size_t>(kTileK) * kDim * kMost + 1024);
  auto* base = reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  check_tiles<kConsumerRows, kDim, kConsumers>(base, typename S::Queries{}, false, "queries");
  check_tiles<kTileK, kDim, S::kStages>(base, typename S::Keys{}, false, "keys");
  check_tiles<kTileK, kDim, S::kStages>(base, typename S::ValuesTransposed{}, true, "values");
  check_tiles<kConsumerRows, kDim, kConsumers>(base, typename G::Own{}, false, "own");
  check_tiles<kOtherRows, kDim, G::kStages>(base, typename G::Other{}, false, "other");
  check_tiles<kOtherRows, kDim, G::kStages>(base, typename G::OtherTransposed{}, true, "other transposed");

  const auto n_of = [](int n, int) { return n; };
  const auto k_of = [](int, int k) { return k; };
  const auto by_rows = [](int rows) {
    return [rows](int n, int k) { return copied_to(rows, kBlock, n, k); };
  };
  const auto by_columns = [](int rows) {
    return [rows](int n, int k) { return copied_to(rows, kBlock, k, n); };
  };
  auto tensor = [&](auto layout) { return cute::make_tensor(cute::make_smem_ptr(base), layout)(_, _, 0); };
  auto scores = typename S::ScoreProduct{}.get_slice(0);
  auto output = typename S::OutputProduct{}.get_slice(0);
  auto pairs = typename G::PairProduct{}.get_slice(0);
  auto gradient = typename G::GradientProduct{}.get_slice(0);
  check_steps<kBlock>(scores.partition_fragment_A(tensor(typename S::Queries{})), "query descriptors", kDim,
                      kConsumerRows, k_of, n_of, true, by_rows(kConsumerRows));
  check_steps<kBlock>(scores.partition_fragment_B(tensor(typename S::Keys{})), "key descriptors", kDim,
                      kTileK, k_of, n_of, true, by_rows(kTileK));
  check_steps<kBlock>(output.partition_fragment_B(tensor(typename S::ValuesTransposed{})),
                      "value descriptors", kDim, kDim, n_of, k_of, false, by_columns(kTileK));
  check_steps<kBlock>(pairs.partition_fragment_A(tensor(typename G::Own{})), "own descriptors", kDim,
                      kConsumerRows, k_of, n_of, true, by_rows(kConsumerRows));
  check_steps<kBlock>(pairs.partition_fragment_B(tensor(typename G::Other{})), "other descriptors", kDim,
                      kOtherRows, k_of, n_of, true, by_rows(kOtherRows));
  check_steps<kBlock>(gradient.partition_fragment_B(tensor(typename G::OtherTransposed{})),
                      "column descriptors", kDim, kDim, n_of, k_of, false, by_columns(kOtherRows));
}

// The fifth product of the fused backward: dS by bytes of change_byte, the own keys by columns.
template <typename Element, int kDim>
void check_fused() {
  using F = FusedShapes<Element, kDim>;
  constexpr int kBlock = F::kBlock, kColumns = F::kQueryColumns;
  check_accumulator<kColumns>(typename F::QueryProduct{}, "sums of dQ", kDim);
  check_accumulator<kOtherRows>(typename F::OwnProduct{}, "pairs of own registers", kDim);
  check_left_operand<kDim>(typename F::OwnProduct{}, "own registers", kDim);
  std::vector<Element> memory(static_cast<size_t>(kOwnRows) * (kOtherRows + kDim) + 1024);
  auto* base = reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  const auto byte_of = [&](const Element& element) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(&element) - reinterpret_cast<uintptr_t>(base));
  };
  auto changes = cute::make_tensor(cute::make_smem_ptr(base), typename F::Changes{});
  for (int key = 0; key < kOwnRows; ++key)
    for (int query = 0; query < kOtherRows; ++query)
      expect(byte_of(changes(query, key % kConsumerRows, key / kConsumerRows)) == change_byte(key, query),
             "dS", kDim, key, query);
  for (int part = 0; part < kDim / kColumns; ++part) {
    auto columns = cute::make_tensor(cute::make_smem_ptr(base + part * kConsumerRows * kColumns),
                                     typename F::OwnColumns{});
    for (int key = 0; key < kConsumerRows; ++key)
      for (int column = 0; column < kColumns; ++column)
        expect(
            byte_of(columns(column, key)) == copied_to(kConsumerRows, kBlock, key, part * kColumns + column),
            "own keys by columns", kDim, key, column);
  }
  auto slice = typename F::QueryProduct{}.get_slice(0);
  const auto n_of = [](int n, int) { return n; };
  const auto k_of = [](int, int k) { return k; };
  check_steps<64>(slice.partition_fragment_A(changes(_, _, 0)), "dS descriptors", kDim, kOtherRows, n_of,
                  k_of, false, [](int n, int k) { return change_byte(k, n); });
  check_steps<kBlock>(
      slice.partition_fragment_B(cute::make_tensor(cute::make_smem_ptr(base), typename F::OwnColumns{})),
      "own column descriptors", kDim, kColumns, n_of, k_of, false,
      [](int n, int k) { return copied_to(kConsumerRows, kBlock, k, n); });
}

template <typename Element>
void check_all() {
  check_fused<Element, 64>();
  check_fused<Element, 96>();
  check_fused<Element, 128>();
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
