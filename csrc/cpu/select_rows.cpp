// A mask that prunes exactly `counts[i]` entries of row i, those with the lowest scores.
#include <ATen/Parallel.h>

#include <vector>

#include "entries.h"
#include "operators.h"

namespace torchalignprune {
namespace {

// Keeps what is above the count-th smallest key, and the last ones of those that equal it.
template <class Key>
void keep_row(const Key* keys, Key* scratch, int64_t n, int64_t count, uint8_t* mask) {
  if (count == 0) {
    for (int64_t i = 0; i < n; ++i) mask[i] = keys[i] != not_a_candidate<Key> ? 1 : 0;
    return;
  }
  std::copy(keys, keys + n, scratch);
  std::nth_element(scratch, scratch + (count - 1), scratch + n);
  const Key threshold = scratch[count - 1];
  int64_t pruned = count;
  for (int64_t i = 0; i < count; ++i) pruned -= scratch[i] < threshold ? 1 : 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = keys[i] == threshold;
    mask[i] = keys[i] != not_a_candidate<Key> && (keys[i] > threshold || (equal && pruned <= 0));
    pruned -= equal ? 1 : 0;
  }
}

template <class Acc>
at::Tensor select_rows_as(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask, const at::Tensor& counts,
    const std::string& name) {
  using Key = typename KeyOf<Acc>::type;
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const Entries<Acc> entries{weight, mask, std::nullopt, std::nullopt, std::nullopt, Score::value};
  at::Tensor out = weight.new_empty(weight.sizes(), weight.options().dtype(at::kBool));
  auto* kept = static_cast<uint8_t*>(out.data_ptr());
  const at::Tensor own_counts = counts.contiguous();
  const auto* count = own_counts.const_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
  at::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
    std::vector<Key> keys(columns), scratch(columns);
    for (int64_t row = from; row < to; ++row) {
      bool nan = false;
      for (int64_t at = 0; at < columns; at += block_size) {
        const int64_t n = std::min(block_size, columns - at);
        entries.read(row * columns + at, n, keys.data() + at, &nan);
      }
      TORCH_CHECK_VALUE(!nan, "the scores of ", name, " should be numbers, got NaN");
      const int64_t alive = columns - std::count(keys.begin(), keys.end(), not_a_candidate<Key>);
      TORCH_CHECK_VALUE(
          0 <= count[row] && count[row] <= alive, "row ", row, " of ", name, " has ", alive,
          " entries that are not pruned yet, so counts should be between 0 and that, got ",
          count[row]);
      keep_row(keys.data(), scratch.data(), columns, count[row], kept + row * columns);
    }
  });
  return out;
}

}  // namespace

at::Tensor select_rows(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask, const at::Tensor& counts,
    std::string name) {
  check_select_rows(weight, mask, counts, name);
  return weight.scalar_type() == at::kDouble ? select_rows_as<double>(weight, mask, counts, name)
                                             : select_rows_as<float>(weight, mask, counts, name);
}

}  // namespace torchalignprune
