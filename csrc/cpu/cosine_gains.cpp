// What each entry adds to the alignment of its unit (row), taken in falling order of importance.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "entries.h"

namespace torchalignprune {
namespace {

// The rising order of a unit's entries: stable, so that among equals the lower position comes first
// and is pruned first.
class RowSort {
 public:
  explicit RowSort(int64_t row_size) : items_(row_size), spare_(row_size) {}

  void clear() { size_ = 0; }
  void push(float score, uint32_t position) {
    uint32_t key;
    std::memcpy(&key, &score, sizeof(key));
    key ^= static_cast<uint32_t>(static_cast<int32_t>(key) >> 31) | 0x80000000u;
    items_[size_++] = static_cast<uint64_t>(key) << 32 | position;
  }

  // The positions are the low halves of the items.
  const uint64_t* sort() {
    if (size_ < 64) {
      std::sort(items_.begin(), items_.begin() + size_);
      return items_.data();
    }
    constexpr int digits = 4;
    std::array<std::array<uint32_t, 256>, digits> counts{};
    for (int64_t i = 0; i < size_; ++i) {
      const uint64_t item = items_[i];
      for (int d = 0; d < digits; ++d) ++counts[d][item >> (32 + 8 * d) & 255];
    }
    for (int d = 0; d < digits; ++d) {
      auto& starts = counts[d];
      if (starts[items_[0] >> (32 + 8 * d) & 255] == size_) continue;  // all have this digit
      uint32_t start = 0;
      for (uint32_t& count : starts) {
        const uint32_t own = count;
        count = start;
        start += own;
      }
      for (int64_t i = 0; i < size_; ++i) {
        const uint64_t item = items_[i];
        spare_[starts[item >> (32 + 8 * d) & 255]++] = item;
      }
      items_.swap(spare_);
    }
    return items_.data();
  }

 private:
  std::vector<uint64_t> items_, spare_;
  int64_t size_ = 0;
};

struct Scratch {
  explicit Scratch(int64_t n) : sort(n), weight(n), reference(n), sums(n + 1), values(n), gains(n) {
    order.reserve(n);
  }
  RowSort sort;
  std::vector<double> weight, reference, sums, values, gains;
  std::vector<uint32_t> order;
};

// Rising positions by |w|, exactly, for scores that do not fit a float32 key.
void order_by(const std::vector<double>& score, std::vector<uint32_t>& order) {
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return score[a] < score[b];
  });
}

// r = w: the k-th largest |w| adds w^2 / ((sqrt(C_k) + sqrt(C_{k-1})) |w|), where C_k is the sum of
// the k largest squares (marginal analysis, Fox 1966).
template <class Order>
void own_gains(Scratch& s, int64_t alive, double norm, Order position) {
  s.sums[0] = 0;
  for (int64_t k = 0; k < alive; ++k) {
    const double w = s.weight[position(alive - 1 - k)];
    s.values[k] = w * w;
    s.sums[k + 1] = s.sums[k] + s.values[k];
  }
  kernels().gains(s.values.data(), s.sums.data() + 1, norm, alive, s.gains.data());
}

