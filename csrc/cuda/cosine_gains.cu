// What each entry adds to the alignment of its unit (row), taken in descending order of importance.
//
// Rows are sorted in shared memory; those of more than 4096 entries in global memory, all of them
// together. With a reference a block orders a row by searching for the best of the entries that are
// left, up to 512 at a time. Sums are in float64 and add up a row entry by entry, in the order of
// the CPU, so that the gains are the same bit for bit. One warp adds up a row, and rows run in
// parallel. A single very long row therefore takes the time of its chain of additions, and with a
// reference a time that grows with the square of its length from some ten thousand entries on.
#include <cfloat>
#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "device.cuh"
#include "launchers.h"
#include "row_search.cuh"

namespace torchalignprune {
namespace cuda {
namespace {

constexpr int block_threads = 128;
constexpr int64_t slab_entries = int64_t{1} << 24;  // sorted at a time, or one row

// What is the same for all entries of a row.
struct Unit {
  double norm;                         // of the reference
  double weight_peak, reference_peak;  // float64 is divided by these
  uint32_t count;                      // candidates, or 0 if no entry gains anything
};

// Rows [first, first + rows) of the call.
struct Slab {
  int64_t first, rows;
};

// An entry as it lies in memory, and the factor of its column. They are widened and multiplied
// later, since that waits for the loads.
template <class Acc>
struct Loaded {
  uint64_t bits = 0;
  Acc factor = 1;
};

template <class Acc>
__device__ __forceinline__ Loaded<Acc> load(
    const CosineGains& call, const View& view, int64_t row, int64_t position) {
  Loaded<Acc> loaded;
  const int64_t offset = offset_of(view, row * call.row_size + position);
  switch (view.element) {
    case Element::f64:
      loaded.bits = static_cast<const uint64_t*>(view.data)[offset];
      break;
    case Element::f32:
      loaded.bits = static_cast<const uint32_t*>(view.data)[offset];
      break;
    default:
      loaded.bits = static_cast<const uint16_t*>(view.data)[offset];
  }
  if (call.column_scale != nullptr) {
    const int64_t column = call.inner == 1 ? position : quotient(position, call.inner);
    loaded.factor = factor<Acc>(call.column_scale, column * call.column_step);
  }
  return loaded;
}

template <class Acc>
__device__ __forceinline__ Acc widened(uint64_t bits, Element element) {
  switch (element) {
    case Element::f64:
      return static_cast<Acc>(bits_as<double>(bits));
    case Element::f32:
      return static_cast<Acc>(bits_as<float>(static_cast<uint32_t>(bits)));
    case Element::f16:
      return static_cast<Acc>(from_f16(static_cast<uint16_t>(bits)));
    default:
      return static_cast<Acc>(from_bf16(static_cast<uint16_t>(bits)));
  }
}

template <class Acc>
__device__ __forceinline__ double value_of(const View& view, const Loaded<Acc>& loaded) {
  return static_cast<double>(multiply(widened<Acc>(loaded.bits, view.element), loaded.factor));
}

template <class Acc>
__device__ __forceinline__ double read_entry(
    const CosineGains& call, const View& view, int64_t row, int64_t position) {
  return value_of(view, load<Acc>(call, view, row, position));
}

// Squares of float64 may overflow or vanish, and alignment does not depend on a unit's scale.
template <class Acc>
__device__ __forceinline__ double normed(double value, double peak) {
  return sizeof(Acc) == 8 ? value / peak : value;
}

template <class Acc>
__device__ __forceinline__ double weight_at(
    const CosineGains& call, const Unit& unit, int64_t row, int64_t position) {
  return normed<Acc>(read_entry<Acc>(call, call.weight, row, position), unit.weight_peak);
}

template <class Acc>
__device__ __forceinline__ double reference_at(
    const CosineGains& call, const Unit& unit, int64_t row, int64_t position) {
  return normed<Acc>(read_entry<Acc>(call, call.reference, row, position), unit.reference_peak);
}

__device__ __forceinline__ double peak_or_one(double peak) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) {
    peak = fmax(peak, __shfl_xor_sync(all_lanes, peak, step));
  }
  return peak > 0 ? peak : 1;
}

__device__ __forceinline__ int64_t first_warp() {
  return static_cast<int64_t>(blockIdx.x) * (block_threads / warp_size) + threadIdx.x / warp_size;
}
__device__ __forceinline__ int64_t all_warps() {
  return static_cast<int64_t>(gridDim.x) * (block_threads / warp_size);
}

// Not 0 for a candidate.
__device__ __forceinline__ uint8_t mask_at(const CosineGains& call, int64_t row, int64_t position) {
  if (call.mask.data == nullptr) return 1;
  const int64_t offset = offset_of(call.mask, row * call.row_size + position);
  return static_cast<const uint8_t*>(call.mask.data)[offset];
}

__device__ __forceinline__ bool is_candidate(
    const CosineGains& call, int64_t row, int64_t position) {
  return mask_at(call, row, position) != 0;
}

// A warp for each row.
template <class Acc>
__global__ void __launch_bounds__(block_threads)
    unit_kernel(CosineGains call, Slab slab, Unit* units, uint32_t* faults) {
  alignas(16) __shared__ double all_values[block_threads];
  double* values = all_values + threadIdx.x / warp_size * warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const bool has_reference = call.reference.data != nullptr;
  for (int64_t r = first_warp(); r < slab.rows; r += all_warps()) {
    const int64_t row = slab.first + r;
    Unit unit{};
    unit.weight_peak = unit.reference_peak = 1;
    if constexpr (sizeof(Acc) == 8) {
      double weight_peak = 0;
      double reference_peak = 0;
      for (int64_t i = lane; i < call.row_size; i += warp_size) {
        weight_peak = fmax(weight_peak, fabs(read_entry<Acc>(call, call.weight, row, i)));
        if (!has_reference) continue;
        reference_peak = fmax(reference_peak, fabs(read_entry<Acc>(call, call.reference, row, i)));
      }
      unit.weight_peak = peak_or_one(weight_peak);
      unit.reference_peak = peak_or_one(reference_peak);
    }
    struct {
      Loaded<Acc> weight, reference;
      uint8_t mask = 0;
    } entry, next;
    const auto load_next = [&](int64_t i) {
      next = {};
      if (i >= call.row_size) return;
      next.weight = load<Acc>(call, call.weight, row, i);
      if (has_reference) next.reference = load<Acc>(call, call.reference, row, i);
      next.mask = mask_at(call, row, i);
    };
    double square = 0;
    bool finite = true;
    load_next(lane);
    for (int64_t base = 0; base < call.row_size; base += warp_size) {
      entry = next;
      load_next(base + warp_size + lane);  // while these are added up
      double value = value_of(call.weight, entry.weight);
      finite = finite && fabs(value) <= DBL_MAX;
      if (has_reference) {
        value = value_of(call.reference, entry.reference);
        finite = finite && fabs(value) <= DBL_MAX;
      }
      value = normed<Acc>(value, has_reference ? unit.reference_peak : unit.weight_peak);
      sum_in_order(multiply(value, value), values, square);
      unit.count += __popc(__ballot_sync(all_lanes, entry.mask != 0));
    }
    finite = __all_sync(all_lanes, finite);
    unit.norm = sqrt(square);
    // A unit whose reference is zero gains nothing from any entry.
    if (!finite || !(unit.norm > 0)) unit.count = 0;
    if (lane != 0) continue;
    if (!finite) *faults = 1;
    units[r] = unit;
  }
}

// For r = w the entries are in the order of |w|.
template <class Acc>
__device__ __forceinline__ KeyFor<Acc> magnitude_key(
    const CosineGains& call, const Unit& unit, int64_t row, int64_t position) {
  if (!is_candidate(call, row, position)) return not_a_candidate<KeyFor<Acc>>();
  return order(static_cast<Acc>(fabs(weight_at<Acc>(call, unit, row, position))));
}

// The sorting kernels write the candidates of each row in ascending order, as places in the slab.
// Among equals the lower position comes first, and is pruned first.

// Rows of up to 32 entries: a lane for each, which counts those that come before its own.
template <class Acc>
__global__ void __launch_bounds__(block_threads)
    sort_short_kernel(CosineGains call, Slab slab, const Unit* units, uint32_t* sorted) {
  using Key = KeyFor<Acc>;
  const int columns = static_cast<int>(call.row_size);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int rows_each = warp_size / columns;
  const int own = lane / columns;
  const int first = own * columns;
  for (int64_t base = first_warp() * rows_each; base < slab.rows; base += all_warps() * rows_each) {
    const int64_t r = base + own;
    const bool here = own < rows_each && r < slab.rows;
    const Key key = here ? magnitude_key<Acc>(call, units[r], slab.first + r, lane - first)
                         : not_a_candidate<Key>();
    int rank = 0;
    for (int j = 0; j < columns; ++j) {
      const Key other = __shfl_sync(all_lanes, key, (first + j) % warp_size);
      rank += other < key || (other == key && j < lane - first) ? 1 : 0;
    }
    if (here) {
      sorted[r * columns + rank] = static_cast<uint32_t>(r * columns + lane - first);
    }
  }
}

// Rows of up to threads * items entries, a block for each.
template <class Acc, int threads, int items>
__global__ void __launch_bounds__(threads) sort_block_kernel(
    CosineGains call, Slab slab, const Unit* units, uint32_t* sorted, int first_bit) {
  using Key = KeyFor<Acc>;
  using Sort = cub::BlockRadixSort<Key, threads, items, uint16_t>;
  __shared__ typename Sort::TempStorage storage;
  for (int64_t r = blockIdx.x; r < slab.rows; r += gridDim.x) {
    const Unit unit = units[r];
    Key keys[items];
    uint16_t positions[items];
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int position = static_cast<int>(threadIdx.x) * items + i;
      positions[i] = static_cast<uint16_t>(position);
      // Padding comes after the entries that are no candidates.
      keys[i] = position < call.row_size ? magnitude_key<Acc>(call, unit, slab.first + r, position)
                                         : not_a_candidate<Key>();
    }
    Sort(storage).SortBlockedToStriped(keys, positions, first_bit, 8 * sizeof(Key));
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const int k = i * threads + static_cast<int>(threadIdx.x);
      if (k < call.row_size) {
        sorted[r * call.row_size + k] = static_cast<uint32_t>(r * call.row_size + positions[i]);
      }
    }
    __syncthreads();
  }
}

