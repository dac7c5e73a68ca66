// The sums of squares of a tensor's rows and columns, in float64 and in one pass.
#include <ATen/Parallel.h>

#include <tuple>
#include <vector>

#include "entries.h"
#include "operators.h"

namespace torchalignprune {
namespace {

// Rows are cut into the same parts for any number of threads, and the parts' columns are added up
// in order, so the result does not depend on that number.
constexpr int64_t most_parts = 64;
constexpr int64_t most_partial_sums = int64_t{1} << 20;

template <class Acc>
std::tuple<at::Tensor, at::Tensor> square_sums_as(
    const at::Tensor& weight, const std::optional<at::Tensor>& row_scale,
    const std::optional<at::Tensor>& column_scale, std::optional<int64_t> all_columns) {
  const int64_t rows = rows_of(weight);
  // A tensor of at most one dimension has no columns to add up.
  const int64_t columns = weight.dim() < 2 ? 0 : columns_of(weight);
  const auto options = weight.options().dtype(at::kDouble);
  at::Tensor row_sums = weight.new_zeros({rows}, options);
  at::Tensor column_sums = weight.new_zeros({columns}, options);
  if (weight.numel() == 0) return {row_sums, column_sums};
  auto* row_sum = row_sums.mutable_data_ptr<double>();
  auto* column_sum = column_sums.mutable_data_ptr<double>();

  const Entries<Acc> entries{weight,    std::nullopt, std::nullopt,
                             row_scale, column_scale, Score::magnitude};
  const int64_t row_size = weight.numel() / rows;
  const int64_t inner = row_size / columns_of(weight);
  const int64_t whole = columns == 0 ? 0 : all_columns.value_or(columns);
  const int64_t parts = std::min(
      {most_parts, rows, std::max<int64_t>(1, most_partial_sums / std::max<int64_t>(1, whole)),
       1 + (columns == 0 ? row_size : rows * whole * inner) / (16 * block_size)});
  std::vector<std::vector<double>> partial(parts);
  at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    std::array<double, block_size> squares;
    for (int64_t part = from; part < to; ++part) {
      partial[part].assign(columns, 0);
      for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
        for (int64_t at = 0; at < row_size; at += block_size) {
          const int64_t n = std::min(block_size, row_size - at);
          entries.for_each_piece(
              row * row_size + at, n, [&](const Piece<Acc>& piece, int64_t offset) {
                const int64_t start = at + offset;
                const auto add = kernels().of<Acc>().add_squares;
                if (inner == 1 && columns > 0) {
                  row_sum[row] += add(
                      piece.weight, piece.column, piece.row, piece.n, partial[part].data() + start);
                  return;
                }
                std::fill_n(squares.begin(), piece.n, 0.0);
                row_sum[row] += add(piece.weight, piece.column, piece.row, piece.n, squares.data());
                for (int64_t i = 0; i < piece.n && columns > 0; ++i) {
                  partial[part][(start + i) / inner] += squares[i];
                }
              });
        }
      }
    }
  });
  for (const auto& sums : partial) {
    for (int64_t column = 0; column < columns; ++column) column_sum[column] += sums[column];
  }
  return {row_sums, column_sums};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> square_sums(
    const at::Tensor& weight, const std::optional<at::Tensor>& row_scale,
    const std::optional<at::Tensor>& column_scale, std::string name,
    std::optional<int64_t> all_columns) {
  check_square_sums(weight, row_scale, column_scale, name, all_columns);
  const auto contiguous = [](const std::optional<at::Tensor>& scale) {
    return scale ? std::optional(scale->contiguous()) : std::nullopt;
  };
  const auto rows = contiguous(row_scale);
  const auto columns = contiguous(column_scale);
  return weight.scalar_type() == at::kDouble
             ? square_sums_as<double>(weight, rows, columns, all_columns)
             : square_sums_as<float>(weight, rows, columns, all_columns);
}

}  // namespace torchalignprune
