// The fused kernels' planner: chooses the instruction set and the tiles, turns the windows
// into tables that the inner loops (fused_tile.h) read, and splits the work into tasks.
//
// Nothing here depends on the number of threads, and sums over tasks are taken in a fixed
// order, so results are bitwise reproducible.
#include "fused.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "elements.h"
#include "kernels.h"

namespace jax_na::cpu {
namespace {

const FusedKernels& select_kernels() {
  std::vector<const FusedKernels*> candidates;  // widest first
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    candidates.push_back(&kFusedAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    candidates.push_back(&kFusedAvx2);
  }
#endif
  candidates.push_back(&kFusedBaseline);
  if (const char* name = std::getenv("JAX_NA_CPU_ISA")) {
    for (const FusedKernels* kernels : candidates) {
      if (std::strcmp(kernels->name, name) == 0) return *kernels;
    }
  }
  return *candidates.front();
}

const FusedKernels& kernels() {
  static const FusedKernels& selected = select_kernels();
  return selected;
}

int64_t accum_bytes(const Problem& p) { return p.element_type == ElementType::kF64 ? 8 : 4; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class LaneToken { kQuery, kKey };

// The tiles of one kind of token, with the tables that TilePlan points to.
class Plan {
 public:
  Plan(const Problem& problem, LaneToken lane_token, const ParallelFor& parallel_for)
      : p_(problem),
        lane_token_(lane_token),
        grid_(lane_token == LaneToken::kQuery ? problem.query_grid : problem.key_grid) {
    plan_ = {};
    plan_.bias_size = p_.bias_size();
    if (p_.batch == 0 || grid_[0] == 0 || grid_[1] == 0 || grid_[2] == 0) return;
    choose_extents();
    for (int a = 0; a < kMaxRank; ++a) {
      plan_.tiles[a] = static_cast<int32_t>(count_tiles(a, plan_.extent[a]));
    }
    choose_regions();
    number_lanes();
    const bool own_frames = p_.frame != nullptr && p_.frame_batch_stride != 0;
    plan_.frame_stride = own_frames ? kMaxRank : 0;
    axes_.resize((own_frames ? p_.batch : 1) * kMaxRank);
    axis_tiles_.resize(axes_.size());
    parallel_for(axes_.size(), [&](int64_t i) { fill_axis(i); });
    plan_.frames = axis_tiles_.data();
  }

  const TilePlan& operator*() const { return plan_; }
  const TilePlan* operator->() const { return &plan_; }

 private:
  struct Axis {
    std::vector<LaneSlot> slots;
    std::vector<RowSpan> rows;
  };

  AxisRange visible(const AxisFrame& frame, int axis, int32_t position) const {
    return lane_token_ == LaneToken::kQuery ? keys_of_query(p_.window[axis], frame, position)
                                            : queries_of_key(p_.window[axis], frame, position);
  }
  bool in_grid(const AxisFrame& frame, int32_t position) const {
    const int32_t i =
        position + (lane_token_ == LaneToken::kQuery ? frame.query_origin : frame.key_origin);
    return i >= 0 && i < frame.length;
  }

  // Tiles hold up to `extent` neighbours of one residue class.
  int64_t count_tiles(int axis, int32_t extent) const {
    const int32_t length = grid_[axis], dilation = p_.window[axis].dilation;
    int64_t tiles = 0;
    for (int32_t residue = 0; residue < std::min(dilation, length); ++residue) {
      tiles += ceil_div(ceil_div(length - residue, dilation), extent);
    }
    return tiles;
  }

  // Calls fn(positions of one tile: first, count) for the tiles of an axis in order.
  template <typename Fn>
  void for_each_axis_tile(int axis, int32_t extent, int32_t length, const Fn& fn) const {
    const int32_t dilation = p_.window[axis].dilation;
    for (int32_t residue = 0; residue < std::min(dilation, length); ++residue) {
      const int32_t tokens = static_cast<int32_t>(ceil_div(length - residue, dilation));
      for (int32_t first = 0; first < tokens; first += extent) {
        fn(residue + first * dilation, std::min(extent, tokens - first));
      }
    }
  }

  // The union of what a tile's tokens see.
  RowSpan union_of(const AxisRange* ranges, int32_t count, int32_t dilation) const {
    int32_t first = INT32_MAX, last = -1;
    for (int32_t i = 0; i < count; ++i) {
      if (ranges[i].count == 0) continue;
      first = std::min(first, ranges[i].first);
      last = std::max(last, ranges[i].first + (ranges[i].count - 1) * dilation);
    }
    if (last < 0) return {0, 0};
    return {first, (last - first) / dilation + 1};
  }

  // The extents and number of vectors that visit least. Long axes are judged by their
  // beginning, all samples by the first one's frame.
  void choose_extents() {
    constexpr int32_t kSample = 4096;
    constexpr int32_t kExtents[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32};
    const int32_t width =
        static_cast<int32_t>(kernels().vector_bytes / accum_bytes(p_));
    double visited[kMaxRank][std::size(kExtents)], tiles[kMaxRank][std::size(kExtents)];
    std::vector<AxisRange> ranges, tile;
    for (int a = 0; a < kMaxRank; ++a) {
      const int32_t length = std::min(grid_[a], kSample), dilation = p_.window[a].dilation;
      const AxisFrame frame = p_.axis_frame(0, a);
      ranges.clear();
      for (int32_t i = 0; i < length; ++i) ranges.push_back(visible(frame, a, i));
      for (size_t e = 0; e < std::size(kExtents); ++e) {
        visited[a][e] = tiles[a][e] = 0;
        for_each_axis_tile(a, kExtents[e], length, [&](int32_t first, int32_t count) {
          tile.clear();
          for (int32_t i = 0; i < count; ++i) tile.push_back(ranges[first + i * dilation]);
          visited[a][e] += union_of(tile.data(), count, dilation).count;
          tiles[a][e] += 1;
        });
      }
    }
    double least = -1;
    for (int32_t vectors : {kernels().small_vectors, kernels().large_vectors}) {
      // A visited row costs one vector operation per element and vector, somewhat less in
      // larger register blocks; a tile costs about as much as some rows.
      const double row_cost = vectors * (vectors == kernels().large_vectors ? 0.9 : 1.0);
      const double tile_cost = 24.0 * vectors;
      const int32_t lanes = std::min(vectors * width, kMaxLanes);
      for (size_t z = 0; z < std::size(kExtents); ++z) {
        for (size_t y = 0; y < std::size(kExtents); ++y) {
          for (size_t x = 0; x < std::size(kExtents); ++x) {
            if (kExtents[z] * kExtents[y] * kExtents[x] > lanes) break;
            const double cost = row_cost * visited[0][z] * visited[1][y] * visited[2][x] +
                                tile_cost * tiles[0][z] * tiles[1][y] * tiles[2][x];
            if (least >= 0 && cost >= least) continue;
            least = cost;
            plan_.vectors = vectors;
            plan_.extent[0] = kExtents[z];
            plan_.extent[1] = kExtents[y];
            plan_.extent[2] = kExtents[x];
            rows_per_tile_ = visited[0][z] / tiles[0][z] * (visited[1][y] / tiles[1][y]) *
                             (visited[2][x] / tiles[2][x]);
          }
        }
      }
    }
    plan_.lanes = plan_.extent[0] * plan_.extent[1] * plan_.extent[2];
  }

  // Tasks of some ten microseconds whose tiles are neighbours, so that the rows they share
  // stay in the cache.
  void choose_regions() {
    constexpr double kOperationsPerTask = 1 << 17;
    const double per_tile =
        (rows_per_tile_ + 24) * plan_.vectors * (p_.head_dim + p_.value_dim);
    const double tiles = std::clamp(kOperationsPerTask / per_tile, 1.0, 64.0);
    for (int a = 0; a < kMaxRank; ++a) plan_.region[a] = 1;
    for (;;) {
      int shortest = -1;
      for (int a = 0; a < kMaxRank; ++a) {
        if (plan_.region[a] >= plan_.tiles[a]) continue;
        if (shortest < 0 || plan_.region[a] * plan_.extent[a] <=
                                plan_.region[shortest] * plan_.extent[shortest]) {
          shortest = a;
        }
      }
      if (shortest < 0) break;
      if (2.0 * plan_.region[0] * plan_.region[1] * plan_.region[2] > tiles) break;
      plan_.region[shortest] *= 2;
    }
    for (int a = 0; a < kMaxRank; ++a) {
      plan_.regions[a] = static_cast<int32_t>(ceil_div(plan_.tiles[a], plan_.region[a]));
    }
  }

  void number_lanes() {
    for (int lane = 0; lane < plan_.lanes; ++lane) {
      int rest = lane;
      for (int a = kMaxRank - 1; a >= 0; --a) {
        plan_.lane[a][lane] = static_cast<int8_t>(rest % plan_.extent[a]);
        rest /= plan_.extent[a];
      }
    }
  }

  void fill_axis(int64_t index) {
    const int a = static_cast<int>(index % kMaxRank);
    const int32_t extent = plan_.extent[a], dilation = p_.window[a].dilation;
    const AxisFrame frame = p_.axis_frame(index / kMaxRank, a);
    Axis& axis = axes_[index];
    axis.slots.assign(int64_t(plan_.tiles[a]) * extent, LaneSlot{-1, 0, 0, 0, 0});
    axis.rows.reserve(plan_.tiles[a]);
    AxisRange ranges[kMaxLanes];
    for_each_axis_tile(a, extent, grid_[a], [&](int32_t first, int32_t count) {
      for (int32_t i = 0; i < count; ++i) ranges[i] = visible(frame, a, first + i * dilation);
      const RowSpan rows = union_of(ranges, count, dilation);
      LaneSlot* slots = axis.slots.data() + axis.rows.size() * extent;
      for (int32_t i = 0; i < count; ++i) {
        const AxisRange& range = ranges[i];
        const int32_t begin = range.count > 0 ? (range.first - rows.first) / dilation : 0;
        slots[i].position = first + i * dilation;
        slots[i].in_grid = in_grid(frame, slots[i].position);
        slots[i].begin = begin;
        slots[i].count = range.count;
        slots[i].bias =
            range.bias_row + (lane_token_ == LaneToken::kQuery ? -begin : begin);
      }
      axis.rows.push_back(rows);
    });
    axis_tiles_[index] = {axis.slots.data(), axis.rows.data()};
  }

  const Problem& p_;
  const LaneToken lane_token_;
  const int32_t* const grid_;
  TilePlan plan_;
  double rows_per_tile_ = 0;
  std::vector<Axis> axes_;  // kMaxRank per frame
  std::vector<AxisTiles> axis_tiles_;
};

// Calls fn(batch, head, task) for all; tasks of the same region follow each other, because
// the heads of a token are neighbours in memory.
template <typename Fn>
void for_each_task(const Problem& p, const TilePlan& plan, int32_t heads,
                   const ParallelFor& parallel_for, const Fn& fn) {
  const int64_t tasks = plan.tasks();
  parallel_for(p.batch * tasks * heads, [&](int64_t i) {
    fn(i / heads / tasks, static_cast<int32_t>(i % heads), i / heads % tasks);
  });
}

// Room for partial sums, and how finely sums over tokens are split: finely enough for many
// cores, and that no float is a sum of very many.
constexpr int64_t kPartialBytes = 16 << 20;
constexpr int64_t kWantedTasks = 64;
constexpr int64_t kTokensPerSum = 1 << 14;

int64_t choose_splits(int64_t sums, int64_t bytes_of_sum, int64_t tokens, int64_t most) {
  const int64_t wanted =
      std::max(ceil_div(kWantedTasks, sums), ceil_div(tokens, kTokensPerSum));
  const int64_t fitting = kPartialBytes / std::max<int64_t>(1, sums * bytes_of_sum);
  return std::max<int64_t>(1, std::min({wanted, fitting, most}));
}

// dquery and dbias. One dbias table for each of several runs of tasks, then their sum.
template <typename T>
void query_gradients_with_bias(const BackwardCall& call, const TilePlan& plan,
                               const ParallelFor& parallel_for) {
  const Problem& p = call.problem;
  const bool shared = p.bias_batch_stride == 0;
  const int64_t tables = (shared ? 1 : p.batch) * p.heads;
  if (tables == 0) return;
  const int64_t samples = shared ? p.batch : 1;  // that share a table
  const int64_t tasks = samples * plan.tasks(), size = plan.bias_size;
  const int64_t splits =
      choose_splits(tables, size * sizeof(T), samples * p.query_tokens(), tasks);
  std::vector<T> partials(tables * splits * size);
  parallel_for(tables * splits, [&](int64_t i) {
    const int64_t table = i / splits, split = i % splits;
    const int32_t head = static_cast<int32_t>(table % p.heads);
    for (int64_t t = tasks * split / splits; t < tasks * (split + 1) / splits; ++t) {
      const int64_t batch = shared ? t / plan.tasks() : table / p.heads;
      kernels().backward_queries(call, plan, batch, head, t % plan.tasks(),
                                 partials.data() + i * size);
    }
  });
  parallel_for(tables, [&](int64_t table) {
    T* dbias = static_cast<T*>(call.dbias) + table * size;
    for (int64_t j = 0; j < size; ++j) {
      T sum = 0;
      for (int64_t split = 0; split < splits; ++split) {
        sum += partials[(table * splits + split) * size + j];
      }
      dbias[j] = sum;
    }
  });
}

// Splits the queries of every sample; one partial sum for each additional key and split.
template <typename E>
void additional_gradients(const BackwardCall& call, const ParallelFor& parallel_for) {
  using T = typename E::Accum;
  const Problem& p = call.problem;
  const int64_t sums = p.batch * p.key_heads;
  if (sums == 0 || p.additional == 0) return;
  const int64_t width = int64_t(p.head_dim) + p.value_dim, size = p.additional * width;
  const int64_t tokens = p.query_tokens() * (p.heads / p.key_heads);
  const int64_t splits = choose_splits(sums, size * sizeof(T), tokens,
                                       std::max<int64_t>(1, p.query_tokens() / 64));
  std::vector<T> partials(sums * splits * size);
  parallel_for(sums * splits, [&](int64_t i) {
    const int64_t sum = i / splits, split = i % splits, batch = sum / p.key_heads;
    QuerySlab slab;
    int64_t queries = 1;
    for (int a = 0; a < kMaxRank; ++a) {
      const AxisFrame frame = p.axis_frame(batch, a);
      slab.first[a] = std::max(0, -frame.query_origin);
      const int64_t last = std::min<int64_t>(frame.query_length,
                                             int64_t(frame.length) - frame.query_origin);
      slab.count[a] = static_cast<int32_t>(std::max<int64_t>(0, last - slab.first[a]));
      queries *= slab.count[a];
    }
    slab.begin = queries * split / splits;
    slab.end = queries * (split + 1) / splits;
    kernels().backward_additional(call, batch, static_cast<int32_t>(sum % p.key_heads), slab,
                                  partials.data() + i * size);
  });
  parallel_for(sums * p.additional, [&](int64_t i) {
    const int64_t sum = i / p.additional, m = i % p.additional;
    const int64_t row = (sum / p.key_heads * p.additional + m) * p.key_heads +
                        sum % p.key_heads;
    for (int64_t d = 0; d < width; ++d) {
      T total = 0;
      for (int64_t split = 0; split < splits; ++split) {
        total += partials[(sum * splits + split) * size + m * width + d];
      }
      if (d >= p.head_dim) {
        if (call.dadditional_value == nullptr) continue;
        store_element<E>(call.dadditional_value, row * p.value_dim + d - p.head_dim, total);
      } else if (call.dadditional_key != nullptr) {
        store_element<E>(call.dadditional_key, row * p.head_dim + d, total);
      }
    }
  });
}

// The inner loops index one head's bias table with 32 bits, with room to spare.
bool bias_too_large(const Problem& p, const Inputs& in) {
  return in.bias != nullptr && p.bias_size() > (int64_t(1) << 28);
}

}  // namespace

const char* fused_instruction_set() { return kernels().name; }

void forward_fused(const ForwardCall& call, const ParallelFor& parallel_for) {
  const Problem& p = call.problem;
  if (bias_too_large(p, call.in)) return forward_naive(call, parallel_for);
  const Plan plan(p, LaneToken::kQuery, parallel_for);
  for_each_task(p, *plan, p.heads, parallel_for, [&](int64_t b, int32_t h, int64_t task) {
    kernels().forward(call, *plan, b, h, task);
  });
}

void backward_fused(const BackwardCall& call, const ParallelFor& parallel_for) {
  const Problem& p = call.problem;
  if (bias_too_large(p, call.in)) return backward_naive(call, parallel_for);
  if (call.dquery != nullptr || call.dbias != nullptr) {
    const Plan plan(p, LaneToken::kQuery, parallel_for);
    if (call.dbias != nullptr) {
      if (p.element_type == ElementType::kF64) {
        query_gradients_with_bias<double>(call, *plan, parallel_for);
      } else {
        query_gradients_with_bias<float>(call, *plan, parallel_for);
      }
    } else {
      for_each_task(p, *plan, p.heads, parallel_for, [&](int64_t b, int32_t h, int64_t task) {
        kernels().backward_queries(call, *plan, b, h, task, nullptr);
      });
    }
  }
  if (call.dkey != nullptr || call.dvalue != nullptr) {
    const Plan plan(p, LaneToken::kKey, parallel_for);
    for_each_task(p, *plan, p.key_heads, parallel_for,
                  [&](int64_t b, int32_t kh, int64_t task) {
                    kernels().backward_keys(call, *plan, b, kh, task);
                  });
  }
  if (call.dadditional_key != nullptr || call.dadditional_value != nullptr) {
    with_element(p.element_type,
                 [&](auto e) { additional_gradients<decltype(e)>(call, parallel_for); });
  }
}

}  // namespace jax_na::cpu
