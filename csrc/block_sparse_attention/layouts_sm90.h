// Layouts in shared memory and matrix products of the sm_90a kernel. Compiles for the CPU too, where the
// tests ask CuTe which register and which byte hold what.
#pragma once

#include <cute/tensor.hpp>
#include <type_traits>

#include "block_sparse_attention/tile_loop_sm90.h"

namespace arcore::block_sparse_attention::sm90 {

template <typename Element, int kDim>
struct Shapes {
  static constexpr int kBlock = block_columns(kDim), kStages = stages(kDim);

  // Blocks of [rows][kBlock], one per copy, swizzled within 8 rows.
  using RowAtom = std::conditional_t<kBlock == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                     cute::GMMA::Layout_K_SW64_Atom<Element>>;
  // The same bytes read as [columns][rows].
  using ColumnAtom = std::conditional_t<kBlock == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                        cute::GMMA::Layout_MN_SW64_Atom<Element>>;
  using Queries = decltype(cute::tile_to_shape(
      RowAtom{}, cute::Shape<cute::Int<kConsumerRows>, cute::Int<kDim>, cute::Int<kConsumers>>{}));
  using Keys = decltype(cute::tile_to_shape(
      RowAtom{}, cute::Shape<cute::Int<kTileK>, cute::Int<kDim>, cute::Int<kStages>>{}));
  using ValuesTransposed = decltype(cute::tile_to_shape(
      ColumnAtom{}, cute::Shape<cute::Int<kDim>, cute::Int<kTileK>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  using ScoreProduct = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kConsumerRows>, cute::Int<kTileK>, cute::Int<kDim>>>()));
  using OutputProduct = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kConsumerRows>, cute::Int<kDim>, cute::Int<kTileK>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  // Accumulators of one thread.
  using Scores = decltype(cute::partition_fragment_C(
      ScoreProduct{}, cute::Shape<cute::Int<kConsumerRows>, cute::Int<kTileK>>{}));
  using Output = decltype(cute::partition_fragment_C(
      OutputProduct{}, cute::Shape<cute::Int<kConsumerRows>, cute::Int<kDim>>{}));
};

}  // namespace arcore::block_sparse_attention::sm90
