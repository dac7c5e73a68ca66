// CUB's sorts of whole arrays, by std::stable_sort. What CUB leaves in no order gets no meaning
// here either: the result of a double buffer is in the other one, and the first is overwritten.
#pragma once

#include <vector>

#include "cuda_runtime.h"

namespace emulated {

template <class Key>
Key sorted_bits(Key key, int begin, int end) {
  const int bits = end - begin;
  key = static_cast<Key>(key >> begin);
  return bits == static_cast<int>(8 * sizeof(Key)) ? key : key & ((Key{1} << bits) - 1);
}

template <class Key>
std::vector<size_t> sorted_places(const Key* keys, size_t n, int begin, int end) {
  std::vector<size_t> places(n);
  for (size_t i = 0; i < n; ++i) places[i] = i;
  std::stable_sort(places.begin(), places.end(), [&](size_t a, size_t b) {
    return sorted_bits(keys[a], begin, end) < sorted_bits(keys[b], begin, end);
  });
  return places;
}

}  // namespace emulated

namespace cub {

template <class Item>
struct DoubleBuffer {
  DoubleBuffer() = default;
  DoubleBuffer(Item* current, Item* alternate) : buffers{current, alternate} {}
  Item* Current() const { return buffers[selector]; }
  Item* Alternate() const { return buffers[1 - selector]; }
  Item* buffers[2] = {};
  int selector = 0;
};

struct DeviceRadixSort {
  static constexpr size_t asked = 1000;  // bytes that the sorts here do not need

  template <class Key, class Number>
  static cudaError_t SortKeys(
      void* storage, size_t& bytes, const Key* from, Key* to, Number n, int begin, int end,
      cudaStream_t) {
    if (storage == nullptr) {
      bytes = asked;
      return cudaSuccess;
    }
    const auto places = emulated::sorted_places(from, static_cast<size_t>(n), begin, end);
    for (size_t i = 0; i < places.size(); ++i) to[i] = from[places[i]];
    return cudaSuccess;
  }

  template <class Key, class Value, class Number>
  static cudaError_t SortPairs(
      void* storage, size_t& bytes, DoubleBuffer<Key>& keys, DoubleBuffer<Value>& values, Number n,
      int begin = 0, int end = 8 * sizeof(Key), cudaStream_t = nullptr) {
    if (storage == nullptr) {
      bytes = asked;
      return cudaSuccess;
    }
    const auto places = emulated::sorted_places(keys.Current(), n, begin, end);
    for (size_t i = 0; i < places.size(); ++i) {
      keys.Alternate()[i] = keys.Current()[places[i]];
      values.Alternate()[i] = values.Current()[places[i]];
    }
    memset(keys.Current(), 0xAB, n * sizeof(Key));
    memset(values.Current(), 0xAB, n * sizeof(Value));
    keys.selector = 1 - keys.selector;
    values.selector = 1 - values.selector;
    return cudaSuccess;
  }
};

}  // namespace cub
