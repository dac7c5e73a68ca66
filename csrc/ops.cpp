// Every operator's schema, and the pybind11 module; nothing else.
#include <pybind11/pybind11.h>
#include <torch/library.h>

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
}
