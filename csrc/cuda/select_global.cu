// Masks that prune exactly `count` entries of a list of tensors, those of the lowest scores.
//
// A sample says between which two keys the last pruned entry lies, most probably; a pass over all
// entries counts those below and makes a histogram of those between, whose bins are single keys
// unless the two lie far apart, when further passes narrow the bins down; a last pass writes the
// masks. Where only some of the equals go, their places are counted chunk by chunk. Every pass is
// one launch for all tensors, and entries are never copied, concatenated or sorted. All counts are
// integers, so that nothing depends on the order in which blocks run.
#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <vector>

#include "device.cuh"
#include "launchers.h"

namespace torchalignprune {
namespace cuda {
namespace {

constexpr int block_threads = 256;
constexpr int64_t chunk_size = 8192;
constexpr int group_size = 4;
constexpr int run_length = 4;
constexpr int sample_runs = 1 << 14;
constexpr int sample_size = sample_runs * run_length;
constexpr int64_t most_fine_bins = int64_t{1} << 19;

using Count = unsigned long long;  // what atomicAdd takes

// The tensors, cut into chunks; an array of first chunks and one of first entries tell where each
// tensor begins.
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

// The keys of a group of a tensor that is read in vectors.
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

// A whole chunk of a plain tensor, in vectors of 16 bytes, several of them on their way at a time.
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

// Hands all keys of a chunk, in arrays of neighbours, to visit(keys, index of the first). Returns
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

// Draws short runs of entries, spread evenly with a fixed scatter that no row length falls in step
// with.
template <class Acc, Score kind>
__global__ void sample_kernel(Table table, KeyFor<Acc>* sample) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= sample_size) return;
  const int run = i / run_length;
  double scatter = run * 0.6180339887498949;
  scatter -= static_cast<double>(static_cast<int64_t>(scatter));
  const double step = static_cast<double>(table.entries) / sample_runs;
  const auto start = static_cast<int64_t>((run + scatter) * step);
  const int64_t position = min(start + i % run_length, table.entries - 1);
  const int64_t t = last_not_above(table.first_entries, table.length, position);
  bool nan = false;
  sample[i] = key_at<Acc, kind>(table.tensors[t], position - table.first_entries[t], nan);
}

template <class Key>
__global__ void plan_kernel(Search<Key>* search, const Key* sorted, int64_t entries) {
  plan_sampled(*search, sorted, sample_size, entries);
}

template <class Acc, Score kind>
__global__ void __launch_bounds__(block_threads)
    histogram_kernel(Table table, Search<KeyFor<Acc>>* search, Count* coarse, Count* fine) {
  using Key = KeyFor<Acc>;
  __shared__ uint32_t bins[coarse_bins];
  if (search->done) return;
  const Key low = search->low;
  const Key span = search->high - low;
  const int coarse_shift = search->coarse_shift;
  const int fine_shift = search->fine_shift;
  const bool counted = search->counted;
  const int used = static_cast<int>(span >> coarse_shift) + 1;
  for (int b = threadIdx.x; b < used; b += block_threads) bins[b] = 0;
  __syncthreads();

  Count below = 0;
  Count alive = 0;
  // Hits of the same bin in a row are counted in a register: neighbours are often equals.
  int last_bin = 0;
  uint32_t hits = 0;
  for_each_chunk(table, [&](const Chunk& chunk, int64_t) {
    uint32_t chunk_below = 0;
    uint32_t chunk_alive = 0;
    const bool nan = visit_chunk<Acc, kind>(
        table.tensors[chunk.tensor], chunk.begin, chunk.length, [&](const auto& keys, int64_t) {
          constexpr int size = sizeof(keys) / sizeof(Key);
#pragma unroll
          for (int i = 0; i < size; ++i) {
            const Key key = keys[i];
            chunk_alive += key != not_a_candidate<Key>() ? 1 : 0;
            chunk_below += key < low ? 1 : 0;
            const Key offset = key - low;
            if (offset > span) continue;
            const int bin = static_cast<int>(offset >> coarse_shift);
            if (bin != last_bin) {
              if (hits > 0) atomicAdd(&bins[last_bin], hits);
              last_bin = bin;
              hits = 0;
            }
            ++hits;
            if (fine_shift < coarse_shift) atomicAdd(&fine[offset >> fine_shift], Count{1});
          }
        });
    below += chunk_below;
    alive += chunk_alive;
    if (nan && !counted) {
      atomicMin(reinterpret_cast<Count*>(&search->nan), static_cast<Count>(chunk.tensor));
    }
  });
  if (hits > 0) atomicAdd(&bins[last_bin], hits);
  below = warp_sum(below);
  alive = warp_sum(alive);
  if (threadIdx.x % warp_size == 0) {
    atomicAdd(reinterpret_cast<Count*>(&search->below), below);
    if (!counted) atomicAdd(reinterpret_cast<Count*>(&search->alive), alive);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < used; b += block_threads) {
    if (bins[b] > 0) atomicAdd(&coarse[b], static_cast<Count>(bins[b]));
  }
}

constexpr int advance_threads = 1024;

template <class Key>
__global__ void __launch_bounds__(advance_threads)
    advance_kernel(Search<Key>* search, const Count* coarse, const Count* fine) {
  __shared__ int64_t sums[advance_threads / warp_size];
  __shared__ int64_t found[3];
  Search<Key> own = *search;
  __syncthreads();  // everybody has read what the first thread writes at the end
  if (own.done) return;
  const auto pick = [&](bool is_fine, int64_t first, int64_t n, int64_t rank) {
    const Count* bins = (is_fine ? fine : coarse) + first;
    if (threadIdx.x == 0) found[0] = -1;
    __syncthreads();
    int64_t before = 0;
    for (int64_t base = 0; base < n && before < rank; base += advance_threads) {
      const int64_t b = base + threadIdx.x;
      const int64_t inside = b < n ? static_cast<int64_t>(bins[b]) : 0;
      int64_t total;
      const int64_t below = before + block_running_sum(inside, sums, &total) - inside;
      if (below < rank && rank <= below + inside) {
        found[0] = b;
        found[1] = below;
        found[2] = inside;
      }
      before += total;
    }
    __syncthreads();
    Bin bin;
    bin.index = found[0];
    bin.below = found[1];
    bin.inside = found[2];
    __syncthreads();
    return bin;
  };
  advance(own, pick);
  if (threadIdx.x == 0) *search = own;
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

template <class Acc, Score kind>
__global__ void __launch_bounds__(block_threads)
    write_kernel(Table table, Threshold<KeyFor<Acc>> threshold, Count* equals) {
  using Key = KeyFor<Acc>;
  for_each_chunk(table, [&](const Chunk& chunk, int64_t c) {
    const Tensor& tensor = table.tensors[chunk.tensor];
    uint32_t equal = 0;
    visit_chunk<Acc, kind>(tensor, chunk.begin, chunk.length, [&](const auto& keys, int64_t index) {
      constexpr int size = sizeof(keys) / sizeof(Key);
      uint64_t bytes = 0;
#pragma unroll
      for (int i = 0; i < size; ++i) {
        equal += is_equal(threshold, keys[i]) ? 1 : 0;
        bytes |= static_cast<uint64_t>(is_kept(threshold, keys[i]) ? 1 : 0) << (8 * i);
      }
      write_group<size>(tensor.out, index, bytes);
    });
    if (!threshold.ties) return;
    equal = warp_sum(equal);
    if (threadIdx.x % warp_size == 0 && equal > 0) {
      atomicAdd(&equals[c], static_cast<Count>(equal));
    }
  });
}

// Turns the number of equals in each chunk into that in the chunks before it.
__global__ void __launch_bounds__(advance_threads) rank_kernel(Count* equals, int64_t chunks) {
  __shared__ Count sums[advance_threads / warp_size];
  Count before = 0;
  for (int64_t base = 0; base <= chunks; base += advance_threads) {
    const int64_t c = base + threadIdx.x;
    const Count own = c < chunks ? equals[c] : 0;
    Count total;
    const Count sum = block_running_sum(own, sums, &total);
    if (c <= chunks) equals[c] = before + sum - own;
    before += total;
  }
}

// Goes over the chunks again whose equals were not all written rightly. They are the first or the
// last ones, so the blocks take turns. Each thread has a stretch of neighbours.
template <class Acc, Score kind>
__global__ void __launch_bounds__(block_threads)
    tie_kernel(Table table, Threshold<KeyFor<Acc>> threshold, const Count* before) {
  using Key = KeyFor<Acc>;
  constexpr int stretch = chunk_size / block_threads;
  __shared__ int sums[block_threads / warp_size];
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const auto earlier = static_cast<int64_t>(before[c]);
    if (!is_wrong(threshold, earlier, static_cast<int64_t>(before[c + 1]) - earlier)) continue;
    const int64_t t = last_not_above(table.first_chunks, table.length, c);
    const Chunk chunk = chunk_in(table, t, c);
    const Tensor& tensor = table.tensors[t];
    const int at = static_cast<int>(threadIdx.x) * stretch;
    const int length = max(0, min(stretch, chunk.length - at));
    int equal = 0;
    visit_in_order<Acc, kind>(tensor, chunk.begin + at, length, [&](const auto& keys, int64_t) {
      constexpr int size = sizeof(keys) / sizeof(Key);
#pragma unroll
      for (int i = 0; i < size; ++i) equal += is_equal(threshold, keys[i]) ? 1 : 0;
    });
    int total;
    int64_t place = earlier + block_running_sum(equal, sums, &total) - equal;
    auto* data = static_cast<uint8_t*>(const_cast<void*>(tensor.out.data));
    visit_in_order<Acc, kind>(
        tensor, chunk.begin + at, length, [&](const auto& keys, int64_t index) {
          constexpr int size = sizeof(keys) / sizeof(Key);
#pragma unroll
          for (int i = 0; i < size; ++i) {
            if (!is_equal(threshold, keys[i])) continue;
            data[offset_of(tensor.out, index + i)] = place++ >= threshold.pruned ? 1 : 0;
          }
        });
  }
}

// The parts of the workspace.
template <class Key>
struct Workspace {
  explicit Workspace(const SelectGlobal& call, void* memory) : base(static_cast<char*>(memory)) {
    int64_t bytes = 0;
    for (int64_t t = 0; t < call.length; ++t) {
      const Tensor& tensor = call.tensors[t];
      table.chunks += (tensor.size + chunk_size - 1) / chunk_size;
      table.entries += tensor.size;
      const Element element = tensor.weight.element;
      bytes += tensor.size * (element == Element::f64 ? 8 : element == Element::f32 ? 4 : 2);
    }
    table.length = call.length;
    sampled = table.entries >= call.sample_from;
    // The fine bins take at most 1/64 of the memory of the weights.
    while (2 * fine_bins <= most_fine_bins &&
           2 * fine_bins * static_cast<int64_t>(sizeof(Count)) <= bytes / 64) {
      fine_bins *= 2;
    }
    search = take<Search<Key>>(1);
    table.tensors = take<Tensor>(call.length);
    table.first_chunks = take<int64_t>(call.length);
    table.first_entries = take<int64_t>(call.length);
    copied = size;
    coarse = take<Count>(coarse_bins + fine_bins);
    fine = coarse + coarse_bins;
    equals = take<Count>(table.chunks + 1);
    if (!sampled) return;
    sample = take<Key>(sample_size);
    sorted = take<Key>(sample_size);
    sort(nullptr);
    sorting = take<char>(static_cast<int64_t>(sorting_bytes));
  }

