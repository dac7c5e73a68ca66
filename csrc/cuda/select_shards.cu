// The counts that the processes holding the shards of a list of tensors add up to agree on a
// threshold, and then the masks of the shards. Every operator is one launch for all tensors of this
// process; all counts are integers, so that nothing depends on the order in which blocks run.
#include <algorithm>
#include <vector>

#include "chunks.cuh"
#include "launchers.h"

namespace torchalignprune {
namespace cuda {
namespace {

constexpr int most_bins = 2048;

// `numbers` are the tensors' places among `all`; empty tensors are left out here.
template <class Acc, Score kind>
__global__ void __launch_bounds__(block_threads) counts_kernel(
    Table table, const int64_t* numbers, int64_t all, KeyFor<Acc> low, KeyFor<Acc> span, int shift,
    int bins, Count* out) {
  using Key = KeyFor<Acc>;
  __shared__ uint32_t shared[most_bins];
  for (int b = threadIdx.x; b < bins; b += block_threads) shared[b] = 0;
  __syncthreads();

  Count below = 0;
  // Hits of the same bin in a row are counted in a register: neighbours are often equals.
  int last_bin = 0;
  uint32_t hits = 0;
  for_each_chunk(table, [&](const Chunk& chunk, int64_t) {
    uint32_t chunk_below = 0;
    const bool nan = visit_chunk<Acc, kind>(
        table.tensors[chunk.tensor], chunk.begin, chunk.length, [&](const auto& keys, int64_t) {
          constexpr int size = sizeof(keys) / sizeof(Key);
#pragma unroll
          for (int i = 0; i < size; ++i) {
            const Key key = keys[i];
            chunk_below += key < low ? 1 : 0;
            const Key offset = key - low;
            if (offset > span) continue;
            const int bin = static_cast<int>(offset >> shift);
            if (bin != last_bin) {
              if (hits > 0) atomicAdd(&shared[last_bin], hits);
              last_bin = bin;
              hits = 0;
            }
            ++hits;
          }
        });
    below += chunk_below;
    // The larger, the earlier the tensor.
    if (nan) atomicMax(&out[bins + 1], static_cast<Count>(all - numbers[chunk.tensor]));
  });
  if (hits > 0) atomicAdd(&shared[last_bin], hits);
  below = warp_sum(below);
  if (threadIdx.x % warp_size == 0 && below > 0) atomicAdd(&out[bins], below);
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += block_threads) {
    if (shared[b] > 0) atomicAdd(&out[b], static_cast<Count>(shared[b]));
  }
}

// Turns what the blocks have left about NaN into 1 + the number of the tensor.
__global__ void number_kernel(Count* nan, int64_t all) {
  if (*nan > 0) *nan = static_cast<Count>(all) + 1 - *nan;
}

template <class Acc, Score kind>
__global__ void __launch_bounds__(block_threads) ties_kernel(
    Table table, KeyFor<Acc> key, const int64_t* edges, const int64_t* first_edges,
    const int64_t* first_stretches, Count* out) {
  using Key = KeyFor<Acc>;
  for_each_chunk(table, [&](const Chunk& chunk, int64_t) {
    const int64_t* own = edges + first_edges[chunk.tensor];
    const int64_t n = first_edges[chunk.tensor + 1] - first_edges[chunk.tensor];
    if (own[0] >= chunk.begin + chunk.length || own[n - 1] <= chunk.begin) return;
    Count* counts = out + first_stretches[chunk.tensor];
    // The stretch that the last equal was in.
    int64_t stretch = 0;
    int64_t from = 0;
    int64_t to = 0;
    uint32_t hits = 0;
    visit_chunk<Acc, kind>(
        table.tensors[chunk.tensor], chunk.begin, chunk.length,
        [&](const auto& keys, int64_t index) {
          constexpr int size = sizeof(keys) / sizeof(Key);
#pragma unroll
          for (int i = 0; i < size; ++i) {
            const int64_t at = index + i;
            if (keys[i] != key || at < own[0] || at >= own[n - 1]) continue;
            if (at < from || at >= to) {
              if (hits > 0) atomicAdd(&counts[stretch], static_cast<Count>(hits));
              hits = 0;
              stretch = last_not_above(own, n, at);
              from = own[stretch];
              to = own[stretch + 1];
            }
            ++hits;
          }
        });
    if (hits > 0) atomicAdd(&counts[stretch], static_cast<Count>(hits));
  });
}

template <class Acc, Score kind>
__global__ void __launch_bounds__(block_threads)
    masks_kernel(Table table, KeyFor<Acc> key, const int64_t* splits) {
  using Key = KeyFor<Acc>;
  for_each_chunk(table, [&](const Chunk& chunk, int64_t) {
    const Tensor& tensor = table.tensors[chunk.tensor];
    const int64_t split = splits[chunk.tensor];
    visit_chunk<Acc, kind>(tensor, chunk.begin, chunk.length, [&](const auto& keys, int64_t index) {
      constexpr int size = sizeof(keys) / sizeof(Key);
      uint64_t bytes = 0;
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const bool kept = keys[i] != not_a_candidate<Key>() &&
                          (keys[i] > key || (keys[i] == key && index + i >= split));
        bytes |= static_cast<uint64_t>(kept ? 1 : 0) << (8 * i);
      }
      write_group<size>(tensor.out, index, bytes);
    });
  });
}

// The table on the device, and behind it the numbers that a kernel needs.
struct Upload {
  Upload(const Shards& call, const std::vector<std::pair<const int64_t*, int64_t>>& lists) {
    first_chunks.push_back(0);
    for (int64_t t = 0; t < call.length; ++t) {
      const int64_t size = call.tensors[t].size;
      first_chunks.push_back(first_chunks.back() + (size + chunk_size - 1) / chunk_size);
      table.entries += size;
    }
    table.length = call.length;
    table.chunks = first_chunks.back();
    const auto put = [&](const void* source, int64_t bytes) {
      const size_t at = host.size();
      const size_t end = at + (static_cast<size_t>(bytes) + 255) / 256 * 256;
      host.resize(end);
      if (bytes > 0) memcpy(host.data() + at, source, static_cast<size_t>(bytes));
      return at;
    };
    tensors_at = put(call.tensors, call.length * static_cast<int64_t>(sizeof(Tensor)));
    chunks_at = put(first_chunks.data(), call.length * static_cast<int64_t>(sizeof(int64_t)));
    for (const auto& [list, n] : lists) {
      lists_at.push_back(put(list, n * static_cast<int64_t>(sizeof(int64_t))));
    }
  }

