// The product of a weight and its mask in memory that exists already.
#pragma once

#include <ATen/core/Tensor.h>

namespace torchalignprune {

// Whether the next product may be written over a former one: only the caller holds that and its
// memory, and the next one fits.
bool may_overwrite(const at::Tensor& product, const at::Tensor& weight, const at::Tensor& mask);

// Like the operator masked_weight, but if a product is made, it is written over the former one.
at::Tensor masked_weight_over(
    const at::Tensor& product, const at::Tensor& weight, const at::Tensor& mask);

// The product in the memory of the weight, which is masked already or is about to be.
at::Tensor zeroed_weight(const at::Tensor& weight, const at::Tensor& mask);

}  // namespace torchalignprune