// Any r: the differences of A along the order, then the least concave majorant, by pooling
// neighbours whose gains rise.
template <class Order>
void reference_gains(Scratch& s, int64_t alive, double norm, Order position) {
  double dot = 0, square = 0, before = 0;
  for (int64_t k = 0; k < alive; ++k) {
    const uint32_t at = position(alive - 1 - k);
    dot += s.weight[at] * s.reference[at];
    square += s.weight[at] * s.weight[at];
    const double alignment = square > 0 ? dot / (std::sqrt(square) * norm) : 0;
    s.gains[k] = alignment - before;
    before = alignment;
  }
  // s.values and s.sums hold the pools' totals and sizes.
  int64_t pools = 0;
  for (int64_t k = 0; k < alive; ++k) {
    double total = s.gains[k];
    double size = 1;
    while (pools > 0 && s.values[pools - 1] * size < total * s.sums[pools - 1]) {
      --pools;
      total += s.values[pools];
      size += s.sums[pools];
    }
    s.values[pools] = total;
    s.sums[pools] = size;
    ++pools;
  }
  int64_t k = 0;
  for (int64_t pool = 0; pool < pools; ++pool) {
    const auto size = static_cast<int64_t>(s.sums[pool]);
    std::fill_n(s.gains.begin() + k, size, s.values[pool] / s.sums[pool]);
    k += size;
  }
}

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
    double peak = 0;
    bool finite = true;
    for (int64_t i = 0; i < row_size; ++i) {
      const double magnitude = std::abs(to[i]);
      finite &= magnitude <= std::numeric_limits<double>::max();
      peak = std::max(peak, magnitude);
    }
    TORCH_CHECK_VALUE(
        finite, "the scores of ", name, " should be finite numbers, got NaN or infinity");
    // Alignment does not see a unit's scale, and squares of float64 may overflow or vanish.
    if (sizeof(Acc) == 8 && peak > 0) {
      for (int64_t i = 0; i < row_size; ++i) to[i] /= peak;
    }
  };
  const auto norm_of = [&](const std::vector<double>& values) {
    double square = 0;
    for (int64_t i = 0; i < row_size; ++i) square += values[i] * values[i];
    return std::sqrt(square);
  };

  const int64_t grain = std::max<int64_t>(1, 16384 / row_size);
  at::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
    Scratch s(row_size);
    std::vector<uint8_t> mask_buffer(row_size, 1);
    std::vector<Acc> row_gains(out.is_contiguous() ? 0 : row_size);
    for (int64_t row = from; row < to; ++row) {
      load(weight, row, s.weight);
      if (reference) load(*reference, row, s.reference);
      const uint8_t* alive = mask_buffer.data();
      if (mask) alive = read_mask(*mask, row * row_size, row_size, mask_buffer.data());
      const double norm = norm_of(reference ? s.reference : s.weight);

      // An entry's place in the order: |w|, or s = w (r - rho w / 2) with rho = <w, r> / <w, w>.
      double rho = 0;
      double unit = 1;  // brings s into the range of float32
      if (reference) {
        double dot = 0, square = 0;
        for (int64_t i = 0; i < row_size; ++i) {
          if (!alive[i]) continue;
          dot += s.weight[i] * s.reference[i];
          square += s.weight[i] * s.weight[i];
        }
        rho = square > 0 ? dot / square : 0;
        unit = square > 0 && norm > 0 ? 1 / (std::sqrt(square) * norm) : 1;
      }
      const auto rank_score = [&](int64_t i) {
        const double w = s.weight[i];
        return reference ? w * (s.reference[i] - rho * w / 2) * unit : std::abs(w);
      };
      Acc* gains = out.is_contiguous() ? result + row * row_size : row_gains.data();
      std::fill_n(gains, row_size, Acc{0});
      int64_t count = 0;
      const auto settle = [&](auto position) {
        if (norm == 0) {
          std::fill_n(s.gains.begin(), count, 0.0);
        } else if (reference) {
          reference_gains(s, count, norm, position);
        } else {
          own_gains(s, count, norm, position);
        }
      };
      if constexpr (sizeof(Acc) == 4) {
        s.sort.clear();
        for (int64_t i = 0; i < row_size; ++i) {
          if (!alive[i]) continue;
          s.sort.push(static_cast<float>(rank_score(i)), static_cast<uint32_t>(i));
          ++count;
        }
        const uint64_t* items = s.sort.sort();
        const auto position = [&](int64_t k) { return static_cast<uint32_t>(items[k]); };
        settle(position);
        for (int64_t k = 0; k < count; ++k) {
          gains[position(count - 1 - k)] = static_cast<Acc>(s.gains[k]);
        }
      } else {
        s.order.clear();
        for (int64_t i = 0; i < row_size; ++i) {
          s.values[i] = rank_score(i);
          if (alive[i]) s.order.push_back(static_cast<uint32_t>(i));
        }
        order_by(s.values, s.order);
        count = static_cast<int64_t>(s.order.size());
        const auto position = [&](int64_t k) { return s.order[k]; };
        settle(position);
        for (int64_t k = 0; k < count; ++k) gains[position(count - 1 - k)] = s.gains[k];
      }
      if (out.is_contiguous()) continue;
      for_each_run(
          out, row * row_size, row_size,
          [&](int64_t at, int64_t offset, int64_t stride, int64_t length) {
            for (int64_t i = 0; i < length; ++i) result[offset + i * stride] = gains[at + i];
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