  cudaError_t sort(cudaStream_t stream) {
    return cub::DeviceRadixSort::SortKeys(
        sorting, sorting_bytes, sample, sorted, sample_size, 0, static_cast<int>(8 * sizeof(Key)),
        stream);
  }

  char* base;
  size_t size = 0;
  size_t copied = 0;  // so much comes from the host
  Table table{};
  bool sampled = false;
  int64_t fine_bins = coarse_bins;
  Search<Key>* search = nullptr;
  Count* coarse = nullptr;
  Count* fine = nullptr;
  Count* equals = nullptr;
  Key* sample = nullptr;
  Key* sorted = nullptr;
  char* sorting = nullptr;
  size_t sorting_bytes = 0;

 private:
  template <class Item>
  Item* take(int64_t n) {
    const size_t at = size;
    size += (static_cast<size_t>(n) * sizeof(Item) + 255) / 256 * 256;
    return base == nullptr ? nullptr : reinterpret_cast<Item*>(base + at);
  }
};

// Low bits in which no two keys differ: widening leaves them alike.
int grain_of(const SelectGlobal& call) {
  int grain = call.wide || call.score == Score::worth ? 0 : 16;
  for (int64_t t = 0; t < call.length && grain > 0; ++t) {
    const Tensor& tensor = call.tensors[t];
    if (tensor.size == 0) continue;
    const bool scaled = tensor.row_scale != nullptr || tensor.column_scale != nullptr;
    const Element element = tensor.weight.element;
    const bool half = element == Element::f16 || element == Element::bf16;
    grain = std::min(grain, scaled || !half ? 0 : element == Element::f16 ? 13 : 16);
  }
  return grain;
}

template <class Acc, Score kind>
cudaError_t search_as(const SelectGlobal& call, void* memory, Found* found, cudaStream_t stream) {
  using Key = KeyFor<Acc>;
  Workspace<Key> work(call, memory);

  Search<Key> search;
  search.count = call.count;
  search.nan = call.length;
  search.grain = grain_of(call);
  search.fine_bins = work.fine_bins;
  plan_all(search);

  std::vector<char> host(work.copied);
  const auto put = [&](const void* device, const void* source, size_t bytes) {
    memcpy(host.data() + (static_cast<const char*>(device) - work.base), source, bytes);
  };
  std::vector<int64_t> first_chunks, first_entries;
  int64_t chunk = 0;
  int64_t entry = 0;
  for (int64_t t = 0; t < call.length; ++t) {
    first_chunks.push_back(chunk);
    first_entries.push_back(entry);
    chunk += (call.tensors[t].size + chunk_size - 1) / chunk_size;
    entry += call.tensors[t].size;
  }
  const auto length = static_cast<size_t>(call.length);
  put(work.search, &search, sizeof(search));
  put(work.table.tensors, call.tensors, length * sizeof(Tensor));
  put(work.table.first_chunks, first_chunks.data(), length * sizeof(int64_t));
  put(work.table.first_entries, first_entries.data(), length * sizeof(int64_t));
  // From pageable memory, so `host` is read before this returns.
  TAP_CHECK(cudaMemcpyAsync(work.base, host.data(), work.copied, cudaMemcpyHostToDevice, stream));

  int blocks = 0;
  TAP_CHECK(
      resident_blocks(histogram_kernel<Acc, kind>, block_threads, work.table.chunks, &blocks));
  if (work.sampled) {
    sample_kernel<Acc, kind>
        <<<sample_size / block_threads, block_threads, 0, stream>>>(work.table, work.sample);
    TAP_CHECK(cudaGetLastError());
    TAP_CHECK(work.sort(stream));
    plan_kernel<Key><<<1, 1, 0, stream>>>(work.search, work.sorted, work.table.entries);
    TAP_CHECK(cudaGetLastError());
  }
  // So many passes do, most probably, and the host looks once they are done. Passes that are not
  // needed return at once.
  const int bits = static_cast<int>(8 * sizeof(Key)) - search.grain;
  int passes = work.sampled ? 1 : (bits + 10) / 11;
  while (!search.done) {
    for (; passes > 0; --passes) {
      TAP_CHECK(cudaMemsetAsync(
          work.coarse, 0, static_cast<size_t>(coarse_bins + work.fine_bins) * sizeof(Count),
          stream));
      histogram_kernel<Acc, kind>
          <<<blocks, block_threads, 0, stream>>>(work.table, work.search, work.coarse, work.fine);
      TAP_CHECK(cudaGetLastError());
      advance_kernel<Key><<<1, advance_threads, 0, stream>>>(work.search, work.coarse, work.fine);
      TAP_CHECK(cudaGetLastError());
    }
    passes = 1;
    TAP_CHECK(
        cudaMemcpyAsync(&search, work.search, sizeof(search), cudaMemcpyDeviceToHost, stream));
    TAP_CHECK(cudaStreamSynchronize(stream));
  }
  found->alive = search.alive;
  found->nan = search.nan < call.length ? search.nan : -1;
  found->low = search.low;
  found->high = search.high;
  found->pruned = search.count - search.below;
  found->inside = search.inside;
  return cudaSuccess;
}

template <class Acc, Score kind>
cudaError_t write_as(
    const SelectGlobal& call, void* memory, const Found& found, cudaStream_t stream) {
  using Key = KeyFor<Acc>;
  const Workspace<Key> work(call, memory);
  const Threshold<Key> threshold = threshold_of(
      static_cast<Key>(found.low), static_cast<Key>(found.high), found.pruned, found.inside);
  int blocks = 0;
  TAP_CHECK(resident_blocks(write_kernel<Acc, kind>, block_threads, work.table.chunks, &blocks));
  if (threshold.ties) {
    TAP_CHECK(cudaMemsetAsync(
        work.equals, 0, static_cast<size_t>(work.table.chunks + 1) * sizeof(Count), stream));
  }
  write_kernel<Acc, kind><<<blocks, block_threads, 0, stream>>>(work.table, threshold, work.equals);
  TAP_CHECK(cudaGetLastError());
  if (!threshold.ties) return cudaSuccess;
  rank_kernel<<<1, advance_threads, 0, stream>>>(work.equals, work.table.chunks);
  TAP_CHECK(cudaGetLastError());
  TAP_CHECK(resident_blocks(tie_kernel<Acc, kind>, block_threads, work.table.chunks, &blocks));
  tie_kernel<Acc, kind><<<blocks, block_threads, 0, stream>>>(work.table, threshold, work.equals);
  return cudaGetLastError();
}

}  // namespace

