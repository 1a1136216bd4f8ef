// Layouts in shared memory and matrix products of the sm_90a kernel. Compiles for the CPU too, where the
// tests ask CuTe which register and which byte hold what.
#pragma once

#include <cute/tensor.hpp>
#include <type_traits>

#include "block_sparse_attention/fused_loop_sm90.h"
#include "block_sparse_attention/gradient_loop_sm90.h"
#include "block_sparse_attention/tile_loop_sm90.h"

namespace arcore::block_sparse_attention::sm90 {

template <typename Element, int kDim>
struct Atoms {
  static constexpr int kBlock = block_columns(kDim);
  // Blocks of [rows][kBlock], one per copy, swizzled within 8 rows.
  using RowAtom = std::conditional_t<kBlock == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                     cute::GMMA::Layout_K_SW64_Atom<Element>>;
  // The same bytes read as [columns][rows].
  using ColumnAtom = std::conditional_t<kBlock == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                        cute::GMMA::Layout_MN_SW64_Atom<Element>>;
};

// Layouts in shared memory, matrix products and the accumulators of one thread: forward.
template <typename Element, int kDim>
struct Shapes : Atoms<Element, kDim> {
  static constexpr int kStages = stages(kDim);
  using RowAtom = typename Atoms<Element, kDim>::RowAtom;
  using ColumnAtom = typename Atoms<Element, kDim>::ColumnAtom;

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

  using Scores = decltype(cute::partition_fragment_C(
      ScoreProduct{}, cute::Shape<cute::Int<kConsumerRows>, cute::Int<kTileK>>{}));
  using Output = decltype(cute::partition_fragment_C(
      OutputProduct{}, cute::Shape<cute::Int<kConsumerRows>, cute::Int<kDim>>{}));
};

// Backward, for either side: tiles of 64 x D that are read by rows and by columns.
template <typename Element, int kDim>
struct GradientShapes : Atoms<Element, kDim> {
  static constexpr int kStages = gradient_stages(kDim);
  using RowAtom = typename Atoms<Element, kDim>::RowAtom;
  using ColumnAtom = typename Atoms<Element, kDim>::ColumnAtom;
  using Own = decltype(cute::tile_to_shape(
      RowAtom{}, cute::Shape<cute::Int<kConsumerRows>, cute::Int<kDim>, cute::Int<kConsumers>>{}));
  using Other = decltype(cute::tile_to_shape(
      RowAtom{}, cute::Shape<cute::Int<kOtherRows>, cute::Int<kDim>, cute::Int<kStages>>{}));
  using OtherTransposed = decltype(cute::tile_to_shape(
      ColumnAtom{}, cute::Shape<cute::Int<kDim>, cute::Int<kOtherRows>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  using PairProduct = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kConsumerRows>, cute::Int<kOtherRows>, cute::Int<kDim>>>()));
  using GradientProduct = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kConsumerRows>, cute::Int<kDim>, cute::Int<kOtherRows>>, cute::GMMA::Major::K,
          cute::GMMA::Major::MN>()));
  using Pairs = decltype(cute::partition_fragment_C(
      PairProduct{}, cute::Shape<cute::Int<kConsumerRows>, cute::Int<kOtherRows>>{}));
  using Gradient = decltype(cute::partition_fragment_C(
      GradientProduct{}, cute::Shape<cute::Int<kConsumerRows>, cute::Int<kDim>>{}));
};

// The fifth product of the fused backward: dQ = dS K, both from shared memory by columns. dS of both
// consumers' keys, [keys][queries]; of the own keys as many columns as one product takes.
template <typename Element, int kDim>
struct FusedShapes : GradientShapes<Element, kDim> {
  static constexpr int kQueryColumns = query_columns(kDim);
  using ColumnAtom = typename Atoms<Element, kDim>::ColumnAtom;
  using Changes = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_MN_SW128_Atom<Element>{},
      cute::Shape<cute::Int<kOtherRows>, cute::Int<kConsumerRows>, cute::Int<kConsumers>>{}));
  using OwnColumns = decltype(cute::tile_to_shape(
      ColumnAtom{}, cute::Shape<cute::Int<kQueryColumns>, cute::Int<kConsumerRows>>{},
      cute::Step<cute::_2, cute::_1>{}));
  using QueryProduct = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kOtherRows>, cute::Int<kQueryColumns>, cute::Int<kConsumerRows>>,
          cute::GMMA::Major::MN, cute::GMMA::Major::MN>()));
  // Where there are registers for them, the own sides of the first two products stay in registers: shared
  // memory then gives the matrix unit half as much.
  static constexpr bool kOwnInRegisters = kDim <= 64;
  using OwnProduct = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kConsumerRows>, cute::Int<kOtherRows>, cute::Int<kDim>>, cute::GMMA::Major::K,
          cute::GMMA::Major::K>()));
  using OwnFactors = decltype(cute::make_tensor<Element>(
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<kDim / 16>>{}));
  using QuerySums = decltype(cute::partition_fragment_C(
      QueryProduct{}, cute::Shape<cute::Int<kOtherRows>, cute::Int<kQueryColumns>>{}));
};

}  // namespace arcore::block_sparse_attention::sm90
