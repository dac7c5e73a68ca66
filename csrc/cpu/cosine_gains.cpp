// What each entry adds to the alignment of its unit (row), taken in falling order of importance.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "entries.h"

namespace torchalignprune {
namespace {

// Sorts positions by rising scores; among equals the lower position comes first.
class RowSort {
 public:
  explicit RowSort(int64_t row_size) : items_(row_size + 1), spare_(row_size + 1) {}

  // Takes the place of what was there. A score is not negative, so that its bits order as it does.
  void clear() { size_ = 0; }
  void push(float score, uint32_t position, bool wanted) {
    uint32_t key;
    std::memcpy(&key, &score, sizeof(key));
    items_[size_] = static_cast<uint64_t>(key) << 32 | position;
    size_ += wanted ? 1 : 0;
  }
  int64_t size() const { return size_; }

  static float score(uint64_t item) {
    const auto key = static_cast<uint32_t>(item >> 32);
    float score;
    std::memcpy(&score, &key, sizeof(score));
    return score;
  }

  // The positions are the low halves of the items.
  const uint64_t* sort() {
    if (size_ < 64) {
      std::sort(items_.begin(), items_.begin() + size_);
      return items_.data();
    }
    // The lowest digit seldom decides, and the few that it does are put right one by one.
    sort_digits(1);
    if (!insert()) sort_digits(0);
    return items_.data();
  }

 private:
  static constexpr int digits = 4;

  // The two halves of the items are counted and moved side by side: most have one of few leading
  // digits, and the next item would have to wait for the counter of the last one.
  void sort_digits(int lowest) {
    const int64_t half = size_ / 2;
    for (int d = lowest; d < digits; ++d) {
      const auto digit = [d](uint64_t item) { return item >> (32 + 8 * d) & 255; };
      std::array<uint32_t, 256> first{}, second{};
      const uint64_t* from = items_.data();
      for (int64_t i = 0; i < half; ++i) {
        ++first[digit(from[i])];
        ++second[digit(from[half + i])];
      }
      if (size_ % 2 != 0) ++second[digit(from[size_ - 1])];
      const uint64_t any = digit(from[0]);
      if (first[any] + second[any] == size_) continue;  // all have this digit
      uint32_t start = 0;
      for (size_t value = 0; value < 256; ++value) {
        const uint32_t in_first = first[value];
        const uint32_t in_both = in_first + second[value];
        first[value] = start;
        second[value] = start + in_first;
        start += in_both;
      }
      uint64_t* to = spare_.data();
      for (int64_t i = 0; i < half; ++i) {
        const uint64_t one = from[i];
        const uint64_t other = from[half + i];
        to[first[digit(one)]++] = one;
        to[second[digit(other)]++] = other;
      }
      if (size_ % 2 != 0) to[second[digit(from[size_ - 1])]++] = from[size_ - 1];
      items_.swap(spare_);
    }
  }

  // Insertion sort of what is almost sorted; gives up where it is not.
  bool insert() {
    int64_t moves = 0;
    for (int64_t i = 1; i < size_; ++i) {
      const uint64_t item = items_[i];
      int64_t at = i;
      for (; at > 0 && item < items_[at - 1] && moves <= size_; --at, ++moves) {
        items_[at] = items_[at - 1];
      }
      items_[at] = item;
      if (moves > size_) return false;
    }
    return true;
  }

  std::vector<uint64_t> items_, spare_;
  int64_t size_ = 0;
};

// One unit, and the memory that is used again for the next one.
template <class Acc>
class Unit {
 public:
  std::vector<double> weight, reference;

  explicit Unit(int64_t size)
      : weight(size),
        reference(size),
        size_(size),
        sort_(size),
        gains_(size),
        squares_(size),
        sums_(size + 1) {
    order_.reserve(size);
    rest_.reserve(size);
  }

  // What each entry that is alive adds; the others get 0.
  void rank(const uint8_t* alive, bool has_reference, Acc* out) {
    std::fill_n(out, size_, Acc{0});
    if constexpr (sizeof(Acc) == 4) {
      if (!has_reference) return rank_magnitudes(alive, out);
    }
    const double norm = norm_of(has_reference ? reference : weight);
    if (norm == 0) return;
    order_.clear();
    for (int64_t i = 0; i < size_; ++i) {
      if (alive[i] != 0) order_.push_back(static_cast<uint32_t>(i));
    }
    if (has_reference) {
      order_by_alignment();
      reference_gains(norm);
    } else {
      order_by_magnitude();
      const auto value = [&](int64_t k) { return weight[order_[k]]; };
      own_gains(norm, static_cast<int64_t>(order_.size()), value);
    }
    for (size_t k = 0; k < order_.size(); ++k) out[order_[k]] = static_cast<Acc>(gains_[k]);
  }

