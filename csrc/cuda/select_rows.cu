// A mask that prunes exactly counts[i] entries of row i, those with the lowest scores.
//
// Rows of up to 32 entries take a lane for each entry, which counts those that are pruned before
// its own. Longer ones take a warp or a block each.
#include "device.cuh"
#include "launchers.h"
#include "row_search.cuh"

namespace torchalignprune {
namespace cuda {
namespace {

constexpr int least_threads = 128;  // of a block

template <class Acc>
__device__ __forceinline__ KeyFor<Acc> row_key(
    const SelectRows& call, int64_t row, int64_t column, bool& nan) {
  if (call.mask != nullptr &&
      call.mask[row * call.mask_strides[0] + column * call.mask_strides[1]] == 0) {
    return not_a_candidate<KeyFor<Acc>>();
  }
  const int64_t at = row * call.weight_strides[0] + column * call.weight_strides[1];
  const Acc score = add(read<Acc>(call.weight, call.element, at), Acc{0});
  nan |= score != score;
  return order(score);
}

__device__ __forceinline__ void report_row(Faults* faults, int64_t row) {
  atomicMin(
      reinterpret_cast<unsigned long long*>(&faults->row), static_cast<unsigned long long>(row));
}

template <class Acc>
__global__ void __launch_bounds__(least_threads)
    short_rows_kernel(SelectRows call, Faults* faults) {
  using Key = KeyFor<Acc>;
  const int columns = static_cast<int>(call.columns);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int rows_each = warp_size / columns;
  const int own = lane / columns;
  const int first = own * columns;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (least_threads / warp_size);
  const int64_t warp =
      static_cast<int64_t>(blockIdx.x) * (least_threads / warp_size) + threadIdx.x / warp_size;
  for (int64_t base = warp * rows_each; base < call.rows; base += warps * rows_each) {
    const int64_t row = base + own;
    const bool here = own < rows_each && row < call.rows;
    bool nan = false;
    const Key key = here ? row_key<Acc>(call, row, lane - first, nan) : not_a_candidate<Key>();
    int rank = 0;
    int alive = 0;
    for (int j = 0; j < columns; ++j) {
      const Key other = __shfl_sync(all_lanes, key, (first + j) % warp_size);
      rank += other < key || (other == key && j < lane - first) ? 1 : 0;
      alive += other != not_a_candidate<Key>() ? 1 : 0;
    }
    if (nan) faults->nan = 1;
    if (!here) continue;
    const int64_t count = call.counts[row];
    if (count < 0 || count > alive) report_row(faults, row);
    call.out[row * columns + lane - first] = key != not_a_candidate<Key>() && rank >= count ? 1 : 0;
  }
}

// `threads` work on a row: a warp, of which there are several in a block, or a block.
template <class Acc, int threads>
__global__ void __launch_bounds__(threads < least_threads ? least_threads : threads)
    long_rows_kernel(SelectRows call, Faults* faults) {
  using Key = KeyFor<Acc>;
  constexpr int groups = threads < least_threads ? least_threads / threads : 1;
  __shared__ RowScratch<Key, threads> scratches[groups];
  const int group = static_cast<int>(threadIdx.x) / threads;
  const int member = static_cast<int>(threadIdx.x) % threads;
  RowScratch<Key, threads>& scratch = scratches[group];
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * groups + group; row < call.rows;
       row += static_cast<int64_t>(gridDim.x) * groups) {
    bool nan = false;
    const auto key_at = [&](int64_t i) { return row_key<Acc>(call, row, i, nan); };
    const Search<Key> search =
        search_row<Key, threads>(call.columns, call.counts[row], scratch, key_at);
    if (nan) faults->nan = 1;
    if (!search.done) {
      if (member == 0) report_row(faults, row);
      continue;
    }
    const Threshold<Key> threshold =
        threshold_of(search.low, search.high, search.count - search.below, search.inside);
    uint8_t* out = call.out + row * call.columns;
    int64_t place = 0;
    for (int64_t base = 0; base < call.columns; base += threads) {
      const int64_t i = base + member;
      const Key key = i < call.columns ? key_at(i) : not_a_candidate<Key>();
      bool kept = is_kept(threshold, key);
      if (threshold.ties) {
        const bool equal = is_equal(threshold, key);
        int64_t total;
        const int64_t before = place + count_before(equal, scratch, &total);
        place += total;
        if (equal) kept = before >= threshold.pruned;
      }
      if (i < call.columns) out[i] = kept ? 1 : 0;
    }
  }
}

template <class Acc, int threads>
cudaError_t long_rows(const SelectRows& call, Faults* faults, cudaStream_t stream) {
  constexpr int block = threads < least_threads ? least_threads : threads;
  constexpr int64_t groups = block / threads;
  int blocks = 0;
  TAP_CHECK(resident_blocks(
      long_rows_kernel<Acc, threads>, block, (call.rows + groups - 1) / groups, &blocks));
  long_rows_kernel<Acc, threads><<<blocks, block, 0, stream>>>(call, faults);
  return cudaGetLastError();
}

template <class Acc>
cudaError_t select_rows_as(const SelectRows& call, Faults* faults, cudaStream_t stream) {
  if (call.columns > 8192) return long_rows<Acc, 1024>(call, faults, stream);
  if (call.columns > 512) return long_rows<Acc, 128>(call, faults, stream);
  if (call.columns > warp_size) return long_rows<Acc, warp_size>(call, faults, stream);
  const int64_t rows_each = warp_size / call.columns * (least_threads / warp_size);
  int blocks = 0;
  TAP_CHECK(resident_blocks(
      short_rows_kernel<Acc>, least_threads, (call.rows + rows_each - 1) / rows_each, &blocks));
  short_rows_kernel<Acc><<<blocks, least_threads, 0, stream>>>(call, faults);
  return cudaGetLastError();
}

}  // namespace

size_t select_rows_workspace() { return sizeof(Faults); }

cudaError_t select_rows(
    const SelectRows& call, void* workspace, Faults* faults, cudaStream_t stream) {
  *faults = {0, ~uint64_t{0}};
  auto* own = static_cast<Faults*>(workspace);
  TAP_CHECK(cudaMemcpyAsync(own, faults, sizeof(Faults), cudaMemcpyHostToDevice, stream));
  TAP_CHECK(
      call.element == Element::f64 ? select_rows_as<double>(call, own, stream)
                                   : select_rows_as<float>(call, own, stream));
  TAP_CHECK(cudaMemcpyAsync(faults, own, sizeof(Faults), cudaMemcpyDeviceToHost, stream));
  return cudaStreamSynchronize(stream);
}

}  // namespace cuda
}  // namespace torchalignprune
