// The search for the count-th smallest key of a row, by a warp or a block.
#pragma once

#include "device.cuh"

namespace torchalignprune {
namespace cuda {

constexpr int row_bins = 256;

// What the threads of a row share. `threads` is 32, a warp, or the size of the block.
template <class Key, int threads>
struct RowScratch {
  static constexpr int warps = threads / warp_size;
  uint32_t bins[row_bins];
  int64_t picked[3];
  Key lowest[warps], highest[warps];
  int64_t counted[warps];
};

template <int threads>
__device__ __forceinline__ void wait_for_row() {
  if constexpr (threads == warp_size) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// How many of the threads before this one say yes; `total` becomes how many do in all.
template <class Key, int threads>
__device__ __forceinline__ int64_t
count_before(bool yes, RowScratch<Key, threads>& scratch, int64_t* total) {
  const int member = static_cast<int>(threadIdx.x) % threads;
  const int lane = member % warp_size;
  const unsigned all = __ballot_sync(all_lanes, yes);
  int64_t before = __popc(all & ((1u << lane) - 1));
  if constexpr (threads == warp_size) {
    *total = __popc(all);
  } else {
    const int warp = member / warp_size;
    if (lane == 0) scratch.counted[warp] = __popc(all);
    __syncthreads();
    *total = 0;
    for (int w = 0; w < threads / warp_size; ++w) {
      if (w < warp) before += scratch.counted[w];
      *total += scratch.counted[w];
    }
    __syncthreads();
  }
  return before;
}

// Searches for the count-th smallest of the keys key_at(0) to key_at(n - 1) by histograms, from the
// range between the smallest and the largest one. `alive` becomes the number of candidates; if that
// is less than `count`, or `count` is negative, the search is not done.
template <class Key, int threads, class KeyAt>
__device__ __forceinline__ Search<Key> search_row(
    int64_t n, int64_t count, RowScratch<Key, threads>& scratch, KeyAt key_at) {
  const int member = static_cast<int>(threadIdx.x) % threads;
  const int lane = member % warp_size;
  const int warp = member / warp_size;
  Key low = not_a_candidate<Key>();
  Key high = 0;
  int64_t alive = 0;
  for (int64_t i = member; i < n; i += threads) {
    const Key key = key_at(i);
    if (key == not_a_candidate<Key>()) continue;
    low = min(low, key);
    high = max(high, key);
    ++alive;
  }
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) {
    low = min(low, __shfl_xor_sync(all_lanes, low, step));
    high = max(high, __shfl_xor_sync(all_lanes, high, step));
    alive += __shfl_xor_sync(all_lanes, alive, step);
  }
  if constexpr (threads > warp_size) {
    if (lane == 0) {
      scratch.lowest[warp] = low;
      scratch.highest[warp] = high;
      scratch.counted[warp] = alive;
    }
    __syncthreads();
    alive = 0;
    for (int w = 0; w < threads / warp_size; ++w) {
      low = min(low, scratch.lowest[w]);
      high = max(high, scratch.highest[w]);
      alive += scratch.counted[w];
    }
    __syncthreads();
  }

  Search<Key> search;
  search.count = count;
  search.alive = alive;
  search.done = 0 <= count && count <= alive;
  if (!search.done || count == 0) return search;  // no score has the key 0
  search.low = low;
  search.high = high;
  search.inside = alive;
  while (search.low != search.high && search.below + search.inside != count) {
    const Key span = search.high - search.low;
    const int shift = shift_for(span, 0, row_bins);
    for (int b = member; b < row_bins; b += threads) scratch.bins[b] = 0;
    wait_for_row<threads>();
    for (int64_t i = member; i < n; i += threads) {
      const Key offset = key_at(i) - search.low;
      if (offset <= span) atomicAdd(&scratch.bins[offset >> shift], 1u);
    }
    wait_for_row<threads>();
    if (warp == 0) {
      constexpr int each = row_bins / warp_size;
      const int64_t rank = count - search.below;
      int64_t inside = 0;
      for (int b = lane * each; b < (lane + 1) * each; ++b) inside += scratch.bins[b];
      int64_t below = warp_running_sum(inside) - inside;
      if (below < rank && rank <= below + inside) {
        int b = lane * each;
        for (; below + scratch.bins[b] < rank; ++b) below += scratch.bins[b];
        scratch.picked[0] = b;
        scratch.picked[1] = below;
        scratch.picked[2] = scratch.bins[b];
      }
    }
    wait_for_row<threads>();
    Bin bin;
    bin.index = scratch.picked[0];
    bin.below = scratch.picked[1];
    bin.inside = scratch.picked[2];
    narrow(search, shift, bin);
  }
  return search;
}

}  // namespace cuda
}  // namespace torchalignprune
