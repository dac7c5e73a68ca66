// The operators on CUDA tensors: checks, outputs and workspaces, the device and its current stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "launchers.h"

namespace torchalignprune {
namespace {

cuda::Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cuda::Element::f32;
    case at::kDouble:
      return cuda::Element::f64;
    case at::kHalf:
      return cuda::Element::f16;
    default:
      return cuda::Element::bf16;
  }
}

// Dimensions that lie in memory as one are merged; a contiguous tensor has none left.
cuda::View view_of(const at::Tensor& tensor) {
  cuda::View view;
  view.data = tensor.const_data_ptr();
  view.element = element_of(tensor);
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  view.aligned = tensor.is_contiguous() && address % 16 == 0;
  if (tensor.is_contiguous()) return view;
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d);
    const int64_t stride = tensor.stride(d);
    if (size == 1) continue;
    if (!sizes.empty() && strides.back() == size * stride) {
      sizes.back() *= size;
      strides.back() = stride;
    } else {
      sizes.push_back(size);
      strides.push_back(stride);
    }
  }
  view.dimensions = static_cast<int32_t>(sizes.size());
  for (size_t d = 0; d < sizes.size() && d < cuda::most_dimensions; ++d) {
    view.sizes[d] = sizes[d];
    view.strides[d] = strides[d];
  }
  return view;
}

bool fits(const cuda::View& view) { return view.dimensions <= cuda::most_dimensions; }

// The tensors that the views of a call point into.
class Inputs {
 public:
  // A tensor with more dimensions than a view can have is copied; in practice there are none.
  cuda::View view(const at::Tensor& tensor) {
    const cuda::View view = view_of(tensor);
    if (fits(view)) return view;
    kept_.push_back(tensor.contiguous());
    return view_of(kept_.back());
  }
  cuda::View view(const std::optional<at::Tensor>& tensor) {
    return tensor ? view(*tensor) : cuda::View{};
  }
  const void* vector(const std::optional<at::Tensor>& scale) {
    if (!scale) return nullptr;
    kept_.push_back(scale->contiguous());
    return kept_.back().const_data_ptr();
  }

 private:
  std::vector<at::Tensor> kept_;
};

// An output with the strides of a tensor, and the tensor that the kernel writes.
struct Output {
  Output(const at::Tensor& like, at::ScalarType dtype)
      : tensor(at::empty_like(like, at::TensorOptions().dtype(dtype))), written(tensor) {
    if (fits(view_of(tensor))) return;
    written = at::empty(like.sizes(), tensor.options());
  }
  at::Tensor finish() {
    if (!written.is_same(tensor)) tensor.copy_(written);
    return tensor;
  }
  at::Tensor tensor, written;
};

int64_t row_size_of(const at::Tensor& weight) {
  return weight.numel() == 0 ? 1 : weight.numel() / rows_of(weight);
}
int64_t inner_of(const at::Tensor& weight) {
  return weight.numel() == 0 ? 1 : row_size_of(weight) / columns_of(weight);
}
int64_t step_of(const std::optional<at::Tensor>& scale) {
  return scale && scale->numel() > 1 ? 1 : 0;
}

at::Tensor workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

void set_layout(cuda::Tensor& tensor) {
  const auto vectors = [](const cuda::View& view) { return view.data == nullptr || view.aligned; };
  tensor.vectors = vectors(tensor.weight) && vectors(tensor.mask) && vectors(tensor.reference) &&
                   vectors(tensor.out);
  tensor.plain = tensor.vectors && tensor.reference.data == nullptr &&
                 tensor.row_scale == nullptr && tensor.column_scale == nullptr;
}

// check(found) raises if there is NaN, or too few candidates.
template <class Check>
void select(
    const std::vector<cuda::Tensor>& tensors, cuda::Score score, bool wide, int64_t count,
    const at::Tensor& like, Check check) {
  cuda::SelectGlobal call{};
  call.tensors = tensors.data();
  call.length = static_cast<int64_t>(tensors.size());
  call.score = score;
  call.wide = wide;
  call.count = count;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor memory = workspace(cuda::select_global_workspace(call), like);
  cuda::Found found{};
  C10_CUDA_CHECK(cuda::select_global_search(call, memory.data_ptr(), &found, stream));
  check(found);
  C10_CUDA_CHECK(cuda::select_global_write(call, memory.data_ptr(), found, stream));
}

