// The inner products of every unit, from which alignment and distortion follow, in one pass.
#include <ATen/Parallel.h>

#include "operators.h"
#include "unit_rows.h"

namespace torchalignprune {
namespace {

// Rows are cut into the same parts for any number of threads, and the parts' columns are added up
// in order, so the result does not depend on that number.
constexpr int64_t most_parts = 64;
constexpr int64_t most_partial_sums = int64_t{1} << 20;

// Writes to result[first + unit], and to the same in the next two rows of the result.
template <class Acc>
void unit_products_as(const UnitArguments& call, double* result, int64_t stride) {
  const UnitRows<Acc> entries(call);
  if (call.weight.numel() == 0) return;
  const int64_t dim = call.dim;
  const int64_t units = units_of(call.weight, dim);
  result += call.first;
  const auto& kernel = kernels().of<Acc>();
  if (dim == 0) {
    const int64_t grain = std::max<int64_t>(1, 16 * block_size / entries.row_size);
    at::parallel_for(0, entries.rows, grain, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        double sums[3] = {};
        entries.for_each_stretch(
            row, [&](int64_t, int64_t n, const Acc* w, const uint8_t* m, const Acc* r) {
              kernel.add_products(w, m, r, n, sums);
            });
        for (int64_t k = 0; k < 3; ++k) result[k * stride + row] = sums[k];
      }
    });
    return;
  }
  const int64_t parts = std::min(
      {most_parts, entries.rows, std::max<int64_t>(1, most_partial_sums / (3 * units)),
       1 + call.weight.numel() / (16 * block_size)});
  std::vector<std::vector<double>> partial(parts);
  at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      partial[part].assign(3 * units, 0);
      double* pp = partial[part].data();
      const auto add = [&](int64_t at, int64_t n, const Acc* w, const uint8_t* m, const Acc* r) {
        if (entries.inner == 1) {
          kernel.add_each_product(w, m, r, n, pp + at, pp + units + at, pp + 2 * units + at);
          return;
        }
        // The entries of one column that lie side by side.
        for (int64_t i = 0; i < n;) {
          const int64_t column = (at + i) / entries.inner;
          const int64_t length = std::min(n - i, (column + 1) * entries.inner - (at + i));
          double sums[3] = {};
          kernel.add_products(w + i, m == nullptr ? nullptr : m + i, r + i, length, sums);
          for (int64_t k = 0; k < 3; ++k) pp[k * units + column] += sums[k];
          i += length;
        }
      };
      for (int64_t row = entries.rows * part / parts; row < entries.rows * (part + 1) / parts;
           ++row) {
        entries.for_each_stretch(row, add);
      }
    }
  });
  for (const auto& sums : partial) {
    for (int64_t k = 0; k < 3; ++k) {
      for (int64_t i = 0; i < units; ++i) result[k * stride + i] += sums[k * units + i];
    }
  }
}

}  // namespace

at::Tensor unit_products(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> indices, at::IntArrayRef dims,
    at::ArrayRef<std::string> names) {
  const auto calls = check_unit_arguments(
      weights, masks.vec(), references.vec(), indices.vec(), dims, names.vec());
  const int64_t units = total_units(calls);
  at::Tensor products = weights[0].new_zeros({3, units}, weights[0].options().dtype(at::kDouble));
  auto* result = products.mutable_data_ptr<double>();
  for (const auto& call : calls) {
    call.weight.scalar_type() == at::kDouble ? unit_products_as<double>(call, result, units)
                                             : unit_products_as<float>(call, result, units);
  }
  return products;
}

}  // namespace torchalignprune
