// Every operator's schema, and the pybind11 module; nothing else.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "cpu/apply_mask.h"
#include "cpu/kernels.h"

TORCH_LIBRARY(torchalignprune, m) {
  m.def(
      "select_global(Tensor[] weights, Tensor?[] masks, Tensor?[] references, "
      "Tensor?[] row_scales, Tensor?[] column_scales, str[] names, int count, str score) "
      "-> Tensor[]");
  m.def(
      "shard_counts(Tensor[] weights, Tensor?[] masks, Tensor?[] references, Tensor?[] row_scales, "
      "Tensor?[] column_scales, str[] names, str score, int low, int shift, int bins) -> Tensor");
  m.def(
      "shard_ties(Tensor[] weights, Tensor?[] masks, Tensor?[] references, Tensor?[] row_scales, "
      "Tensor?[] column_scales, str[] names, str score, int key, Tensor[] edges) -> Tensor");
  m.def(
      "shard_masks(Tensor[] weights, Tensor?[] masks, Tensor?[] references, Tensor?[] row_scales, "
      "Tensor?[] column_scales, str[] names, str score, int key, int[] splits) -> Tensor[]");
  m.def("select_rows(Tensor weight, Tensor? mask, Tensor counts, str name) -> Tensor");
  m.def(
      "cosine_gains(Tensor weight, Tensor? mask, Tensor? reference, Tensor? column_scale, "
      "str name) -> Tensor");
  m.def(
      "square_sums(Tensor weight, Tensor? row_scale, Tensor? column_scale, str name, "
      "int? all_columns=None) -> (Tensor, Tensor)");
  m.def("greedy_match(Tensor similarity, str name) -> Tensor");
  m.def("match_in_order(Tensor rows, Tensor columns, int row_count, int column_count) -> Tensor");
  m.def("apply_mask(Tensor weight, Tensor mask) -> Tensor");
  m.def("masked_weight(Tensor(a) weight, Tensor mask) -> Tensor(a)");
  m.def("zero_pruned_(Tensor(a!)[] tensors, Tensor[] masks, str[] names) -> ()");
  m.def("pack_entries(Tensor weight, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("unpack_entries(Tensor bits, Tensor values, Tensor signs, int[] shape) -> Tensor");
  m.def("count_bits(Tensor bits, int count) -> Tensor");
  m.def(
      "unit_products(Tensor[] weights, Tensor?[] masks, Tensor?[] references, Tensor?[] indices, "
      "int[] dims, str[] names) -> Tensor");
  m.def(
      "unit_combination(Tensor[] weights, Tensor?[] masks, Tensor?[] references, "
      "Tensor?[] indices, Tensor coefficients, int[] dims, str[] names) -> Tensor[]");
}

namespace {

// The attribute of a module, if it is a tensor that nothing else in Python refers to.
const at::Tensor* own_tensor(const pybind11::dict& attributes, const std::string& name) {
#ifdef Py_GIL_DISABLED  // Other threads could take a reference to it at any time.
  return nullptr;
#else
  PyObject* found = PyDict_GetItemString(attributes.ptr(), name.c_str());
  if (found == nullptr || Py_REFCNT(found) != 1 || !THPVariable_CheckExact(found)) return nullptr;
  return &THPVariable_Unpack(found);
#endif
}

bool may_overwrite(
    const pybind11::dict& attributes, const std::string& name, const at::Tensor& weight,
    const at::Tensor& mask) {
  const at::Tensor* product = own_tensor(attributes, name);
  return product != nullptr && torchalignprune::may_overwrite(*product, weight, mask);
}

// None if the former product may not be overwritten.
std::optional<at::Tensor> masked_weight_over(
    const pybind11::dict& attributes, const std::string& name, const at::Tensor& weight,
    const at::Tensor& mask) {
  if (!may_overwrite(attributes, name, weight, mask)) return std::nullopt;
  return torchalignprune::masked_weight_over(*own_tensor(attributes, name), weight, mask);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of torchalignprune, registered as torch.ops.torchalignprune.*";
  m.def("simd_level", [] { return torchalignprune::kernels().level; });
  m.def("openmp", [] {
#ifdef _OPENMP
    return _OPENMP;
#else
    return 0;
#endif
  });
  m.def("may_overwrite", &may_overwrite);
  m.def("masked_weight_over", &masked_weight_over);
  m.def("zeroed_weight", &torchalignprune::zeroed_weight);
}
