// The argument checks that CPU and CUDA share. Every error is raised before any mask is written.
#pragma once

#include <ATen/MemoryOverlap.h>
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

// The tensors that are zeroed in place, and their masks.
inline void check_zero_pruned(
    at::ArrayRef<at::Tensor> tensors, at::ArrayRef<at::Tensor> masks,
    const std::vector<std::string>& names) {
  for (const auto& [length, what] :
       {std::pair{masks.size(), "masks"}, std::pair{names.size(), "names"}}) {
    TORCH_CHECK_VALUE(
        length == tensors.size(), what, " should have one entry for each of the ", tensors.size(),
        " tensors, got ", length);
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_weight(tensors[i], names[i]);
    check_mask(tensors[i], masks[i], names[i]);
    TORCH_CHECK_VALUE(
        tensors[i].device() == tensors[0].device(), "all tensors should be on one device, got ",
        names[0], " on ", tensors[0].device(), " and ", names[i], " on ", tensors[i].device());
    TORCH_CHECK_VALUE(
        at::has_internal_overlap(tensors[i]) != at::MemOverlap::Yes, names[i],
        " should have a place in memory for each entry, got shape ", tensors[i].sizes(),
        " with strides ", tensors[i].strides());
  }
}

// Whether both lie in memory without gaps and in the same order, so that the i-th entries in memory
// belong together.
inline bool lie_alike(const at::Tensor& a, const at::Tensor& b) {
  if (!a.is_non_overlapping_and_dense() || !b.is_non_overlapping_and_dense()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
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

// Scores are computed in float32, or in float64 if any of the tensors is float64.
inline at::ScalarType score_dtype(at::ArrayRef<at::Tensor> weights) {
  const bool wide = std::any_of(weights.begin(), weights.end(), [](const at::Tensor& weight) {
    return weight.scalar_type() == at::kDouble;
  });
  return wide ? at::kDouble : at::kFloat;
}

inline void check_score_arguments(
    at::ArrayRef<at::Tensor> weights, const std::vector<std::optional<at::Tensor>>& masks,
    const std::vector<std::optional<at::Tensor>>& references,
    const std::vector<std::optional<at::Tensor>>& row_scales,
    const std::vector<std::optional<at::Tensor>>& column_scales, at::ArrayRef<std::string> names,
    Score score) {
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

// Keys are passed as the bits of an int64; no score has the largest one.
inline void check_shard_key(at::ArrayRef<at::Tensor> weights, int64_t key) {
  const bool wide = score_dtype(weights) == at::kDouble;
  TORCH_CHECK_VALUE(
      wide ? key != -1 : key >= 0 && key < int64_t{0xFFFFFFFF}, "key should be one of ",
      wide ? 64 : 32, " bits that are not all set, got ", key);
}

inline constexpr int64_t most_shard_bins = 2048;

inline void check_shard_counts(
    at::ArrayRef<at::Tensor> weights, int64_t low, int64_t shift, int64_t bins) {
  check_shard_key(weights, low);
  const int64_t bits = score_dtype(weights) == at::kDouble ? 64 : 32;
  TORCH_CHECK_VALUE(shift >= 0 && shift < bits, "shift should be in [0, ", bits, "), got ", shift);
  TORCH_CHECK_VALUE(
      bins > 0 && bins <= most_shard_bins, "bins should be in [1, ", most_shard_bins, "], got ",
      bins);
}

// Returns the edges on the CPU, contiguous.
inline std::vector<at::Tensor> check_edges(
    at::ArrayRef<at::Tensor> weights, at::ArrayRef<at::Tensor> edges,
    at::ArrayRef<std::string> names) {
  TORCH_CHECK_VALUE(
      edges.size() == weights.size(), "edges should have one entry for each of the ",
      weights.size(), " weights, got ", edges.size());
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_TYPE(
        edges[i].scalar_type() == at::kLong, "the edges of ", names[i], " should be int64, got ",
        edges[i].scalar_type());
    TORCH_CHECK_VALUE(
        edges[i].dim() == 1 && edges[i].numel() > 0 && edges[i].is_cpu(), "the edges of ", names[i],
        " should be a 1d tensor on the CPU that is not empty, got shape ", edges[i].sizes(), " on ",
        edges[i].device());
    result.push_back(edges[i].contiguous());
    const auto* edge = result.back().const_data_ptr<int64_t>();
    const int64_t n = edges[i].numel();
    TORCH_CHECK_VALUE(
        std::is_sorted(edge, edge + n) && edge[0] >= 0 && edge[n - 1] <= weights[i].numel(),
        "the edges of ", names[i], " should rise from at least 0 to at most ", weights[i].numel());
  }
  return result;
}

inline void check_splits(
    at::ArrayRef<at::Tensor> weights, at::IntArrayRef splits, at::ArrayRef<std::string> names) {
  TORCH_CHECK_VALUE(
      splits.size() == weights.size(), "splits should have one entry for each of the ",
      weights.size(), " weights, got ", splits.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_VALUE(
        splits[i] >= 0 && splits[i] <= weights[i].numel(), "the split of ", names[i],
        " should be in [0, ", weights[i].numel(), "], got ", splits[i]);
  }
}

// The tensors and what their entries are scored by, as the operators take them.
struct ScoreArguments {
  std::vector<at::Tensor> weights;
  std::vector<std::optional<at::Tensor>> masks, references, row_scales, column_scales;
  std::vector<std::string> names;
  Score score;
};

inline ScoreArguments check_scores(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    const std::string& score) {
  ScoreArguments call{weights.vec(),       masks.vec(), references.vec(),  row_scales.vec(),
                      column_scales.vec(), names.vec(), parse_score(score)};
  check_score_arguments(
      call.weights, call.masks, call.references, call.row_scales, call.column_scales, call.names,
      call.score);
  return call;
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
    const std::optional<at::Tensor>& column_scale, const std::string& name,
    std::optional<int64_t> all_columns) {
  check_weight(weight, name);
  const at::ScalarType dtype = score_dtype(weight);
  check_scale(weight, row_scale, rows_of(weight), dtype, "row scale", name);
  check_scale(weight, column_scale, columns_of(weight), dtype, "column scale", name);
  TORCH_CHECK_VALUE(
      !all_columns || (weight.dim() >= 2 && *all_columns >= columns_of(weight)),
      "all_columns should be at least the number of columns of ", name, ", got ", *all_columns);
}

// Units lie along dim 0 or 1; a tensor of at most one dimension is a single unit, along dim 0.
inline int64_t units_of(const at::Tensor& weight, int64_t dim) {
  return dim == 0 ? rows_of(weight) : columns_of(weight);
}

// A weight that is read as units, with what belongs to it.
struct UnitArguments {
  at::Tensor weight;
  std::optional<at::Tensor> mask, reference, index;
  int64_t dim;
  std::string name;
  int64_t first;  // the number of units before its own
};

inline void check_units(const UnitArguments& call) {
  const auto& [weight, mask, reference, index, dim, name, first] = call;
  check_weight(weight, name);
  check_mask(weight, mask, name);
  if (reference) {
    // It may stay on the CPU, so that it takes no memory of the device between calls.
    check_weight(*reference, "the reference of " + name);
    TORCH_CHECK_VALUE(
        reference->sizes() == weight.sizes(), "the reference of ", name, " should have shape ",
        weight.sizes(), ", got ", reference->sizes());
    TORCH_CHECK_VALUE(
        reference->device() == weight.device() || reference->is_cpu(), "the reference of ", name,
        " should be on ", weight.device(), " or on the CPU, got ", reference->device());
  }
  TORCH_CHECK_VALUE(
      dim == 0 || (dim == 1 && weight.dim() >= 2), "the dim of ", name, " should be 0, or 1 for a ",
      "tensor of two or more dimensions, got ", dim, " for ", weight.dim(), " dimensions");
  if (!index) return;
  TORCH_CHECK_VALUE(
      index->dim() == 1 && index->numel() == units_of(weight, dim), "the index of ", name,
      " should have shape [", units_of(weight, dim), "], one for each unit, got ", index->sizes());
  TORCH_CHECK_TYPE(
      index->scalar_type() == at::kLong, "the index of ", name, " should be int64, got ",
      index->scalar_type());
  TORCH_CHECK_VALUE(
      index->device() == weight.device(), "the index of ", name, " should be on ", weight.device(),
      ", got ", index->device());
}

inline std::vector<UnitArguments> check_unit_arguments(
    at::ArrayRef<at::Tensor> weights, const std::vector<std::optional<at::Tensor>>& masks,
    const std::vector<std::optional<at::Tensor>>& references,
    const std::vector<std::optional<at::Tensor>>& indices, at::IntArrayRef dims,
    at::ArrayRef<std::string> names) {
  const auto check_length = [&](size_t length, const char* what) {
    TORCH_CHECK_VALUE(
        length == weights.size(), what, " should have one entry for each of the ", weights.size(),
        " weights, got ", length);
  };
  check_length(masks.size(), "masks");
  check_length(references.size(), "references");
  check_length(indices.size(), "indices");
  check_length(dims.size(), "dims");
  check_length(names.size(), "names");
  TORCH_CHECK_VALUE(!weights.empty(), "weights should have at least one tensor, got none");
  std::vector<UnitArguments> calls;
  int64_t first = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    calls.push_back({weights[i], masks[i], references[i], indices[i], dims[i], names[i], first});
    check_units(calls.back());
    TORCH_CHECK_VALUE(
        weights[i].device() == weights[0].device(), "all weights should be on one device, got ",
        names[0], " on ", weights[0].device(), " and ", names[i], " on ", weights[i].device());
    first += units_of(weights[i], dims[i]);
  }
  return calls;
}

// Checks an entry of the index.
inline void check_partner(const UnitArguments& call, int64_t partner) {
  const int64_t units = units_of(call.weight, call.dim);
  TORCH_CHECK_VALUE(
      partner >= 0 && partner < units, "the index of ", call.name, " should be in [0, ", units,
      "), got ", partner);
}

inline int64_t total_units(const std::vector<UnitArguments>& calls) {
  return calls.back().first + units_of(calls.back().weight, calls.back().dim);
}

inline void check_coefficients(
    const std::vector<UnitArguments>& calls, const at::Tensor& coefficients) {
  const int64_t units = total_units(calls);
  TORCH_CHECK_VALUE(
      coefficients.dim() == 2 && coefficients.size(0) == 2 && coefficients.size(1) == units,
      "coefficients should have shape [2, ", units, "], got ", coefficients.sizes());
  TORCH_CHECK_TYPE(
      coefficients.scalar_type() == at::kDouble, "coefficients should be float64, got ",
      coefficients.scalar_type());
  TORCH_CHECK_VALUE(
      coefficients.device() == calls[0].weight.device(), "coefficients should be on ",
      calls[0].weight.device(), ", got ", coefficients.device());
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
