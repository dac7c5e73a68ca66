// Runs CUDA kernels on the CPU, for tests on machines without a GPU: one block after the other, the
// threads of a block as coroutines. Which thread goes on is drawn whenever one has to wait, so that
// a result that depends on the order, for want of a barrier, shows. What a GPU would not forgive is
// an error: reads by __ldg that are not aligned, barriers that not all of the threads reach.
//
// What does not show: other vectors that are not aligned, how threads meet between barriers, the
// order in which their writes are seen, and everything about time and the size of memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) double2 {
  double x, y;
};

namespace emulated {

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = size_t{1} << 16;

// Threads that wait for each other: those of a warp or of a block.
struct Group {
  unsigned size = 0;
  const char* barrier = nullptr;  // at which they wait
  std::vector<unsigned> waiting;
};

// The threads of the block that runs. Each has a stack of its own and keeps it for the next block.
class Block {
 public:
  void run(unsigned threads, const std::function<void()>& kernel) {
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    kernel_ = &kernel;
    blockDim.x = threads;
    all_ = Group{threads, nullptr, {}};
    warps_.assign((threads + warp_size - 1) / warp_size, Group{});
    values_.assign(2 * threads, 0);
    turns_.assign(threads, 0);
    ready_.assign(warps_.size(), {});
    for (unsigned t = 0; t < threads; ++t) {
      ++warps_[t / warp_size].size;
      make_ready(t);
    }
    order_ = shuffled(static_cast<unsigned>(warps_.size()));
    has_favourites_ = random_() % 2 == 0;
    left_ = threads;
    if (_setjmp(main_) == 0) go_on();
    if (error_.empty() && left_ > 0) {
      error_ = "threads wait for some that have left, or that wait elsewhere";
    }
    if (error_.empty()) return;
    fibers_.clear();  // wherever they are
    const std::string error = std::move(error_);
    error_.clear();
    throw std::runtime_error("emulated kernel: " + error);
  }

  [[noreturn]] void fail(const std::string& error) {
    error_ = error;
    _longjmp(main_, 1);
  }

  void wait_for_block() { wait(all_, "__syncthreads"); }
  void wait_for_warp(const char* barrier) { wait(warps_[threadIdx.x / warp_size], barrier); }

  // What the lane's value was when all lanes of the warp were here. The value after the next goes
  // where this one is, and no lane is there before all have read.
  template <class Value>
  Value exchange(const char* barrier, unsigned mask, Value value, unsigned lane) {
    const unsigned own = threadIdx.x;
    const unsigned first = own / warp_size * warp_size;
    if (mask != 0xFFFFFFFFu) fail(std::string(barrier) + " of some lanes only");
    const unsigned turn = turns_[own]++ % 2 * blockDim.x;
    static_assert(sizeof(Value) <= sizeof(uint64_t), "lanes exchange up to 8 bytes");
    memcpy(&values_[turn + own], &value, sizeof(Value));
    wait_for_warp(barrier);
    if (first + lane >= blockDim.x) fail(std::string(barrier) + " with a lane that is not there");
    memcpy(&value, &values_[turn + first + lane], sizeof(Value));
    return value;
  }

