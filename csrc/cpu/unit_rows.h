// Reads a weight, its mask and its reference side by side, a stretch of a row at a time.
#pragma once

#include <vector>

#include "entries.h"

namespace torchalignprune {

template <class Acc>
class UnitRows {
 public:
  // With an index, unit i of the weight goes with unit index[i] of the reference.
  explicit UnitRows(const UnitArguments& call)
      : weight_(call.weight),
        mask_(call.mask),
        reference_(call.reference ? *call.reference : call.weight),
        dim_(call.dim),
        itself_(!call.reference && !call.index) {
    rows = rows_of(weight_);
    row_size = rows == 0 ? 0 : weight_.numel() / rows;
    inner = row_size == 0 ? 1 : row_size / columns_of(weight_);
    if (!call.index) return;
    index_ = call.index->contiguous();
    const auto* at = index_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < index_.numel(); ++i) check_partner(call, at[i]);
  }

  // Calls use(at, n, weight, mask, reference) for the stretches [at, at + n) of a row.
  template <class Use>
  void for_each_stretch(int64_t row, Use use) const {
    std::array<Acc, block_size> weight_buffer, reference_buffer;
    std::array<uint8_t, block_size> mask_buffer;
    const auto* index = index_.defined() ? index_.const_data_ptr<int64_t>() : nullptr;
    const bool permuted = index != nullptr && dim_ == 1;
    const int64_t partner = index != nullptr && dim_ == 0 ? index[row] : row;
    std::vector<Acc> whole(permuted ? row_size : 0);
    if (permuted) {
      for (int64_t at = 0; at < row_size; at += block_size) {
        const int64_t n = std::min(block_size, row_size - at);
        const Acc* from = read_values(reference_, row * row_size + at, n, weight_buffer.data());
        std::copy_n(from, n, whole.data() + at);
      }
    }
    for (int64_t at = 0; at < row_size; at += block_size) {
      const int64_t n = std::min(block_size, row_size - at);
      const int64_t begin = row * row_size + at;
      const Acc* w = read_values(weight_, begin, n, weight_buffer.data());
      const Acc* r = w;
      if (permuted) {
        for (int64_t i = 0; i < n; ++i) {
          reference_buffer[i] = whole[index[(at + i) / inner] * inner + (at + i) % inner];
        }
        r = reference_buffer.data();
      } else if (!itself_) {
        r = read_values(reference_, partner * row_size + at, n, reference_buffer.data());
      }
      use(at, n, w, mask_ ? read_mask(*mask_, begin, n, mask_buffer.data()) : nullptr, r);
    }
  }

  int64_t rows, row_size, inner;

 private:
  at::Tensor weight_;
  std::optional<at::Tensor> mask_;
  at::Tensor reference_, index_;
  int64_t dim_;
  bool itself_;
};

}  // namespace torchalignprune
