// What each entry adds to the alignment of its unit (row), taken in descending order of importance.
#include <ATen/Parallel.h>

#include <cmath>
#include <utility>
#include <vector>

#include "entries.h"
#include "factories.h"
#include "operators.h"

namespace torchalignprune {
namespace {

// Sorts positions by ascending score; among equals the lower position comes first.
class RowSort {
 public:
  explicit RowSort(int64_t row_size)
      : digits_(row_size), items_(row_size + 1), spare_(row_size + 1) {}

  static float score(uint64_t item) {
    const auto key = static_cast<uint32_t>(item >> 32);
    float score;
    std::memcpy(&score, &key, sizeof(score));
    return score;
  }

  // The candidates among n entries by their magnitudes, of which `peak` is the largest; returns how
  // many there are. `alive` may be null. The positions are the low halves of the sorted items.
  int64_t sort(const float* values, int64_t n, const uint8_t* alive, float peak) {
    // As numbers of sixteen bits almost all scores are apart: the few that share one are put right
    // one by one. That fails in rows with an entry thousands of times larger than most.
    const float scale = 65535.0F / peak;
    const bool by_digits = n >= 64 && std::isnormal(scale);
    const int64_t count = by_digits ? sort_digits(values, n, alive, scale) : fill(values, n, alive);
    if (n < 64 || !insert(count)) std::sort(items_.begin(), items_.begin() + count);
    return count;
  }

  const uint64_t* items() const { return items_.data(); }

 private:
  // A magnitude, whose bits order as it does, and its position.
  static uint64_t item(const float* values, int64_t position) {
    uint32_t key;
    std::memcpy(&key, values + position, sizeof(key));
    return static_cast<uint64_t>(key & 0x7fffffffU) << 32 | static_cast<uint64_t>(position);
  }

  int64_t fill(const float* values, int64_t n, const uint8_t* alive) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      items_[count] = item(values, i);
      count += alive == nullptr || alive[i] != 0 ? 1 : 0;
    }
    return count;
  }