  // 0 to n - 1 in an order that is drawn.
  std::vector<unsigned> shuffled(unsigned n) {
    std::vector<unsigned> order(n);
    for (unsigned i = 0; i < n; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

 private:
  // Only a fiber's first steps are those of a context: to change it takes calls of the system.
  struct Fiber {
    std::vector<char> stack = std::vector<char>(stack_bytes);
    jmp_buf place;
    bool started = false;
  };

  static void start();

  void make_ready(unsigned thread) { ready_[thread / warp_size].push_back(thread); }

  // Draws who goes on; nobody can, if all have left or wait. In every other block some warps go
  // before others whenever they can, so that they get as far ahead as barriers let them.
  [[noreturn]] void go_on() {
    const size_t first = has_favourites_ ? 0 : random_() % order_.size();
    size_t i = 0;
    while (i < order_.size() && ready_[order_[(first + i) % order_.size()]].empty()) ++i;
    if (i == order_.size()) _longjmp(main_, 1);
    auto& ready = ready_[order_[(first + i) % order_.size()]];
    std::swap(ready[random_() % ready.size()], ready.back());
    threadIdx.x = ready.back();
    ready.pop_back();
    Fiber& fiber = *fibers_[threadIdx.x];
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    context.uc_link = nullptr;
    makecontext(&context, &Block::start, 0);
    setcontext(&context);
    abort();
  }

  void let_others() {
    if (_setjmp(fibers_[threadIdx.x]->place) == 0) go_on();
  }

  void wait(Group& group, const char* barrier) {
    if (group.waiting.empty()) group.barrier = barrier;
    if (strcmp(group.barrier, barrier) != 0) {
      fail(std::string("threads meet at ") + barrier + " and " + group.barrier);
    }
    if (group.waiting.size() + 1 == group.size) {
      for (const unsigned thread : group.waiting) make_ready(thread);
      group.waiting.clear();
      return;
    }
    group.waiting.push_back(threadIdx.x);
    let_others();
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf main_;
  std::vector<std::vector<unsigned>> ready_;  // of each warp
  std::vector<unsigned> order_;               // of the warps
  bool has_favourites_ = false;
  unsigned left_ = 0;
  Group all_;
  std::vector<Group> warps_;
  std::vector<uint64_t> values_;
  std::vector<unsigned> turns_;
  std::string error_;
  std::minstd_rand random_;
};

inline Block block;

inline void Block::start() {
  while (true) {
    (*block.kernel_)();
    --block.left_;
    block.let_others();
  }
}

template <class... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  unsigned blocks, threads;

  void operator()(Parameters... arguments) const {
    static_assert((sizeof(Parameters) + ... + 0) <= 4096, "the arguments of a kernel have 4 KiB");
    if (blocks == 0 || threads == 0 || threads > 1024) {
      throw std::runtime_error("emulated kernel: no such grid");
    }
    gridDim.x = blocks;
    for (const unsigned b : block.shuffled(blocks)) {
      blockIdx.x = b;
      block.run(threads, [&] { kernel(arguments...); });
    }
  }
};

// kernel<<<blocks, threads, shared, stream>>>(...)
template <class... Parameters>
Launch<Parameters...> launch(
    void (*kernel)(Parameters...), int64_t blocks, int64_t threads, size_t, cudaStream_t) {
  return {kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads)};
}

inline unsigned lane() { return threadIdx.x % warp_size; }

}  // namespace emulated

inline void __syncthreads() { emulated::block.wait_for_block(); }
inline void __syncwarp() { emulated::block.wait_for_warp("__syncwarp"); }

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int lane, int width = 32) {
  const unsigned first = emulated::lane() / width * width;
  return emulated::block.exchange("__shfl_sync", mask, value, first + lane % width);
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned step, int width = 32) {
  const unsigned own = emulated::lane();
  const unsigned from = own % width >= step ? own - step : own;
  return emulated::block.exchange("__shfl_up_sync", mask, value, from);
}
template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned step, int width = 32) {
  const unsigned own = emulated::lane();
  const unsigned from = own % width + step < static_cast<unsigned>(width) ? own + step : own;
  return emulated::block.exchange("__shfl_down_sync", mask, value, from);
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int bits) {
  return emulated::block.exchange("__shfl_xor_sync", mask, value, emulated::lane() ^ bits);
}

inline unsigned __ballot_sync(unsigned mask, bool yes) {
  unsigned all = yes ? 1u << emulated::lane() : 0;
  for (int step = 1; step < 32; step *= 2) all |= __shfl_xor_sync(mask, all, step);
  return all;
}
inline bool __any_sync(unsigned mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
inline bool __all_sync(unsigned mask, bool yes) { return __ballot_sync(mask, yes) == mask; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class Value>
Value __ldg(const Value* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(Value) != 0) {
    emulated::block.fail("a read of " + std::to_string(sizeof(Value)) + " bytes is not aligned");
  }
  return *at;
}

template <class Value>
Value atomicAdd(Value* at, Value value) {
  const Value before = *at;
  *at = before + value;
  return before;
}
template <class Value>
Value atomicMin(Value* at, Value value) {
  const Value before = *at;
  *at = min(before, value);
  return before;
}
template <class Value>
Value atomicMax(Value* at, Value value) {
  const Value before = *at;
  *at = max(before, value);
  return before;
}
template <class Value>
Value atomicCAS(Value* at, Value expected, Value value) {
  const Value before = *at;
  if (before == expected) *at = value;
  return before;
}