size_t select_global_workspace(const SelectGlobal& call) {
  return call.wide ? Workspace<uint64_t>(call, nullptr).size
                   : Workspace<uint32_t>(call, nullptr).size;
}

cudaError_t select_global_search(
    const SelectGlobal& call, void* workspace, Found* found, cudaStream_t stream) {
  switch (call.score) {
    case Score::value:
      return call.wide ? search_as<double, Score::value>(call, workspace, found, stream)
                       : search_as<float, Score::value>(call, workspace, found, stream);
    case Score::magnitude:
      return call.wide ? search_as<double, Score::magnitude>(call, workspace, found, stream)
                       : search_as<float, Score::magnitude>(call, workspace, found, stream);
    default:
      return call.wide ? search_as<double, Score::worth>(call, workspace, found, stream)
                       : search_as<float, Score::worth>(call, workspace, found, stream);
  }
}

cudaError_t select_global_write(
    const SelectGlobal& call, void* workspace, const Found& found, cudaStream_t stream) {
  switch (call.score) {
    case Score::value:
      return call.wide ? write_as<double, Score::value>(call, workspace, found, stream)
                       : write_as<float, Score::value>(call, workspace, found, stream);
    case Score::magnitude:
      return call.wide ? write_as<double, Score::magnitude>(call, workspace, found, stream)
                       : write_as<float, Score::magnitude>(call, workspace, found, stream);
    default:
      return call.wide ? write_as<double, Score::worth>(call, workspace, found, stream)
                       : write_as<float, Score::worth>(call, workspace, found, stream);
  }
}

}  // namespace cuda
}  // namespace torchalignprune
