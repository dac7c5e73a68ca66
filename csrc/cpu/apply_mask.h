// The product of a weight and its mask in the memory of a former one.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchalignprune {

// Whether nobody but the caller has a former product or its memory, and the next one fits in there.
bool may_overwrite(const at::Tensor& product, const at::Tensor& weight, const at::Tensor& mask);

// As the operator masked_weight, where a product is made written over the former one.
at::Tensor masked_weight_over(
    const at::Tensor& product, const at::Tensor& weight, const at::Tensor& mask);

// The product where the weight is known to be masked already, or about to be: in its memory.
at::Tensor zeroed_weight(const at::Tensor& weight, const at::Tensor& mask);

}  // namespace torchalignprune
