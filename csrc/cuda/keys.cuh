// What the kernels share: reading entries, their scores and keys, the search for a threshold. The
// functions also compile without CUDA, so that tests can run them on any machine.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define TAP_BOTH __host__ __device__ inline
#else
#define TAP_BOTH inline
#endif

namespace torchalignprune {
namespace cuda {

enum class Element : uint8_t { f32, f64, f16, bf16 };

// What an entry is worth, as in checks.h.
enum class Score : uint8_t { value, magnitude, worth };

template <class Acc>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};
template <class Acc>
using KeyFor = typename KeyOf<Acc>::type;

// A key is an unsigned integer that orders as its score does. The largest one marks an entry that
// is no candidate; as a float it would be NaN, so no score has it.
template <class Key>
TAP_BOTH constexpr Key not_a_candidate() {
  return static_cast<Key>(~Key{0});
}

template <class To, class From>
TAP_BOTH To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are reinterpreted, not converted");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Arithmetic that no compiler contracts: scores and gains are the same bits on every device.
TAP_BOTH float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
TAP_BOTH double add(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
TAP_BOTH float subtract(float a, float b) { return add(a, -b); }
TAP_BOTH double subtract(double a, double b) { return add(a, -b); }
TAP_BOTH float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
TAP_BOTH double multiply(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

TAP_BOTH float from_bf16(uint16_t bits) {
  return bits_as<float>(static_cast<uint32_t>(bits) << 16);
}

TAP_BOTH float from_f16(uint16_t bits) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(bits));
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero and the subnormals, in steps of 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
    return sign != 0 ? -value : value;
  }
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  return bits_as<float>(sign | (magnitude >= 0x7c00u ? special : normal));
#endif
}

TAP_BOTH uint32_t order(float score) {
  const uint32_t bits = bits_as<uint32_t>(score);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
TAP_BOTH uint64_t order(double score) {
  const uint64_t bits = bits_as<uint64_t>(score);
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | 0x8000000000000000u);
}

// The score of a weight and a reference that have been multiplied by the factors of row and column.
template <Score kind, class Acc>
TAP_BOTH Acc score_of(Acc weight, Acc reference) {
  Acc score = weight;
  if (kind == Score::magnitude) score = score < 0 ? -score : score;
  if (kind == Score::worth) score = multiply(score, subtract(multiply(Acc{2}, reference), score));
  return add(score, Acc{0});  // -0 becomes +0: they are equals
}

// Where the entry of a flat index lies in memory: in index order, or by strides. A view of no
// dimensions is contiguous.
constexpr int most_dimensions = 6;

struct View {
  const void* data = nullptr;
  int64_t sizes[most_dimensions] = {};
  int64_t strides[most_dimensions] = {};
  int32_t dimensions = 0;
  Element element = Element::f32;
  bool aligned = false;  // contiguous, and data is a multiple of 16 bytes
};

// a / b for numbers that are not negative. Divisions of 64 bits take several times as long as those
// of 32.
TAP_BOTH int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

TAP_BOTH int64_t offset_of(const View& view, int64_t index) {
  if (view.dimensions == 0) return index;
  int64_t offset = 0;
  // Unrolled, every place that reads an entry would have the code of four divisions or more.
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (int d = view.dimensions - 1; d > 0; --d) {
    const int64_t above = quotient(index, view.sizes[d]);
    offset += (index - above * view.sizes[d]) * view.strides[d];
    index = above;
  }
  return offset + index * view.strides[0];
}

template <class Acc>
TAP_BOTH Acc read(const void* data, Element element, int64_t offset) {
  switch (element) {
    case Element::f32:
      return static_cast<Acc>(static_cast<const float*>(data)[offset]);
    case Element::f64:
      return static_cast<Acc>(static_cast<const double*>(data)[offset]);
    case Element::f16:
      return static_cast<Acc>(from_f16(static_cast<const uint16_t*>(data)[offset]));
    default:
      return static_cast<Acc>(from_bf16(static_cast<const uint16_t*>(data)[offset]));
  }
}

