// Reads the entries of a tensor in the order of its flat index, whatever its strides, as blocks of
// keys that order as the scores do.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace torchalignprune {

inline constexpr int64_t block_size = 2048;

inline Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Element::f32;
    case at::kDouble:
      return Element::f64;
    case at::kHalf:
      return Element::f16;
    default:
      return Element::bf16;
  }
}

// Walks over the runs of equal stride that make up the entries [begin, begin + n).
template <class Visit>
void for_each_run(const at::Tensor& tensor, int64_t begin, int64_t n, Visit visit) {
  if (tensor.is_contiguous()) {
    visit(int64_t{0}, begin, int64_t{1}, n);
    return;
  }
  const int64_t inner = tensor.size(-1);
  const int64_t stride = tensor.stride(-1);
  for (int64_t done = 0; done < n;) {
    const int64_t flat = begin + done;
    int64_t rest = flat / inner;
    const int64_t column = flat % inner;
    int64_t offset = column * stride;
    for (int64_t dim = tensor.dim() - 2; dim >= 0; --dim) {
      offset += rest % tensor.size(dim) * tensor.stride(dim);
      rest /= tensor.size(dim);
    }
    const int64_t length = std::min(n - done, inner - column);
    visit(done, offset, stride, length);
    done += length;
  }
}

// A pointer to n widened entries: the tensor's own memory where it can serve, or else `buffer`.
template <class Acc>
const Acc* read_values(const at::Tensor& tensor, int64_t begin, int64_t n, Acc* buffer) {
  const Element element = element_of(tensor);
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t bytes = tensor.element_size();
  if (tensor.is_contiguous() && bytes == static_cast<int64_t>(sizeof(Acc))) {
    return reinterpret_cast<const Acc*>(data) + begin;
  }
  const auto& kernel = kernels().of<Acc>();
  for_each_run(tensor, begin, n, [&](int64_t at, int64_t offset, int64_t stride, int64_t length) {
    kernel.widen(element, data + offset * bytes, stride, length, buffer + at);
  });
  return buffer;
}

// Writes n entries in the dtype of the tensor.
template <class Acc>
void write_values(const at::Tensor& tensor, int64_t begin, int64_t n, const Acc* values) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, tensor.scalar_type(), "write_values", [&] {
        auto* data = static_cast<scalar_t*>(tensor.data_ptr());
        for_each_run(
            tensor, begin, n, [&](int64_t at, int64_t offset, int64_t stride, int64_t length) {
              for (int64_t i = 0; i < length; ++i) {
                data[offset + i * stride] = static_cast<scalar_t>(values[at + i]);
              }
            });
      });
}

inline const uint8_t* read_mask(const at::Tensor& mask, int64_t begin, int64_t n, uint8_t* buffer) {
  const auto* data = static_cast<const uint8_t*>(mask.const_data_ptr());
  if (mask.is_contiguous()) return data + begin;
  for_each_run(mask, begin, n, [&](int64_t at, int64_t offset, int64_t stride, int64_t length) {
    for (int64_t i = 0; i < length; ++i) buffer[at + i] = data[offset + i * stride];
  });
  return buffer;
}

// The candidates of one tensor and what their scores are made of.
template <class Acc>
struct Entries {
  using Key = typename KeyOf<Acc>::type;

  at::Tensor weight;
  std::optional<at::Tensor> mask, reference, row_scale, column_scale;
  Score score;

  // Calls use(piece, offset) for the pieces that make up the entries [begin, begin + n),
  // n <= block_size, at their offsets from `begin`.
  template <class Use>
  void for_each_piece(int64_t begin, int64_t n, Use use) const {
    std::array<Acc, block_size> weight_buffer, reference_buffer, column_buffer;
    std::array<uint8_t, block_size> mask_buffer;
    Piece<Acc> piece{};
    piece.weight = read_values(weight, begin, n, weight_buffer.data());
    if (reference) piece.reference = read_values(*reference, begin, n, reference_buffer.data());
    if (mask) piece.mask = read_mask(*mask, begin, n, mask_buffer.data());
    piece.row = 1;
    piece.n = n;
    if (!row_scale && !column_scale) return use(piece, int64_t{0});

    // Scales change from row to row, so each stretch of a row is a piece of its own.
    const int64_t row_size = weight.numel() / rows_of(weight);
    const int64_t inner = row_size / columns_of(weight);
    for (int64_t done = 0; done < n;) {
      const int64_t row = (begin + done) / row_size;
      const int64_t start = (begin + done) % row_size;
      Piece<Acc> part = piece;
      part.n = std::min(n - done, row_size - start);
      part.weight += done;
      if (reference) part.reference += done;
      if (mask) part.mask += done;
      if (row_scale) part.row = factor(*row_scale, row);
      if (column_scale) {
        const Acc* factors = column_scale->const_data_ptr<Acc>();
        if (inner == 1 && column_scale->numel() > 1) {
          part.column = factors + start;
        } else {
          for (int64_t i = 0; i < part.n; ++i) {
            column_buffer[i] = column_scale->numel() > 1 ? factors[(start + i) / inner] : *factors;
          }
          part.column = column_buffer.data();
        }
      }
      use(part, done);
      done += part.n;
    }
  }

  // Keys of the entries [begin, begin + n), n <= block_size.
  void read(int64_t begin, int64_t n, Key* keys, bool* nan) const {
    for_each_piece(begin, n, [&](const Piece<Acc>& piece, int64_t offset) {
      kernels().of<Acc>().to_keys[static_cast<int>(score)](piece, keys + offset, nan);
    });
  }

 private:
  static Acc factor(const at::Tensor& scale, int64_t index) {
    return scale.const_data_ptr<Acc>()[scale.numel() > 1 ? index : 0];
  }
};

}  // namespace torchalignprune
