// The entries of a list of tensors, cut into chunks that blocks process, and their keys.
#pragma once

#include "device.cuh"

namespace torchalignprune {
namespace cuda {

constexpr int block_threads = 256;
constexpr int64_t chunk_size = 8192;
constexpr int group_size = 4;

using Count = unsigned long long;  // what atomicAdd takes

// The tensors, cut into chunks; two arrays hold the first chunk and the first entry of each tensor.
struct Table {
  const Tensor* tensors;
  const int64_t* first_chunks;
  const int64_t* first_entries;
  int64_t length, chunks, entries;
};

template <class Acc>
__device__ __forceinline__ void read_group(
    const View& view, int64_t index, Acc (&values)[group_size]) {
  if (view.element == Element::f64) {
    const auto* data = static_cast<const double*>(view.data) + index;
#pragma unroll
    for (int i = 0; i < group_size; ++i) values[i] = static_cast<Acc>(__ldg(data + i));
  } else if (view.element == Element::f32) {
    const auto* data = static_cast<const float*>(view.data) + index;
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(data));
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < group_size; ++i) values[i] = static_cast<Acc>(bits_as<float>(words[i]));
  } else {
    const auto* data = static_cast<const uint16_t*>(view.data) + index;
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(data));
    const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
    for (int i = 0; i < group_size; ++i) {
      const auto bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      values[i] = static_cast<Acc>(view.element == Element::f16 ? from_f16(bits) : from_bf16(bits));
    }
  }
}

template <int n>
__device__ __forceinline__ uint64_t read_bytes(const uint8_t* data) {
  static_assert(n == 2 || n == 4 || n == 8, "a group has 2, 4 or 8 entries");
  if constexpr (n == 2) {
    return __ldg(reinterpret_cast<const unsigned short*>(data));
  } else if constexpr (n == 4) {
    return __ldg(reinterpret_cast<const unsigned int*>(data));
  } else {
    return __ldg(reinterpret_cast<const unsigned long long*>(data));
  }
}

// The keys of a group of entries, of a tensor that is read in vectors.
template <class Acc, Score kind>
__device__ __forceinline__ bool group_keys(
    const Tensor& tensor, int64_t index, KeyFor<Acc> (&keys)[group_size]) {
  using Key = KeyFor<Acc>;
  Acc weights[group_size], references[group_size];
  read_group(tensor.weight, index, weights);
  if (kind == Score::worth && tensor.reference.data != nullptr) {
    read_group(tensor.reference, index, references);
  } else {
#pragma unroll
    for (int i = 0; i < group_size; ++i) references[i] = weights[i];
  }
  uint64_t mask = ~uint64_t{0};
  if (tensor.mask.data != nullptr) {
    mask = read_bytes<group_size>(static_cast<const uint8_t*>(tensor.mask.data) + index);
  }
  int64_t row = 0;
  int64_t place = 0;
  const bool has_scales = tensor.row_scale != nullptr || tensor.column_scale != nullptr;
  if (has_scales) {
    row = quotient(index, tensor.row_size);
    place = index - row * tensor.row_size;
  }
  bool nan = false;
#pragma unroll
  for (int i = 0; i < group_size; ++i) {
    if (has_scales) {
      const int64_t column = tensor.inner == 1 ? place : quotient(place, tensor.inner);
      const Acc row_factor = factor<Acc>(tensor.row_scale, row * tensor.row_step);
      const Acc column_factor = factor<Acc>(tensor.column_scale, column * tensor.column_step);
      weights[i] = multiply(multiply(weights[i], row_factor), column_factor);
      references[i] = multiply(multiply(references[i], row_factor), column_factor);
      if (++place == tensor.row_size) {
        place = 0;
        ++row;
      }
    }
    const Acc score = score_of<kind>(weights[i], references[i]);
    const bool candidate = (mask >> (8 * i) & 0xFF) != 0;
    keys[i] = candidate ? order(score) : not_a_candidate<Key>();
    nan |= candidate && score != score;
  }
  return nan;
}

// A whole chunk of a plain tensor, in vectors of 16 bytes, with several loads under way at a time.
// `Bits` is as wide as an element.
template <class Acc, Score kind, class Bits, class Widen, class Visit>
__device__ __forceinline__ bool visit_plain(
    const Tensor& tensor, int64_t begin, Widen widen, Visit visit) {
  using Key = KeyFor<Acc>;
  constexpr int n = 16 / sizeof(Bits);
  constexpr int unroll = 4;
  constexpr int stride = block_threads * n;
  static_assert(chunk_size % (stride * unroll) == 0, "a chunk is a whole number of rounds");
  const auto* weights = static_cast<const Bits*>(tensor.weight.data);
  const auto* mask = static_cast<const uint8_t*>(tensor.mask.data);
  bool nan = false;
  for (int at = static_cast<int>(threadIdx.x) * n; at < chunk_size; at += stride * unroll) {
    uint4 raw[unroll];
    uint64_t alive[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t index = begin + at + u * stride;
      raw[u] = __ldg(reinterpret_cast<const uint4*>(weights + index));
      alive[u] = mask == nullptr ? ~uint64_t{0} : read_bytes<n>(mask + index);
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const uint32_t words[4] = {raw[u].x, raw[u].y, raw[u].z, raw[u].w};
      Key keys[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        Bits bits;
        if constexpr (sizeof(Bits) == 2) {
          bits = static_cast<Bits>(words[i / 2] >> (i % 2 * 16));
        } else if constexpr (sizeof(Bits) == 4) {
          bits = words[i];
        } else {
          bits = words[2 * i] | static_cast<uint64_t>(words[2 * i + 1]) << 32;
        }
        const Acc weight = widen(bits);
        const Acc score = score_of<kind>(weight, weight);
        const bool candidate = (alive[u] >> (8 * i) & 0xFF) != 0;
        keys[i] = candidate ? order(score) : not_a_candidate<Key>();
        nan |= candidate && score != score;
      }
      visit(keys, begin + at + u * stride);
    }
  }
  return nan;
}

