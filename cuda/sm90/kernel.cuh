// The kernel of every pass, and its launch. A pass says in a class of its own
//
//   Plan, Variants<kDim>        its parameters, and what is compiled
//   kRowsAre, kRowArrays        the side of its rows, and how many arrays of them there are:
//                               queries alone, queries and output gradients, or keys and values
//   kRowTiles<kDim>             tiles whose rows are there at once, 1 or as many as tables
//   kLeastSlots                 of the ring, so that the walk does not stall
//   Statistics<S>, reader<S>()  what comes with a box beside its blocks, and who brings it;
//   kStatistics<kColumns>       its bytes per slot
//   kReadsRows<kDim>            whether read_rows<S>() of warps beside the producers brings
//                               RowNumbers
//   kExchange<kDim, kColumns, kGroups>    bytes of a pipeline through which its consumers exchange
//   kConstants<kDim, kColumns>  bytes of Constants<S>, what consumers multiply with beside what
//                               comes; fill() of all threads makes them
//   kMaskProduct<kDim>          whether there are kernels that mask by a product
//   consume<S>()                the part of a consumer warpgroup
#pragma once

#include <iterator>
#include <utility>

#include "launch.cuh"
#include "mask_product.cuh"
#include "pipeline.cuh"
#include "streams.h"

namespace jax_na::cuda::sm90 {

struct NoConstants {
  __device__ __forceinline__ void fill(const Cut&, int) {}
};

// The columns' side of masks by products.
template <class S>
using MaskConstants = std::conditional_t<S::kMaskProduct, MaskColumns<S::kColumns>, NoConstants>;
template <int kColumns>
constexpr int kMaskConstants = sizeof(MaskColumns<kColumns>) + 1024;

template <class Pass, class S>
struct Shared {
  typename S::Pipeline pipeline[S::kPipelines];
  alignas(16) ColumnSets<S::kColumns> sets;
  alignas(8) BiasColumns<Sides<Pass::kRowsAre>::kSign, S::kColumns> bias;
  typename Pass::template Statistics<S> statistics[S::kPipelines];
  typename Pass::template Constants<S> constants;
};

// d = rows(a) rows(b)^T over the channels, masked if the kernel masks by products; d begins with
// the bias then, where there is one.
template <class S>
__device__ __forceinline__ void multiply_and_mask(float (&d)[S::kColumns / 2], uint32_t a,
                                                  uint32_t b, MaskRows& masks,
                                                  const MaskConstants<S>& constants) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Columns = typename S::Columns;
  if constexpr (S::kMaskProduct) {
    pin(masks.operand);
    products_begin();
    masks.template mask_scores<S::kHasBias, S::kColumns>(d, constants);
  } else {
    products_begin();
  }
  multiply_channels<T, Rows, Columns>(d, a, b, S::kMaskProduct);
}

// Gives every warpgroup its part and its registers.
template <class S, class Produce, class ReadRows, class Consume>
__device__ __forceinline__ void divide_labour(const Produce& produce, const ReadRows& read_rows,
                                              const Consume& consume) {
  const int consumer = uniform(threadIdx.x / kGroupThreads);
  if (consumer == S::kConsumers) {
    ptx::fewer_registers<S::kProducerRegisters>();
    const int producer = uniform(threadIdx.x % kGroupThreads / kWarpLanes);
    if (producer < S::kProducers) {
      produce(producer);
    } else if (producer < S::kProducers + S::kPipelines * S::kRowReaders) {
      read_rows(producer - S::kProducers);
    }
  } else {
    ptx::more_registers<S::kConsumerRegisters>();
    consume(consumer);
  }
}

