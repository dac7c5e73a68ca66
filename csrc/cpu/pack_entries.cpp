// Packs a tensor into one bit for each entry and the values whose bit is set, and unpacks it.
//
// Entry i has bit i % 8 of byte i / 8. Entries whose bit is not set are zeros; a second, shorter
// row of bits says which of those are negative.
#include <ATen/Parallel.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "operators.h"

namespace torchalignprune {
namespace {

constexpr int64_t block_size = int64_t{1} << 16;  // entries; a multiple of 64

int64_t bytes_of(int64_t bits) { return (bits + 7) / 8; }

// Up to 64 bits from a place that is a multiple of 64, whatever the order of the machine's bytes.
uint64_t load_bits(const uint8_t* bits, int64_t begin, int64_t end) {
  const uint8_t* from = bits + begin / 8;
  uint64_t word = 0;
  if (end - begin == 64) {  // of a length that compilers make one load of
    for (int k = 0; k < 8; ++k) word |= uint64_t{from[k]} << (8 * k);
    return word;
  }
  for (int64_t k = 0; k < bytes_of(end - begin); ++k) word |= uint64_t{from[k]} << (8 * k);
  return word;
}

// The lowest n bits of 64.
uint64_t bits_below(int64_t n) { return n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0}; }

// Torch 2.11 compiles extensions as C++17, which has no <bit>.
int count_ones(uint64_t bits) { return __builtin_popcountll(bits); }
int first_one(uint64_t bits) { return __builtin_ctzll(bits); }

bool bit_at(const uint8_t* bits, int64_t i) { return (bits[i / 8] >> (i % 8) & 1) != 0; }

// How many values and negative zeros a block of entries has, and how many values a mask would lose.
struct Counts {
  int64_t kept = 0;
  int64_t negative = 0;
  int64_t lost = 0;
};

struct Edge {
  int64_t byte = 0;
  uint8_t bits = 0;
};

// A bit for each of up to 8 entries.
struct Eight {
  unsigned nonzero = 0, negative = 0, kept = 0;

  template <class Bits>
  Eight(const Bits* words, const uint8_t* mask, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
      nonzero |= unsigned{static_cast<Bits>(words[k] << 1) != 0} << k;
      negative |= unsigned{words[k] >> (8 * sizeof(Bits) - 1) != 0} << k;
    }
    if (mask == nullptr) {
      kept = nonzero;
    } else {
      for (int64_t k = 0; k < n; ++k) kept |= unsigned{mask[k] != 0} << k;
    }
  }
};

template <class Bits>
Counts write_bits(
    const Bits* words, const uint8_t* mask, int64_t begin, int64_t end, uint8_t* bits) {
  Counts counts;
  for (int64_t i = begin; i < end; i += 8) {
    const uint8_t* own_mask = mask == nullptr ? nullptr : mask + i;
    // All but the last are 8, which the compiler unrolls.
    const Eight eight =
        end - i >= 8 ? Eight(words + i, own_mask, 8) : Eight(words + i, own_mask, end - i);
    bits[i / 8] = static_cast<uint8_t>(eight.kept);
    counts.kept += count_ones(eight.kept);
    counts.lost += count_ones(eight.nonzero & ~eight.kept);
    counts.negative += count_ones(eight.negative & ~eight.nonzero & ~eight.kept);
  }
  return counts;
}