// Longer rows: all entries are sorted by their keys, and then by their rows, in a stable way.
template <class Acc>
__global__ void __launch_bounds__(block_threads) key_kernel(
    CosineGains call, Slab slab, const Unit* units, KeyFor<Acc>* keys, uint32_t* entries) {
  const int64_t n = slab.rows * call.row_size;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * block_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x; i < n;
       i += threads) {
    const int64_t r = quotient(i, call.row_size);
    keys[i] = magnitude_key<Acc>(call, units[r], slab.first + r, i - r * call.row_size);
    entries[i] = static_cast<uint32_t>(i);
  }
}

__global__ void __launch_bounds__(block_threads)
    row_kernel(const uint32_t* entries, uint32_t row_size, int64_t n, uint32_t* rows) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * block_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x; i < n;
       i += threads) {
    rows[i] = entries[i] / row_size;
  }
}

// With a reference: the next entry is always the one with which the chosen ones are aligned best,
// (d + w r) / sqrt(q + w^2) where d = <w, r> and q = <w, w> of the chosen; a quarter as many at
// once as are chosen already. A block for each row; `keys` and `rest` have a place for each entry.
template <class Acc, int threads>
__global__ void __launch_bounds__(threads) align_kernel(
    CosineGains call, Slab slab, const Unit* units, uint32_t* sorted, uint64_t* all_keys,
    uint32_t* all_rest) {
  constexpr int most = 512;  // chosen in one go
  __shared__ RowScratch<uint64_t, threads> scratch;
  __shared__ uint64_t best_keys[most];
  __shared__ uint32_t best[most];
  __shared__ double products[most], squares[most];
  __shared__ double sums[2];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t r = blockIdx.x; r < slab.rows; r += gridDim.x) {
    const Unit unit = units[r];
    const int64_t row = slab.first + r;
    const int64_t begin = r * call.row_size;
    uint64_t* keys = all_keys + begin;
    uint32_t* rest = all_rest + begin;
    const int64_t count = unit.count;
    if (count == 0) continue;

    int64_t left = 0;
    for (int64_t base = 0; base < call.row_size; base += threads) {
      const int64_t i = base + thread;
      const bool candidate = i < call.row_size && is_candidate(call, row, i);
      int64_t total;
      const int64_t before = count_before(candidate, scratch, &total);
      if (candidate) rest[left + before] = static_cast<uint32_t>(i);
      left += total;
    }
    __syncthreads();

    double dot = 0;
    double square = 0;
    for (int64_t chosen = 0; chosen < count;) {
      for (int64_t i = thread; i < left; i += threads) {
        const double w = weight_at<Acc>(call, unit, row, rest[i]);
        const double product = multiply(w, reference_at<Acc>(call, unit, row, rest[i]));
        const double size = sqrt(add(square, multiply(w, w)));
        keys[i] = order(add(size > 0 ? add(dot, product) / size : 0, 0.0));
      }
      __syncthreads();
      const int64_t block = min(max(int64_t{1}, chosen / 4), left);
      for (int64_t taken = 0; taken < block;) {
        const int64_t now = min(int64_t{most}, block - taken);
        const Search<uint64_t> search = search_row<uint64_t, threads>(
            left, left - now, scratch, [&](int64_t i) { return keys[i]; });
        const Threshold<uint64_t> threshold =
            threshold_of(search.low, search.high, search.count - search.below, search.inside);
        // Takes the best out; the others close up, in their order.
        int64_t out = 0;
        int64_t place = 0;
        for (int64_t base = 0; base < left; base += threads) {
          const int64_t i = base + thread;
          const bool inside = i < left;
          const uint64_t key = inside ? keys[i] : 0;
          const uint32_t position = inside ? rest[i] : 0;
          bool goes = inside && is_kept(threshold, key);
          int64_t total;
          if (threshold.ties) {
            const bool equal = inside && is_equal(threshold, key);
            const int64_t before = place + count_before(equal, scratch, &total);
            place += total;
            if (equal) goes = before >= threshold.pruned;
          }
          const int64_t before = out + count_before(goes, scratch, &total);
          out += total;
          if (goes) {
            best_keys[before] = key;
            best[before] = position;
          } else if (inside) {
            keys[i - before] = key;
            rest[i - before] = position;
          }
        }
        __syncthreads();
        // The highest alignment first, among equals the higher position.
        for (int i = thread; i < now; i += threads) {
          const uint64_t key = best_keys[i];
          int rank = 0;
          for (int j = 0; j < now; ++j) {
            rank += best_keys[j] > key || (best_keys[j] == key && j > i) ? 1 : 0;
          }
          const double w = weight_at<Acc>(call, unit, row, best[i]);
          products[rank] = multiply(w, reference_at<Acc>(call, unit, row, best[i]));
          squares[rank] = multiply(w, w);
          sorted[begin + count - 1 - (chosen + taken + rank)] =
              static_cast<uint32_t>(begin + best[i]);
        }
        __syncthreads();
        if (thread == 0) {
          for (int i = 0; i < now; ++i) {
            dot = add(dot, products[i]);
            square = add(square, squares[i]);
          }
          sums[0] = dot;
          sums[1] = square;
        }
        __syncthreads();
        dot = sums[0];
        square = sums[1];
        left -= now;
        taken += now;
      }
      chosen += block;
    }
  }
}

