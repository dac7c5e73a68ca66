// Which of a sequence of pairs have a row and a column that no kept pair before them has.
#include <ATen/core/Tensor.h>

#include <vector>

#include "../checks.h"
#include "operators.h"

namespace torchalignprune {

at::Tensor match_in_order(
    const at::Tensor& rows, const at::Tensor& columns, int64_t row_count, int64_t column_count) {
  check_match_in_order(rows, columns, row_count, column_count);
  const at::Tensor own_rows = rows.contiguous();
  const at::Tensor own_columns = columns.contiguous();
  const auto* row = own_rows.const_data_ptr<int64_t>();
  const auto* column = own_columns.const_data_ptr<int64_t>();
  at::Tensor out = rows.new_empty(rows.sizes(), rows.options().dtype(at::kBool));
  auto* kept = static_cast<uint8_t*>(out.data_ptr());
  std::vector<uint8_t> has_row(row_count, 0), has_column(column_count, 0);
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_VALUE(
        0 <= row[i] && row[i] < row_count, "rows should be in [0, ", row_count, "), got ", row[i]);
    TORCH_CHECK_VALUE(
        0 <= column[i] && column[i] < column_count, "columns should be in [0, ", column_count,
        "), got ", column[i]);
    const bool is_free = has_row[row[i]] == 0 && has_column[column[i]] == 0;
    kept[i] = is_free ? 1 : 0;
    if (is_free) has_row[row[i]] = has_column[column[i]] = 1;
  }
  return out;
}

}  // namespace torchalignprune
