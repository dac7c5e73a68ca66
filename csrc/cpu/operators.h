// The operators that need nothing of the dispatcher but a kernel for the CPU; csrc/ops.cpp has
// their schemas, registration.cpp registers them. Each is in the file of its name, or of its
// group's.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace torchalignprune {

std::vector<at::Tensor> select_global(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    int64_t count, std::string score);

at::Tensor select_rows(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask, const at::Tensor& counts,
    std::string name);

at::Tensor shard_counts(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t low, int64_t shift, int64_t bins);

at::Tensor shard_ties(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t key, at::TensorList edges);

std::vector<at::Tensor> shard_masks(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t key, at::IntArrayRef splits);

at::Tensor cosine_gains(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& reference, const std::optional<at::Tensor>& column_scale,
    std::string name);

std::tuple<at::Tensor, at::Tensor> square_sums(
    const at::Tensor& weight, const std::optional<at::Tensor>& row_scale,
    const std::optional<at::Tensor>& column_scale, std::string name,
    std::optional<int64_t> all_columns);

at::Tensor greedy_match(const at::Tensor& similarity, std::string name);

at::Tensor match_in_order(
    const at::Tensor& rows, const at::Tensor& columns, int64_t row_count, int64_t column_count);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack_entries(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask);

at::Tensor unpack_entries(
    const at::Tensor& bits, const at::Tensor& values, const at::Tensor& signs,
    c10::IntArrayRef shape);

at::Tensor count_bits(const at::Tensor& bits, int64_t n);

at::Tensor unit_products(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> indices, at::IntArrayRef dims,
    at::ArrayRef<std::string> names);

std::vector<at::Tensor> unit_combination(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> indices, const at::Tensor& coefficients,
    at::IntArrayRef dims, at::ArrayRef<std::string> names);

}  // namespace torchalignprune
