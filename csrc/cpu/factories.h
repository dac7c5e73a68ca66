// torch's functions that make tensors, compiled in one file: their headers take longer than all the
// rest of most others.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchalignprune {

// A tensor that lies in memory as the given one does.
at::Tensor empty_like(const at::Tensor& tensor, at::ScalarType dtype);

// n times 0, int64, on the CPU.
at::Tensor zero_counts(int64_t n);

}  // namespace torchalignprune