// The tensors of a call that are not empty, as the kernels take them, and their masks.
struct ScoreTensors {
  ScoreTensors(const ScoreArguments& call, bool with_masks) {
    for (size_t i = 0; i < call.weights.size(); ++i) {
      const at::Tensor& weight = call.weights[i];
      if (with_masks) outputs.emplace_back(weight, at::kBool);
      if (weight.numel() == 0) continue;
      cuda::Tensor tensor;
      tensor.weight = inputs.view(weight);
      tensor.mask = inputs.view(call.masks[i]);
      tensor.reference = inputs.view(call.references[i]);
      if (with_masks) tensor.out = view_of(outputs.back().written);
      tensor.row_scale = inputs.vector(call.row_scales[i]);
      tensor.column_scale = inputs.vector(call.column_scales[i]);
      tensor.row_step = step_of(call.row_scales[i]);
      tensor.column_step = step_of(call.column_scales[i]);
      tensor.size = weight.numel();
      tensor.row_size = row_size_of(weight);
      tensor.inner = inner_of(weight);
      set_layout(tensor);
      tensors.push_back(tensor);
      numbers.push_back(static_cast<int64_t>(i));
    }
  }

  std::vector<at::Tensor> masks() {
    std::vector<at::Tensor> result;
    for (Output& output : outputs) result.push_back(output.finish());
    return result;
  }

  Inputs inputs;
  std::vector<Output> outputs;
  std::vector<cuda::Tensor> tensors;
  std::vector<int64_t> numbers;  // the tensors' places among all
};

std::vector<at::Tensor> select_global(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    int64_t count, std::string score) {
  const auto call =
      check_scores(weights, masks, references, row_scales, column_scales, names, score);
  TORCH_CHECK_VALUE(count >= 0, "count should not be negative, got ", count);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  ScoreTensors all(call, true);
  if (all.tensors.empty()) {
    check_count(count, 0);
    return all.masks();
  }
  const auto check = [&](const cuda::Found& found) {
    TORCH_CHECK_VALUE(
        found.nan < 0, "the scores of ", call.names[all.numbers[found.nan]],
        " should be numbers, got NaN");
    check_count(count, found.alive);
  };
  select(
      all.tensors, static_cast<cuda::Score>(call.score), score_dtype(weights) == at::kDouble, count,
      weights[0], check);
  return all.masks();
}

cuda::Shards shards_of(const ScoreArguments& call, const ScoreTensors& all) {
  cuda::Shards shards{};
  shards.tensors = all.tensors.data();
  shards.length = static_cast<int64_t>(all.tensors.size());
  shards.score = static_cast<cuda::Score>(call.score);
  shards.wide = score_dtype(call.weights) == at::kDouble;
  return shards;
}

