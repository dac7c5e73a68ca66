// The argument checks that CPU and CUDA share. Every error is raised before any mask is written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/Optional.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torchalignprune {

// What an entry is worth. The lower its score, the earlier it is pruned.
enum class Score {
  value,      // w
  magnitude,  // |v|
  worth,      // v * (2 u - v)
};  // where v = w * row_scale * column_scale and u = r * row_scale * column_scale, in this order

inline Score parse_score(const std::string& name) {
  if (name == "value") return Score::value;
  if (name == "magnitude") return Score::magnitude;
  if (name == "worth") return Score::worth;
  TORCH_CHECK_VALUE(false, "score should be 'value', 'magnitude' or 'worth', got '", name, "'");
}

inline bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

inline void check_weight(const at::Tensor& weight, const std::string& name) {
  TORCH_CHECK_TYPE(
      is_supported(weight.scalar_type()), name,
      " should be float32, float64, float16 or bfloat16, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(
      weight.layout() == at::kStrided, name, " should be a strided tensor, got ", weight.layout());
}

inline void check_beside(
    const at::Tensor& weight, const std::optional<at::Tensor>& other, const char* what,
    const std::string& name) {
  if (!other) return;
  TORCH_CHECK_VALUE(
      other->sizes() == weight.sizes(), "the ", what, " of ", name, " should have shape ",
      weight.sizes(), ", got ", other->sizes());
  TORCH_CHECK_VALUE(
      other->device() == weight.device(), "the ", what, " of ", name, " should be on ",
      weight.device(), ", got ", other->device());
}

inline void check_mask(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask, const std::string& name) {
  check_beside(weight, mask, "mask", name);
  TORCH_CHECK_TYPE(
      !mask || mask->scalar_type() == at::kBool, "the mask of ", name, " should be bool, got ",
      mask->scalar_type());
}

inline void check_reference(
    const at::Tensor& weight, const std::optional<at::Tensor>& reference, const std::string& name) {
  check_beside(weight, reference, "reference", name);
  if (reference) check_weight(*reference, "the reference of " + name);
}

// A tensor is read as rows (dim 0) x columns (dim 1) x the rest; a tensor of at most one dimension
// is a single row.
inline int64_t rows_of(const at::Tensor& weight) { return weight.dim() < 2 ? 1 : weight.size(0); }
inline int64_t columns_of(const at::Tensor& weight) {
  return weight.dim() < 2 ? weight.numel() : weight.size(1);
}

inline void check_scale(
    const at::Tensor& weight, const std::optional<at::Tensor>& scale, int64_t length,
    at::ScalarType dtype, const char* what, const std::string& name) {
  if (!scale) return;
  TORCH_CHECK_VALUE(
      scale->dim() == 1 && (scale->numel() == length || scale->numel() == 1), "the ", what, " of ",
      name, " should have shape [", length, "] or [1], got ", scale->sizes());
  TORCH_CHECK_TYPE(
      scale->scalar_type() == dtype, "the ", what, " of ", name, " should be ", dtype, ", got ",
      scale->scalar_type());
  TORCH_CHECK_VALUE(
      scale->device() == weight.device(), "the ", what, " of ", name, " should be on ",
      weight.device(), ", got ", scale->device());
}

// Scores are computed in float32, in float64 as soon as one of the tensors is float64.
inline at::ScalarType score_dtype(at::ArrayRef<at::Tensor> weights) {
  const bool wide = std::any_of(weights.begin(), weights.end(), [](const at::Tensor& weight) {
    return weight.scalar_type() == at::kDouble;
  });
  return wide ? at::kDouble : at::kFloat;
}

