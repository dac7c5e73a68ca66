// The body of kernels_<level>.cpp, which defines TAP_LEVEL, TAP_LEVEL_NAME and TAP_LEVEL_BITS and
// sets the compiler's target. It may include nothing: an inline function of a header, compiled here
// for a wide target, could be the copy that the linker keeps for everybody.

namespace torchalignprune {
namespace TAP_LEVEL {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float from_bf16(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }

// Written with selects instead of branches, so that the compiler vectorises it.
inline float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t exponent = magnitude & 0x7c00u;
  const uint32_t rebased = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t small = bits_as<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) *
                                           5.9604644775390625e-08f);
  const uint32_t value = exponent == 0 ? small : exponent == 0x7c00u ? special : rebased;
  return bits_as<float>(value | sign);
}

template <class Acc>
void widen(Element element, const void* source, int64_t stride, int64_t n, Acc* out) {
  const auto copy = [&](const auto* from, auto convert) {
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(convert(from[i]));
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(convert(from[i * stride]));
    }
  };
  switch (element) {
    case Element::f32:
      return copy(static_cast<const float*>(source), [](float x) { return x; });
    case Element::f64:
      return copy(static_cast<const double*>(source), [](double x) { return x; });
    case Element::f16:
      return copy(static_cast<const uint16_t*>(source), from_f16);
    case Element::bf16:
      return copy(static_cast<const uint16_t*>(source), from_bf16);
  }
}

inline uint32_t order(float score) {
  const uint32_t bits = bits_as<uint32_t>(score);
  const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
  return bits ^ flip;
}

inline uint64_t order(double score) {
  const uint64_t bits = bits_as<uint64_t>(score);
  const uint64_t flip =
      static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | 0x8000000000000000u;
  return bits ^ flip;
}

template <class Acc, int kind, bool has_column, bool has_mask>
bool to_keys_as(
    const Acc* __restrict weight, const Acc* __restrict reference, Acc row,
    const Acc* __restrict column, const uint8_t* __restrict mask, int64_t n,
    typename KeyOf<Acc>::type* __restrict keys) {
  using Key = typename KeyOf<Acc>::type;
  Key nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    Acc score = weight[i];
    if constexpr (kind == 1) score = score < 0 ? -score : score;
    if constexpr (kind == 2) score = score * (2 * reference[i] - score);
    if constexpr (kind != 0) score = score * row;
    if constexpr (has_column) score = score * column[i];
    score = score + Acc{0};  // -0 becomes +0: they are equals
    Key key = order(score);
    Key bad = score != score ? 1 : 0;
    if constexpr (has_mask) {
      key = mask[i] != 0 ? key : not_a_candidate<Key>;
      bad = mask[i] != 0 ? bad : 0;
    }
    nan |= bad;
    keys[i] = key;
  }
  return nan != 0;
}

template <class Acc, int kind>
bool to_keys(
    const Acc* weight, const Acc* reference, Acc row, const Acc* column, const uint8_t* mask,
    int64_t n, typename KeyOf<Acc>::type* keys) {
  if (reference == nullptr) reference = weight;
  if (column != nullptr) {
    return mask != nullptr
               ? to_keys_as<Acc, kind, true, true>(weight, reference, row, column, mask, n, keys)
               : to_keys_as<Acc, kind, true, false>(weight, reference, row, column, mask, n, keys);
  }
  return mask != nullptr
             ? to_keys_as<Acc, kind, false, true>(weight, reference, row, column, mask, n, keys)
             : to_keys_as<Acc, kind, false, false>(weight, reference, row, column, mask, n, keys);
}