template <class Acc>
__device__ __forceinline__ void write_gain(
    const CosineGains& call, int64_t row, int64_t position, double gain) {
  auto* out = static_cast<Acc*>(const_cast<void*>(call.out.data));
  out[offset_of(call.out, row * call.row_size + position)] = static_cast<Acc>(gain);
}

// The gains of a row, a warp for each. With a reference, one lane makes them fall, and `gains` and
// `starts` have a place for each entry.
template <class Acc>
__global__ void __launch_bounds__(block_threads) gain_kernel(
    CosineGains call, Slab slab, const Unit* units, const uint32_t* sorted, double* gains,
    uint32_t* starts) {
  alignas(16) __shared__ double all_values[block_threads];
  double* values = all_values + threadIdx.x / warp_size * warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const bool has_reference = call.reference.data != nullptr;
  for (int64_t r = first_warp(); r < slab.rows; r += all_warps()) {
    const Unit unit = units[r];
    const int64_t row = slab.first + r;
    const int64_t begin = r * call.row_size;
    const int64_t count = unit.count;
    if (count < call.row_size) {
      for (int64_t i = lane; i < call.row_size; i += warp_size) {
        if (count == 0 || !is_candidate(call, row, i)) write_gain<Acc>(call, row, i, 0);
      }
    }
    // The k-th in descending order, as its place in the slab.
    const auto place_of = [&](int64_t k) { return sorted[begin + count - 1 - k]; };
    // Entries are loaded while those before them are added up, and their places one step earlier.
    struct {
      uint32_t place = 0;
      Loaded<Acc> weight, reference;
    } entry, next;
    uint32_t next_place = 0;
    const auto load_next = [&](int64_t k) {
      next = {};
      if (k < count) {
        const int64_t position = next_place - begin;
        next.place = next_place;
        next.weight = load<Acc>(call, call.weight, row, position);
        if (has_reference) next.reference = load<Acc>(call, call.reference, row, position);
      }
      if (k + warp_size < count) next_place = place_of(k + warp_size);
    };
    if (lane < count) next_place = place_of(lane);
    load_next(lane);

    if (!has_reference) {
      // The k-th largest |w| adds w^2 / ((sqrt(C_k) + sqrt(C_{k-1})) |w|), where C_k is the sum of
      // the k largest squares (marginal analysis, Fox 1966).
      double total = 0;
      double last_root = 0;
      for (int64_t base = 0; base < count; base += warp_size) {
        const int64_t k = base + lane;
        entry = next;
        load_next(k + warp_size);
        const double w = normed<Acc>(value_of(call.weight, entry.weight), unit.weight_peak);
        const double square = multiply(w, w);
        const double root = sqrt(sum_in_order(square, values, total));
        double root_before = __shfl_up_sync(all_lanes, root, 1);
        if (lane == 0) root_before = last_root;
        last_root = __shfl_sync(all_lanes, root, warp_size - 1);
        const double roots = add(root, root_before);
        const double gain = roots > 0 ? square / multiply(roots, unit.norm) : 0;
        if (k < count) write_gain<Acc>(call, row, entry.place - begin, gain);
      }
      continue;
    }

    // The differences of A along the order, then the least concave majorant.
    double dot = 0;
    double square = 0;
    double last_alignment = 0;
    double last_gain = DBL_MAX;
    bool rises = false;
    for (int64_t base = 0; base < count; base += warp_size) {
      const int64_t k = base + lane;
      entry = next;
      load_next(k + warp_size);
      const double w = normed<Acc>(value_of(call.weight, entry.weight), unit.weight_peak);
      const double reference =
          normed<Acc>(value_of(call.reference, entry.reference), unit.reference_peak);
      const double dot_here = sum_in_order(multiply(w, reference), values, dot);
      const double square_here = sum_in_order(multiply(w, w), values, square);
      const double alignment =
          square_here > 0 ? dot_here / multiply(sqrt(square_here), unit.norm) : 0;
      double alignment_before = __shfl_up_sync(all_lanes, alignment, 1);
      if (lane == 0) alignment_before = last_alignment;
      last_alignment = __shfl_sync(all_lanes, alignment, warp_size - 1);
      const double gain = subtract(alignment, alignment_before);
      double gain_before = __shfl_up_sync(all_lanes, gain, 1);
      if (lane == 0) gain_before = last_gain;
      last_gain = __shfl_sync(all_lanes, gain, warp_size - 1);
      if (k < count) {
        gains[begin + k] = gain;
        rises = rises || gain > gain_before;
      }
    }
    rises = __any_sync(all_lanes, rises);
    __syncwarp();
    int64_t pools = 0;
    if (rises && lane == 0) pools = pool(gains + begin, starts + begin, count);
    __syncwarp();
    pools = __shfl_sync(all_lanes, pools, 0);
    for (int64_t k = lane; k < count; k += warp_size) {
      const double gain =
          rises ? pooled_gain(gains + begin, starts + begin, pools, count, k) : gains[begin + k];
      write_gain<Acc>(call, row, place_of(k) - begin, gain);
    }
  }
}

