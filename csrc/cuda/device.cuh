// Sums over the threads of a warp or a block, and how many blocks run at a time.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "keys.cuh"

#define TAP_CHECK(call)                       \
  do {                                        \
    const cudaError_t error_ = (call);        \
    if (error_ != cudaSuccess) return error_; \
  } while (false)

namespace torchalignprune {
namespace cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xFFFFFFFFu;

// The first lane gets the sum of the warp's values.
template <class Number>
__device__ __forceinline__ Number warp_sum(Number value) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) {
    value += __shfl_down_sync(all_lanes, value, step);
  }
  return value;
}

// The sum of the values of this lane and those before it.
template <class Number>
__device__ __forceinline__ Number warp_running_sum(Number value) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    const Number other = __shfl_up_sync(all_lanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// The sum of the values of this thread and those before it; `total` becomes that of the block.
// `sums` is shared memory with a place for each warp.
template <class Number>
__device__ __forceinline__ Number block_running_sum(Number value, Number* sums, Number* total) {
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int warps = static_cast<int>(blockDim.x) / warp_size;
  value = warp_running_sum(value);
  if (threadIdx.x % warp_size == warp_size - 1) sums[warp] = value;
  __syncthreads();
  Number before = 0;
  *total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += sums[w];
    *total += sums[w];
  }
  __syncthreads();
  return before + value;
}

// Adds the lanes' values to `total` one after the other; returns the sum up to this lane's. They
// pass through shared memory, 32 places for each warp: shuffles would take four times as long.
__device__ __forceinline__ double sum_in_order(double value, double* values, double& total) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  values[lane] = value;
  __syncwarp();
  double own = 0;
#pragma unroll
  for (int j = 0; j < warp_size; j += 2) {
    const double2 pair = *reinterpret_cast<const double2*>(values + j);
    total = add(total, pair.x);
    if (lane == j) own = total;
    total = add(total, pair.y);
    if (lane == j + 1) own = total;
  }
  __syncwarp();
  return own;
}

// As many blocks as run at a time, at most `most`: each takes its share of the work in a loop.
template <class Kernel>
cudaError_t resident_blocks(Kernel kernel, int threads, int64_t most, int* blocks) {
  int device = 0;
  int processors = 0;
  int each = 0;
  TAP_CHECK(cudaGetDevice(&device));
  TAP_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  TAP_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0));
  const int64_t all = static_cast<int64_t>(processors) * std::max(each, 1);
  *blocks = static_cast<int>(std::min(all, most));
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace torchalignprune