// Copies the keys in [low, low + span], which are few, to `out`, and adds their number to `found`.
// Returns how many keys are below `low`. A branch for each hit would be guessed wrong each time, so
// the wide versions compress the hits without one.
template <class Key>
int64_t scan(
    const Key* __restrict keys, int64_t n, Key low, Key span, Key* __restrict out,
    int64_t* found) {
  int64_t below = 0;
  int64_t start = 0;
  Key* end = out;
#if TAP_LEVEL_BITS == 512
  constexpr int lanes = 64 / sizeof(Key);
  for (; start + lanes <= n; start += lanes) {
    const __m512i key = _mm512_loadu_si512(keys + start);
    if constexpr (sizeof(Key) == 4) {
      const __m512i base = _mm512_set1_epi32(static_cast<int>(low));
      const __m512i width = _mm512_set1_epi32(static_cast<int>(span));
      const __mmask16 hits = _mm512_cmple_epu32_mask(_mm512_sub_epi32(key, base), width);
      below += __builtin_popcount(_mm512_cmplt_epu32_mask(key, base));
      _mm512_storeu_si512(end, _mm512_maskz_compress_epi32(hits, key));
      end += __builtin_popcount(hits);
    } else {
      const __m512i base = _mm512_set1_epi64(static_cast<long long>(low));
      const __m512i width = _mm512_set1_epi64(static_cast<long long>(span));
      const __mmask8 hits = _mm512_cmple_epu64_mask(_mm512_sub_epi64(key, base), width);
      below += __builtin_popcount(_mm512_cmplt_epu64_mask(key, base));
      _mm512_storeu_si512(end, _mm512_maskz_compress_epi64(hits, key));
      end += __builtin_popcount(hits);
    }
  }
#else
  constexpr int width = 64;
  for (; start + width <= n; start += width) {
    alignas(64) uint8_t inside[width];
    uint32_t lower = 0;
    for (int j = 0; j < width; ++j) {
      const Key key = keys[start + j];
      inside[j] = static_cast<Key>(key - low) <= span ? 1 : 0;
      lower += key < low ? 1u : 0u;
    }
    below += lower;
    for (int part = 0; part < width; part += 8) {
      uint64_t flags;
      __builtin_memcpy(&flags, inside + part, 8);
      while (flags != 0) {
        *end++ = keys[start + part + (__builtin_ctzll(flags) >> 3)];
        flags &= flags - 1;
      }
    }
  }
#endif
  for (int64_t i = start; i < n; ++i) {
    below += keys[i] < low ? 1 : 0;
    if (static_cast<Key>(keys[i] - low) <= span) *end++ = keys[i];
  }
  *found += end - out;
  return below;
}

template <class Key>
int64_t keep(
    const Key* __restrict keys, int64_t n, Key threshold, bool keep_equal,
    uint8_t* __restrict mask) {
  Key equal = 0;
  if (keep_equal) {
    for (int64_t i = 0; i < n; ++i) {
      mask[i] = (keys[i] >= threshold) & (keys[i] != not_a_candidate<Key>) ? 1 : 0;
      equal += keys[i] == threshold ? 1 : 0;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      mask[i] = (keys[i] > threshold) & (keys[i] != not_a_candidate<Key>) ? 1 : 0;
      equal += keys[i] == threshold ? 1 : 0;
    }
  }
  return static_cast<int64_t>(equal);
}

inline int64_t count_true(const uint8_t* mask, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += mask[i] != 0 ? 1 : 0;
  return total;
}

inline void gains(const double* squares, double* sums, double norm, int64_t n, double* out) {
  // The roots replace the sums; sums[-1] is there and is zero.
  for (int64_t k = 0; k < n; ++k) sums[k] = __builtin_sqrt(sums[k]);
  for (int64_t k = 0; k < n; ++k) {
    const double roots = sums[k] + sums[k - 1];
    out[k] = roots > 0 ? squares[k] / (roots * norm) : 0;
  }
}

template <class Acc>
constexpr ScoreKernels<Acc> score_kernels() {
  using Key = typename KeyOf<Acc>::type;
  return {widen<Acc>,
          {to_keys<Acc, 0>, to_keys<Acc, 1>, to_keys<Acc, 2>},
          scan<Key>,
          keep<Key>};
}

extern const Kernels table;
const Kernels table{
    TAP_LEVEL_NAME, score_kernels<float>(), score_kernels<double>(), count_true, gains};

}  // namespace TAP_LEVEL
}  // namespace torchalignprune