constexpr int64_t longest_in_block = 4096;

// The parts of the workspace.
template <class Acc>
struct Workspace {
  using Key = KeyFor<Acc>;

  Workspace(const CosineGains& call, void* memory) : base(static_cast<char*>(memory)) {
    slab_rows = std::min(call.rows, std::max<int64_t>(1, slab_entries / call.row_size));
    const int64_t n = slab_rows * call.row_size;
    faults = take<uint32_t>(1);
    units = take<Unit>(slab_rows);
    entries[0] = take<uint32_t>(n);
    if (call.reference.data != nullptr) {
      gains = take<double>(n);
      starts = take<uint32_t>(n);
      return;
    }
    if (call.row_size <= longest_in_block) return;
    entries[1] = take<uint32_t>(n);
    keys[0] = take<Key>(n);
    keys[1] = take<Key>(n);
    // Asks how much memory either of the two sorts needs.
    size_t by_row = 0;
    auto keys_buffer = cub::DoubleBuffer<Key>(keys[0], keys[1]);
    auto entries_buffer = cub::DoubleBuffer<uint32_t>(entries[0], entries[1]);
    auto rows_buffer = cub::DoubleBuffer<uint32_t>();
    asked = cub::DeviceRadixSort::SortPairs(
        nullptr, sorting_bytes, keys_buffer, entries_buffer, static_cast<uint32_t>(n));
    if (asked != cudaSuccess) return;
    asked = cub::DeviceRadixSort::SortPairs(
        nullptr, by_row, rows_buffer, entries_buffer, static_cast<uint32_t>(n));
    sorting_bytes = std::max(sorting_bytes, by_row);
    sorting = take<char>(static_cast<int64_t>(sorting_bytes));
  }

