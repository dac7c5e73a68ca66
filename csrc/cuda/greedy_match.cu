// The greedy matching of rows and columns: the largest entry first, its row and its column struck.
//
// Rows propose and columns hold on to the best proposal (Gale and Shapley, 1962). As both sides
// rank by one order of the entries (by falling value, then row, then column), the stable matching
// is unique, and it is the greedy one: the largest entry is the first choice of its row and of its
// column, and without these two the same goes for the rest. So it does not matter in which order
// the rows have their turn, and no thread waits for those of other rows.
#include "device.cuh"
#include "launchers.h"

namespace torchalignprune {
namespace cuda {
namespace {

constexpr int least_threads = 128;  // of a block
constexpr uint32_t nobody = 0xFFFFFFFFu;

// The key of -infinity, which is never matched.
template <class Acc>
__device__ __forceinline__ KeyFor<Acc> lowest_key() {
  return sizeof(Acc) == 4 ? static_cast<KeyFor<Acc>>(0x007FFFFFu)
                          : static_cast<KeyFor<Acc>>(0x000FFFFFFFFFFFFFull);
}

// Matrices on the device, and what their columns hold.
template <class Acc>
struct Market {
  using Key = KeyFor<Acc>;

  const void* similarity;
  Element element;
  int64_t rows, columns;
  // For every column the key of a proposal that it has had, 0 for none, and the row that it holds.
  // Both only get better, so a refusal because of an old value is right.
  volatile Key* bars;
  volatile uint32_t* holders;
  uint32_t* nan;

  __device__ __forceinline__ Key
  key_of(int64_t matrix, int64_t row, int64_t column, bool& is_nan) const {
    const int64_t at = (matrix * rows + row) * columns + column;
    const Acc value = add(read<Acc>(similarity, element, at), Acc{0});  // -0 becomes +0
    is_nan |= value != value;
    return order(value);
  }

  __device__ __forceinline__ bool is_before(
      Key key, uint32_t row, int64_t matrix, uint32_t other, int64_t column) const {
    bool is_nan = false;
    const Key theirs = key_of(matrix, other, column, is_nan);
    return key != theirs ? key > theirs : row < other;
  }

  // Whether the column may still take the row.
  __device__ __forceinline__ bool is_open(
      Key key, uint32_t row, int64_t matrix, int64_t column) const {
    const Key bar = bars[matrix * columns + column];
    if (key != bar) return key > bar;
    const uint32_t holder = holders[matrix * columns + column];
    return holder == nobody || is_before(key, row, matrix, holder, column);
  }

  // Returns the row that has to look further: the one that the column held, this one, or nobody.
  __device__ __forceinline__ uint32_t
  propose(Key key, uint32_t row, int64_t matrix, int64_t column) const {
    const int64_t place = matrix * columns + column;
    uint32_t held = holders[place];
    while (true) {
      if (held != nobody && !is_before(key, row, matrix, held, column)) {
        // The holder may not have raised the bar yet.
        bool is_nan = false;
        raise(place, key_of(matrix, held, column, is_nan));
        return row;
      }
      const uint32_t now = atomicCAS(const_cast<uint32_t*>(holders + place), held, row);
      if (now == held) {
        raise(place, key);
        return held;
      }
      held = now;
    }
  }

 private:
  __device__ __forceinline__ void raise(int64_t place, Key key) const {
    if constexpr (sizeof(Key) == 4) {
      atomicMax(const_cast<Key*>(bars + place), key);
    } else {
      atomicMax(
          reinterpret_cast<unsigned long long*>(const_cast<Key*>(bars + place)),
          static_cast<unsigned long long>(key));
    }
  }
};

template <class Key, int threads>
struct ProposalScratch {
  Key keys[threads / warp_size];
  uint32_t columns[threads / warp_size];
  uint32_t next;
};

template <int threads>
__device__ __forceinline__ void wait_for_group() {
  if constexpr (threads == warp_size) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The best of the threads' choices: the largest key, and among equals the lowest column.
template <class Key, int threads>
__device__ __forceinline__ void best_of_group(
    Key& key, uint32_t& column, ProposalScratch<Key, threads>& scratch) {
  const auto take = [&](Key other_key, uint32_t other_column) {
    if (other_key > key || (other_key == key && other_column < column)) {
      key = other_key;
      column = other_column;
    }
  };
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) {
    const Key other_key = __shfl_xor_sync(all_lanes, key, step);
    const uint32_t other_column = __shfl_xor_sync(all_lanes, column, step);
    take(other_key, other_column);
  }
  if constexpr (threads > warp_size) {
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    if (threadIdx.x % warp_size == 0) {
      scratch.keys[warp] = key;
      scratch.columns[warp] = column;
    }
    __syncthreads();
    for (int w = 0; w < threads / warp_size; ++w) take(scratch.keys[w], scratch.columns[w]);
    __syncthreads();
  }
}

// `threads` work on a row: a warp, of which there are several in a block, or a block. The group
// continues with the row that its own has displaced, until none is left.
template <class Acc, int threads>
__global__ void __launch_bounds__(threads < least_threads ? least_threads : threads)
    propose_kernel(Market<Acc> market, int64_t all_rows) {
  using Key = KeyFor<Acc>;
  constexpr int groups = threads < least_threads ? least_threads / threads : 1;
  __shared__ ProposalScratch<Key, threads> scratches[groups];
  const int group = static_cast<int>(threadIdx.x) / threads;
  const int member = static_cast<int>(threadIdx.x) % threads;
  ProposalScratch<Key, threads>& scratch = scratches[group];
  bool is_nan = false;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * groups + group; i < all_rows;
       i += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t matrix = quotient(i, market.rows);
    auto row = static_cast<uint32_t>(i - matrix * market.rows);
    while (row != nobody) {
      Key best = lowest_key<Acc>();
      uint32_t choice = nobody;
      for (int64_t column = member; column < market.columns; column += threads) {
        const Key key = market.key_of(matrix, row, column, is_nan);
        if (key > best && market.is_open(key, row, matrix, column)) {
          best = key;
          choice = static_cast<uint32_t>(column);
        }
      }
      best_of_group<Key, threads>(best, choice, scratch);
      if (choice == nobody) break;  // The row stays unmatched.
      if (member == 0) scratch.next = market.propose(best, row, matrix, choice);
      wait_for_group<threads>();
      row = scratch.next;
      wait_for_group<threads>();
    }
  }
  if (is_nan) *market.nan = 1;
}

__global__ void __launch_bounds__(least_threads) write_kernel(
    const uint32_t* holders, int64_t rows, int64_t columns, int64_t all_columns, int64_t* index) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * least_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * least_threads + threadIdx.x; i < all_columns;
       i += threads) {
    const uint32_t row = holders[i];
    if (row == nobody) continue;
    const int64_t matrix = quotient(i, columns);
    index[matrix * rows + row] = i - matrix * columns;
  }
}

