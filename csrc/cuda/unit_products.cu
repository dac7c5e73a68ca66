// The inner products of every unit, from which alignment and distortion follow, in one pass.
//
// Everything is summed in float64: one minus the alignment of a unit that has hardly moved is no
// more than what sums in float32 would lose. By the data sheets, three products and two conversions
// for each entry take much less time than loading its bytes on GPUs where float64 has half the rate
// of float32, and no more for float32 tensors with references where it has a 64th.
#include <vector>

#include "unit_pieces.cuh"

namespace torchalignprune {
namespace cuda {
namespace {

constexpr int products_each = 3;

struct Products {
  double of[products_each];
};

template <class Some>
__device__ __forceinline__ void add_entry(
    const UnitTensor& tensor, const Some& entries, int i, Products& sums) {
  const double r = entries.reference(tensor, i);
  const double p = entries.kept(i) ? entries.weight(tensor, i) : 0;
  sums.of[0] = fma(p, p, sums.of[0]);
  sums.of[1] = fma(p, r, sums.of[1]);
  sums.of[2] = fma(r, r, sums.of[2]);
}

__device__ __forceinline__ void write_products(
    const UnitPieces& pieces, int64_t unit, int64_t piece, int k, double sum, int64_t units,
    double* products, Products* partial) {
  if (pieces.pieces == 1) {
    products[k * units + pieces.tensor.first + unit] = sum;
  } else {
    partial[pieces.partial + unit * pieces.pieces + piece].of[k] = sum;
  }
}

// If units lie side by side.
template <int weight_bytes, int reference_bytes>
__global__ void __launch_bounds__(unit_threads, unit_blocks)
    piece_kernel(UnitBatch batch, int64_t units, double* products, Products* partial) {
  for_each_block(batch, [&](const UnitPieces& pieces, int64_t block) {
    const UnitPlace place = place_of(pieces, block);
    Products sums{};
    const bool here = place.unit < pieces.tensor.units;
    if (here) {
      for_each_of_piece<weight_bytes, reference_bytes>(
          pieces, place.unit, place.piece, [&](const auto& entries, int64_t) {
            constexpr int width = sizeof(entries.mask);
#pragma unroll
            for (int i = 0; i < width; ++i) add_entry(pieces.tensor, entries, i, sums);
          });
    }
    const bool first = threadIdx.x % pieces.lanes == 0;
#pragma unroll
    for (int k = 0; k < products_each; ++k) {
      double sum = sums.of[k];
      for (int step = pieces.lanes / 2; step > 0; step /= 2) {
        sum += __shfl_down_sync(all_lanes, sum, step, pieces.lanes);
      }
      if (here && first) {
        write_products(pieces, place.unit, place.piece, k, sum, units, products, partial);
      }
    }
  });
}

// How many places in shared memory the sums of a warp's columns take.
constexpr int row_places = warp_size * most_width;

template <int weight_bytes, int reference_bytes, int width>
__device__ __forceinline__ void add_columns(
    const UnitPieces& pieces, UnitPlace place, double* own_sums) {
  Products sums[width] = {};
  for_each_of_columns<weight_bytes, reference_bytes, width>(
      pieces, place.unit, place.piece, [&](const auto& entries, int64_t) {
#pragma unroll
        for (int i = 0; i < width; ++i) add_entry(pieces.tensor, entries, i, sums[i]);
      });
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
  for (int i = 0; i < width; ++i) {
#pragma unroll
    for (int k = 0; k < products_each; ++k) {
      double sum = sums[i].of[k];
      for (int step = warp_size / 2; step >= pieces.lanes; step /= 2) {
        sum += __shfl_down_sync(all_lanes, sum, step);
      }
      if (lane < pieces.lanes) own_sums[k * row_places + lane * width + i] = sum;
    }
  }
}

// If units are columns: each thread adds up some rows of its columns, and a block adds up the sums
// of its threads.
template <int weight_bytes, int reference_bytes>
__global__ void __launch_bounds__(unit_threads, unit_blocks)
    column_kernel(UnitBatch batch, int64_t units, double* products, Products* partial) {
  constexpr int warp_places = products_each * row_places;
  __shared__ double warp_sums[unit_warps * warp_places];
  for_each_block(batch, [&](const UnitPieces& pieces, int64_t block) {
    const int thread = static_cast<int>(threadIdx.x);
    const UnitPlace place = place_of(pieces, block);
    double* own_sums = warp_sums + thread / warp_size * warp_places;
    if (pieces.width == most_width) {
      add_columns<weight_bytes, reference_bytes, most_width>(pieces, place, own_sums);
    } else {
      add_columns<weight_bytes, reference_bytes, 1>(pieces, place, own_sums);
    }
    __syncthreads();
    const int64_t first = place.unit - thread % pieces.lanes * pieces.width;
    const int columns = pieces.lanes * pieces.width;
    for (int place_of_sum = thread; place_of_sum < products_each * columns;
         place_of_sum += unit_threads) {
      const int k = place_of_sum / columns;
      const int column = place_of_sum % columns;
      if (first + column >= pieces.tensor.units) continue;
      double sum = 0;
      for (int warp = 0; warp < unit_warps; ++warp) {
        sum += warp_sums[warp * warp_places + k * row_places + column];
      }
      write_products(pieces, first + column, place.piece, k, sum, units, products, partial);
    }
    __syncthreads();
  });
}

int64_t finish_blocks_of(const UnitPieces& pieces) {
  return pieces.pieces == 1 ? 0 : shares(pieces.tensor.units, unit_warps);
}

// A warp for each unit that was cut into pieces.
__global__ void __launch_bounds__(unit_threads)
    finish_kernel(UnitBatch batch, int64_t units, double* products, const Products* partial) {
  for_each_block(batch, [&](const UnitPieces& pieces, int64_t block) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int64_t unit = block * unit_warps + threadIdx.x / warp_size;
    if (unit >= pieces.tensor.units) return;  // the whole warp
    const Products* own = partial + pieces.partial + unit * pieces.pieces;
#pragma unroll
    for (int k = 0; k < products_each; ++k) {
      double sum = 0;
      for (int64_t i = lane; i < pieces.pieces; i += warp_size) sum += own[i].of[k];
      sum = warp_sum(sum);
      if (lane == 0) products[k * units + pieces.tensor.first + unit] = sum;
    }
  });
}

// The tensors in pieces, and how many partial sums they have together.
struct Shares {
  explicit Shares(const UnitProducts& call) {
    for (int64_t i = 0; i < call.length; ++i) {
      tensors.push_back(pieces_of(call.tensors[i]));
      UnitPieces& pieces = tensors.back();
      pieces.partial = partial;
      if (pieces.pieces > 1) partial += pieces.tensor.units * pieces.pieces;
    }
  }
  std::vector<UnitPieces> tensors;
  int64_t partial = 0;
};

}  // namespace

size_t unit_products_workspace(const UnitProducts& call) {
  return static_cast<size_t>(Shares(call).partial) * sizeof(Products);
}

cudaError_t unit_products(const UnitProducts& call, void* workspace, cudaStream_t stream) {
  const Shares all(call);
  auto* partial = static_cast<Products*>(workspace);
  TAP_CHECK(in_batches(all.tensors.data(), call.length, blocks_of, [&](const UnitBatch& batch) {
    return with_sizes(batch, [&](auto weight, auto reference) {
      const auto kernel = batch.tensors[0].columns
                              ? column_kernel<decltype(weight)::value, decltype(reference)::value>
                              : piece_kernel<decltype(weight)::value, decltype(reference)::value>;
      return launch_units(kernel, batch, stream, call.units, call.products, partial);
    });
  }));
  if (all.partial == 0) return cudaSuccess;
  return in_batches(all.tensors.data(), call.length, finish_blocks_of, [&](const UnitBatch& batch) {
    return launch_units(
        finish_kernel, batch, stream, call.units, call.products,
        static_cast<const Products*>(partial));
  });
}

}  // namespace cuda
}  // namespace torchalignprune