template <class Acc>
TAP_BOTH Acc read(const View& view, int64_t index) {
  return read<Acc>(view.data, view.element, offset_of(view, index));
}

TAP_BOTH bool is_true(const View& mask, int64_t index) {
  return static_cast<const uint8_t*>(mask.data)[offset_of(mask, index)] != 0;
}

// A tensor, what its scores are made of, and where its mask goes. A view without data is absent.
struct Tensor {
  View weight, mask, reference, out;
  const void* row_scale = nullptr;
  const void* column_scale = nullptr;
  int64_t row_step = 0, column_step = 0;  // 0 where one factor serves all
  int64_t size = 0;                       // entries
  int64_t row_size = 1, inner = 1;        // entries of a row, and of a column in a row
  bool vectors = false;                   // all views that have data are aligned
  bool plain = false;                     // and there are neither references nor scales
};

template <class Acc>
TAP_BOTH Acc factor(const void* scale, int64_t index) {
  return scale == nullptr ? Acc{1} : static_cast<const Acc*>(scale)[index];
}

// The key of one entry; sets `nan` if it is a candidate whose score is NaN.
template <class Acc, Score kind>
TAP_BOTH KeyFor<Acc> key_at(const Tensor& tensor, int64_t index, bool& nan) {
  if (tensor.mask.data != nullptr && !is_true(tensor.mask, index)) {
    return not_a_candidate<KeyFor<Acc>>();
  }
  const Acc weight = read<Acc>(tensor.weight, index);
  const Acc reference =
      tensor.reference.data != nullptr ? read<Acc>(tensor.reference, index) : weight;
  Acc row_factor = 1;
  Acc column_factor = 1;
  if (tensor.row_scale != nullptr || tensor.column_scale != nullptr) {
    const int64_t row = quotient(index, tensor.row_size);
    const int64_t column = quotient(index - row * tensor.row_size, tensor.inner);
    row_factor = factor<Acc>(tensor.row_scale, row * tensor.row_step);
    column_factor = factor<Acc>(tensor.column_scale, column * tensor.column_step);
  }
  const Acc score = score_of<kind>(
      multiply(multiply(weight, row_factor), column_factor),
      multiply(multiply(reference, row_factor), column_factor));
  nan |= score != score;
  return order(score);
}

// The place of the last of the ascending values[0, n) that is not above x; values[0] is not.
template <class Number>
TAP_BOTH int64_t last_not_above(const Number* values, int64_t n, Number x) {
  int64_t low = 0;
  int64_t high = n;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (values[middle] <= x ? low : high) = middle;
  }
  return low;
}

