// A parallel loop over XLA's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace jax_na {

// Runs fn(i) for every i in [0, n). The caller takes part and waits only for blocks that
// some thread has claimed: a handler may itself run on the pool, where waiting for tasks
// that are still queued could wait forever. The first exception of any block is thrown
// again here; blocks that start after it are skipped.
inline void parallel_for(xla::ffi::ThreadPool& pool, int64_t n,
                         const std::function<void(int64_t)>& fn) {
  // Blocks are small enough to balance the load and large enough that claiming one costs
  // nothing beside the work.
  constexpr int64_t kBlocksPerThread = 16;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t block = std::max<int64_t>(1, n / (kBlocksPerThread * threads));
  const int64_t blocks = (n + block - 1) / block;

  // Tasks that start after the loop has ended find no block left, and touch only this.
  struct State {
    std::atomic<int64_t> claimed{0}, finished{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::condition_variable all_finished;
    std::exception_ptr error;
  };
  const auto state = std::make_shared<State>();
  const auto work = [state, &fn, n, block, blocks] {
    for (;;) {
      const int64_t begin = state->claimed.fetch_add(1) * block;
      if (begin >= n) return;
      try {
        const int64_t end = state->failed ? begin : std::min(begin + block, n);
        for (int64_t i = begin; i < end; ++i) fn(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(state->mutex);
        if (!state->failed.exchange(true)) state->error = std::current_exception();
      }
      if (state->finished.fetch_add(1) + 1 == blocks) {
        const std::lock_guard<std::mutex> lock(state->mutex);
        state->all_finished.notify_one();
      }
    }
  };

  const int64_t helpers = std::min(threads, blocks) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  } catch (const std::bad_alloc&) {
    // Fewer helpers do the same work. Leaving now would pull it from under those that run.
  }
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_finished.wait(lock, [&] { return state->finished == blocks; });
  if (state->error) std::rethrow_exception(state->error);
}

}  // namespace jax_na
