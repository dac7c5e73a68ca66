// The weights where a mask is true, and +0 elsewhere, in one pass; and the gradient of that.
#include "apply_mask.h"

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>

#include "../checks.h"
#include "huge_pages.h"
#include "kernels.h"

namespace torchalignprune {
namespace {

constexpr int64_t grain = int64_t{1} << 16;

int kernel_for(const at::Tensor& tensor) {
  return tensor.element_size() == 2 ? 0 : tensor.element_size() == 4 ? 1 : 2;
}

// The tensor itself if it lies in memory as `out` does, or else a copy that does.
at::Tensor laid_as(const at::Tensor& tensor, const at::Tensor& out) {
  if (lie_alike(tensor, out)) return tensor;
  at::Tensor copy = at::empty_like(out, tensor.options());
  return copy.copy_(tensor);
}

void write_product(const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& out) {
  const at::Tensor own_weight = laid_as(weight, out);
  const at::Tensor own_mask = laid_as(mask, out);
  const auto kernel = kernels().apply_mask[kernel_for(weight)];
  const int64_t bytes = weight.element_size();
  const auto* from = static_cast<const char*>(own_weight.const_data_ptr());
  const auto* kept = static_cast<const uint8_t*>(own_mask.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, weight.numel(), grain, [&](int64_t begin, int64_t end) {
    kernel(from + begin * bytes, kept + begin, end - begin, to + begin * bytes);
  });
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_weight(weight, "weight");
  check_mask(weight, mask, "weight");
  const at::Tensor out = at::empty_like(weight);
  advise_huge_pages(out);
  write_product(weight, mask, out);
  return out;
}

// The product in the memory of a former one, as a new tensor: the former one may have a history or
// be an inference tensor.
at::Tensor apply_mask_in(
    const c10::Storage& memory, const at::Tensor& weight, const at::Tensor& mask) {
  const at::Tensor out = at::empty({0}, weight.options());
  out.unsafeGetTensorImpl()->set_storage_keep_dtype(memory);
  out.unsafeGetTensorImpl()->set_sizes_and_strides(weight.sizes(), weight.strides());
  write_product(weight, mask, out);
  return out;
}

template <class Signature>
auto operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::Tensor call_apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  static const auto op =
      operator_of<at::Tensor(const at::Tensor&, const at::Tensor&)>("torchalignprune::apply_mask");
  return op.call(weight, mask);
}

void call_zero_pruned(const at::Tensor& tensor, const at::Tensor& mask) {
  static const auto op =
      operator_of<void(at::TensorList, at::TensorList, at::ArrayRef<std::string>)>(
          "torchalignprune::zero_pruned_");
  const at::AutoDispatchBelowADInplaceOrView guard;
  const std::string name = "grad";
  op.call({tensor}, {mask}, name);
}

// Whether the product would equal the weight bit for bit. Other devices would mean waiting: false.
bool is_masked(const at::Tensor& weight, const at::Tensor& mask) {
  if (at::isTensorSubclassLike(weight) || at::isTensorSubclassLike(mask)) return false;
  if (!weight.is_cpu()) return false;
  check_weight(weight, "weight");
  check_mask(weight, mask, "weight");
  if (!lie_alike(weight, mask)) return false;
  const auto kernel = kernels().is_masked[kernel_for(weight)];
  const int64_t bytes = weight.element_size();
  const auto* values = static_cast<const char*>(weight.const_data_ptr());
  const auto* kept = static_cast<const uint8_t*>(mask.const_data_ptr());
  std::atomic<bool> masked{true};
  at::parallel_for(0, weight.numel(), grain, [&](int64_t begin, int64_t end) {
    // If some entry is not masked, one is mostly found at once.
    constexpr int64_t step = int64_t{1} << 12;
    for (int64_t at = begin; at < end && masked; at += step) {
      if (!kernel(values + at * bytes, kept + at, std::min(step, end - at))) masked = false;
    }
  });
  return masked;
}

// The same memory under the same version counter, so that a graph that saved it notices changes.
// Not a view, which would lose its history at the next step of the optimizer.
at::Tensor alias_of(const at::Tensor& weight) {
  const auto* impl = weight.unsafeGetTensorImpl();
  if (weight.is_inference()) return at::alias(weight);
  return at::Tensor(impl->shallow_copy_and_detach(
      impl->version_counter(), /*allow_tensor_metadata_change=*/false));
}

// Whether a gradient may be written to, because nothing else holds it or its memory. That of a
// linear layer is a view whose base has no other owner. torch's engine, too, adds up gradients in
// place under such conditions.
bool is_nobody_elses(const at::Tensor& grad) {
  if (at::GradMode::is_enabled() || at::isTensorSubclassLike(grad)) return false;
  if (grad.use_count() != 1 || !grad.is_non_overlapping_and_dense()) return false;
  const auto owners = grad.storage().use_count();
  return owners == 1 || (owners == 2 && grad.is_view() && grad._base().use_count() == 1);
}

}  // namespace

// When the result may share the memory of the weight.
enum class Sharing { never, if_masked, always };

