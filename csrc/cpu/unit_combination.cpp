// mask * (a reference + b weight) with an a and a b for each unit: the gradient of any function of
// the unit products, in one pass.
#include <ATen/Parallel.h>

#include "factories.h"
#include "operators.h"
#include "unit_rows.h"

namespace torchalignprune {
namespace {

template <class Acc>
at::Tensor unit_combination_as(
    const UnitArguments& call, const double* of_reference, const double* of_weight) {
  at::Tensor out = empty_like(call.weight, call.weight.scalar_type());
  const UnitRows<Acc> entries(call);
  if (call.weight.numel() == 0) return out;
  const int64_t dim = call.dim;
  of_reference += call.first;
  of_weight += call.first;
  const auto& kernel = kernels().of<Acc>();
  const bool in_place = out.is_contiguous() && out.element_size() == sizeof(Acc);

  const int64_t grain = std::max<int64_t>(1, 16 * block_size / entries.row_size);
  at::parallel_for(0, entries.rows, grain, [&](int64_t from, int64_t to) {
    std::array<Acc, block_size> buffer;
    std::array<double, block_size> a, b;
    for (int64_t row = from; row < to; ++row) {
      entries.for_each_stretch(
          row, [&](int64_t at, int64_t n, const Acc* w, const uint8_t* m, const Acc* r) {
            const int64_t begin = row * entries.row_size + at;
            Acc* to_here = in_place ? static_cast<Acc*>(out.data_ptr()) + begin : buffer.data();
            if (dim == 0) {
              kernel.combine(w, m, r, of_reference + row, of_weight + row, 0, n, to_here);
            } else if (entries.inner == 1) {
              kernel.combine(w, m, r, of_reference + at, of_weight + at, 1, n, to_here);
            } else {
              for (int64_t i = 0; i < n; ++i) {
                a[i] = of_reference[(at + i) / entries.inner];
                b[i] = of_weight[(at + i) / entries.inner];
              }
              kernel.combine(w, m, r, a.data(), b.data(), 1, n, to_here);
            }
            if (!in_place) write_values(out, begin, n, buffer.data());
          });
    }
  });
  return out;
}

}  // namespace

std::vector<at::Tensor> unit_combination(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> indices, const at::Tensor& coefficients,
    at::IntArrayRef dims, at::ArrayRef<std::string> names) {
  const auto calls = check_unit_arguments(
      weights, masks.vec(), references.vec(), indices.vec(), dims, names.vec());
  check_coefficients(calls, coefficients);
  const at::Tensor factors = coefficients.contiguous();
  const double* of_reference = factors.const_data_ptr<double>();
  const double* of_weight = of_reference + factors.size(1);
  std::vector<at::Tensor> out;
  for (const auto& call : calls) {
    out.push_back(
        call.weight.scalar_type() == at::kDouble
            ? unit_combination_as<double>(call, of_reference, of_weight)
            : unit_combination_as<float>(call, of_reference, of_weight));
  }
  return out;
}

}  // namespace torchalignprune