// How many of the ascending keys[0, n) are below `key`.
template <class Key>
TAP_BOTH int64_t count_below(const Key* keys, int64_t n, Key key) {
  int64_t low = 0;
  int64_t high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The search for the count-th smallest key. [low, high] holds it and is cut into bins, `coarse`
// ones that a block counts in its shared memory and, where few keys are expected, also `fine` ones
// in global memory; each pass over the keys narrows it down to a bin.
constexpr int coarse_bins = 2048;

template <class Key>
struct Search {
  Key low = 0;
  Key high = 0;
  int64_t count = 0;   // entries to prune
  int64_t below = 0;   // candidates below `low`
  int64_t inside = 0;  // candidates in [low, high], known at the end
  int64_t alive = 0;   // candidates
  int64_t nan = 0;     // the first tensor with NaN among its candidates' scores, or their number
  int64_t fine_bins = 0;
  int32_t coarse_shift = 0;
  int32_t fine_shift = 0;
  int32_t grain = 0;     // low bits in which keys do not differ, as those of widened bfloat16
  bool counted = false;  // `alive` and `nan` are known
  bool done = false;     // all in [low, high] are equals, or are all pruned
};

template <class Key>
TAP_BOTH int shift_for(Key span, int grain, int64_t bins) {
  int shift = grain;
  while ((span >> shift) >= static_cast<Key>(bins)) ++shift;
  return shift;
}

// Sets the bins for the next pass.
template <class Key>
TAP_BOTH void plan(Search<Key>& search, Key low, Key high, bool few) {
  const Key grain_mask = (Key{1} << search.grain) - 1;
  const Key highest = not_a_candidate<Key>() - 1;
  search.low = low & ~grain_mask;
  search.high = (high | grain_mask) < highest ? (high | grain_mask) : highest;
  search.below = 0;
  const Key span = search.high - search.low;
  search.coarse_shift = shift_for(span, search.grain, coarse_bins);
  search.fine_shift = few ? shift_for(span, search.grain, search.fine_bins) : search.coarse_shift;
  if (search.fine_shift > search.coarse_shift) search.fine_shift = search.coarse_shift;
}

// Begins with the whole range, or with none if nothing is to be pruned.
template <class Key>
TAP_BOTH void plan_all(Search<Key>& search) {
  plan<Key>(search, 0, search.count > 0 ? not_a_candidate<Key>() - 1 : 0, false);
}

// Begins with the range that most probably holds the key, from n sorted keys that were drawn evenly
// from `total`. A wrong guess costs passes, not exactness.
template <class Key>
TAP_BOTH void plan_sampled(Search<Key>& search, const Key* sample, int64_t n, int64_t total) {
  const Key none = not_a_candidate<Key>();
  const double share = static_cast<double>(search.count) / static_cast<double>(total);
  if (search.count == 0 || share >= 1) return plan_all(search);
  // Five standard deviations of the sample's quantile.
  const double variance = static_cast<double>(n) * share * (1 - share);
#ifdef __CUDA_ARCH__
  const double margin = 5 * ::sqrt(variance) + 8;
#else
  const double margin = 5 * __builtin_sqrt(variance) + 8;
#endif
  const auto from = static_cast<int64_t>(share * static_cast<double>(n) - margin);
  const auto to = static_cast<int64_t>(share * static_cast<double>(n) + margin);
  const Key low = from > 0 && sample[from] != none ? sample[from] : 0;
  const Key high = to < n && sample[to] != none ? sample[to] : none - 1;
  const int64_t inside = count_below<Key>(sample, n, high + 1) - count_below(sample, n, low);
  plan(search, low, high, inside <= n / 16);
}

// A bin, how many keys lie in the bins before it, and how many in it.
struct Bin {
  int64_t index = -1;
  int64_t below = 0;
  int64_t inside = 0;
};

template <class Key>
TAP_BOTH void narrow(Search<Key>& search, int shift, const Bin& bin) {
  const Key width = (Key{1} << shift) - 1;
  search.low += static_cast<Key>(bin.index) << shift;
  if (search.high - search.low > width) search.high = search.low + width;
  search.below += bin.below;
  search.inside = bin.inside;
}

// After a pass has counted: narrows the range, and ends the search or plans the next pass.
// pick(fine, first, n, rank) finds which of the bins [first, first + n) holds the rank-th of their
// keys; its index counts from `first`, and is -1 if they hold fewer keys.
template <class Key, class Pick>
TAP_BOTH void advance(Search<Key>& search, Pick pick) {
  search.counted = true;
  if (search.count == 0 || search.count > search.alive) {
    search.low = search.high = 0;  // no score has this key
    search.below = search.inside = 0;
    search.done = true;
    return;
  }
  if (search.count <= search.below) return plan<Key>(search, 0, search.low - 1, false);
  const auto bins = static_cast<int64_t>((search.high - search.low) >> search.coarse_shift) + 1;
  const Bin coarse = pick(false, int64_t{0}, bins, search.count - search.below);
  if (coarse.index < 0) {
    return plan<Key>(search, search.high + 1, not_a_candidate<Key>() - 1, false);
  }
  narrow(search, search.coarse_shift, coarse);
  if (search.fine_shift < search.coarse_shift) {
    const int64_t first = coarse.index << (search.coarse_shift - search.fine_shift);
    const auto n = static_cast<int64_t>((search.high - search.low) >> search.fine_shift) + 1;
    narrow(search, search.fine_shift, pick(true, first, n, search.count - search.below));
  }
  search.done = ((search.high - search.low) >> search.grain) == 0 ||
                search.below + search.inside == search.count;
  if (search.done) return;
  plan(search, search.low, search.high, search.inside <= search.alive / 64);
}

// What the search found: the keys in [low, high] are equals; the first `pruned` of them are pruned.
template <class Key>
struct Threshold {
  Key low, high;
  int64_t pruned;
  bool keep_equal;  // write the equals as kept at first, because most of them are
  bool ties;        // some of the equals are pruned and some kept
};

template <class Key>
TAP_BOTH Threshold<Key> threshold_of(Key low, Key high, int64_t pruned, int64_t inside) {
  return {low, high, pruned, 2 * pruned < inside, 0 < pruned && pruned < inside};
}

template <class Key>
TAP_BOTH bool is_equal(const Threshold<Key>& threshold, Key key) {
  return key - threshold.low <= threshold.high - threshold.low;
}

// Whether an entry is kept when the equals are all treated alike.
template <class Key>
TAP_BOTH bool is_kept(const Threshold<Key>& threshold, Key key) {
  const Key first = threshold.keep_equal ? threshold.low : threshold.high + 1;
  return key >= first && key != not_a_candidate<Key>();
}

// Whether a chunk has equals that the first writing got wrong: `before` equals lie in the chunks
// before it, `own` in it.
template <class Key>
TAP_BOTH bool is_wrong(const Threshold<Key>& threshold, int64_t before, int64_t own) {
  return own > 0 &&
         (threshold.keep_equal ? before < threshold.pruned : before + own > threshold.pruned);
}

// The least concave majorant of the running sums of gains[0, n): neighbours whose gains rise are
// pooled, one after the other. The pools' totals replace the gains, `starts` becomes where each
// pool begins; returns the number of pools.
TAP_BOTH int64_t pool(double* gains, uint32_t* starts, int64_t n) {
  int64_t pools = 0;
  double last_total = 0;
  uint32_t last_start = 0;
  for (int64_t k = 0; k < n; ++k) {
    double total = gains[k];
    auto start = static_cast<uint32_t>(k);
    while (pools > 0) {
      const auto size = static_cast<double>(k + 1 - start);
      const auto last_size = static_cast<double>(start - last_start);
      if (!(multiply(last_total, size) < multiply(total, last_size))) break;
      total = add(total, last_total);
      start = last_start;
      if (--pools > 0) {
        last_total = gains[pools - 1];
        last_start = starts[pools - 1];
      }
    }
    gains[pools] = last_total = total;
    starts[pools] = last_start = start;
    ++pools;
  }
  return pools;
}

// The gain of the k-th entry of a row of n. A pool falls a little towards the next one, so that a
// cut through it keeps the order.
TAP_BOTH double pooled_gain(
    const double* totals, const uint32_t* starts, int64_t pools, int64_t n, int64_t k) {
  const int64_t p = last_not_above(starts, pools, static_cast<uint32_t>(k));
  const int64_t end = p + 1 < pools ? starts[p + 1] : n;
  const auto size = static_cast<double>(end - starts[p]);
  const double gain = totals[p] / size;
  double next = subtract(gain, gain < 0 ? -gain : gain);
  if (p + 1 < pools) {
    const int64_t next_end = p + 2 < pools ? starts[p + 2] : n;
    next = totals[p + 1] / static_cast<double>(next_end - end);
  }
  const double step = subtract(gain, next) / multiply(1000.0, size);
  return subtract(gain, multiply(static_cast<double>(k - starts[p]), step));
}

}  // namespace cuda
}  // namespace torchalignprune
