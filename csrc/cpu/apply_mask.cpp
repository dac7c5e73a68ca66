// The weights where a mask is true, and zeros of their sign elsewhere, in one pass.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../checks.h"

namespace torchalignprune {
namespace {

// A product with 0 keeps the sign, and so does this; `Bits` is as wide as a weight.
template <class Bits>
void apply_mask_to(const at::Tensor& weight, const at::Tensor& mask, at::Tensor& out) {
  constexpr Bits sign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  const auto* from = static_cast<const Bits*>(weight.const_data_ptr());
  const auto* kept = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* to = static_cast<Bits*>(out.mutable_data_ptr());
  at::parallel_for(0, weight.numel(), int64_t{1} << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      to[i] = from[i] & (kept[i] != 0 ? static_cast<Bits>(~Bits{0}) : sign);
    }
  });
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_weight(weight, "weight");
  check_mask(weight, mask, "weight");
  const at::Tensor own_weight = weight.contiguous();
  const at::Tensor own_mask = mask.contiguous();
  at::Tensor out = at::empty_like(own_weight);
  if (weight.element_size() == 2) {
    apply_mask_to<uint16_t>(own_weight, own_mask, out);
  } else if (weight.element_size() == 4) {
    apply_mask_to<uint32_t>(own_weight, own_mask, out);
  } else {
    apply_mask_to<uint64_t>(own_weight, own_mask, out);
  }
  return out;
}

TORCH_LIBRARY_IMPL(torchalignprune, CPU, m) { m.impl("apply_mask", &apply_mask); }

}  // namespace
}  // namespace torchalignprune
