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

inline constexpr int64_t block_size = 1024;

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

  // Keys of the entries [begin, begin + n), n <= block_size; returns whether one is NaN.
  bool read(int64_t begin, int64_t n, Key* keys) const {
    std::array<Acc, block_size> weight_buffer, reference_buffer, column_buffer;
    std::array<uint8_t, block_size> mask_buffer;
    const Acc* w = read_values(weight, begin, n, weight_buffer.data());
    const Acc* r =
        reference ? read_values(*reference, begin, n, reference_buffer.data()) : nullptr;
    const uint8_t* m = mask ? read_mask(*mask, begin, n, mask_buffer.data()) : nullptr;
    const auto to_keys = kernels().of<Acc>().to_keys[static_cast<int>(score)];
    if (!row_scale && !column_scale) return to_keys(w, r, Acc{1}, nullptr, m, n, keys);

    // Scales change from row to row, so each stretch of a row is a call of its own.
    const int64_t rows = rows_of(weight);
    const int64_t row_size = weight.numel() / rows;
    const int64_t inner = row_size / columns_of(weight);
    bool nan = false;
    for (int64_t done = 0; done < n;) {
      const int64_t row = (begin + done) / row_size;
      const int64_t start = (begin + done) % row_size;
      const int64_t length = std::min(n - done, row_size - start);
      const Acc row_factor = row_scale ? factor(*row_scale, row) : Acc{1};
      const Acc* column = nullptr;
      if (column_scale) {
        const Acc* factors = column_scale->const_data_ptr<Acc>();
        if (inner == 1 && column_scale->numel() > 1) {
          column = factors + start;
        } else {
          for (int64_t i = 0; i < length; ++i) {
            column_buffer[i] = column_scale->numel() > 1 ? factors[(start + i) / inner] : *factors;
          }
          column = column_buffer.data();
        }
      }
      nan |= to_keys(
          w + done, r ? r + done : nullptr, row_factor, column, m ? m + done : nullptr, length,
          keys + done);
      done += length;
    }
    return nan;
  }

 private:
  static Acc factor(const at::Tensor& scale, int64_t index) {
    return scale.const_data_ptr<Acc>()[scale.numel() > 1 ? index : 0];
  }
};

}  // namespace torchalignprune
