// The sums of squares of a tensor's rows and columns, in float64.
//
// The entries are added up in the order of cpu/square_sums.cpp, so that the sums are the same bit
// for bit: those of a row in blocks, in each of which sixteen sums run side by side; those of a
// column in parts of the rows.
#include "device.cuh"
#include "launchers.h"

namespace torchalignprune {
namespace cuda {
namespace {

constexpr int block_threads = 128;
constexpr int lanes = 16;
// As in cpu/entries.h and cpu/square_sums.cpp.
constexpr int64_t row_block = 2048;
constexpr int64_t most_parts = 64;
constexpr int64_t most_partial_sums = int64_t{1} << 20;

int64_t blocks_of(const SquareSums& call) {
  return (call.columns * call.inner + row_block - 1) / row_block;
}
int64_t parts_of(const SquareSums& call) {
  if (call.column_sums == nullptr) return 0;
  return std::min(
      {most_parts, call.rows, std::max<int64_t>(1, most_partial_sums / call.all_columns),
       1 + call.rows * call.all_columns * call.inner / (16 * row_block)});
}

template <class Acc>
__device__ __forceinline__ double square_at(
    const SquareSums& call, int64_t row, int64_t column, int64_t position) {
  const double value = read<double>(call.weight, row * call.columns * call.inner + position);
  const double row_factor = factor<Acc>(call.row_scale, row * call.row_step);
  const double column_factor = factor<Acc>(call.column_scale, column * call.column_step);
  const double scaled = multiply(multiply(value, row_factor), column_factor);
  return multiply(scaled, scaled);
}

// Half a warp for each block of a row.
template <class Acc>
__global__ void __launch_bounds__(block_threads)
    block_kernel(SquareSums call, int64_t blocks_each, double* totals) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t all = call.rows * blocks_each;
  const int64_t row_size = call.columns * call.inner;
  const int64_t halves = static_cast<int64_t>(gridDim.x) * (block_threads / lanes);
  // The two halves of a warp take part in its shuffles together.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (block_threads / lanes) +
                        threadIdx.x / warp_size * (warp_size / lanes);
  for (int64_t base = first; base < all; base += halves) {
    const int64_t b = base + threadIdx.x % warp_size / lanes;
    double sum = 0;
    if (b < all) {
      const int64_t row = quotient(b, blocks_each);
      const int64_t start = (b - row * blocks_each) * row_block;
      const int64_t end = min(start + row_block, row_size);
      for (int64_t i = start + lane; i < end; i += lanes) {
        const int64_t column = call.inner == 1 ? i : quotient(i, call.inner);
        sum = add(sum, square_at<Acc>(call, row, column, i));
      }
    }
    double total = 0;
    const int half = static_cast<int>(threadIdx.x) % warp_size / lanes * lanes;
#pragma unroll
    for (int j = 0; j < lanes; ++j) total = add(total, __shfl_sync(all_lanes, sum, half + j));
    if (b < all && lane == 0) totals[b] = total;
  }
}

// A warp for each row.
__global__ void __launch_bounds__(block_threads)
    row_kernel(const double* totals, int64_t rows, int64_t blocks_each, double* row_sums) {
  alignas(16) __shared__ double all_values[block_threads];
  double* values = all_values + threadIdx.x / warp_size * warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  constexpr int warps = block_threads / warp_size;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / warp_size; row < rows;
       row += static_cast<int64_t>(gridDim.x) * warps) {
    double sum = 0;
    for (int64_t base = 0; base < blocks_each; base += warp_size) {
      const int64_t b = base + lane;
      sum_in_order(b < blocks_each ? totals[row * blocks_each + b] : 0, values, sum);
    }
    if (lane == 0) row_sums[row] = sum;
  }
}

// A thread for each column in a part of the rows.
template <class Acc>
__global__ void __launch_bounds__(block_threads)
    part_kernel(SquareSums call, int64_t parts, double* partial) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * block_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
       i < parts * call.columns; i += threads) {
    const int64_t part = quotient(i, call.columns);
    const int64_t column = i - part * call.columns;
    double sum = 0;
    for (int64_t row = call.rows * part / parts; row < call.rows * (part + 1) / parts; ++row) {
      for (int64_t j = 0; j < call.inner; ++j) {
        sum = add(sum, square_at<Acc>(call, row, column, column * call.inner + j));
      }
    }
    partial[i] = sum;
  }
}

__global__ void __launch_bounds__(block_threads)
    column_kernel(const double* partial, int64_t parts, int64_t columns, double* column_sums) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * block_threads;
  for (int64_t column = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
       column < columns; column += threads) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum = add(sum, partial[part * columns + column]);
    column_sums[column] = sum;
  }
}

template <class Acc>
cudaError_t square_sums_as(const SquareSums& call, void* workspace, cudaStream_t stream) {
  const int64_t blocks_each = blocks_of(call);
  const int64_t parts = parts_of(call);
  auto* totals = static_cast<double*>(workspace);
  double* partial = totals + call.rows * blocks_each;
  const auto share = [](int64_t n, int64_t each) { return (n + each - 1) / each; };
  int blocks = 0;
  TAP_CHECK(resident_blocks(
      block_kernel<Acc>, block_threads, share(call.rows * blocks_each, block_threads / lanes),
      &blocks));
  block_kernel<Acc><<<blocks, block_threads, 0, stream>>>(call, blocks_each, totals);
  TAP_CHECK(cudaGetLastError());
  TAP_CHECK(resident_blocks(
      row_kernel, block_threads, share(call.rows, block_threads / warp_size), &blocks));
  row_kernel<<<blocks, block_threads, 0, stream>>>(totals, call.rows, blocks_each, call.row_sums);
  TAP_CHECK(cudaGetLastError());
  if (parts == 0) return cudaSuccess;
  TAP_CHECK(resident_blocks(
      part_kernel<Acc>, block_threads, share(parts * call.columns, block_threads), &blocks));
  part_kernel<Acc><<<blocks, block_threads, 0, stream>>>(call, parts, partial);
  TAP_CHECK(cudaGetLastError());
  TAP_CHECK(
      resident_blocks(column_kernel, block_threads, share(call.columns, block_threads), &blocks));
  column_kernel<<<blocks, block_threads, 0, stream>>>(
      partial, parts, call.columns, call.column_sums);
  return cudaGetLastError();
}

}  // namespace

size_t square_sums_workspace(const SquareSums& call) {
  const int64_t doubles = call.rows * blocks_of(call) + parts_of(call) * call.columns;
  return static_cast<size_t>(doubles) * sizeof(double);
}

cudaError_t square_sums(const SquareSums& call, void* workspace, cudaStream_t stream) {
  return call.wide ? square_sums_as<double>(call, workspace, stream)
                   : square_sums_as<float>(call, workspace, stream);
}

}  // namespace cuda
}  // namespace torchalignprune