  char* base;
  size_t size = 0;
  int64_t slab_rows;
  uint32_t* faults = nullptr;  // not 0: an entry is not finite
  Unit* units = nullptr;
  uint32_t* entries[2] = {};
  double* gains = nullptr;
  uint32_t* starts = nullptr;
  Key* keys[2] = {};
  char* sorting = nullptr;
  size_t sorting_bytes = 0;
  cudaError_t asked = cudaSuccess;

 private:
  template <class Item>
  Item* take(int64_t n) {
    const size_t at = size;
    size += (static_cast<size_t>(n) * sizeof(Item) + 255) / 256 * 256;
    return base == nullptr ? nullptr : reinterpret_cast<Item*>(base + at);
  }
};

template <class Acc, int threads>
cudaError_t sort_in_blocks(
    const CosineGains& call, Slab slab, const Workspace<Acc>& work, int first_bit,
    cudaStream_t stream) {
  constexpr int items = 8;
  const auto kernel = sort_block_kernel<Acc, threads, items>;
  int blocks = 0;
  TAP_CHECK(resident_blocks(kernel, threads, slab.rows, &blocks));
  kernel<<<blocks, threads, 0, stream>>>(call, slab, work.units, work.entries[0], first_bit);
  return cudaGetLastError();
}

// The keys and the rest use the memory of the gains and of the pools' starts, which come later.
template <class Acc, int threads>
cudaError_t align_rows(
    const CosineGains& call, Slab slab, const Workspace<Acc>& work, cudaStream_t stream) {
  int blocks = 0;
  TAP_CHECK(resident_blocks(align_kernel<Acc, threads>, threads, slab.rows, &blocks));
  align_kernel<Acc, threads><<<blocks, threads, 0, stream>>>(
      call, slab, work.units, work.entries[0], reinterpret_cast<uint64_t*>(work.gains),
      work.starts);
  return cudaGetLastError();
}

