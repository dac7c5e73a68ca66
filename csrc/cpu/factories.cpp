#include "factories.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

namespace torchalignprune {

at::Tensor empty_like(const at::Tensor& tensor, at::ScalarType dtype) {
  return at::empty_like(tensor, tensor.options().dtype(dtype));
}

at::Tensor zero_counts(int64_t n) { return at::zeros({n}, at::kLong); }

}  // namespace torchalignprune