template <class Pass, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    pass_kernel(const __grid_constant__ typename Pass::Plan plan) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<Pass, S>*>(memory);
  const Streams& streams = plan.streams;
  const Problem& p = plan.call.problem;
  if (threadIdx.x == S::kThreads - 1) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (k < S::kRowArrays) ptx::prefetch_map(&streams.row[k]);
      ptx::prefetch_map(&streams.column[k]);
    }
  }
  if (streams.next_taken != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    *streams.next_taken = 0;
  }
  shared.constants.fill(streams.cut, S::kThreads);
  init<S>(shared.pipeline, streams.cut);
  if constexpr (!S::kMaskProduct) {
    shared.sets.fill(streams.cut.columns, S::kThreads / kWarpLanes);
  }
  if constexpr (S::kHasBias) shared.bias.fill(streams.bias, streams.cut.columns, S::kThreads);
  __syncthreads();
  divide_labour<S>(
      [&](int warp) {
        const int pipeline = warp % S::kPipelines;
        produce<S, Pass::kRowsAre>(streams, p, plan.call.in.bias, shared.pipeline[pipeline],
                                   warp,
                                   Pass::template reader<S>(plan, shared.statistics[pipeline]));
      },
      [&](int reader) {
        if constexpr (S::kRowReaders > 0) Pass::template read_rows<S>(plan, shared, reader);
      },
      [&](int consumer) { Pass::template consume<S>(plan, shared, consumer); });
}

// A variant as a type.
template <class Variants, size_t kIndex>
struct VariantOf {
  static constexpr int kColumns = Variants::kList[kIndex].columns;
  static constexpr int kGroups = Variants::kList[kIndex].groups;
  static constexpr int kPipelines = Variants::kList[kIndex].pipelines;
};

// Calls launch(VariantOf) with the one of these columns and groups; cudaErrorInvalidValue where
// there is none.
template <class Variants, size_t... kIndex, class Launch>
cudaError_t with_variant(const HopperTiling& tiling, const Launch& launch,
                         std::index_sequence<kIndex...>) {
  cudaError_t status = cudaErrorInvalidValue;
  const auto attempt = [&](auto variant) {
    using V = decltype(variant);
    if (V::kColumns == tiling.columns && V::kGroups == tiling.groups) status = launch(variant);
  };
  (attempt(VariantOf<Variants, kIndex>{}), ...);
  return status;
}
template <class Variants, class Launch>
cudaError_t with_variant(const HopperTiling& tiling, const Launch& launch) {
  return with_variant<Variants>(tiling, launch,
                                std::make_index_sequence<std::size(Variants::kList)>{});
}

template <class Pass, typename T, int kDim>
cudaError_t launch_pass(const typename Pass::Plan& plan, const HopperTiling& tiling,
                        cudaStream_t stream) {
  constexpr bool kRowsAreKeys = Pass::kRowsAre == Side::kKeys;
  const Problem& problem = plan.call.problem;
  const Cut& cut = plan.streams.cut;
  return with_variant<typename Pass::template Variants<kDim>>(tiling, [&](auto variant) {
    const auto launch = [&](auto has_bias, auto mask_product) {
      using S = Shape<T, kDim, Pass, decltype(variant), decltype(has_bias)::value,
                      decltype(mask_product)::value>;
      static_assert(sizeof(Shared<Pass, S>) <= kSharedMemory);
      static_assert(S::kSlots >= Pass::kLeastSlots);
      auto own = plan;
      if constexpr (S::kHasBias) {
        own.streams.bias = BiasLayout(problem, cut, kRowsAreKeys, S::kBeginsWithBias);
      }
      int32_t ctas = 0;
      const cudaError_t status = count_persistent(
          (plan.streams.tiles + S::kPipelines - 1) / S::kPipelines, &ctas);
      if (status != cudaSuccess || ctas == 0) return status;
      if constexpr (S::kCanStay) {
        deal_tiles_in_place(problem, ctas * S::kPipelines, S::kHasBias, &own.streams);
      } else {
        deal_tiles(ctas * S::kPipelines, &own.streams);
      }
      return launch_persistent(&pass_kernel<Pass, S>, ctas, S::kThreads,
                               sizeof(Shared<Pass, S>), own, stream);
    };
    const bool has_bias = plan.call.in.bias != nullptr;
    if constexpr (Pass::template kMaskProduct<kDim>) {
      if (tiling.masks_by_product &&
          can_mask_by_product(problem, cut, decltype(variant)::kColumns, kMostSeen<kDim>)) {
        if (!has_bias) return launch(std::false_type{}, std::true_type{});
        const int32_t tables = kRowsAreKeys ? plan.streams.members : 1;
        if (can_begin_with_bias(problem, cut, kRowsAreKeys, tables, kBiasEntries<kDim>)) {
          return launch(std::true_type{}, std::true_type{});
        }
      }
    }
    return has_bias ? launch(std::true_type{}, std::false_type{})
                    : launch(std::false_type{}, std::false_type{});
  });
}

}  // namespace jax_na::cuda::sm90
