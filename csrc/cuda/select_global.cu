// Masks that prune exactly `count` entries of a list of tensors, those with the lowest scores.
//
// A sample gives two keys that most probably bracket the last pruned entry. A pass over all entries
// counts those below and makes a histogram of those between; its bins are single keys unless the
// bracket is wide, and then further passes narrow them down. A last pass writes the masks. If only
// some of the equals are pruned, their places are counted chunk by chunk. Every pass is one launch
// for all tensors, and entries are never copied, concatenated or sorted. All counts are integers,
// so that nothing depends on the order in which blocks run.
#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <vector>

#include "chunks.cuh"
#include "launchers.h"

namespace torchalignprune {
namespace cuda {
namespace {

constexpr int run_length = 4;
constexpr int sample_runs = 1 << 14;
constexpr int sample_size = sample_runs * run_length;
constexpr int64_t most_fine_bins = int64_t{1} << 19;

// Draws short runs of entries, spread evenly with a fixed jitter that no row length is in step
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
  __syncthreads();  // all threads have read what the first one writes at the end
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

// Replaces the number of equals in each chunk by the number in all chunks before it.
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

// Corrects the chunks whose equals were not all written rightly. They are the first or the last
// ones, so the blocks take turns. Each thread has a stretch of neighbours.
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
  size_t copied = 0;  // bytes that come from the host
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

// Low bits in which no two keys differ, because widening fills them alike.
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
  // This many passes most probably suffice, and the host looks once they are done. Passes that are
  // not needed return at once.
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
