// Whether the indices of units are in range, for all tensors of a call at once.
#include <vector>

#include "unit_pieces.cuh"

namespace torchalignprune {
namespace cuda {
namespace {

using FirstUnit = unsigned long long;  // as atomicMin takes it
constexpr FirstUnit none = ~FirstUnit{0};

int64_t index_blocks_of(const UnitPieces& pieces) {
  return pieces.tensor.index == nullptr ? 0 : shares(pieces.tensor.units, unit_threads);
}

__global__ void __launch_bounds__(unit_threads) index_kernel(UnitBatch batch, FirstUnit* found) {
  for_each_block(batch, [&](const UnitPieces& pieces, int64_t block) {
    const UnitTensor& tensor = pieces.tensor;
    const int64_t unit = block * unit_threads + threadIdx.x;
    if (unit >= tensor.units) return;
    const int64_t partner = tensor.index[unit];
    if (partner < 0 || partner >= tensor.units) {
      atomicMin(found, static_cast<FirstUnit>(tensor.first + unit));
    }
  });
}

}  // namespace

size_t check_indices_workspace() { return sizeof(FirstUnit); }

cudaError_t check_indices(
    const UnitTensor* tensors, int64_t length, void* workspace, int64_t* unit,
    cudaStream_t stream) {
  std::vector<UnitPieces> all(length);
  for (int64_t i = 0; i < length; ++i) all[i].tensor = tensors[i];
  auto* found = static_cast<FirstUnit*>(workspace);
  TAP_CHECK(cudaMemsetAsync(found, 0xFF, sizeof(FirstUnit), stream));
  TAP_CHECK(in_batches(all.data(), length, index_blocks_of, [&](const UnitBatch& batch) {
    return launch_units(index_kernel, batch, stream, found);
  }));
  FirstUnit first = none;
  TAP_CHECK(cudaMemcpyAsync(&first, found, sizeof(FirstUnit), cudaMemcpyDeviceToHost, stream));
  TAP_CHECK(cudaStreamSynchronize(stream));
  *unit = first == none ? -1 : static_cast<int64_t>(first);
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace torchalignprune
