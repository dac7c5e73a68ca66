// Sets the pruned entries of a list of tensors to +0, in place.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "entries.h"

namespace torchalignprune {
namespace {

constexpr int64_t grain = int64_t{1} << 16;

Kernels::ZeroPruned kernel_of(const at::Tensor& tensor) {
  return kernels().zero_pruned[tensor.element_size() == 2 ? 0 : tensor.element_size() == 4 ? 1 : 2];
}

void zero_alike(const at::Tensor& tensor, const at::Tensor& mask) {
  auto* values = static_cast<char*>(tensor.mutable_data_ptr());
  const auto* kept = static_cast<const uint8_t*>(mask.const_data_ptr());
  const int64_t bytes = tensor.element_size();
  const auto kernel = kernel_of(tensor);
  at::parallel_for(0, tensor.numel(), grain, [&](int64_t begin, int64_t end) {
    kernel(values + begin * bytes, kept + begin, end - begin);
  });
}

template <class Bits>
void zero_strided(const at::Tensor& tensor, const at::Tensor& mask) {
  auto* values = static_cast<Bits*>(tensor.mutable_data_ptr());
  const auto kernel = kernel_of(tensor);
  at::parallel_for(0, tensor.numel(), grain, [&](int64_t begin, int64_t end) {
    std::array<uint8_t, block_size> buffer;
    for (int64_t from = begin; from < end; from += block_size) {
      const int64_t n = std::min(block_size, end - from);
      const uint8_t* kept = read_mask(mask, from, n, buffer.data());
      for_each_run(
          tensor, from, n, [&](int64_t at, int64_t offset, int64_t stride, int64_t length) {
            if (stride == 1) return kernel(values + offset, kept + at, length);
            for (int64_t i = 0; i < length; ++i) {
              if (kept[at + i] == 0) values[offset + i * stride] = 0;
            }
          });
    }
  });
}

void zero_pruned_(at::TensorList tensors, at::TensorList masks, at::ArrayRef<std::string> names) {
  check_zero_pruned(tensors, masks, names.vec());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (lie_alike(tensor, masks[i])) {
      zero_alike(tensor, masks[i]);
    } else if (tensor.element_size() == 2) {
      zero_strided<uint16_t>(tensor, masks[i]);
    } else if (tensor.element_size() == 4) {
      zero_strided<uint32_t>(tensor, masks[i]);
    } else {
      zero_strided<uint64_t>(tensor, masks[i]);
    }
  }
}

// For every device: lets a graph that has saved one of the tensors notice that it has changed.
void zero_and_tell(
    c10::DispatchKeySet keys, at::TensorList tensors, at::TensorList masks,
    at::ArrayRef<std::string> names) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torchalignprune::zero_pruned_", "")
          .typed<void(at::TensorList, at::TensorList, at::ArrayRef<std::string>)>();
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatch(keys & c10::after_ADInplaceOrView_keyset, tensors, masks, names);
  }
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

// For devices without a kernel.
void zero_pruned_anywhere_(
    at::TensorList tensors, at::TensorList masks, at::ArrayRef<std::string> names) {
  check_zero_pruned(tensors, masks, names.vec());
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].masked_fill_(masks[i].logical_not(), 0);
}

TORCH_LIBRARY_IMPL(torchalignprune, CPU, m) { m.impl("zero_pruned_", &zero_pruned_); }
TORCH_LIBRARY_IMPL(torchalignprune, CompositeExplicitAutograd, m) {
  m.impl("zero_pruned_", &zero_pruned_anywhere_);
}
TORCH_LIBRARY_IMPL(torchalignprune, ADInplaceOrView, m) { m.impl("zero_pruned_", &zero_and_tell); }

}  // namespace
}  // namespace torchalignprune
