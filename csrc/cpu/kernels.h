// Inner loops over blocks of entries that fit in the first-level cache. They are compiled once for
// each level of SIMD, and the widest that the processor has is picked at run time.
#pragma once

#include <cstdint>

namespace torchalignprune {

enum class Element : uint8_t { f32, f64, f16, bf16 };

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

// A key is an unsigned integer that orders as its score does. The largest one marks an entry that
// is no candidate; as a float it would be NaN, so no score has it.
template <class Key>
inline constexpr Key not_a_candidate = static_cast<Key>(~Key{0});

// Entries that lie side by side, and what their scores are made of. `reference`, `column` and
// `mask` may be null.
template <class Acc>
struct Piece {
  const Acc* weight;
  const Acc* reference;
  Acc row;
  const Acc* column;
  const uint8_t* mask;
  int64_t n;
};

template <class Acc>
struct ScoreKernels {
  using Key = typename KeyOf<Acc>::type;

  // out[i] = source[i * stride], widened.
  void (*widen)(Element element, const void* source, int64_t stride, int64_t n, Acc* out);

  // The kernels below come once for each of the scores `value`, `magnitude` and `worth` (checks.h),
  // and set `nan` if a candidate's score is NaN.

  using ToKeys = void (*)(const Piece<Acc>& piece, Key* keys, bool* nan);
  ToKeys to_keys[3];

  // Copies the keys in [low, low + span] to `out`, which has room for n + 16, and adds their number
  // to `found`; returns how many keys are below `low`.
  using Scan =
      int64_t (*)(const Piece<Acc>& piece, Key low, Key span, Key* out, int64_t* found, bool* nan);
  Scan scan[3];

  // mask[i] = key > threshold, or >= with `keep_equal`; returns how many are equal.
  using Keep = int64_t (*)(
      const Piece<Acc>& piece, Key threshold, bool keep_equal, uint8_t* mask, bool* nan);
  Keep keep[3];

  // The largest magnitude: not finite if a value is not.
  Acc (*peak)(const Acc* values, int64_t n);

  // Adds the squares of values[i] * row * column[i] to columns[i], and returns their sum. `column`
  // may be null.
  double (*add_squares)(const Acc* values, const Acc* column, Acc row, int64_t n, double* columns);

  // With p = mask * weight (`mask` may be null), adds the sums of p p, p r and r r to products[0],
  // [1] and [2].
  void (*add_products)(
      const Acc* weight, const uint8_t* mask, const Acc* reference, int64_t n, double* products);

  // The same for each entry by itself: to pp[i], pr[i] and rr[i].
  void (*add_each_product)(
      const Acc* weight, const uint8_t* mask, const Acc* reference, int64_t n, double* pp,
      double* pr, double* rr);

  // out[i] = mask[i] * (of_reference[i * step] * reference[i] + of_weight[i * step] * weight[i])
  // where the step is 0 or 1.
  void (*combine)(
      const Acc* weight, const uint8_t* mask, const Acc* reference, const double* of_reference,
      const double* of_weight, int64_t step, int64_t n, Acc* out);

  // Writes the places of the values > bound (above[1]: >= bound), which should be few, to `places`;
  // returns how many there are. Sets `nan` if a value is NaN.
  using Above = int64_t (*)(const Acc* values, int64_t n, Acc bound, uint32_t* places, bool* nan);
  Above above[2];
};

struct Kernels {
  const char* level;
  ScoreKernels<float> f32;
  ScoreKernels<double> f64;

  template <class Acc>
  const ScoreKernels<Acc>& of() const {
    if constexpr (sizeof(Acc) == 4) {
      return f32;
    } else {
      return f64;
    }
  }

  int64_t (*count_true)(const uint8_t* mask, int64_t n);

  // The entries of 2, 4 and 8 bytes where the mask is not 0, and +0 elsewhere.
  using ApplyMask = void (*)(const void* values, const uint8_t* mask, int64_t n, void* out);
  ApplyMask apply_mask[3];

  // Whether entries of 2, 4 and 8 bytes are +0 wherever the mask is 0.
  using IsMasked = bool (*)(const void* values, const uint8_t* mask, int64_t n);
  IsMasked is_masked[3];

  // Sets entries of 2, 4 and 8 bytes to +0 where the mask is 0; writes nothing where they all are.
  using ZeroPruned = void (*)(void* values, const uint8_t* mask, int64_t n);
  ZeroPruned zero_pruned[3];

  // out[i] = |values[i]| * scale, cut off after the point; below 2^16.
  void (*digits)(const float* values, int64_t n, float scale, uint16_t* out);

  // squares[k] are descending, sums[k] their running sums: out[k] is what the (k+1)-th square adds
  // to sqrt(sum) / norm, in the form that does not cancel.
  void (*gains)(const double* squares, double* sums, double norm, int64_t n, double* out);
};

// The widest level that the processor has, or the one that TORCHALIGNPRUNE_SIMD names.
const Kernels& kernels();

}  // namespace torchalignprune