template <class Acc, int threads>
cudaError_t propose_all(const Market<Acc>& market, int64_t all_rows, cudaStream_t stream) {
  constexpr int block = threads < least_threads ? least_threads : threads;
  constexpr int64_t groups = block / threads;
  int blocks = 0;
  TAP_CHECK(resident_blocks(
      propose_kernel<Acc, threads>, block, (all_rows + groups - 1) / groups, &blocks));
  propose_kernel<Acc, threads><<<blocks, block, 0, stream>>>(market, all_rows);
  return cudaGetLastError();
}

// Bars of eight bytes come first, so that all are aligned.
template <class Acc>
cudaError_t greedy_match_as(
    const GreedyMatch& call, void* workspace, uint32_t* nan, cudaStream_t stream) {
  const int64_t all_rows = call.batch * call.rows;
  const int64_t all_columns = call.batch * call.columns;
  auto* bars = static_cast<KeyFor<Acc>*>(workspace);
  auto* holders = reinterpret_cast<uint32_t*>(bars + all_columns);
  uint32_t* own_nan = holders + all_columns;
  const auto bytes = static_cast<size_t>(all_columns);
  TAP_CHECK(cudaMemsetAsync(bars, 0, bytes * sizeof(KeyFor<Acc>), stream));
  TAP_CHECK(cudaMemsetAsync(holders, 0xFF, bytes * sizeof(uint32_t), stream));
  TAP_CHECK(cudaMemsetAsync(own_nan, 0, sizeof(uint32_t), stream));
  TAP_CHECK(cudaMemsetAsync(
      call.index, 0xFF, static_cast<size_t>(all_rows) * sizeof(int64_t), stream));  // -1
  const Market<Acc> market{call.similarity, call.element, call.rows, call.columns, bars,
                           holders,         own_nan};
  const bool is_long = call.columns > 1024;
  TAP_CHECK(
      (is_long ? propose_all<Acc, 256>(market, all_rows, stream)
               : propose_all<Acc, warp_size>(market, all_rows, stream)));
  int blocks = 0;
  TAP_CHECK(resident_blocks(
      write_kernel, least_threads, (all_columns + least_threads - 1) / least_threads, &blocks));
  write_kernel<<<blocks, least_threads, 0, stream>>>(
      holders, call.rows, call.columns, all_columns, call.index);
  TAP_CHECK(cudaGetLastError());
  return cudaMemcpyAsync(nan, own_nan, sizeof(uint32_t), cudaMemcpyDeviceToHost, stream);
}

}  // namespace

size_t greedy_match_workspace(const GreedyMatch& call) {
  const size_t each = (call.element == Element::f64 ? 8 : 4) + sizeof(uint32_t);
  return static_cast<size_t>(call.batch * call.columns) * each + sizeof(uint32_t);
}

cudaError_t greedy_match(
    const GreedyMatch& call, void* workspace, bool* has_nan, cudaStream_t stream) {
  uint32_t nan = 0;
  TAP_CHECK(
      call.element == Element::f64 ? greedy_match_as<double>(call, workspace, &nan, stream)
                                   : greedy_match_as<float>(call, workspace, &nan, stream));
  TAP_CHECK(cudaStreamSynchronize(stream));
  *has_nan = nan != 0;
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace torchalignprune
