// The sums of squares of a tensor's rows and columns, in float64.
//
// The entries are added up in the order of cpu/square_sums.cpp, so that the sums are the same bit
// for bit: those of a row in blocks, in each of which sixteen sums run side by side; those of a
// column in parts of the rows.
#include <type_traits>

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

template <Element element>
using Acc = std::conditional_t<element == Element::f64, double, float>;

// The factor of the column that an entry of a row lies in.
template <class Acc>
__device__ __forceinline__ Acc column_factor(const SquareSums& call, int64_t position) {
  if (call.column_scale == nullptr) return 1;
  const int64_t column = call.inner == 1 ? position : quotient(position, call.inner);
  return factor<Acc>(call.column_scale, column * call.column_step);
}

// The sum of the squares of n entries, one after the other, each multiplied by the factors of its
// row and column. Eight are read before the first of them is multiplied, so that as many loads are
// under way.
template <Element element, class IndexOf, class RowFactorOf, class ColumnFactorOf>
__device__ __forceinline__ double sum_of_squares(
    const SquareSums& call, int64_t n, IndexOf index_of, RowFactorOf row_factor_of,
    ColumnFactorOf column_factor_of) {
  constexpr int ahead = 8;
  double sum = 0;
  for (int64_t base = 0; base < n; base += ahead) {
    int64_t offsets[ahead];
    Acc<element> values[ahead], row_factors[ahead], column_factors[ahead];
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int64_t k = min(base + j, n - 1);
      offsets[j] = offset_of(call.weight, index_of(k));
      row_factors[j] = row_factor_of(k);
      column_factors[j] = column_factor_of(k);
    }
    // Kept apart from code with branches, before which a value would be widened, which waits for
    // it.
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      values[j] = read<Acc<element>>(call.weight.data, element, offsets[j]);
    }
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      if (base + j >= n) continue;
      const double by_row = multiply(static_cast<double>(values[j]), double{row_factors[j]});
      const double scaled = multiply(by_row, double{column_factors[j]});
      sum = add(sum, multiply(scaled, scaled));
    }
  }
  return sum;
}

// Half a warp for each block of a row.
template <Element element>
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
      const auto size = static_cast<int>(min(row_block, row_size - start));
      const auto row_factor = factor<Acc<element>>(call.row_scale, row * call.row_step);
      const auto position_of = [&](int64_t k) { return start + lane + k * lanes; };
      sum = sum_of_squares<element>(
          call, (size - lane + lanes - 1) / lanes,
          [&](int64_t k) { return row * row_size + position_of(k); },
          [&](int64_t) { return row_factor; },
          [&](int64_t k) { return column_factor<Acc<element>>(call, position_of(k)); });
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
template <Element element>
__global__ void __launch_bounds__(block_threads)
    part_kernel(SquareSums call, int64_t parts, double* partial) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * block_threads;
  const int64_t row_size = call.columns * call.inner;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
       i < parts * call.columns; i += threads) {
    const int64_t part = quotient(i, call.columns);
    const int64_t column = i - part * call.columns;
    const int64_t from = call.rows * part / parts;
    const int64_t to = call.rows * (part + 1) / parts;
    const auto own_factor = factor<Acc<element>>(call.column_scale, column * call.column_step);
    const auto row_of = [&](int64_t k) {
      return from + (call.inner == 1 ? k : quotient(k, call.inner));
    };
    partial[i] = sum_of_squares<element>(
        call, (to - from) * call.inner,
        [&](int64_t k) {
          const int64_t row = row_of(k);
          return row * row_size + column * call.inner + k - (row - from) * call.inner;
        },
        [&](int64_t k) { return factor<Acc<element>>(call.row_scale, row_of(k) * call.row_step); },
        [&](int64_t) { return own_factor; });
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

template <Element element>
cudaError_t square_sums_as(const SquareSums& call, void* workspace, cudaStream_t stream) {
  const int64_t blocks_each = blocks_of(call);
  const int64_t parts = parts_of(call);
  auto* totals = static_cast<double*>(workspace);
  double* partial = totals + call.rows * blocks_each;
  const auto share = [](int64_t n, int64_t each) { return (n + each - 1) / each; };
  int blocks = 0;
  TAP_CHECK(resident_blocks(
      block_kernel<element>, block_threads, share(call.rows * blocks_each, block_threads / lanes),
      &blocks));
  block_kernel<element><<<blocks, block_threads, 0, stream>>>(call, blocks_each, totals);
  TAP_CHECK(cudaGetLastError());
  TAP_CHECK(resident_blocks(
      row_kernel, block_threads, share(call.rows, block_threads / warp_size), &blocks));
  row_kernel<<<blocks, block_threads, 0, stream>>>(totals, call.rows, blocks_each, call.row_sums);
  TAP_CHECK(cudaGetLastError());
  if (parts == 0) return cudaSuccess;
  TAP_CHECK(resident_blocks(
      part_kernel<element>, block_threads, share(parts * call.columns, block_threads), &blocks));
  part_kernel<element><<<blocks, block_threads, 0, stream>>>(call, parts, partial);
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
  switch (call.weight.element) {
    case Element::f32:
      return square_sums_as<Element::f32>(call, workspace, stream);
    case Element::f64:
      return square_sums_as<Element::f64>(call, workspace, stream);
    case Element::f16:
      return square_sums_as<Element::f16>(call, workspace, stream);
    default:
      return square_sums_as<Element::bf16>(call, workspace, stream);
  }
}

}  // namespace cuda
}  // namespace torchalignprune
