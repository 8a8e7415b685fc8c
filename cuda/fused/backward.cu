// Which backward kernels run a call, and the sums of what several CTAs have found.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "fused.h"
#include "launch.cuh"
#include "plans.cuh"
#include "variants.h"

namespace jax_na::cuda {
namespace {

using namespace fused;

struct SumPlan {
  const float* parts;  // [count, size]
  int32_t count;
  int64_t size;
  void* result;
};

constexpr int kSumWarps = 8;

// result[i] = sum over parts: a lane per element, and the warps share the parts.
template <typename T>
__global__ void __launch_bounds__(kSumWarps * kWarpLanes)
    sum_kernel(const __grid_constant__ SumPlan plan) {
  __shared__ float sums[kSumWarps][kWarpLanes];
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int64_t i = int64_t{blockIdx.x} * kWarpLanes + lane;
  float sum = 0;
  if (i < plan.size) {
#pragma unroll 4
    for (int32_t part = warp; part < plan.count; part += kSumWarps) {
      sum += plan.parts[part * plan.size + i];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= plan.size) return;
  for (int other = 1; other < kSumWarps; ++other) sum += sums[other][lane];
  static_cast<T*>(plan.result)[i] = static_cast<T>(sum);
}

template <typename T>
cudaError_t sum_parts(const SumPlan& plan, cudaStream_t stream) {
  return launch(&sum_kernel<T>, (plan.size + kWarpLanes - 1) / kWarpLanes,
                kSumWarps * kWarpLanes, 0, plan, stream);
}

int64_t bias_tables(const Problem& p) {
  return (p.bias_batch_stride == 0 ? 1 : p.batch) * p.heads;
}
// Filled up to 16 bytes, since what follows them is written in vectors.
int64_t bias_partials(const BackwardCall& call, int32_t splits) {
  if (call.dbias == nullptr || splits <= 1) return 0;
  return (splits * bias_tables(call.problem) * call.problem.bias_size() + 3) / 4 * 4;
}
int64_t additional_rows(const Problem& p) { return p.batch * p.additional * p.key_heads; }
int64_t dkey_partials(const BackwardCall& call, int32_t splits) {
  if (call.dadditional_key == nullptr || splits <= 1) return 0;
  return splits * additional_rows(call.problem) * call.problem.head_dim;
}
int64_t dvalue_partials(const BackwardCall& call, int32_t splits) {
  if (call.dadditional_value == nullptr || splits <= 1) return 0;
  return splits * additional_rows(call.problem) * call.problem.value_dim;
}

template <typename T, Precision kPrecision>
cudaError_t dquery(const BackwardPlan& plan, cudaStream_t stream) {
  return with_padded_dim(plan.call.problem, [&](auto dim) {
    return launch_dquery<T, dim.value, kPrecision>(plan, stream);
  });
}

template <typename T, Precision kPrecision>
cudaError_t dbias(const BackwardPlan& plan, cudaStream_t stream) {
  return with_padded_dim(plan.call.problem, [&](auto dim) {
    return launch_dbias<T, dim.value, kPrecision>(plan, stream);
  });
}

template <typename T, Precision kPrecision>
cudaError_t dkey_dvalue(const BackwardPlan& plan, Side rows, cudaStream_t stream) {
  return with_padded_dim(plan.call.problem, [&](auto dim) {
    return launch_dkey_dvalue<T, dim.value, kPrecision>(plan, rows, stream);
  });
}

BackwardPlan plan_of(const BackwardCall& call, const int32_t (&row_grid)[kMaxRank],
                     const int32_t (&rows)[kMaxRank], const int32_t (&columns)[kMaxRank]) {
  const Problem& p = call.problem;
  BackwardPlan plan{};
  plan.call = call;
  plan.rows = TileGrid(row_grid, p.window, rows);
  plan.columns = ColumnBox(columns);
  plan.group = Divisor(p.heads / p.key_heads);
  plan.key_heads = Divisor(p.key_heads);
  plan.one = Divisor(1);
  plan.bias_splits = plan.column_splits = 1;
  return plan;
}

// What the kernel of dbias wants to know beside.
void add_bias_shares(BackwardPlan* plan, int32_t splits, float* workspace) {
  const Problem& p = plan->call.problem;
  const int32_t(&tile)[kMaxRank] = plan->rows.tile.extent;
  const int32_t(&box)[kMaxRank] = plan->columns.order.extent;
  plan->bias_splits = splits;
  plan->tables = bias_tables(p);
  plan->bias_partials = splits > 1 ? workspace : static_cast<float*>(plan->call.dbias);
  int32_t boxes[kMaxRank], distances[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    const AxisWindow& w = p.window[a];
    int64_t most = most_columns(w, tile[a]);
    if (p.frame == nullptr) {
      most = std::min<int64_t>(most, (p.key_grid[a] + w.dilation - 1) / w.dilation);
    }
    boxes[a] = static_cast<int32_t>((most + box[a] - 1) / box[a]);
    distances[a] = tile[a] + box[a] - 1;
  }
  plan->boxes = BoxOrder(boxes);
  plan->distances = BoxOrder(distances);
}

// The call in which the additional keys are all keys, with everything in sight.
BackwardCall additional_call(const BackwardCall& call) {
  BackwardCall additional = call;
  Problem& p = additional.problem;
  for (int a = 0; a < kMaxRank; ++a) {
    p.window[a] = AxisWindow{1, 1, 1, false};
    p.key_grid[a] = 1;
  }
  p.key_grid[kMaxRank - 1] = p.additional;
  p.additional = 0;
  additional.in.key = call.in.additional_key;
  additional.in.value = call.in.additional_value;
  additional.in.bias = nullptr;
  additional.dkey = call.dadditional_key;
  additional.dvalue = call.dadditional_value;
  return additional;
}

template <typename T, Precision kPrecision>
cudaError_t run(const BackwardCall& call, const BackwardTiling& tiling, float* workspace,
                cudaStream_t stream) {
  const Problem& p = call.problem;
  cudaError_t status = cudaSuccess;
  if (call.dquery != nullptr) {
    const BackwardPlan plan =
        plan_of(call, p.query_grid, tiling.dquery.query_tile, tiling.dquery.key_tile);
    status = dquery<T, kPrecision>(plan, stream);
    if (status != cudaSuccess) return status;
  }
  if (call.dbias != nullptr) {
    BackwardPlan plan =
        plan_of(call, p.query_grid, tiling.dbias.query_tile, tiling.dbias.key_tile);
    add_bias_shares(&plan, tiling.bias_splits, workspace);
    status = dbias<T, kPrecision>(plan, stream);
    if (status != cudaSuccess) return status;
    if (tiling.bias_splits > 1) {
      status = sum_parts<float>(
          {workspace, tiling.bias_splits, plan.tables * p.bias_size(), call.dbias}, stream);
      if (status != cudaSuccess) return status;
    }
  }
  if ((call.dkey != nullptr || call.dvalue != nullptr) && p.key_tokens() > 0) {
    const BackwardPlan plan =
        plan_of(call, p.key_grid, tiling.dkey_dvalue.key_tile, tiling.dkey_dvalue.query_tile);
    status = dkey_dvalue<T, kPrecision>(plan, Side::kKeys, stream);
    if (status != cudaSuccess) return status;
  }
  if (p.additional > 0 &&
      (call.dadditional_key != nullptr || call.dadditional_value != nullptr)) {
    const BackwardCall additional = additional_call(call);
    const int32_t splits = tiling.additional_splits, list[kMaxRank] = {
        1, 1, backward_rows(padded_dim(p), element_bytes(p))};
    BackwardPlan plan = plan_of(additional, additional.problem.key_grid, list,
                                tiling.dkey_dvalue.query_tile);
    plan.column_splits = splits;
    plan.dkey_partials = workspace + bias_partials(call, tiling.bias_splits);
    plan.dvalue_partials = plan.dkey_partials + dkey_partials(call, splits);
    status = dkey_dvalue<T, kPrecision>(plan, Side::kAdditional, stream);
    if (status == cudaSuccess && dkey_partials(call, splits) > 0) {
      status = sum_parts<T>({plan.dkey_partials, splits, additional_rows(p) * p.head_dim,
                             call.dadditional_key},
                            stream);
    }
    if (status == cudaSuccess && dvalue_partials(call, splits) > 0) {
      status = sum_parts<T>({plan.dvalue_partials, splits, additional_rows(p) * p.value_dim,
                             call.dadditional_value},
                            stream);
    }
  }
  return status;
}

bool dquery_fits(const Problem& p, const Tiling& tiling) {
  const int dim = padded_dim(p), bytes = element_bytes(p), few = backward_rows(dim, bytes);
  const int rows = box_size(tiling.query_tile) > few ? dquery_rows(dim, bytes) : few;
  return fits(tiling.query_tile, rows, tiling.key_tile, dquery_columns(dim, bytes, rows));
}
bool dbias_fits(const Problem& p, const Tiling& tiling) {
  const int dim = padded_dim(p), bytes = element_bytes(p);
  return fits(tiling.query_tile, dbias_rows(dim, bytes), tiling.key_tile,
              dbias_columns(dim, bytes));
}
bool dkey_fits(const Problem& p, const Tiling& tiling) {
  const int dim = padded_dim(p), bytes = element_bytes(p);
  return fits(tiling.key_tile, backward_rows(dim, bytes), tiling.query_tile,
              dkey_columns(dim, bytes));
}

}  // namespace

int64_t backward_fused_workspace(const BackwardCall& call, const BackwardTiling& tiling) {
  return bias_partials(call, tiling.bias_splits) +
         dkey_partials(call, tiling.additional_splits) +
         dvalue_partials(call, tiling.additional_splits);
}

cudaError_t backward_fused(const BackwardCall& call, const BackwardTiling& tiling,
                           bool highest_precision, float* workspace, cudaStream_t stream) {
  const Problem& p = call.problem;
  if (!supported(p) || !dquery_fits(p, tiling.dquery) || !dkey_fits(p, tiling.dkey_dvalue) ||
      (call.dbias != nullptr && !dbias_fits(p, tiling.dbias)) || tiling.bias_splits < 1 ||
      tiling.additional_splits < 1) {
    return cudaErrorInvalidValue;
  }
  switch (p.element_type) {
    case ElementType::kF16:
      return run<__half, Precision::kDefault>(call, tiling, workspace, stream);
    case ElementType::kBF16:
      return run<__nv_bfloat16, Precision::kDefault>(call, tiling, workspace, stream);
    case ElementType::kF32:
      return highest_precision
                 ? run<float, Precision::kHighest>(call, tiling, workspace, stream)
                 : run<float, Precision::kDefault>(call, tiling, workspace, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_na::cuda