template <class Bits>
void pack_as(
    const at::Tensor& weight, const uint8_t* mask, at::Tensor& bits, at::Tensor& values,
    at::Tensor& signs, int64_t& lost) {
  const int64_t n = weight.numel();
  const auto* words = static_cast<const Bits*>(weight.const_data_ptr());
  auto* packed = bits.mutable_data_ptr<uint8_t>();
  const int64_t blocks = (n + block_size - 1) / block_size;
  std::vector<Counts> counts(blocks);
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t begin = block * block_size;
      const int64_t end = std::min(n, begin + block_size);
      counts[block] = write_bits(words, mask, begin, end, packed);
    }
  });
  Counts total;
  std::vector<int64_t> first(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    first[block] = total.kept;
    total.kept += counts[block].kept;
    total.negative += counts[block].negative;
    total.lost += counts[block].lost;
  }
  lost = total.lost;
  if (lost > 0) return;
  values = weight.new_empty({total.kept});
  auto* to_value = static_cast<Bits*>(values.mutable_data_ptr());
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      Bits* out = to_value + first[block];
      const int64_t end = std::min(n, (block + 1) * block_size);
      for (int64_t i = block * block_size; i < end; i += 64) {
        for (uint64_t left = load_bits(packed, i, std::min(end, i + 64)); left != 0;
             left &= left - 1) {
          *out++ = words[i + first_one(left)];
        }
      }
    }
  });
  if (total.negative == 0) return;
  signs = bits.new_zeros({bytes_of(n - total.kept)});
  auto* to_sign = signs.mutable_data_ptr<uint8_t>();
  // A block's zeros begin and end within bytes that it shares with others.
  std::vector<Edge> edges(2 * blocks);
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t end = std::min(n, (block + 1) * block_size);
      int64_t zero = block * block_size - first[block];
      const int64_t first_byte = zero / 8;
      unsigned byte = 0;
      for (int64_t i = block * block_size; i < end; i += 64) {
        const int64_t last = std::min(end, i + 64);
        const uint64_t kept = load_bits(packed, i, last);
        for (uint64_t left = bits_below(last - i) & ~kept; left != 0; left &= left - 1) {
          byte |= unsigned{words[i + first_one(left)] != 0} << (zero % 8);
          if (++zero % 8 != 0) continue;
          if (zero / 8 - 1 == first_byte) {
            edges[2 * block] = {first_byte, static_cast<uint8_t>(byte)};
          } else {
            to_sign[zero / 8 - 1] = static_cast<uint8_t>(byte);
          }
          byte = 0;
        }
      }
      if (byte != 0) edges[2 * block + 1] = {zero / 8, static_cast<uint8_t>(byte)};
    }
  });
  for (const Edge& edge : edges) {
    if (edge.bits != 0) to_sign[edge.byte] |= edge.bits;
  }
}

void check_bits(const at::Tensor& bits, int64_t n, const char* what) {
  TORCH_CHECK_TYPE(
      bits.scalar_type() == at::kByte, what, " should be uint8, got ", bits.scalar_type());
  TORCH_CHECK_VALUE(
      n >= 0 && bits.dim() == 1 && bits.numel() == bytes_of(n), what, " should have shape [",
      bytes_of(n), "], that of ", n, " bits, got ", bits.sizes());
  TORCH_CHECK_VALUE(
      n % 8 == 0 || bits.const_data_ptr<uint8_t>()[n / 8] >> (n % 8) == 0, what,
      " should be 0 past the last of ", n);
}

// How many bits are set before each block, and in the last element how many in all.
std::vector<int64_t> count_blocks(const uint8_t* bits, int64_t n) {
  const int64_t blocks = (n + block_size - 1) / block_size;
  std::vector<int64_t> first(blocks + 1);
  at::parallel_for(0, blocks, 16, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t end = std::min(n, (block + 1) * block_size);
      int64_t count = 0;
      for (int64_t i = block * block_size; i < end; i += 64) {
        count += count_ones(load_bits(bits, i, std::min(end, i + 64)));
      }
      first[block + 1] = count;
    }
  });
  for (int64_t block = 0; block < blocks; ++block) first[block + 1] += first[block];
  return first;
}

template <class Bits>
void unpack_as(
    const uint8_t* bits, const std::vector<int64_t>& first, const at::Tensor& values,
    const uint8_t* signs, at::Tensor& out) {
  const int64_t n = out.numel();
  const auto* from_value = static_cast<const Bits*>(values.const_data_ptr());
  auto* to = static_cast<Bits*>(out.mutable_data_ptr());
  at::parallel_for(0, static_cast<int64_t>(first.size()) - 1, 1, [&](int64_t from, int64_t until) {
    for (int64_t block = from; block < until; ++block) {
      const Bits* value = from_value + first[block];
      const int64_t begin = block * block_size;
      const int64_t end = std::min(n, begin + block_size);
      int64_t zero = begin - first[block];
      std::fill(to + begin, to + end, Bits{0});
      for (int64_t i = begin; i < end; i += 64) {
        const int64_t last = std::min(end, i + 64);
        const uint64_t kept = load_bits(bits, i, last);
        for (uint64_t left = kept; left != 0; left &= left - 1) {
          to[i + first_one(left)] = *value++;
        }
        if (signs == nullptr) continue;
        for (uint64_t left = bits_below(last - i) & ~kept; left != 0; left &= left - 1) {
          const Bits sign = bit_at(signs, zero++) ? 1 : 0;
          to[i + first_one(left)] = static_cast<Bits>(sign << (8 * sizeof(Bits) - 1));
        }
      }
    }
  });
}