// Outside the anonymous namespace, so that its name is the same everywhere.
class MaskedWeight : public torch::autograd::Function<MaskedWeight> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context, const at::Tensor& weight, const at::Tensor& mask,
      Sharing sharing, const c10::Storage& memory) {
    context->save_for_backward({mask});
    context->set_materialize_grads(false);
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (sharing == Sharing::always || (sharing == Sharing::if_masked && is_masked(weight, mask))) {
      return alias_of(weight);
    }
    return memory ? apply_mask_in(memory, weight, mask) : call_apply_mask(weight, mask);
  }

  // Takes the gradients by reference, so as not to be an owner of them itself.
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, torch::autograd::variable_list& grads) {
    at::Tensor grad = std::move(grads[0]);
    if (grad.defined()) {
      const at::Tensor mask = context->get_saved_variables()[0];
      if (grad.layout() != at::kStrided) {  // from an embedding with sparse gradients
        grad = at::mul(grad, mask.to(grad.scalar_type()));
      } else if (is_nobody_elses(grad)) {
        call_zero_pruned(grad, mask);
      } else {
        grad = call_apply_mask(grad, mask);
      }
    }
    return {std::move(grad), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

namespace {

// torch.func and forward mode have the derivatives of torch's own operators.
bool has_transforms(const at::Tensor& weight) {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         weight._fw_grad(/*level=*/0).defined();
}

at::Tensor apply_mask_by_where(const at::Tensor& weight, const at::Tensor& mask) {
  return at::where(mask, weight, 0);
}

at::Tensor apply_mask_with_gradient(const at::Tensor& weight, const at::Tensor& mask) {
  if (has_transforms(weight)) return apply_mask_by_where(weight, mask);
  return MaskedWeight::apply(weight, mask, Sharing::never, c10::Storage());
}

// For devices without a kernel.
at::Tensor apply_mask_anywhere(const at::Tensor& weight, const at::Tensor& mask) {
  check_weight(weight, "weight");
  check_mask(weight, mask, "weight");
  return apply_mask_by_where(weight, mask);
}

at::Tensor masked_weight(const at::Tensor& weight, const at::Tensor& mask) {
  return is_masked(weight, mask) ? alias_of(weight) : call_apply_mask(weight, mask);
}

at::Tensor masked_weight_with_gradient(const at::Tensor& weight, const at::Tensor& mask) {
  if (has_transforms(weight)) return apply_mask_by_where(weight, mask);
  return MaskedWeight::apply(weight, mask, Sharing::if_masked, c10::Storage());
}

TORCH_LIBRARY_IMPL(torchalignprune, CPU, m) { m.impl("apply_mask", &apply_mask); }
TORCH_LIBRARY_IMPL(torchalignprune, CompositeExplicitAutograd, m) {
  m.impl("apply_mask", &apply_mask_anywhere);
  m.impl("masked_weight", &masked_weight);
}
TORCH_LIBRARY_IMPL(torchalignprune, Autograd, m) {
  m.impl("apply_mask", &apply_mask_with_gradient);
  m.impl("masked_weight", &masked_weight_with_gradient);
}
TORCH_LIBRARY_IMPL(torchalignprune, Functionalize, m) {
  m.impl("masked_weight", &apply_mask_by_where);
}
TORCH_LIBRARY_IMPL(torchalignprune, FuncTorchBatched, m) {
  m.impl("apply_mask", &apply_mask_by_where);
  m.impl("masked_weight", &apply_mask_by_where);
}

}  // namespace

bool may_overwrite(const at::Tensor& product, const at::Tensor& weight, const at::Tensor& mask) {
  for (const at::Tensor* tensor : {&product, &weight, &mask}) {
    if (at::isTensorSubclassLike(*tensor) || !tensor->is_cpu()) return false;
  }
  if (has_transforms(weight) || product.use_count() != 1) return false;
  const bool alike = mask.scalar_type() == at::kBool && mask.sizes() == weight.sizes() &&
                     lie_alike(weight, mask) && product.scalar_type() == weight.scalar_type() &&
                     product.sizes() == weight.sizes() && product.strides() == weight.strides();
  if (!alike) return false;
  // Memory that a product was made in, not any that is shared with NumPy, a file or a process.
  const c10::Storage& memory = product.storage();
  return memory.use_count() == 1 && product.storage_offset() == 0 &&
         memory.nbytes() == weight.nbytes() &&
         memory.data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

at::Tensor masked_weight_over(
    const at::Tensor& product, const at::Tensor& weight, const at::Tensor& mask) {
  const c10::Storage memory = product.storage();
  if (at::GradMode::is_enabled() && weight.requires_grad()) {
    return MaskedWeight::apply(weight, mask, Sharing::if_masked, memory);
  }
  return is_masked(weight, mask) ? alias_of(weight) : apply_mask_in(memory, weight, mask);
}

at::Tensor zeroed_weight(const at::Tensor& weight, const at::Tensor& mask) {
  return MaskedWeight::apply(weight, mask, Sharing::always, c10::Storage());
}

}  // namespace torchalignprune