 private:
  static double norm_of(const std::vector<double>& values) {
    double square = 0;
    for (const double value : values) square += value * value;
    return std::sqrt(square);
  }

  // The way that most go: magnitudes travel with their positions in the items that are sorted.
  void rank_magnitudes(const uint8_t* alive, Acc* out) {
    double square = 0;
    sort_.clear();
    for (int64_t i = 0; i < size_; ++i) {
      const double value = weight[i];
      square += value * value;
      sort_.push(static_cast<float>(std::abs(value)), static_cast<uint32_t>(i), alive[i] != 0);
    }
    const double norm = std::sqrt(square);
    const int64_t count = sort_.size();
    if (norm == 0 || count == 0) return;
    const uint64_t* last = sort_.sort() + count - 1;
    const auto value = [&](int64_t k) { return static_cast<double>(RowSort::score(last[-k])); };
    own_gains(norm, count, value);
    for (int64_t k = 0; k < count; ++k) {
      out[static_cast<uint32_t>(last[-k])] = static_cast<Acc>(gains_[k]);
    }
  }

  // Among equals the higher position comes first: the lower one is pruned first.
  void order_by_magnitude() {
    std::sort(order_.begin(), order_.end(), [&](uint32_t a, uint32_t b) {
      const double x = std::abs(weight[a]), y = std::abs(weight[b]);
      return x != y ? x > y : a > b;
    });
  }

  // Always next the entry with which the chosen ones are aligned best, (d + w r) / sqrt(q + w^2)
  // where d = <w, r> and q = <w, w> of the chosen; a quarter as many at once as are chosen already,
  // which changes little and makes it O(n log n). For r = w this is the order of magnitude.
  void order_by_alignment() {
    rest_.clear();
    for (const uint32_t at : order_) rest_.push_back({0, at});
    double dot = 0, square = 0;
    for (size_t chosen = 0; chosen < order_.size();) {
      for (auto next = rest_.begin() + chosen; next != rest_.end(); ++next) {
        const double w = weight[next->position];
        const double size = std::sqrt(square + w * w);
        next->alignment = size > 0 ? (dot + w * reference[next->position]) / size : 0;
      }
      const size_t block = std::min(std::max<size_t>(1, chosen / 4), order_.size() - chosen);
      const auto begin = rest_.begin() + chosen;
      std::partial_sort(begin, begin + block, rest_.end());
      for (size_t k = chosen; k < chosen + block; ++k) {
        const uint32_t at = rest_[k].position;
        order_[k] = at;
        dot += weight[at] * reference[at];
        square += weight[at] * weight[at];
      }
      chosen += block;
    }
  }

  // The k-th largest |w| adds w^2 / ((sqrt(C_k) + sqrt(C_{k-1})) |w|), where C_k is the sum of the
  // k largest squares (marginal analysis, Fox 1966).
  template <class Value>
  void own_gains(double norm, int64_t alive, Value value) {
    sums_[0] = 0;
    double sum = 0;
    for (int64_t k = 0; k < alive; ++k) {
      const double w = value(k);
      squares_[k] = w * w;
      sums_[k + 1] = sum += squares_[k];
    }
    kernels().gains(squares_.data(), sums_.data() + 1, norm, alive, gains_.data());
  }

  // The differences of A along the order, then the least concave majorant, by pooling neighbours
  // whose gains rise.
  void reference_gains(double norm) {
    const auto alive = static_cast<int64_t>(order_.size());
    double dot = 0, square = 0, before = 0;
    int64_t pools = 0;
    std::vector<double>&totals = squares_, &sizes = sums_;
    for (int64_t k = 0; k < alive; ++k) {
      const uint32_t at = order_[k];
      dot += weight[at] * reference[at];
      square += weight[at] * weight[at];
      const double alignment = square > 0 ? dot / (std::sqrt(square) * norm) : 0;
      double total = alignment - before;
      double size = 1;
      before = alignment;
      while (pools > 0 && totals[pools - 1] * size < total * sizes[pools - 1]) {
        --pools;
        total += totals[pools];
        size += sizes[pools];
      }
      totals[pools] = total;
      sizes[pools] = size;
      ++pools;
    }
    int64_t k = 0;
    for (int64_t pool = 0; pool < pools; ++pool) {
      const double gain = totals[pool] / sizes[pool];
      const double next =
          pool + 1 < pools ? totals[pool + 1] / sizes[pool + 1] : gain - std::abs(gain);
      // A pool falls a little towards the next one, so that a cut through it keeps the order.
      const double step = (gain - next) / (1000 * sizes[pool]);
      for (int64_t i = 0; i < static_cast<int64_t>(sizes[pool]); ++i, ++k) {
        gains_[k] = gain - static_cast<double>(i) * step;
      }
    }
  }