  // By the lower of two digits first, each time stably.
  int64_t sort_digits(const float* values, int64_t n, const uint8_t* alive, float scale) {
    const uint16_t* digits = digits_.data();
    uint64_t* __restrict items = items_.data();
    uint64_t* __restrict spare = spare_.data();
    kernels().digits(values, n, scale, digits_.data());
    std::array<uint32_t, 256> low{}, high{};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t one = alive == nullptr || alive[i] != 0 ? 1 : 0;
      low[digits[i] & 255] += one;
      high[digits[i] >> 8] += one;
    }
    uint32_t in_low = 0, in_high = 0;
    for (size_t value = 0; value < 256; ++value) {
      low[value] = std::exchange(in_low, in_low + low[value]);
      high[value] = std::exchange(in_high, in_high + high[value]);
    }
    const auto count = static_cast<int64_t>(in_low);
    for (int64_t i = 0; i < n; ++i) {
      // No branch, which would be guessed wrong: what is no candidate goes behind the others.
      const uint32_t one = alive == nullptr || alive[i] != 0 ? 1 : 0;
      uint32_t& next = low[digits[i] & 255];
      spare[one != 0 ? next : in_low] = item(values, i);
      next += one;
    }
    for (int64_t i = 0; i < count; ++i) {
      items[high[digits[static_cast<uint32_t>(spare[i])] >> 8]++] = spare[i];
    }
    return count;
  }

  // Insertion sort of what is almost sorted; gives up where it is not.
  bool insert(int64_t count) {
    uint64_t* items = items_.data();
    int64_t moves = 0;
    for (int64_t i = 1; i < count; ++i) {
      const uint64_t own = items[i];
      if (own >= items[i - 1]) continue;
      int64_t at = i;
      for (; at > 0 && own < items[at - 1] && moves <= count; --at, ++moves) {
        items[at] = items[at - 1];
      }
      items[at] = own;
      if (moves > count) return false;
    }
    return true;
  }

  std::vector<uint16_t> digits_;
  std::vector<uint64_t> items_, spare_;
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

  // What each entry that is alive adds; the others get 0. `alive` may be null.
  void rank(const uint8_t* alive, bool has_reference, Acc* out) {
    std::fill_n(out, size_, Acc{0});
    const double norm = norm_of(has_reference ? reference : weight);
    if (norm == 0) return;
    order_.clear();
    for (int64_t i = 0; i < size_; ++i) {
      if (alive == nullptr || alive[i] != 0) order_.push_back(static_cast<uint32_t>(i));
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

  // The same for r = w, the common case: the items that are sorted hold magnitudes and positions.
  // `alive` may be null; `peak` and `norm` are those of the whole unit.
  void rank_magnitudes(
      const float* values, const uint8_t* alive, float peak, double norm, float* out) {
    const int64_t count = norm == 0 ? 0 : sort_.sort(values, size_, alive, peak);
    if (count < size_) std::fill_n(out, size_, 0.0F);
    if (count == 0) return;
    const uint64_t* last = sort_.items() + count - 1;
    const auto value = [&](int64_t k) { return static_cast<double>(RowSort::score(last[-k])); };
    own_gains(norm, count, value);
    for (int64_t k = 0; k < count; ++k) {
      out[static_cast<uint32_t>(last[-k])] = static_cast<float>(gains_[k]);
    }
  }

 private:
  static double norm_of(const std::vector<double>& values) {
    double square = 0;
    for (const double value : values) square += value * value;
    return std::sqrt(square);
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
  at::Tensor out = empty_like(weight, dtype);
  if (weight.numel() == 0) return out;
  const int64_t rows = rows_of(weight);
  const int64_t row_size = weight.numel() / rows;
  const int64_t inner = row_size / columns_of(weight);
  const auto scale = column_scale ? column_scale->contiguous() : at::Tensor();
  const Acc* factors = column_scale ? scale.const_data_ptr<Acc>() : nullptr;
  const int64_t factor_step = column_scale && scale.numel() > 1 ? 1 : 0;
  auto* result = static_cast<Acc*>(out.data_ptr());

  // Returns the largest magnitude.
  const auto load = [&](const at::Tensor& from, int64_t row, auto& to) {
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
    const auto peak =
        kernels().of<typename std::decay_t<decltype(to)>::value_type>().peak(to.data(), row_size);
    TORCH_CHECK_VALUE(
        std::isfinite(peak), "the scores of ", name,
        " should be finite numbers, got NaN or infinity");
    return peak;
  };
  const auto load_wide = [&](const at::Tensor& from, int64_t row, std::vector<double>& to) {
    const double peak = load(from, row, to);
    // Squares of float64 may overflow or vanish, and alignment does not depend on a unit's scale.
    if constexpr (sizeof(Acc) == 8) {
      if (peak == 0) return;
      for (double& value : to) value /= peak;
    }
  };

  const int64_t grain = std::max<int64_t>(1, 16384 / row_size);
  at::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
    Unit<Acc> unit(row_size);
    std::vector<uint8_t> mask_buffer(row_size);
    std::vector<Acc> row_gains(out.is_contiguous() ? 0 : row_size);
    // Calls rank(alive, gains) and puts the gains of the row where they belong in `out`.
    const auto rank_row = [&](int64_t row, auto rank) {
      const uint8_t* alive = nullptr;
      if (mask) alive = read_mask(*mask, row * row_size, row_size, mask_buffer.data());
      if (out.is_contiguous()) return rank(alive, result + row * row_size);
      rank(alive, row_gains.data());
      for_each_run(
          out, row * row_size, row_size,
          [&](int64_t at, int64_t offset, int64_t stride, int64_t length) {
            for (int64_t i = 0; i < length; ++i) result[offset + i * stride] = row_gains[at + i];
          });
    };
    if constexpr (sizeof(Acc) == 4) {
      if (!reference) {
        // The norms of several rows at once: each sum has to wait for its last addition.
        std::array<std::vector<float>, 4> values;
        for (auto& row : values) row.resize(row_size);
        for (int64_t row = from; row < to; row += 4) {
          const int64_t n = std::min<int64_t>(4, to - row);
          std::array<float, 4> peaks;
          for (int64_t j = 0; j < n; ++j) peaks[j] = load(weight, row + j, values[j]);
          std::array<double, 4> squares{};
          for (int64_t i = 0; i < row_size; ++i) {
            for (size_t j = 0; j < 4; ++j) {
              const double value = values[j][i];
              squares[j] += value * value;
            }
          }
          for (int64_t j = 0; j < n; ++j) {
            rank_row(row + j, [&](const uint8_t* alive, float* gains) {
              unit.rank_magnitudes(values[j].data(), alive, peaks[j], std::sqrt(squares[j]), gains);
            });
          }
        }
        return;
      }
    }
    for (int64_t row = from; row < to; ++row) {
      load_wide(weight, row, unit.weight);
      if (reference) load_wide(*reference, row, unit.reference);
      rank_row(row, [&](const uint8_t* alive, Acc* gains) {
        unit.rank(alive, reference.has_value(), gains);
      });
    }
  });
  return out;
}

}  // namespace

at::Tensor cosine_gains(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& reference, const std::optional<at::Tensor>& column_scale,
    std::string name) {
  check_cosine_gains(weight, mask, reference, column_scale, name);
  return weight.scalar_type() == at::kDouble
             ? cosine_gains_as<double>(weight, mask, reference, column_scale, name)
             : cosine_gains_as<float>(weight, mask, reference, column_scale, name);
}

}  // namespace torchalignprune