// How many entries a tensor of a shape has, checked before memory is taken for it.
int64_t entries_of(c10::IntArrayRef shape) {
  constexpr int64_t most = std::numeric_limits<int64_t>::max() - 7;  // which bytes round up
  int64_t n = 1;
  for (const int64_t size : shape) {
    TORCH_CHECK_VALUE(
        size >= 0 && (size == 0 || n <= most / size),
        "shape should have sizes of at least 0, and not too many entries to count, got ", shape);
    n *= size;
  }
  return n;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack_entries(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask) {
  check_weight(weight, "weight");
  check_mask(weight, mask, "weight");
  const at::Tensor own = weight.contiguous();
  const at::Tensor own_mask = mask ? mask->contiguous() : at::Tensor();
  const auto* given = mask ? static_cast<const uint8_t*>(own_mask.const_data_ptr()) : nullptr;
  const auto bytes = weight.options().dtype(at::kByte);
  at::Tensor bits = weight.new_empty({bytes_of(weight.numel())}, bytes);
  at::Tensor values = weight.new_empty({0});
  at::Tensor signs = weight.new_empty({0}, bytes);
  int64_t lost = 0;
  if (weight.element_size() == 2) {
    pack_as<uint16_t>(own, given, bits, values, signs, lost);
  } else if (weight.element_size() == 4) {
    pack_as<uint32_t>(own, given, bits, values, signs, lost);
  } else {
    pack_as<uint64_t>(own, given, bits, values, signs, lost);
  }
  at::Tensor outside = weight.new_empty({}, bytes.dtype(at::kLong));
  *outside.mutable_data_ptr<int64_t>() = lost;
  return {bits, values, signs, outside};
}

at::Tensor unpack_entries(
    const at::Tensor& bits, const at::Tensor& values, const at::Tensor& signs,
    c10::IntArrayRef shape) {
  check_weight(values, "values");
  const int64_t n = entries_of(shape);
  const at::Tensor own = bits.contiguous();
  const at::Tensor own_values = values.contiguous();
  const at::Tensor own_signs = signs.contiguous();
  check_bits(own, n, "bits");
  const auto* packed = own.const_data_ptr<uint8_t>();
  const std::vector<int64_t> first = count_blocks(packed, n);
  TORCH_CHECK_VALUE(
      values.dim() == 1 && values.numel() == first.back(), "values should have shape [",
      first.back(), "], one for each bit, got ", values.sizes());
  const bool has_signs = signs.numel() > 0;
  if (has_signs) check_bits(own_signs, n - first.back(), "signs");
  const uint8_t* sign = has_signs ? own_signs.const_data_ptr<uint8_t>() : nullptr;
  at::Tensor out = values.new_empty(shape);
  if (values.element_size() == 2) {
    unpack_as<uint16_t>(packed, first, own_values, sign, out);
  } else if (values.element_size() == 4) {
    unpack_as<uint32_t>(packed, first, own_values, sign, out);
  } else {
    unpack_as<uint64_t>(packed, first, own_values, sign, out);
  }
  return out;
}

at::Tensor count_bits(const at::Tensor& bits, int64_t n) {
  const at::Tensor own = bits.contiguous();
  check_bits(own, n, "bits");
  at::Tensor count = bits.new_empty({}, bits.options().dtype(at::kLong));
  *count.mutable_data_ptr<int64_t>() = count_blocks(own.const_data_ptr<uint8_t>(), n).back();
  return count;
}

}  // namespace torchalignprune
