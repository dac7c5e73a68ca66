// How the kernels distribute the entries of masked tensors, 16 bytes to a thread at a time. Many
// tensors go into one launch: what the kernels need to know of them fits into the arguments of a
// launch, so that nothing is copied to the device.
#pragma once

#include "unit_pieces.cuh"

namespace torchalignprune {
namespace cuda {

constexpr int mask_threads = 256;
constexpr int mask_ahead = 4;  // times that a thread reads before it writes
constexpr int most_runs = 80;

struct RunBatch {
  MaskedRun runs[most_runs];
  int64_t first_blocks[most_runs];
  int64_t blocks = 0;
  int64_t length = 0;
};
static_assert(sizeof(RunBatch) + 64 <= 4096, "the arguments of a kernel have 4 KiB");

// How many entries of a size in bytes a thread takes at a time.
constexpr int width_for(int bytes) { return 16 / bytes; }

inline bool is_aligned(const MaskedRun& run) {
  const auto in_place = [](const void* data, int bytes) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
  };
  return in_place(run.values, 16) && in_place(run.out, 16) &&
         in_place(run.mask, width_for(run.bytes));
}

// Calls launch(batch, Bytes<bytes>(), Bytes<width>()) for stretches of the list that one kernel can
// take.
template <class Launch>
cudaError_t in_run_batches(const MaskedRun* runs, int64_t length, Launch launch) {
  const auto with_width = [&](const RunBatch& batch, bool aligned, auto bytes) {
    constexpr int width = width_for(decltype(bytes)::value);
    return aligned ? launch(batch, bytes, Bytes<width>()) : launch(batch, bytes, Bytes<1>());
  };
  RunBatch batch;
  for (int64_t i = 0; i < length; ++i) {
    const bool aligned = is_aligned(runs[i]);
    const int64_t width = aligned ? width_for(runs[i].bytes) : 1;
    batch.runs[batch.length] = runs[i];
    batch.first_blocks[batch.length++] = batch.blocks;
    batch.blocks += shares(runs[i].size, mask_threads * mask_ahead * width);
    const bool last = i + 1 == length || batch.length == most_runs;
    if (!last && runs[i + 1].bytes == runs[i].bytes && is_aligned(runs[i + 1]) == aligned) continue;
    if (runs[i].bytes == 2) {
      TAP_CHECK(with_width(batch, aligned, Bytes<2>()));
    } else if (runs[i].bytes == 4) {
      TAP_CHECK(with_width(batch, aligned, Bytes<4>()));
    } else {
      TAP_CHECK(with_width(batch, aligned, Bytes<8>()));
    }
    batch = RunBatch();
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t launch_runs(Kernel kernel, const RunBatch& batch, cudaStream_t stream) {
  if (batch.blocks == 0) return cudaSuccess;
  int blocks = 0;
  TAP_CHECK(resident_blocks(kernel, mask_threads, batch.blocks, &blocks));
  kernel<<<blocks, mask_threads, 0, stream>>>(batch);
  return cudaGetLastError();
}

// Calls use(run, places, whole) with the first of the `width` entries that this thread takes at
// each of its turns; `whole[j]` says whether the run has all of them.
template <int width, class Use>
__device__ __forceinline__ void for_each_turn(const RunBatch& batch, Use use) {
  constexpr int64_t step = mask_threads * width;
  for (int64_t block = blockIdx.x; block < batch.blocks; block += gridDim.x) {
    const int64_t which = last_not_above(batch.first_blocks, batch.length, block);
    const MaskedRun& run = batch.runs[which];
    const int64_t first = (block - batch.first_blocks[which]) * (mask_ahead * step);
    int64_t places[mask_ahead];
    bool whole[mask_ahead];
#pragma unroll
    for (int j = 0; j < mask_ahead; ++j) {
      places[j] = first + j * step + static_cast<int64_t>(threadIdx.x) * width;
      whole[j] = places[j] + width <= run.size;
    }
    use(run, places, whole);
  }
}

// The entries at the end of a run, if they are fewer than `width`.
template <int width, class Use>
__device__ __forceinline__ void for_each_left(
    const MaskedRun& run, const int64_t* places, const bool* whole, Use use) {
  if constexpr (width > 1) {
#pragma unroll
    for (int j = 0; j < mask_ahead; ++j) {
      if (whole[j]) continue;
      for (int64_t i = places[j]; i < run.size; ++i) use(i);
    }
  }
}

template <class Raw>
__device__ __forceinline__ int count_kept(const Raw& mask) {
  int kept = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(mask.at)); ++i) kept += mask.at[i] != 0 ? 1 : 0;
  return kept;
}

template <class Kernel>
cudaError_t launch_views(Kernel kernel, const MaskedViews& call, cudaStream_t stream) {
  if (call.size == 0) return cudaSuccess;
  int blocks = 0;
  TAP_CHECK(resident_blocks(kernel, mask_threads, shares(call.size, mask_threads), &blocks));
  kernel<<<blocks, mask_threads, 0, stream>>>(call);
  return cudaGetLastError();
}

// Calls use(index) for the entries that are this thread's.
template <class Use>
__device__ __forceinline__ void for_each_entry(int64_t size, Use use) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * mask_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * mask_threads + threadIdx.x; i < size;
       i += threads) {
    use(i);
  }
}

}  // namespace cuda
}  // namespace torchalignprune