template <class Acc>
cudaError_t sort_long(
    const CosineGains& call, Slab slab, Workspace<Acc>& work, int first_bit,
    const uint32_t** sorted, cudaStream_t stream) {
  using Key = KeyFor<Acc>;
  const auto n = static_cast<uint32_t>(slab.rows * call.row_size);
  const int64_t most = (static_cast<int64_t>(n) + block_threads - 1) / block_threads;
  int blocks = 0;
  TAP_CHECK(resident_blocks(key_kernel<Acc>, block_threads, most, &blocks));
  key_kernel<Acc>
      <<<blocks, block_threads, 0, stream>>>(call, slab, work.units, work.keys[0], work.entries[0]);
  TAP_CHECK(cudaGetLastError());
  cub::DoubleBuffer<Key> keys(work.keys[0], work.keys[1]);
  cub::DoubleBuffer<uint32_t> entries(work.entries[0], work.entries[1]);
  TAP_CHECK(
      cub::DeviceRadixSort::SortPairs(
          work.sorting, work.sorting_bytes, keys, entries, n, first_bit,
          static_cast<int>(8 * sizeof(Key)), stream));
  if (slab.rows > 1) {
    cub::DoubleBuffer<uint32_t> rows(
        reinterpret_cast<uint32_t*>(work.keys[0]), reinterpret_cast<uint32_t*>(work.keys[1]));
    TAP_CHECK(resident_blocks(row_kernel, block_threads, most, &blocks));
    row_kernel<<<blocks, block_threads, 0, stream>>>(
        entries.Current(), static_cast<uint32_t>(call.row_size), n, rows.Current());
    TAP_CHECK(cudaGetLastError());
    int bits = 0;
    while (slab.rows >> bits > 0) ++bits;
    TAP_CHECK(
        cub::DeviceRadixSort::SortPairs(
            work.sorting, work.sorting_bytes, rows, entries, n, 0, bits, stream));
  }
  *sorted = entries.Current();
  return cudaSuccess;
}

