// The body of kernels_<level>.cpp, which defines TAP_LEVEL, TAP_LEVEL_NAME and TAP_LEVEL_BITS and
// sets the compiler's target. It may include nothing: the linker could keep the copy of a header's
// inline function that is compiled here, for a wide target, for all processors.

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
  const uint32_t wide = bits;
  const uint32_t sign = (wide & 0x8000u) << 16;
  const uint32_t magnitude = (wide & 0x7fffu) << 13;
  constexpr uint32_t rebase = 112u << 23;
  const uint32_t normal = magnitude + rebase + (magnitude >= 0x0f800000u ? rebase : 0u);
  // 2^-14 is put before the fraction and taken away again, which no processor flushes to zero.
  const uint32_t subnormal =
      bits_as<uint32_t>(bits_as<float>(magnitude + (113u << 23)) - 6.103515625e-05f);
  return bits_as<float>((magnitude < 0x00800000u ? subnormal : normal) | sign);
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
    case Element::f16: {
      const auto* from = static_cast<const uint16_t*>(source);
#if TAP_LEVEL_BITS != 0
      if constexpr (sizeof(Acc) == 4) {
        for (; stride == 1 && n >= 8; n -= 8, from += 8, out += 8) {
          const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
          _mm256_storeu_ps(out, _mm256_cvtph_ps(bits));
        }
      }
#endif
      return copy(from, from_f16);
    }
    case Element::bf16:
      return copy(static_cast<const uint16_t*>(source), from_bf16);
  }
}

inline float absolute(float x) { return __builtin_fabsf(x); }
inline double absolute(double x) { return __builtin_fabs(x); }

template <class Key>
inline constexpr Key sign_bit = static_cast<Key>(Key{1} << (8 * sizeof(Key) - 1));

inline uint32_t order(float score) {
  const uint32_t bits = bits_as<uint32_t>(score);
  const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
  return bits ^ (flip | sign_bit<uint32_t>);
}

inline uint64_t order(double score) {
  const uint64_t bits = bits_as<uint64_t>(score);
  const uint64_t flip = static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63);
  return bits ^ (flip | sign_bit<uint64_t>);
}

template <bool on>
struct Constant {
  static constexpr bool value = on;
};

// `scaling`: 0 without scales, 1 with that of the row, 2 with those of the columns too.
template <class Acc, int kind, int scaling, bool has_mask>
inline typename KeyOf<Acc>::type to_keys_as(
    const Piece<Acc>& piece, int64_t start, int64_t n, typename KeyOf<Acc>::type* __restrict keys) {
  using Key = typename KeyOf<Acc>::type;
  const Acc* __restrict weight = piece.weight + start;
  const Acc* __restrict reference =
      (piece.reference == nullptr ? piece.weight : piece.reference) + start;
  const Acc* __restrict column = scaling == 2 ? piece.column + start : nullptr;
  const uint8_t* __restrict mask = has_mask ? piece.mask + start : nullptr;
  const Acc row = piece.row;
  Key nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    Acc score = weight[i];
    if constexpr (scaling >= 1) score = score * row;
    if constexpr (scaling == 2) score = score * column[i];
    if constexpr (kind == 1) score = absolute(score);
    if constexpr (kind == 2) {
      Acc wanted = reference[i];
      if constexpr (scaling >= 1) wanted = wanted * row;
      if constexpr (scaling == 2) wanted = wanted * column[i];
      score = score * (2 * wanted - score);
    }
    Key key;
    if constexpr (kind == 1) {
      key = bits_as<Key>(score) | sign_bit<Key>;
    } else {
      key = order(score + Acc{0});  // -0 becomes +0: they are equals
    }
    Key bad = score != score ? 1 : 0;
    if constexpr (has_mask) {
      key = mask[i] != 0 ? key : not_a_candidate<Key>;
      bad = mask[i] != 0 ? bad : 0;
    }
    nan |= bad;
    keys[i] = key;
  }
  return nan;
}

inline constexpr int64_t tile_size = 64;

// The processor does not fetch far enough ahead by itself while it looks at a tile.
template <class Acc>
inline void prefetch(const Acc* entries) {
  constexpr int64_t line = 64 / sizeof(Acc);
  constexpr int64_t ahead = 32 * line;
  for (int64_t i = 0; i < tile_size; i += line) __builtin_prefetch(entries + ahead + i);
}

