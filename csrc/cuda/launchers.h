// How the kernels are started: raw pointers, sizes and a stream. Memory that a launcher needs on
// the device is passed as a workspace of the size that it asks for. Every launcher returns the
// first error of the CUDA runtime. Those that return something on the host wait for the stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "keys.cuh"

namespace torchalignprune {
namespace cuda {

// Masks that prune exactly `count` entries of a list of tensors, those with the lowest scores.
struct SelectGlobal {
  const Tensor* tensors;  // on the host
  int64_t length;
  Score score;
  bool wide;  // scores in float64
  int64_t count;
  // With this many entries or more, a sample says where to look first.
  int64_t sample_from = int64_t{1} << 24;
};

struct Found {
  int64_t alive;       // how many candidates there are
  int64_t nan;         // the first tensor with NaN among its candidates' scores, or -1
  uint64_t low, high;  // for the masks: the threshold
  int64_t pruned, inside;
};

size_t select_global_workspace(const SelectGlobal& call);

// Finds the threshold.
cudaError_t select_global_search(
    const SelectGlobal& call, void* workspace, Found* found, cudaStream_t stream);

// Writes the masks, once the search has found neither NaN nor too few candidates.
cudaError_t select_global_write(
    const SelectGlobal& call, void* workspace, const Found& found, cudaStream_t stream);

// This process's shards of a list of tensors.
struct Shards {
  const Tensor* tensors;  // on the host, none of them empty
  int64_t length;         // at least one
  Score score;
  bool wide;  // scores in float64
};

// How many candidates have keys in bins of 2^shift keys from `low` on.
struct ShardCounts {
  Shards shards;
  const int64_t* numbers;  // on the host: each tensor's place among `all`, with the empty ones
  int64_t all;
  uint64_t low;
  int shift;
  int64_t bins;
  int64_t* out;  // bins + 2, all 0 before: the bins, how many are lower, 1 + the first with NaN
};

size_t shard_counts_workspace(const ShardCounts& call);
cudaError_t shard_counts(const ShardCounts& call, void* workspace, cudaStream_t stream);

// How many candidates between the edges, which are flat indices, have the key.
struct ShardTies {
  Shards shards;
  uint64_t key;
  const int64_t* edges;            // on the host, in the order of the tensors
  const int64_t* first_edges;      // on the host, length + 1: where those of each tensor begin
  const int64_t* first_stretches;  // on the host: where those of each tensor begin in `out`
  int64_t* out;                    // all 0 before
};

size_t shard_ties_workspace(const ShardTies& call);
cudaError_t shard_ties(const ShardTies& call, void* workspace, cudaStream_t stream);

// Masks that prune the candidates with lower keys, and those before each tensor's split that have
// the key.
struct ShardMasks {
  Shards shards;
  uint64_t key;
  const int64_t* splits;  // on the host
};

size_t shard_masks_workspace(const ShardMasks& call);
cudaError_t shard_masks(const ShardMasks& call, void* workspace, cudaStream_t stream);

// A mask that prunes exactly counts[i] entries of row i, those with the lowest scores.
struct SelectRows {
  const void* weight;
  const uint8_t* mask;    // or null
  const int64_t* counts;  // contiguous
  uint8_t* out;           // contiguous
  int64_t rows, columns;
  int64_t weight_strides[2], mask_strides[2];
  Element element;
};

struct Faults {
  uint64_t nan;  // not 0: a candidate's score is NaN
  uint64_t row;  // the first row with fewer candidates than are to be pruned, or ~0
};

size_t select_rows_workspace();

// The mask is meaningless if there is a fault.
cudaError_t select_rows(
    const SelectRows& call, void* workspace, Faults* faults, cudaStream_t stream);

// What each entry adds to the alignment of its unit (row).
struct CosineGains {
  View weight, mask, reference, out;  // `out` in the accumulation type
  const void* column_scale;
  int64_t column_step;
  int64_t rows, row_size, inner;
  bool wide;
};

size_t cosine_gains_workspace(const CosineGains& call);

// Not `finite`: a weight or a reference is NaN or infinite, and the gains are meaningless.
cudaError_t cosine_gains(
    const CosineGains& call, void* workspace, bool* finite, cudaStream_t stream);

// The sums of squares of a tensor's rows and columns.
struct SquareSums {
  View weight;
  const void* row_scale;  // both scales are float64 if the weight is, and float32 otherwise
  const void* column_scale;
  int64_t row_step, column_step;
  int64_t rows, columns, inner;
  int64_t all_columns;  // of the tensor that these are columns of
  double* row_sums;
  double* column_sums;  // or null
};

size_t square_sums_workspace(const SquareSums& call);

cudaError_t square_sums(const SquareSums& call, void* workspace, cudaStream_t stream);

// The greedy matching of each matrix of a batch.
struct GreedyMatch {
  const void* similarity;  // contiguous
  Element element;
  int64_t batch, rows, columns;  // none of them 0
  int64_t* index;                // contiguous; the column of each row, or -1
};

size_t greedy_match_workspace(const GreedyMatch& call);

// The matching is meaningless if there is NaN.
cudaError_t greedy_match(
    const GreedyMatch& call, void* workspace, bool* has_nan, cudaStream_t stream);

// A weight that is read as units, with what belongs to it, all contiguous: `outer` times the units
// one after the other, with `inner` entries of each side by side. None of the sizes is zero.
struct UnitTensor {
  const void* weight = nullptr;
  const uint8_t* mask = nullptr;    // or null
  const void* reference = nullptr;  // or null: the weight, without the mask
  const int64_t* index = nullptr;   // or null: unit i goes with unit index[i] of the reference
  void* out = nullptr;              // of a combination, in the dtype of the weight
  int64_t outer = 1, units = 1, inner = 1;
  int64_t first = 0;  // the number of units before its own
  Element weight_element = Element::f32;
  Element reference_element = Element::f32;
};

// <p, p>, <p, r> and <r, r> of the units of a list of tensors, in three rows. `units` counts the
// units of empty tensors too.
struct UnitProducts {
  const UnitTensor* tensors;  // on the host
  int64_t length;
  int64_t units;
  double* products;
};

size_t unit_products_workspace(const UnitProducts& call);

cudaError_t unit_products(const UnitProducts& call, void* workspace, cudaStream_t stream);

// mask * (a reference + b weight), with the a of all units in the first row of the coefficients and
// the b in the second.
struct UnitCombination {
  const UnitTensor* tensors;  // on the host
  int64_t length;
  int64_t units;
  const double* coefficients;
};

cudaError_t unit_combination(const UnitCombination& call, cudaStream_t stream);

size_t check_indices_workspace();

// Finds the first unit, counted over all tensors, whose index is out of range, or -1.
cudaError_t check_indices(
    const UnitTensor* tensors, int64_t length, void* workspace, int64_t* unit, cudaStream_t stream);

// Entries of 2, 4 or 8 bytes that lie side by side in memory, as their mask does.
struct MaskedRun {
  const void* values;
  const uint8_t* mask;
  void* out;  // `values` itself where they are changed in place
  int64_t size;
  int64_t bytes;  // of an entry
};

// Entries and their mask wherever they lie.
struct MaskedViews {
  View values, mask, out;
  int64_t size;
  int64_t bytes;
};

// The entries become +0 where the mask is false, in place.
cudaError_t zero_pruned(const MaskedRun* runs, int64_t length, cudaStream_t stream);
cudaError_t zero_pruned(const MaskedViews& call, cudaStream_t stream);

// `out` gets the entries where the mask is true, and +0 elsewhere.
cudaError_t apply_mask(const MaskedRun& run, cudaStream_t stream);
cudaError_t apply_mask(const MaskedViews& call, cudaStream_t stream);

}  // namespace cuda
}  // namespace torchalignprune