inline void check_select_global(
    at::ArrayRef<at::Tensor> weights, const std::vector<std::optional<at::Tensor>>& masks,
    const std::vector<std::optional<at::Tensor>>& references,
    const std::vector<std::optional<at::Tensor>>& row_scales,
    const std::vector<std::optional<at::Tensor>>& column_scales, at::ArrayRef<std::string> names,
    int64_t count, Score score) {
  const auto check_length = [&](size_t length, const char* what) {
    TORCH_CHECK_VALUE(
        length == weights.size(), what, " should have one entry for each of the ", weights.size(),
        " weights, got ", length);
  };
  check_length(masks.size(), "masks");
  check_length(references.size(), "references");
  check_length(row_scales.size(), "row_scales");
  check_length(column_scales.size(), "column_scales");
  check_length(names.size(), "names");
  TORCH_CHECK_VALUE(count >= 0, "count should not be negative, got ", count);
  const at::ScalarType dtype = score_dtype(weights);
  for (size_t i = 0; i < weights.size(); ++i) {
    check_weight(weights[i], names[i]);
    TORCH_CHECK_VALUE(
        weights[i].device() == weights[0].device(), "all weights should be on one device, got ",
        names[0], " on ", weights[0].device(), " and ", names[i], " on ", weights[i].device());
    check_mask(weights[i], masks[i], names[i]);
    check_reference(weights[i], references[i], names[i]);
    TORCH_CHECK_VALUE(
        score == Score::worth || !references[i], "a reference goes with score='worth' only (",
        names[i], ")");
    TORCH_CHECK_VALUE(
        score != Score::value || (!row_scales[i] && !column_scales[i]),
        "scales do not go with score='value' (", names[i], ")");
    check_scale(weights[i], row_scales[i], rows_of(weights[i]), dtype, "row scale", names[i]);
    check_scale(
        weights[i], column_scales[i], columns_of(weights[i]), dtype, "column scale", names[i]);
  }
}

inline void check_count(int64_t count, int64_t alive) {
  TORCH_CHECK_VALUE(
      count <= alive, "count=", count, " should not be larger than the number of entries that are ",
      "not pruned yet=", alive);
}

inline void check_select_rows(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask, const at::Tensor& counts,
    const std::string& name) {
  check_weight(weight, name);
  TORCH_CHECK_VALUE(weight.dim() == 2, name, " should be a 2d tensor, got ", weight.dim(), "d");
  check_mask(weight, mask, name);
  TORCH_CHECK_VALUE(
      counts.dim() == 1 && counts.numel() == weight.size(0), "counts should have shape [",
      weight.size(0), "], one for each row of ", name, ", got ", counts.sizes());
  TORCH_CHECK_TYPE(
      counts.scalar_type() == at::kLong, "counts should be int64, got ", counts.scalar_type());
  TORCH_CHECK_VALUE(
      counts.device() == weight.device(), "counts should be on ", weight.device(), ", got ",
      counts.device());
}

inline void check_square_sums(
    const at::Tensor& weight, const std::optional<at::Tensor>& row_scale,
    const std::optional<at::Tensor>& column_scale, const std::string& name) {
  check_weight(weight, name);
  const at::ScalarType dtype = score_dtype(weight);
  check_scale(weight, row_scale, rows_of(weight), dtype, "row scale", name);
  check_scale(weight, column_scale, columns_of(weight), dtype, "column scale", name);
}

inline void check_cosine_gains(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& reference, const std::optional<at::Tensor>& column_scale,
    const std::string& name) {
  check_weight(weight, name);
  check_mask(weight, mask, name);
  check_reference(weight, reference, name);
  check_scale(weight, column_scale, columns_of(weight), score_dtype(weight), "column scale", name);
  const int64_t row = weight.numel() == 0 ? 0 : weight.numel() / rows_of(weight);
  TORCH_CHECK_VALUE(
      row <= int64_t{0xFFFFFFFF}, "a unit of ", name, " has ", row,
      " entries, more than the 2^32 - 1 that can be sorted");
}

inline void check_greedy_match(const at::Tensor& similarity, const std::string& name) {
  check_weight(similarity, name);
  TORCH_CHECK_VALUE(
      similarity.dim() >= 2, name, " should have at least 2 dimensions, got ", similarity.dim(),
      "d");
  for (const int64_t dim : {-2, -1}) {
    TORCH_CHECK_VALUE(
        similarity.size(dim) <= int64_t{0x7FFFFFFF}, name, " has ", similarity.size(dim),
        dim == -1 ? " columns" : " rows", ", more than the 2^31 - 1 that can be matched");
  }
}

inline void check_match_in_order(
    const at::Tensor& rows, const at::Tensor& columns, int64_t row_count, int64_t column_count) {
  for (const auto& [tensor, what] : {std::pair{rows, "rows"}, std::pair{columns, "columns"}}) {
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == at::kLong, what, " should be int64, got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.dim() == 1, what, " should be a 1d tensor, got ", tensor.dim(), "d");
  }
  TORCH_CHECK_VALUE(
      rows.numel() == columns.numel(), "rows and columns should be of one length, got ",
      rows.numel(), " and ", columns.numel());
  TORCH_CHECK_VALUE(
      row_count >= 0 && column_count >= 0,
      "row_count and column_count should not be negative, got ", row_count, " and ", column_count);
}

}  // namespace torchalignprune