// Calls use(start, keys, n) with the keys of one tile after another. There are tile_size keys
// always; those behind the last entry of the piece are no candidates.
template <class Acc, int kind, int scaling, bool has_mask, class Use>
inline void for_each_tile(const Piece<Acc>& piece, bool* nan, Use use) {
  using Key = typename KeyOf<Acc>::type;
  alignas(64) Key keys[tile_size];
  Key bad = 0;
  int64_t start = 0;
  for (; start + tile_size <= piece.n; start += tile_size) {
    prefetch(piece.weight + start);
    if constexpr (kind == 2) prefetch(piece.reference + start);
    bad |= to_keys_as<Acc, kind, scaling, has_mask>(piece, start, tile_size, keys);
    use(start, keys, tile_size);
  }
  if (start < piece.n) {
    const int64_t n = piece.n - start;
    for (int64_t i = n; i < tile_size; ++i) keys[i] = not_a_candidate<Key>;
    bad |= to_keys_as<Acc, kind, scaling, has_mask>(piece, start, n, keys);
    use(start, keys, n);
  }
  if (bad != 0) *nan = true;
}

template <class Acc, int kind, class Use>
inline void with_keys(const Piece<Acc>& piece, bool* nan, Use use) {
  const auto scaled = [&](auto masked) {
    if (piece.column != nullptr) return for_each_tile<Acc, kind, 2, masked.value>(piece, nan, use);
    if (piece.row != 1) return for_each_tile<Acc, kind, 1, masked.value>(piece, nan, use);
    return for_each_tile<Acc, kind, 0, masked.value>(piece, nan, use);
  };
  return piece.mask != nullptr ? scaled(Constant<true>{}) : scaled(Constant<false>{});
}

template <class Acc, int kind>
void to_keys(const Piece<Acc>& piece, typename KeyOf<Acc>::type* keys, bool* nan) {
  using Key = typename KeyOf<Acc>::type;
  with_keys<Acc, kind>(piece, nan, [&](int64_t start, const Key* tile, int64_t n) {
    for (int64_t i = 0; i < n; ++i) keys[start + i] = tile[i];
  });
}

#if TAP_LEVEL_BITS == 256
// For each set of the eight lanes of 4 bytes, their numbers, a byte for each.
struct Compression {
  uint64_t lanes[256];

  constexpr Compression() : lanes() {
    for (int set = 0; set < 256; ++set) {
      int found = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if ((set >> lane & 1) != 0) lanes[set] |= static_cast<uint64_t>(lane) << (8 * found++);
      }
    }
  }
};

inline constexpr Compression compression;
#endif

// Writes the keys in [low, low + span] to `out` and returns their end. A branch for each hit would
// be guessed wrong each time, so the wide versions compress the hits without one.
template <class Key>
inline Key* scan_tile(const Key* __restrict keys, Key low, Key span, Key* __restrict out) {
#if TAP_LEVEL_BITS == 512
  for (int64_t i = 0; i < tile_size; i += 64 / sizeof(Key)) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    if constexpr (sizeof(Key) == 4) {
      const __m512i offset = _mm512_sub_epi32(key, _mm512_set1_epi32(static_cast<int>(low)));
      const __m512i width = _mm512_set1_epi32(static_cast<int>(span));
      const __mmask16 hits = _mm512_cmple_epu32_mask(offset, width);
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(hits, key));
      out += __builtin_popcount(hits);
    } else {
      const __m512i offset = _mm512_sub_epi64(key, _mm512_set1_epi64(static_cast<long long>(low)));
      const __m512i width = _mm512_set1_epi64(static_cast<long long>(span));
      const __mmask8 hits = _mm512_cmple_epu64_mask(offset, width);
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(hits, key));
      out += __builtin_popcount(hits);
    }
  }
#elif TAP_LEVEL_BITS == 256
  using Lanes __attribute__((vector_size(32))) = Key;
  for (int64_t i = 0; i < tile_size; i += 32 / sizeof(Key)) {
    Lanes key;
    __builtin_memcpy(&key, keys + i, sizeof(key));
    const auto inside = key - low <= span;
    const auto hits = static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(inside)));
    const __m256i places =
        _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(compression.lanes[hits])));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(out),
        _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(key), places));
    out += __builtin_popcount(hits) / static_cast<int>(sizeof(Key) / 4);
  }