// Calls visit(keys, index of the first) for all keys of a chunk, in arrays of neighbours. Returns
// whether a candidate's score is NaN.
template <class Acc, Score kind, class Visit>
__device__ __forceinline__ bool visit_chunk(
    const Tensor& tensor, int64_t begin, int length, Visit visit) {
  if (tensor.plain && length == chunk_size) {
    if constexpr (sizeof(Acc) == 8) {
      if (tensor.weight.element == Element::f64) {
        return visit_plain<Acc, kind, uint64_t>(
            tensor, begin, [](uint64_t bits) { return bits_as<double>(bits); }, visit);
      }
    } else if (tensor.weight.element == Element::f32) {
      return visit_plain<Acc, kind, uint32_t>(
          tensor, begin, [](uint32_t bits) { return bits_as<float>(bits); }, visit);
    } else if (tensor.weight.element == Element::f16) {
      return visit_plain<Acc, kind, uint16_t>(
          tensor, begin, [](uint16_t bits) { return from_f16(bits); }, visit);
    } else if (tensor.weight.element == Element::bf16) {
      return visit_plain<Acc, kind, uint16_t>(
          tensor, begin, [](uint16_t bits) { return from_bf16(bits); }, visit);
    }
  }
  bool nan = false;
  const int thread = static_cast<int>(threadIdx.x);
  const int grouped = tensor.vectors ? length / group_size * group_size : 0;
  for (int at = thread * group_size; at < grouped; at += block_threads * group_size) {
    KeyFor<Acc> keys[group_size];
    nan |= group_keys<Acc, kind>(tensor, begin + at, keys);
    visit(keys, begin + at);
  }
  for (int at = grouped + thread; at < length; at += block_threads) {
    const KeyFor<Acc> keys[1] = {key_at<Acc, kind>(tensor, begin + at, nan)};
    visit(keys, begin + at);
  }
  return nan;
}

// The same for a stretch of a chunk, from a multiple of group_size on, in order and by one thread.
template <class Acc, Score kind, class Visit>
__device__ __forceinline__ void visit_in_order(
    const Tensor& tensor, int64_t begin, int length, Visit visit) {
  const int grouped = tensor.vectors ? length / group_size * group_size : 0;
  for (int at = 0; at < grouped; at += group_size) {
    KeyFor<Acc> keys[group_size];
    group_keys<Acc, kind>(tensor, begin + at, keys);
    visit(keys, begin + at);
  }
  for (int at = grouped; at < length; ++at) {
    bool nan = false;
    const KeyFor<Acc> keys[1] = {key_at<Acc, kind>(tensor, begin + at, nan)};
    visit(keys, begin + at);
  }
}

struct Chunk {
  int64_t tensor, begin;
  int length;
};

__device__ __forceinline__ Chunk chunk_in(const Table& table, int64_t tensor, int64_t chunk) {
  const int64_t begin = (chunk - table.first_chunks[tensor]) * chunk_size;
  const int64_t rest = table.tensors[tensor].size - begin;
  return {tensor, begin, static_cast<int>(rest < chunk_size ? rest : chunk_size)};
}

// Calls use(chunk, its number) for the chunks of this block, which are neighbours.
template <class Use>
__device__ __forceinline__ void for_each_chunk(const Table& table, Use use) {
  int64_t c = table.chunks * blockIdx.x / gridDim.x;
  const int64_t end = table.chunks * (blockIdx.x + 1) / gridDim.x;
  if (c == end) return;
  int64_t t = last_not_above(table.first_chunks, table.length, c);
  for (; c < end; ++c) {
    while (t + 1 < table.length && table.first_chunks[t + 1] <= c) ++t;
    use(chunk_in(table, t, c), c);
  }
}

// Writes the neighbouring bytes of a mask, the first of which is in the lowest bits.
template <int size>
__device__ __forceinline__ void write_group(const View& out, int64_t index, uint64_t bytes) {
  auto* data = static_cast<uint8_t*>(const_cast<void*>(out.data));
  if constexpr (size == 1) {
    data[offset_of(out, index)] = static_cast<uint8_t>(bytes);
  } else if constexpr (size == 2) {
    *reinterpret_cast<uint16_t*>(data + index) = static_cast<uint16_t>(bytes);
  } else if constexpr (size == 4) {
    *reinterpret_cast<uint32_t*>(data + index) = static_cast<uint32_t>(bytes);
  } else {
    *reinterpret_cast<uint64_t*>(data + index) = bytes;
  }
}

}  // namespace cuda
}  // namespace torchalignprune