template <class Acc>
cudaError_t cosine_gains_as(
    const CosineGains& call, void* memory, bool* finite, cudaStream_t stream) {
  Workspace<Acc> work(call, memory);
  TAP_CHECK(work.asked);
  TAP_CHECK(cudaMemsetAsync(work.faults, 0, sizeof(uint32_t), stream));
  // Low bits in which no two keys differ, because widening fills them alike.
  int first_bit = 0;
  if (sizeof(Acc) == 4 && call.column_scale == nullptr) {
    first_bit = call.weight.element == Element::bf16  ? 16
                : call.weight.element == Element::f16 ? 13
                                                      : 0;
  }
  constexpr int64_t warps = block_threads / warp_size;
  for (int64_t first = 0; first < call.rows; first += work.slab_rows) {
    const Slab slab{first, std::min(work.slab_rows, call.rows - first)};
    const int64_t most = (slab.rows + warps - 1) / warps;
    int blocks = 0;
    TAP_CHECK(resident_blocks(unit_kernel<Acc>, block_threads, most, &blocks));
    unit_kernel<Acc><<<blocks, block_threads, 0, stream>>>(call, slab, work.units, work.faults);
    TAP_CHECK(cudaGetLastError());
    const uint32_t* sorted = work.entries[0];
    if (call.reference.data != nullptr) {
      if (call.row_size <= 2048) {
        TAP_CHECK((align_rows<Acc, 128>(call, slab, work, stream)));
      } else {
        TAP_CHECK((align_rows<Acc, 512>(call, slab, work, stream)));
      }
    } else if (call.row_size <= warp_size) {
      const int64_t rows_each = warp_size / call.row_size * warps;
      TAP_CHECK(resident_blocks(
          sort_short_kernel<Acc>, block_threads, (slab.rows + rows_each - 1) / rows_each, &blocks));
      sort_short_kernel<Acc>
          <<<blocks, block_threads, 0, stream>>>(call, slab, work.units, work.entries[0]);
      TAP_CHECK(cudaGetLastError());
    } else if (call.row_size <= 512) {
      TAP_CHECK((sort_in_blocks<Acc, 64>(call, slab, work, first_bit, stream)));
    } else if (call.row_size <= 1024) {
      TAP_CHECK((sort_in_blocks<Acc, 128>(call, slab, work, first_bit, stream)));
    } else if (call.row_size <= 2048) {
      TAP_CHECK((sort_in_blocks<Acc, 256>(call, slab, work, first_bit, stream)));
    } else if (call.row_size <= longest_in_block) {
      TAP_CHECK((sort_in_blocks<Acc, 512>(call, slab, work, first_bit, stream)));
    } else {
      TAP_CHECK(sort_long<Acc>(call, slab, work, first_bit, &sorted, stream));
    }
    TAP_CHECK(resident_blocks(gain_kernel<Acc>, block_threads, most, &blocks));
    gain_kernel<Acc><<<blocks, block_threads, 0, stream>>>(
        call, slab, work.units, sorted, work.gains, work.starts);
    TAP_CHECK(cudaGetLastError());
  }
  uint32_t faults = 0;
  TAP_CHECK(
      cudaMemcpyAsync(&faults, work.faults, sizeof(uint32_t), cudaMemcpyDeviceToHost, stream));
  TAP_CHECK(cudaStreamSynchronize(stream));
  *finite = faults == 0;
  return cudaSuccess;
}

}  // namespace

size_t cosine_gains_workspace(const CosineGains& call) {
  return call.wide ? Workspace<double>(call, nullptr).size : Workspace<float>(call, nullptr).size;
}

cudaError_t cosine_gains(
    const CosineGains& call, void* workspace, bool* finite, cudaStream_t stream) {
  return call.wide ? cosine_gains_as<double>(call, workspace, finite, stream)
                   : cosine_gains_as<float>(call, workspace, finite, stream);
}

}  // namespace cuda
}  // namespace torchalignprune