  // From pageable memory, so `host` is read before this returns.
  cudaError_t send(void* workspace, cudaStream_t stream) {
    base = static_cast<const char*>(workspace);
    table.tensors = reinterpret_cast<const Tensor*>(base + tensors_at);
    table.first_chunks = reinterpret_cast<const int64_t*>(base + chunks_at);
    return cudaMemcpyAsync(workspace, host.data(), host.size(), cudaMemcpyHostToDevice, stream);
  }

  const int64_t* list(size_t i) const {
    return reinterpret_cast<const int64_t*>(base + lists_at[i]);
  }

  Table table{};
  std::vector<char> host;

 private:
  const char* base = nullptr;
  std::vector<int64_t> first_chunks;
  size_t tensors_at = 0;
  size_t chunks_at = 0;
  std::vector<size_t> lists_at;
};

Upload upload_of(const ShardCounts& call) {
  return Upload(call.shards, {{call.numbers, call.shards.length}});
}
Upload upload_of(const ShardTies& call) {
  const int64_t n = call.shards.length;
  return Upload(
      call.shards,
      {{call.edges, call.first_edges[n]}, {call.first_edges, n + 1}, {call.first_stretches, n}});
}
Upload upload_of(const ShardMasks& call) {
  return Upload(call.shards, {{call.splits, call.shards.length}});
}

template <class Acc, Score kind>
cudaError_t run_as(const ShardCounts& call, Upload& sent, cudaStream_t stream) {
  using Key = KeyFor<Acc>;
  const Key low = static_cast<Key>(call.low);
  const Key rest = not_a_candidate<Key>() - 1 - low;
  const Key last = static_cast<Key>(call.bins) - 1;
  const Key span =
      last >= (rest >> call.shift) ? rest : static_cast<Key>(((last + 1) << call.shift) - 1);
  auto* out = reinterpret_cast<Count*>(call.out);
  int blocks = 0;
  TAP_CHECK(resident_blocks(counts_kernel<Acc, kind>, block_threads, sent.table.chunks, &blocks));
  counts_kernel<Acc, kind><<<blocks, block_threads, 0, stream>>>(
      sent.table, sent.list(0), call.all, low, span, call.shift, static_cast<int>(call.bins), out);
  TAP_CHECK(cudaGetLastError());
  number_kernel<<<1, 1, 0, stream>>>(out + call.bins + 1, call.all);
  return cudaGetLastError();
}

template <class Acc, Score kind>
cudaError_t run_as(const ShardTies& call, Upload& sent, cudaStream_t stream) {
  int blocks = 0;
  TAP_CHECK(resident_blocks(ties_kernel<Acc, kind>, block_threads, sent.table.chunks, &blocks));
  ties_kernel<Acc, kind><<<blocks, block_threads, 0, stream>>>(
      sent.table, static_cast<KeyFor<Acc>>(call.key), sent.list(0), sent.list(1), sent.list(2),
      reinterpret_cast<Count*>(call.out));
  return cudaGetLastError();
}

template <class Acc, Score kind>
cudaError_t run_as(const ShardMasks& call, Upload& sent, cudaStream_t stream) {
  int blocks = 0;
  TAP_CHECK(resident_blocks(masks_kernel<Acc, kind>, block_threads, sent.table.chunks, &blocks));
  masks_kernel<Acc, kind><<<blocks, block_threads, 0, stream>>>(
      sent.table, static_cast<KeyFor<Acc>>(call.key), sent.list(0));
  return cudaGetLastError();
}

template <class Call>
cudaError_t run(const Call& call, void* workspace, cudaStream_t stream) {
  Upload sent = upload_of(call);
  TAP_CHECK(sent.send(workspace, stream));
  const bool wide = call.shards.wide;
  switch (call.shards.score) {
    case Score::value:
      return wide ? run_as<double, Score::value>(call, sent, stream)
                  : run_as<float, Score::value>(call, sent, stream);
    case Score::magnitude:
      return wide ? run_as<double, Score::magnitude>(call, sent, stream)
                  : run_as<float, Score::magnitude>(call, sent, stream);
    default:
      return wide ? run_as<double, Score::worth>(call, sent, stream)
                  : run_as<float, Score::worth>(call, sent, stream);
  }
}

}  // namespace

size_t shard_counts_workspace(const ShardCounts& call) { return upload_of(call).host.size(); }
size_t shard_ties_workspace(const ShardTies& call) { return upload_of(call).host.size(); }
size_t shard_masks_workspace(const ShardMasks& call) { return upload_of(call).host.size(); }

cudaError_t shard_counts(const ShardCounts& call, void* workspace, cudaStream_t stream) {
  return run(call, workspace, stream);
}
cudaError_t shard_ties(const ShardTies& call, void* workspace, cudaStream_t stream) {
  return run(call, workspace, stream);
}
cudaError_t shard_masks(const ShardMasks& call, void* workspace, cudaStream_t stream) {
  return run(call, workspace, stream);
}

}  // namespace cuda
}  // namespace torchalignprune
