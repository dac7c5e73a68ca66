// The functions that the CUDA kernels share, on the CPU: what the kernels do in parallel is done
// here one after the other. test_cuda_host.py compiles and calls it.
#include <algorithm>
#include <vector>

#include "../csrc/cuda/keys.cuh"

namespace cuda = torchalignprune::cuda;

namespace {

using Key = uint32_t;

// One pass over the keys, as histogram_kernel and advance_kernel do it.
void pass(cuda::Search<Key>& search, const Key* keys, int64_t n) {
  std::vector<int64_t> coarse(cuda::coarse_bins), fine(search.fine_bins);
  const Key span = search.high - search.low;
  for (int64_t i = 0; i < n; ++i) {
    if (!search.counted) search.alive += keys[i] != cuda::not_a_candidate<Key>() ? 1 : 0;
    search.below += keys[i] < search.low ? 1 : 0;
    const Key offset = keys[i] - search.low;
    if (offset > span) continue;
    ++coarse.at(offset >> search.coarse_shift);
    if (search.fine_shift < search.coarse_shift) ++fine.at(offset >> search.fine_shift);
  }
  cuda::advance(search, [&](bool is_fine, int64_t first, int64_t bins, int64_t rank) {
    const auto& counts = is_fine ? fine : coarse;
    cuda::Bin bin;
    int64_t below = 0;
    for (int64_t b = 0; b < bins; ++b) {
      const int64_t inside = counts.at(first + b);
      if (below + inside >= rank) {
        bin.index = b;
        bin.below = below;
        bin.inside = inside;
        break;
      }
      below += inside;
    }
    return bin;
  });
}

template <class Acc, cuda::Score kind>
bool keys_of(const cuda::Tensor& tensor, void* out) {
  bool nan = false;
  auto* keys = static_cast<cuda::KeyFor<Acc>*>(out);
  for (int64_t i = 0; i < tensor.size; ++i) keys[i] = cuda::key_at<Acc, kind>(tensor, i, nan);
  return nan;
}

template <class Acc>
bool keys_of(const cuda::Tensor& tensor, int kind, void* out) {
  if (kind == 0) return keys_of<Acc, cuda::Score::value>(tensor, out);
  if (kind == 1) return keys_of<Acc, cuda::Score::magnitude>(tensor, out);
  return keys_of<Acc, cuda::Score::worth>(tensor, out);
}

cuda::View view_of(const void* data, int element, int dims, const int64_t* layout) {
  cuda::View view;
  view.data = data;
  view.element = static_cast<cuda::Element>(element);
  view.dimensions = dims;
  std::copy_n(layout, dims, view.sizes);
  std::copy_n(layout + dims, dims, view.strides);
  return view;
}

}  // namespace

extern "C" {

// A `layout` is sizes, then strides, of `dims` dimensions. Returns whether a candidate is NaN.
bool tensor_keys(
    const void* weight, int element, int dims, const int64_t* layout, const void* mask,
    const int64_t* mask_layout, const void* reference, int reference_element,
    const int64_t* reference_layout, const void* rows, int64_t row_step, const void* columns,
    int64_t column_step, int64_t size, int64_t row_size, int64_t inner, int kind, bool wide,
    void* out) {
  cuda::Tensor tensor;
  tensor.weight = view_of(weight, element, dims, layout);
  if (mask != nullptr) tensor.mask = view_of(mask, 0, dims, mask_layout);
  if (reference != nullptr) {
    tensor.reference = view_of(reference, reference_element, dims, reference_layout);
  }
  tensor.row_scale = rows;
  tensor.row_step = row_step;
  tensor.column_scale = columns;
  tensor.column_step = column_step;
  tensor.size = size;
  tensor.row_size = row_size;
  tensor.inner = inner;
  return wide ? keys_of<double>(tensor, kind, out) : keys_of<float>(tensor, kind, out);
}

int64_t view_offset(int dims, const int64_t* layout, int64_t index) {
  return cuda::offset_of(view_of(nullptr, 0, dims, layout), index);
}

// Writes a mask, in chunks, and returns the number of passes of the search. A `sample` is sorted
// and may be null.
int64_t prune(
    const Key* keys, int64_t n, int64_t count, int64_t fine_bins, int grain, const Key* sample,
    int64_t sampled, int64_t chunk_size, uint8_t* mask) {
  cuda::Search<Key> search;
  search.count = count;
  search.grain = grain;
  search.fine_bins = fine_bins;
  if (sample == nullptr) {
    cuda::plan_all(search);
  } else {
    cuda::plan_sampled(search, sample, sampled, n);
  }
  int64_t passes = 0;
  for (; !search.done; ++passes) {
    if (passes == 100) return -1;
    pass(search, keys, n);
  }
  const auto threshold =
      cuda::threshold_of(search.low, search.high, search.count - search.below, search.inside);
  int64_t before = 0;
  for (int64_t begin = 0; begin < n; begin += chunk_size) {
    const int64_t end = std::min(begin + chunk_size, n);
    int64_t own = 0;
    for (int64_t i = begin; i < end; ++i) {
      mask[i] = cuda::is_kept(threshold, keys[i]) ? 1 : 0;
      own += cuda::is_equal(threshold, keys[i]) ? 1 : 0;
    }
    if (threshold.ties && cuda::is_wrong(threshold, before, own)) {
      int64_t place = before;
      for (int64_t i = begin; i < end; ++i) {
        if (cuda::is_equal(threshold, keys[i])) mask[i] = place++ >= threshold.pruned ? 1 : 0;
      }
    }
    before += own;
  }
  return passes;
}

void concave(double* gains, int64_t n, double* out) {
  std::vector<uint32_t> starts(n);
  const int64_t pools = cuda::pool(gains, starts.data(), n);
  for (int64_t k = 0; k < n; ++k) out[k] = cuda::pooled_gain(gains, starts.data(), pools, n, k);
}

int64_t last_not_above(const int64_t* values, int64_t n, int64_t x) {
  return cuda::last_not_above(values, n, x);
}
}