at::Tensor shard_counts(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t low, int64_t shift, int64_t bins) {
  const auto arguments =
      check_scores(weights, masks, references, row_scales, column_scales, names, score);
  check_shard_counts(arguments.weights, low, shift, bins);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  at::Tensor result = at::zeros({bins + 2}, weights[0].options().dtype(at::kLong));
  ScoreTensors all(arguments, false);
  if (all.tensors.empty()) return result;
  cuda::ShardCounts call{};
  call.shards = shards_of(arguments, all);
  call.numbers = all.numbers.data();
  call.all = static_cast<int64_t>(weights.size());
  call.low = static_cast<uint64_t>(low);
  call.shift = static_cast<int>(shift);
  call.bins = bins;
  call.out = result.mutable_data_ptr<int64_t>();
  const at::Tensor memory = workspace(cuda::shard_counts_workspace(call), result);
  C10_CUDA_CHECK(cuda::shard_counts(call, memory.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return result;
}

at::Tensor shard_ties(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t key, at::TensorList edges) {
  const auto arguments =
      check_scores(weights, masks, references, row_scales, column_scales, names, score);
  check_shard_key(arguments.weights, key);
  const std::vector<at::Tensor> own = check_edges(arguments.weights, edges, arguments.names);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  ScoreTensors all(arguments, false);
  std::vector<int64_t> all_edges, first_edges, first_stretches;
  int64_t stretches = 0;
  for (size_t i = 0; i < own.size(); ++i) {
    if (weights[i].numel() > 0) {
      const auto* edge = own[i].const_data_ptr<int64_t>();
      first_edges.push_back(static_cast<int64_t>(all_edges.size()));
      first_stretches.push_back(stretches);
      all_edges.insert(all_edges.end(), edge, edge + own[i].numel());
    }
    stretches += own[i].numel() - 1;
  }
  first_edges.push_back(static_cast<int64_t>(all_edges.size()));
  at::Tensor result = at::zeros({stretches}, weights[0].options().dtype(at::kLong));
  if (all.tensors.empty() || stretches == 0) return result;
  cuda::ShardTies call{};
  call.shards = shards_of(arguments, all);
  call.key = static_cast<uint64_t>(key);
  call.edges = all_edges.data();
  call.first_edges = first_edges.data();
  call.first_stretches = first_stretches.data();
  call.out = result.mutable_data_ptr<int64_t>();
  const at::Tensor memory = workspace(cuda::shard_ties_workspace(call), result);
  C10_CUDA_CHECK(cuda::shard_ties(call, memory.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return result;
}

std::vector<at::Tensor> shard_masks(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t key, at::IntArrayRef splits) {
  const auto arguments =
      check_scores(weights, masks, references, row_scales, column_scales, names, score);
  check_shard_key(arguments.weights, key);
  check_splits(arguments.weights, splits, arguments.names);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  ScoreTensors all(arguments, true);
  if (all.tensors.empty()) return all.masks();
  std::vector<int64_t> own;
  for (const int64_t number : all.numbers) own.push_back(splits[number]);
  cuda::ShardMasks call{};
  call.shards = shards_of(arguments, all);
  call.key = static_cast<uint64_t>(key);
  call.splits = own.data();
  const at::Tensor memory = workspace(cuda::shard_masks_workspace(call), weights[0]);
  C10_CUDA_CHECK(cuda::shard_masks(call, memory.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return all.masks();
}

// With a block for each, a few long rows would leave most of the device idle.
bool are_few_long_rows(int64_t rows, int64_t columns) {
  return rows <= 16 && columns >= int64_t{1} << 20;
}

at::Tensor select_rows(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask, const at::Tensor& counts,
    std::string name) {
  check_select_rows(weight, mask, counts, name);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor out = at::empty(weight.sizes(), weight.options().dtype(at::kBool));
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  if (rows == 0) return out;
  const auto check_row = [&](int64_t row, int64_t count, int64_t alive) {
    TORCH_CHECK_VALUE(
        0 <= count && count <= alive, "row ", row, " of ", name, " has ", alive,
        " entries that are not pruned yet, so counts should be between 0 and that, got ", count);
  };
  const bool wide = weight.scalar_type() == at::kDouble;
  if (columns == 0 || are_few_long_rows(rows, columns)) {
    const at::Tensor host_counts = counts.to(at::kCPU).contiguous();
    const auto* count = host_counts.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < rows; ++row) {
      if (columns == 0) {
        check_row(row, count[row], 0);
        continue;
      }
      Inputs inputs;
      cuda::Tensor tensor;
      tensor.weight = inputs.view(weight.select(0, row));
      if (mask) tensor.mask = inputs.view(mask->select(0, row));
      tensor.out = view_of(out.select(0, row));
      tensor.size = tensor.row_size = columns;
      set_layout(tensor);
      select(
          {tensor}, cuda::Score::value, wide, std::max<int64_t>(0, count[row]), weight,
          [&](const cuda::Found& found) {
            TORCH_CHECK_VALUE(found.nan < 0, "the scores of ", name, " should be numbers, got NaN");
            check_row(row, count[row], found.alive);
          });
    }
    return out;
  }
  const at::Tensor own_counts = counts.contiguous();
  cuda::SelectRows call{};
  call.weight = weight.const_data_ptr();
  call.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  call.counts = own_counts.const_data_ptr<int64_t>();
  call.out = static_cast<uint8_t*>(out.data_ptr());
  call.rows = rows;
  call.columns = columns;
  call.element = element_of(weight);
  for (int d = 0; d < 2; ++d) {
    call.weight_strides[d] = weight.stride(d);
    call.mask_strides[d] = mask ? mask->stride(d) : 0;
  }
  const at::Tensor memory = workspace(cuda::select_rows_workspace(), weight);
  cuda::Faults faults{};
  C10_CUDA_CHECK(
      cuda::select_rows(call, memory.data_ptr(), &faults, c10::cuda::getCurrentCUDAStream()));
  TORCH_CHECK_VALUE(faults.nan == 0, "the scores of ", name, " should be numbers, got NaN");
  if (faults.row != ~uint64_t{0}) {
    const auto row = static_cast<int64_t>(faults.row);
    check_row(
        row, counts[row].item<int64_t>(),
        mask ? mask->select(0, row).sum().item<int64_t>() : columns);
  }
  return out;
}

at::Tensor cosine_gains(
    const at::Tensor& weight, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& reference, const std::optional<at::Tensor>& column_scale,
    std::string name) {
  check_cosine_gains(weight, mask, reference, column_scale, name);
  const c10::cuda::CUDAGuard guard(weight.device());
  const bool wide = weight.scalar_type() == at::kDouble;
  Output output(weight, wide ? at::kDouble : at::kFloat);
  if (weight.numel() == 0) return output.finish();
  Inputs inputs;
  cuda::CosineGains call{};
  call.weight = inputs.view(weight);
  call.mask = inputs.view(mask);
  call.reference = inputs.view(reference);
  call.out = view_of(output.written);
  call.column_scale = inputs.vector(column_scale);
  call.column_step = step_of(column_scale);
  call.rows = rows_of(weight);
  call.row_size = row_size_of(weight);
  call.inner = inner_of(weight);
  call.wide = wide;
  const at::Tensor memory = workspace(cuda::cosine_gains_workspace(call), weight);
  bool finite = true;
  C10_CUDA_CHECK(
      cuda::cosine_gains(call, memory.data_ptr(), &finite, c10::cuda::getCurrentCUDAStream()));
  TORCH_CHECK_VALUE(
      finite, "the scores of ", name, " should be finite numbers, got NaN or infinity");
  return output.finish();
}

std::tuple<at::Tensor, at::Tensor> square_sums(
    const at::Tensor& weight, const std::optional<at::Tensor>& row_scale,
    const std::optional<at::Tensor>& column_scale, std::string name,
    std::optional<int64_t> all_columns) {
  check_square_sums(weight, row_scale, column_scale, name, all_columns);
  const c10::cuda::CUDAGuard guard(weight.device());
  const auto options = weight.options().dtype(at::kDouble);
  at::Tensor row_sums = at::zeros({rows_of(weight)}, options);
  // A tensor of at most one dimension has no columns to add up.
  const bool has_columns = weight.dim() >= 2;
  at::Tensor column_sums = at::zeros({has_columns ? columns_of(weight) : 0}, options);
  if (weight.numel() == 0) return {row_sums, column_sums};
  Inputs inputs;
  cuda::SquareSums call{};
  call.weight = inputs.view(weight);
  call.row_scale = inputs.vector(row_scale);
  call.column_scale = inputs.vector(column_scale);
  call.row_step = step_of(row_scale);
  call.column_step = step_of(column_scale);
  call.rows = rows_of(weight);
  call.columns = columns_of(weight);
  call.all_columns = all_columns.value_or(call.columns);
  call.inner = inner_of(weight);
  call.row_sums = row_sums.mutable_data_ptr<double>();
  call.column_sums = has_columns ? column_sums.mutable_data_ptr<double>() : nullptr;
  const at::Tensor memory = workspace(cuda::square_sums_workspace(call), weight);
  C10_CUDA_CHECK(cuda::square_sums(call, memory.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {row_sums, column_sums};
}

at::Tensor greedy_match(const at::Tensor& similarity, std::string name) {
  check_greedy_match(similarity, name);
  const c10::cuda::CUDAGuard guard(similarity.device());
  const auto options = similarity.options().dtype(at::kLong);
  const auto shape = similarity.sizes().slice(0, similarity.dim() - 1);
  if (similarity.numel() == 0) return at::full(shape, -1, options);
  at::Tensor index = at::empty(shape, options);
  const at::Tensor own = similarity.contiguous();
  cuda::GreedyMatch call{};
  call.similarity = own.const_data_ptr();
  call.element = element_of(own);
  call.rows = own.size(-2);
  call.columns = own.size(-1);
  call.batch = own.numel() / (call.rows * call.columns);
  call.index = index.mutable_data_ptr<int64_t>();
  const at::Tensor memory = workspace(cuda::greedy_match_workspace(call), own);
  bool has_nan = false;
  C10_CUDA_CHECK(
      cuda::greedy_match(call, memory.data_ptr(), &has_nan, c10::cuda::getCurrentCUDAStream()));
  TORCH_CHECK_VALUE(!has_nan, name, " should be numbers, got NaN");
  return index;
}

// A weight that is read as units, with what belongs to it, contiguous and on the device.
struct UnitInputs {
  explicit UnitInputs(const UnitArguments& call) {
    tensor.weight = use(call.weight);
    if (call.mask) tensor.mask = static_cast<const uint8_t*>(use(*call.mask));
    if (call.index) tensor.index = static_cast<const int64_t*>(use(*call.index));
    tensor.weight_element = tensor.reference_element = element_of(call.weight);
    if (call.reference) {
      const at::Tensor& reference = *call.reference;
      const bool moved = reference.device() != call.weight.device();
      copied = copied || moved;
      tensor.reference =
          use(moved ? reference.to(
                          call.weight.device(), reference.scalar_type(),
                          /*non_blocking=*/reference.is_pinned())
                    : reference);
      tensor.reference_element = element_of(reference);
    } else if (call.index) {
      tensor.reference = tensor.weight;
    }
    // Along dim 0 the units are rows, along dim 1 columns of each row.
    tensor.units = units_of(call.weight, call.dim);
    tensor.outer = call.dim == 0 ? 1 : rows_of(call.weight);
    tensor.inner = call.dim == 0 ? row_size_of(call.weight) : inner_of(call.weight);
    tensor.first = call.first;
  }

  cuda::UnitTensor tensor;
  bool copied = false;

 private:
  const void* use(const at::Tensor& given) {
    kept_.push_back(given.contiguous());
    copied = copied || !kept_.back().is_same(given);
    return kept_.back().const_data_ptr();
  }
  std::vector<at::Tensor> kept_;
};

// Calls launch(tensors) for each tensor that has to be copied by itself, so that only one copy
// exists at a time, and then for all others together. With `outs` these are written to.
template <class Launch>
void launch_units(
    const std::vector<UnitArguments>& calls, const std::vector<at::Tensor>* outs, Launch launch) {
  std::vector<cuda::UnitTensor> together;
  for (size_t i = 0; i < calls.size(); ++i) {
    const at::Tensor& weight = calls[i].weight;
    if (weight.numel() == 0) continue;
    UnitInputs inputs(calls[i]);
    at::Tensor written;
    if (outs != nullptr) {
      const at::Tensor& out = (*outs)[i];
      written = out.is_contiguous() ? out : at::empty(out.sizes(), out.options());
      inputs.tensor.out = written.data_ptr();
      inputs.copied = inputs.copied || !written.is_same(out);
    }
    if (!inputs.copied) {
      together.push_back(inputs.tensor);
      continue;
    }
    launch(std::vector<cuda::UnitTensor>{inputs.tensor});
    if (outs != nullptr && !written.is_same((*outs)[i])) (*outs)[i].copy_(written);
  }
  if (!together.empty()) launch(together);
}

// Waits for the device, but only if there are indices.
void check_indices(const std::vector<UnitArguments>& calls) {
  std::vector<at::Tensor> kept;
  std::vector<cuda::UnitTensor> tensors;
  for (const UnitArguments& call : calls) {
    if (!call.index || call.index->numel() == 0) continue;
    kept.push_back(call.index->contiguous());
    cuda::UnitTensor tensor;
    tensor.index = kept.back().const_data_ptr<int64_t>();
    tensor.units = kept.back().numel();
    tensor.first = call.first;
    tensors.push_back(tensor);
  }
  if (tensors.empty()) return;
  const at::Tensor memory = workspace(cuda::check_indices_workspace(), kept[0]);
  int64_t unit = -1;
  C10_CUDA_CHECK(
      cuda::check_indices(
          tensors.data(), static_cast<int64_t>(tensors.size()), memory.data_ptr(), &unit,
          c10::cuda::getCurrentCUDAStream()));
  for (const UnitArguments& call : calls) {
    if (unit < call.first || unit >= call.first + units_of(call.weight, call.dim)) continue;
    check_partner(call, call.index->select(0, unit - call.first).item<int64_t>());
  }
}

at::Tensor unit_products(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> indices, at::IntArrayRef dims,
    at::ArrayRef<std::string> names) {
  const auto calls = check_unit_arguments(
      weights, masks.vec(), references.vec(), indices.vec(), dims, names.vec());
  const c10::cuda::CUDAGuard guard(weights[0].device());
  check_indices(calls);
  const int64_t units = total_units(calls);
  at::Tensor products = at::zeros({3, units}, weights[0].options().dtype(at::kDouble));
  launch_units(calls, nullptr, [&](const std::vector<cuda::UnitTensor>& tensors) {
    cuda::UnitProducts call{};
    call.tensors = tensors.data();
    call.length = static_cast<int64_t>(tensors.size());
    call.units = units;
    call.products = products.mutable_data_ptr<double>();
    const at::Tensor memory = workspace(cuda::unit_products_workspace(call), products);
    C10_CUDA_CHECK(cuda::unit_products(call, memory.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  });
  return products;
}

std::vector<at::Tensor> unit_combination(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> indices, const at::Tensor& coefficients,
    at::IntArrayRef dims, at::ArrayRef<std::string> names) {
  const auto calls = check_unit_arguments(
      weights, masks.vec(), references.vec(), indices.vec(), dims, names.vec());
  check_coefficients(calls, coefficients);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  check_indices(calls);
  const at::Tensor factors = coefficients.contiguous();
  std::vector<at::Tensor> outs;
  for (const at::Tensor& weight : weights) outs.push_back(at::empty_like(weight));
  launch_units(calls, &outs, [&](const std::vector<cuda::UnitTensor>& tensors) {
    cuda::UnitCombination call{};
    call.tensors = tensors.data();
    call.length = static_cast<int64_t>(tensors.size());
    call.units = factors.size(1);
    call.coefficients = factors.const_data_ptr<double>();
    C10_CUDA_CHECK(cuda::unit_combination(call, c10::cuda::getCurrentCUDAStream()));
  });
  return outs;
}

// Values, mask and output that lie in memory alike.
cuda::MaskedRun run_of(const at::Tensor& values, const at::Tensor& mask, void* out) {
  return {
      values.const_data_ptr(), static_cast<const uint8_t*>(mask.const_data_ptr()), out,
      values.numel(), values.element_size()};
}

void zero_pruned_(at::TensorList tensors, at::TensorList masks, at::ArrayRef<std::string> names) {
  check_zero_pruned(tensors, masks, names.vec());
  if (tensors.empty()) return;
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  std::vector<cuda::MaskedRun> runs;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (tensor.numel() == 0) continue;
    void* out = tensor.mutable_data_ptr();
    if (lie_alike(tensor, masks[i])) {
      runs.push_back(run_of(tensor, masks[i], out));
      continue;
    }
    Inputs inputs;
    cuda::MaskedViews call{};
    call.mask = inputs.view(masks[i]);
    call.out = view_of(tensor);
    call.size = tensor.numel();
    call.bytes = tensor.element_size();
    if (!fits(call.out)) {  // more dimensions than a view has
      tensor.masked_fill_(masks[i].logical_not(), 0);
      continue;
    }
    C10_CUDA_CHECK(cuda::zero_pruned(call, stream));
  }
  C10_CUDA_CHECK(cuda::zero_pruned(runs.data(), static_cast<int64_t>(runs.size()), stream));
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_weight(weight, "weight");
  check_mask(weight, mask, "weight");
  const c10::cuda::CUDAGuard guard(weight.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  Output output(weight, weight.scalar_type());
  if (weight.numel() == 0) return output.finish();
  if (lie_alike(weight, mask) && lie_alike(weight, output.written)) {
    C10_CUDA_CHECK(
        cuda::apply_mask(run_of(weight, mask, output.written.mutable_data_ptr()), stream));
    return output.finish();
  }
  Inputs inputs;
  cuda::MaskedViews call{};
  call.values = inputs.view(weight);
  call.mask = inputs.view(mask);
  call.out = view_of(output.written);
  call.size = weight.numel();
  call.bytes = weight.element_size();
  C10_CUDA_CHECK(cuda::apply_mask(call, stream));
  return output.finish();
}

TORCH_LIBRARY_IMPL(torchalignprune, CUDA, m) {
  m.impl("apply_mask", &apply_mask);
  m.impl("zero_pruned_", &zero_pruned_);
  m.impl("select_global", &select_global);
  m.impl("select_rows", &select_rows);
  m.impl("shard_counts", &shard_counts);
  m.impl("shard_ties", &shard_ties);
  m.impl("shard_masks", &shard_masks);
  m.impl("cosine_gains", &cosine_gains);
  m.impl("square_sums", &square_sums);
  m.impl("greedy_match", &greedy_match);
  m.impl("unit_products", &unit_products);
  m.impl("unit_combination", &unit_combination);
}

}  // namespace
}  // namespace torchalignprune