#else
  uint8_t inside[tile_size];
  for (int64_t i = 0; i < tile_size; ++i) {
    inside[i] = static_cast<Key>(keys[i] - low) <= span ? 1 : 0;
  }
  for (int64_t i = 0; i < tile_size; i += 8) {
    uint64_t flags;
    __builtin_memcpy(&flags, inside + i, 8);
    while (flags != 0) {
      *out++ = keys[i + (__builtin_ctzll(flags) >> 3)];
      flags &= flags - 1;
    }
  }
#endif
  return out;
}

template <class Acc, int kind>
int64_t scan(
    const Piece<Acc>& piece, typename KeyOf<Acc>::type low, typename KeyOf<Acc>::type span,
    typename KeyOf<Acc>::type* out, int64_t* found, bool* nan) {
  using Key = typename KeyOf<Acc>::type;
  int64_t below = 0;
  Key* end = out;
  with_keys<Acc, kind>(piece, nan, [&](int64_t, const Key* __restrict keys, int64_t) {
    Key lower = 0;
    for (int64_t i = 0; i < tile_size; ++i) lower += keys[i] < low ? 1 : 0;
    below += static_cast<int64_t>(lower);
    end = scan_tile(keys, low, span, end);
  });
  *found += end - out;
  return below;
}

// Whether each key is in [first, first + width).
template <class Key>
inline void keep_tile(const Key* __restrict keys, Key first, Key width, uint8_t* __restrict kept) {
#if TAP_LEVEL_BITS == 512
  if constexpr (sizeof(Key) == 4) {
    for (int64_t i = 0; i < tile_size; i += 16) {
      const __m512i key = _mm512_loadu_si512(keys + i);
      const __m512i offset = _mm512_sub_epi32(key, _mm512_set1_epi32(static_cast<int>(first)));
      const __m512i end = _mm512_set1_epi32(static_cast<int>(width));
      const __mmask16 inside = _mm512_cmplt_epu32_mask(offset, end);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(kept + i), _mm_maskz_set1_epi8(inside, 1));
    }
    return;
  }
#endif
  for (int64_t i = 0; i < tile_size; ++i) {
    kept[i] = static_cast<Key>(keys[i] - first) < width ? 1 : 0;
  }
}

template <class Acc, int kind>
int64_t keep(
    const Piece<Acc>& piece, typename KeyOf<Acc>::type threshold, bool keep_equal, uint8_t* mask,
    bool* nan) {
  using Key = typename KeyOf<Acc>::type;
  // Kept are the keys in [first, not_a_candidate).
  const Key first = static_cast<Key>(threshold + (keep_equal ? 0 : 1));
  const Key width = static_cast<Key>(not_a_candidate<Key> - first);
  int64_t equal = 0;
  with_keys<Acc, kind>(piece, nan, [&](int64_t start, const Key* __restrict keys, int64_t n) {
    alignas(64) uint8_t kept[tile_size];
    Key same = 0;
    keep_tile(keys, first, width, kept);
    for (int64_t i = 0; i < tile_size; ++i) same += keys[i] == threshold ? 1 : 0;
    if (n == tile_size) {
      __builtin_memcpy(mask + start, kept, tile_size);
    } else {
      for (int64_t i = 0; i < n; ++i) mask[start + i] = kept[i];
    }
    equal += static_cast<int64_t>(same);
  });
  return equal;
}

inline int64_t count_true(const uint8_t* mask, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += mask[i] != 0 ? 1 : 0;
  return total;
}

template <class Bits>
inline Bits all_if(uint8_t kept) {
  return static_cast<Bits>(Bits{0} - static_cast<Bits>(kept != 0));
}

template <class Bits>
void apply_mask(const void* values, const uint8_t* __restrict mask, int64_t n, void* out) {
  const Bits* __restrict from = static_cast<const Bits*>(values);
  Bits* __restrict to = static_cast<Bits*>(out);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Bits>(from[i] & all_if<Bits>(mask[i]));
}

template <class Bits>
bool is_masked(const void* values, const uint8_t* __restrict mask, int64_t n) {
  const Bits* __restrict bits = static_cast<const Bits*>(values);
  Bits wrong = 0;
  for (int64_t i = 0; i < n; ++i) wrong |= static_cast<Bits>(bits[i] & ~all_if<Bits>(mask[i]));
  return wrong == 0;
}