  struct Candidate {
    double alignment;
    uint32_t position;
    bool operator<(const Candidate& other) const {
      return alignment != other.alignment ? alignment > other.alignment : position > other.position;
    }
  };

  int64_t size_;
  RowSort sort_;
  std::vector<double> gains_;
  std::vector<double> squares_, sums_;
  std::vector<uint32_t> order_;
  std::vector<Candidate> rest_;
};

template <class Acc>
at::Tensor cosine_gains_as(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& reference, const std::optional<at::Tensor>& column_scale,
    const std::string& name) {
  const at::ScalarType dtype = sizeof(Acc) == 4 ? at::kFloat : at::kDouble;
  at::Tensor out = at::empty_like(weight, at::TensorOptions().dtype(dtype));
  if (weight.numel() == 0) return out;
  const int64_t rows = rows_of(weight);
  const int64_t row_size = weight.numel() / rows;
  const int64_t inner = row_size / columns_of(weight);
  const auto scale = column_scale ? column_scale->contiguous() : at::Tensor();
  const Acc* factors = column_scale ? scale.const_data_ptr<Acc>() : nullptr;
  const int64_t factor_step = column_scale && scale.numel() > 1 ? 1 : 0;
  auto* result = static_cast<Acc*>(out.data_ptr());

  const auto load = [&](const at::Tensor& from, int64_t row, std::vector<double>& to) {
    std::array<Acc, block_size> buffer;
    for (int64_t at = 0; at < row_size; at += block_size) {
      const int64_t n = std::min(block_size, row_size - at);
      const Acc* values = read_values(from, row * row_size + at, n, buffer.data());
      if (factors == nullptr) {
        for (int64_t i = 0; i < n; ++i) to[at + i] = values[i];
      } else {
        for (int64_t i = 0; i < n; ++i) {
          to[at + i] = values[i] * factors[(at + i) / inner * factor_step];
        }
      }
    }
    uint64_t infinite = 0;
    for (int64_t i = 0; i < row_size; ++i) {
      infinite |= std::abs(to[i]) <= std::numeric_limits<double>::max() ? 0 : 1;
    }
    TORCH_CHECK_VALUE(
        infinite == 0, "the scores of ", name, " should be finite numbers, got NaN or infinity");
    // Alignment does not see a unit's scale, and squares of float64 may overflow or vanish.
    if constexpr (sizeof(Acc) == 8) {
      double peak = 0;
      for (const double value : to) peak = std::max(peak, std::abs(value));
      if (peak == 0) return;
      for (double& value : to) value /= peak;
    }
  };

  const int64_t grain = std::max<int64_t>(1, 16384 / row_size);
  at::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
    Unit<Acc> unit(row_size);
    std::vector<uint8_t> mask_buffer(row_size, 1);
    std::vector<Acc> row_gains(out.is_contiguous() ? 0 : row_size);
    for (int64_t row = from; row < to; ++row) {
      load(weight, row, unit.weight);
      if (reference) load(*reference, row, unit.reference);
      const uint8_t* alive = mask_buffer.data();
      if (mask) alive = read_mask(*mask, row * row_size, row_size, mask_buffer.data());
      if (out.is_contiguous()) {
        unit.rank(alive, reference.has_value(), result + row * row_size);
        continue;
      }
      unit.rank(alive, reference.has_value(), row_gains.data());
      for_each_run(
          out, row * row_size, row_size,
          [&](int64_t at, int64_t offset, int64_t stride, int64_t length) {
            for (int64_t i = 0; i < length; ++i) result[offset + i * stride] = row_gains[at + i];
          });
    }
  });
  return out;
}

at::Tensor cosine_gains(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& reference, const std::optional<at::Tensor>& column_scale,
    std::string name) {
  check_cosine_gains(weight, mask, reference, column_scale, name);
  return weight.scalar_type() == at::kDouble
             ? cosine_gains_as<double>(weight, mask, reference, column_scale, name)
             : cosine_gains_as<float>(weight, mask, reference, column_scale, name);
}

TORCH_LIBRARY_IMPL(torchalignprune, CPU, m) { m.impl("cosine_gains", &cosine_gains); }

}  // namespace
}  // namespace torchalignprune
