// CUB's sort of the entries of a block's threads.
#pragma once

#include "cub/device/device_radix_sort.cuh"

namespace cub {

template <class Key, int threads, int items, class Value>
class BlockRadixSort {
 public:
  struct TempStorage {
    Key keys[threads * items];
    Value values[threads * items];
  };

  explicit BlockRadixSort(TempStorage& storage) : storage_(storage) {}

  void SortBlockedToStriped(Key (&keys)[items], Value (&values)[items], int begin, int end) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = 0; i < items; ++i) {
      storage_.keys[thread * items + i] = keys[i];
      storage_.values[thread * items + i] = values[i];
    }
    __syncthreads();
    if (thread == 0) {
      const TempStorage before = storage_;
      const auto places = emulated::sorted_places(before.keys, threads * items, begin, end);
      for (size_t i = 0; i < places.size(); ++i) {
        storage_.keys[i] = before.keys[places[i]];
        storage_.values[i] = before.values[places[i]];
      }
    }
    __syncthreads();
    for (int i = 0; i < items; ++i) {
      keys[i] = storage_.keys[i * threads + thread];
      values[i] = storage_.values[i * threads + thread];
    }
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