// Of a block without pruned entries only the mask is read, and a tile is written only where it is
// not +0 already. With a branch for the mask of each tile, many would be guessed wrong.
template <class Bits>
void zero_pruned(void* values, const uint8_t* __restrict mask, int64_t n) {
  constexpr int64_t block = 512;
  constexpr int64_t tile = 64;
  Bits* __restrict bits = static_cast<Bits*>(values);
  const auto clear = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      bits[i] = static_cast<Bits>(bits[i] & all_if<Bits>(mask[i]));
  };
  int64_t start = 0;
  for (; start + block <= n; start += block) {
    uint8_t pruned = 0;
    for (int64_t i = start; i < start + block; ++i) pruned |= mask[i] == 0 ? 1 : 0;
    if (pruned == 0) continue;
    for (int64_t at = start; at < start + block; at += tile) {
      Bits wrong = 0;
      for (int64_t i = at; i < at + tile; ++i) {
        wrong |= static_cast<Bits>(bits[i] & ~all_if<Bits>(mask[i]));
      }
      if (wrong != 0) clear(at, at + tile);
    }
  }
  clear(start, n);
}

// As bits, because NaN compares as not larger.
template <class Acc>
Acc peak(const Acc* values, int64_t n) {
  using Bits = typename KeyOf<Acc>::type;
  Bits most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits own = bits_as<Bits>(values[i]) & ~sign_bit<Bits>;
    most = own > most ? own : most;
  }
  return bits_as<Acc>(most);
}

inline void digits(
    const float* __restrict values, int64_t n, float scale, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint16_t>(static_cast<int32_t>(absolute(values[i]) * scale));
  }
}

