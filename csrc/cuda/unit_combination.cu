// mask * (a reference + b weight) with an a and a b for each unit, in one pass; the same bits as
// those of the CPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <vector>

#include "unit_pieces.cuh"

namespace torchalignprune {
namespace cuda {
namespace {

struct Pair {
  double of_reference, of_weight;
};

__device__ __forceinline__ void narrow(double value, Element element, uint16_t& bits) {
  const auto rounded = static_cast<float>(value);
  bits = element == Element::f16 ? __half_as_ushort(__float2half_rn(rounded))
                                 : __bfloat16_as_ushort(__float2bfloat16_rn(rounded));
}
__device__ __forceinline__ void narrow(double value, Element, uint32_t& bits) {
  bits = bits_as<uint32_t>(static_cast<float>(value));
}
__device__ __forceinline__ void narrow(double value, Element, uint64_t& bits) {
  bits = bits_as<uint64_t>(value);
}

// pair(i) gives the coefficients of entry i.
template <class Some, class PairOf>
__device__ __forceinline__ void write(
    const UnitTensor& tensor, const Some& entries, int64_t offset, PairOf pair) {
  constexpr int width = sizeof(entries.mask);
  auto out = entries.weights;
  using Bits = std::remove_reference_t<decltype(out.at[0])>;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const double sum =
        add(multiply(pair(i).of_reference, entries.reference(tensor, i)),
            multiply(pair(i).of_weight, entries.weight(tensor, i)));
    narrow(entries.kept(i) ? sum : 0, tensor.weight_element, out.at[i]);
  }
  *reinterpret_cast<decltype(out)*>(static_cast<Bits*>(tensor.out) + offset) = out;
}

__device__ __forceinline__ Pair
pair_of(const UnitTensor& tensor, int64_t unit, int64_t units, const double* coefficients) {
  const int64_t at = tensor.first + unit;
  return {coefficients[at], coefficients[units + at]};
}

// If units lie side by side.
template <int weight_bytes, int reference_bytes>
__global__ void __launch_bounds__(unit_threads, unit_blocks)
    piece_kernel(UnitBatch batch, int64_t units, const double* coefficients) {
  for_each_block(batch, [&](const UnitPieces& pieces, int64_t block) {
    const UnitPlace place = place_of(pieces, block);
    if (place.unit >= pieces.tensor.units) return;
    const Pair pair = pair_of(pieces.tensor, place.unit, units, coefficients);
    for_each_of_piece<weight_bytes, reference_bytes>(
        pieces, place.unit, place.piece, [&](const auto& entries, int64_t offset) {
          write(pieces.tensor, entries, offset, [&](int) { return pair; });
        });
  });
}

template <int weight_bytes, int reference_bytes, int width>
__device__ __forceinline__ void combine_columns(
    const UnitPieces& pieces, UnitPlace place, int64_t units, const double* coefficients) {
  if (place.unit >= pieces.tensor.units) return;
  Pair pairs[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    pairs[i] = pair_of(pieces.tensor, place.unit + i, units, coefficients);
  }
  for_each_of_columns<weight_bytes, reference_bytes, width>(
      pieces, place.unit, place.piece, [&](const auto& entries, int64_t offset) {
        write(pieces.tensor, entries, offset, [&](int i) { return pairs[i]; });
      });
}

// If units are columns.
template <int weight_bytes, int reference_bytes>
__global__ void __launch_bounds__(unit_threads, unit_blocks)
    column_kernel(UnitBatch batch, int64_t units, const double* coefficients) {
  for_each_block(batch, [&](const UnitPieces& pieces, int64_t block) {
    const UnitPlace place = place_of(pieces, block);
    if (pieces.width == most_width) {
      combine_columns<weight_bytes, reference_bytes, most_width>(
          pieces, place, units, coefficients);
    } else {
      combine_columns<weight_bytes, reference_bytes, 1>(pieces, place, units, coefficients);
    }
  });
}

}  // namespace

cudaError_t unit_combination(const UnitCombination& call, cudaStream_t stream) {
  std::vector<UnitPieces> tensors;
  for (int64_t i = 0; i < call.length; ++i) tensors.push_back(pieces_of(call.tensors[i]));
  return in_batches(tensors.data(), call.length, blocks_of, [&](const UnitBatch& batch) {
    return with_sizes(batch, [&](auto weight, auto reference) {
      const auto kernel = batch.tensors[0].columns
                              ? column_kernel<decltype(weight)::value, decltype(reference)::value>
                              : piece_kernel<decltype(weight)::value, decltype(reference)::value>;
      return launch_units(kernel, batch, stream, call.units, call.coefficients);
    });
  });
}

}  // namespace cuda
}  // namespace torchalignprune