// Sixteen sums side by side, so that the result does not depend on the width of the SIMD.
template <class Acc>
double add_squares(const Acc* values, const Acc* column, Acc row, int64_t n, double* columns) {
  double sums[16] = {};
  int64_t i = 0;
  const auto square = [&](int64_t at) {
    const double value = column == nullptr
                             ? static_cast<double>(values[at]) * static_cast<double>(row)
                             : static_cast<double>(values[at]) * static_cast<double>(row) *
                                   static_cast<double>(column[at]);
    return value * value;
  };
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) {
      const double own = square(i + j);
      sums[j] += own;
      columns[i + j] += own;
    }
  }
  for (; i < n; ++i) {
    const double own = square(i);
    sums[i % 16] += own;
    columns[i] += own;
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// Calls use(p, start, n) with p = mask * weight for one tile after another; without a mask p is the
// weight itself. A separate loop for the mask is what lets the compiler vectorise both.
template <class Acc, class Use>
inline void for_each_masked_tile(const Acc* weight, const uint8_t* mask, int64_t n, Use use) {
  using Bits = typename KeyOf<Acc>::type;
  if (mask == nullptr) return use(weight, int64_t{0}, n);
  constexpr int64_t tile = 256;
  alignas(64) Acc buffer[tile];
  for (int64_t start = 0; start < n; start += tile) {
    const int64_t length = n - start < tile ? n - start : tile;
    const Acc* __restrict from = weight + start;
    const uint8_t* __restrict kept = mask + start;
    for (int64_t i = 0; i < length; ++i) {
      const Bits all = static_cast<Bits>(Bits{0} - static_cast<Bits>(kept[i] != 0));
      buffer[i] = bits_as<Acc>(static_cast<Bits>(bits_as<Bits>(from[i]) & all));
    }
    use(static_cast<const Acc*>(buffer), start, length);
  }
}

// Eight sums side by side for each product, so that the result does not depend on the width of the
// SIMD.
template <class Acc>
void add_products(
    const Acc* weight, const uint8_t* mask, const Acc* reference, int64_t n, double* products) {
  double pp[8] = {}, pr[8] = {}, rr[8] = {};
  for_each_masked_tile(
      weight, mask, n, [&](const Acc* __restrict masked, int64_t start, int64_t length) {
        const Acc* __restrict other = reference + start;
        int64_t i = 0;
        for (; i + 8 <= length; i += 8) {
          for (int j = 0; j < 8; ++j) {
            const double p = static_cast<double>(masked[i + j]);
            const double r = static_cast<double>(other[i + j]);
            pp[j] += p * p;
            pr[j] += p * r;
            rr[j] += r * r;
          }
        }
        for (; i < length; ++i) {
          const double p = static_cast<double>(masked[i]);
          const double r = static_cast<double>(other[i]);
          pp[i % 8] += p * p;
          pr[i % 8] += p * r;
          rr[i % 8] += r * r;
        }
      });
  for (int j = 0; j < 8; ++j) {
    products[0] += pp[j];
    products[1] += pr[j];
    products[2] += rr[j];
  }
}

template <class Acc>
void add_each_product(
    const Acc* weight, const uint8_t* mask, const Acc* reference, int64_t n, double* pp, double* pr,
    double* rr) {
  for_each_masked_tile(
      weight, mask, n, [&](const Acc* __restrict masked, int64_t start, int64_t length) {
        const Acc* __restrict other = reference + start;
        double* __restrict to_pp = pp + start;
        double* __restrict to_pr = pr + start;
        double* __restrict to_rr = rr + start;
        for (int64_t i = 0; i < length; ++i) {
          const double p = static_cast<double>(masked[i]);
          const double r = static_cast<double>(other[i]);
          to_pp[i] += p * p;
          to_pr[i] += p * r;
          to_rr[i] += r * r;
        }
      });
}

template <class Acc, int step>
inline void combine_as(
    const Acc* __restrict weight, const uint8_t* __restrict mask, const Acc* __restrict reference,
    const double* __restrict of_reference, const double* __restrict of_weight, int64_t n,
    Acc* __restrict out) {
  using Bits = typename KeyOf<Acc>::type;
  for (int64_t i = 0; i < n; ++i) {
    const double sum = of_reference[i * step] * static_cast<double>(reference[i]) +
                       of_weight[i * step] * static_cast<double>(weight[i]);
    out[i] = static_cast<Acc>(sum);
  }
  if (mask == nullptr) return;
  for (int64_t i = 0; i < n; ++i) {
    const Bits all = static_cast<Bits>(Bits{0} - static_cast<Bits>(mask[i] != 0));
    out[i] = bits_as<Acc>(static_cast<Bits>(bits_as<Bits>(out[i]) & all));
  }
}

template <class Acc>
void combine(
    const Acc* weight, const uint8_t* mask, const Acc* reference, const double* of_reference,
    const double* of_weight, int64_t step, int64_t n, Acc* out) {
  return step == 0 ? combine_as<Acc, 0>(weight, mask, reference, of_reference, of_weight, n, out)
                   : combine_as<Acc, 1>(weight, mask, reference, of_reference, of_weight, n, out);
}

template <class Acc, bool or_equal>
int64_t above(
    const Acc* __restrict values, int64_t n, Acc bound, uint32_t* __restrict places, bool* nan) {
  using Key = typename KeyOf<Acc>::type;
  const auto is_hit = [&](Acc value) { return or_equal ? value >= bound : value > bound; };
  constexpr int64_t width = 64;
  Key bad = 0;
  int64_t found = 0;
  const auto write = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      places[found] = static_cast<uint32_t>(i);
      found += is_hit(values[i]) ? 1 : 0;
    }
  };
  int64_t start = 0;
  for (; start + width <= n; start += width) {
    Key any = 0;
    for (int64_t i = start; i < start + width; ++i) {
      const Acc value = values[i];
      any |= is_hit(value) ? 1 : 0;
      bad |= value != value ? 1 : 0;
    }
    if (any != 0) write(start, start + width);
  }
  for (int64_t i = start; i < n; ++i) bad |= values[i] != values[i] ? 1 : 0;
  write(start, n);
  if (bad != 0) *nan = true;
  return found;
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
  return {
      widen<Acc>,
      {to_keys<Acc, 0>, to_keys<Acc, 1>, to_keys<Acc, 2>},
      {scan<Acc, 0>, scan<Acc, 1>, scan<Acc, 2>},
      {keep<Acc, 0>, keep<Acc, 1>, keep<Acc, 2>},
      peak<Acc>,
      add_squares<Acc>,
      add_products<Acc>,
      add_each_product<Acc>,
      combine<Acc>,
      {above<Acc, false>, above<Acc, true>}};
}

extern const Kernels table;
const Kernels table{
    TAP_LEVEL_NAME,
    score_kernels<float>(),
    score_kernels<double>(),
    count_true,
    {apply_mask<uint16_t>, apply_mask<uint32_t>, apply_mask<uint64_t>},
    {is_masked<uint16_t>, is_masked<uint32_t>, is_masked<uint64_t>},
    {zero_pruned<uint16_t>, zero_pruned<uint32_t>, zero_pruned<uint64_t>},
    digits,
    gains};

}  // namespace TAP_LEVEL
}  // namespace torchalignprune
