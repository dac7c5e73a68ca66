// The counts that the processes holding the shards of a list of tensors add up to agree on a
// threshold, and then the masks of the shards. The tensors here are those of one process.
#include <atomic>
#include <vector>

#include "chunks.h"
#include "operators.h"

namespace torchalignprune {
namespace {

template <class Acc>
class Shards {
  using Key = typename KeyOf<Acc>::type;
  static constexpr Key highest = not_a_candidate<Key> - 1;

 public:
  explicit Shards(const ScoreArguments& call)
      : all_(call),
        scan_(kernels().of<Acc>().scan[static_cast<int>(call.score)]),
        keep_(kernels().of<Acc>().keep[static_cast<int>(call.score)]) {}

  at::Tensor counts(Key low, int64_t shift, int64_t bins) const {
    at::Tensor result = zero_counts(bins + 2);
    auto* total = result.mutable_data_ptr<int64_t>();
    const Key last = static_cast<Key>(bins) - 1;
    const bool to_the_end = last >= ((highest - low) >> shift);
    const Key span = to_the_end ? highest - low : static_cast<Key>(((last + 1) << shift) - 1);
    std::vector<Found> founds(static_cast<size_t>(at::get_num_threads()));
    const int64_t nan =
        all_.for_each_piece([&](int64_t, const Piece<Acc>& piece, int64_t, bool* is_nan) {
          Found& own = founds[static_cast<size_t>(at::get_thread_num())];
          own.bins.resize(bins);
          std::array<Key, block_size + 16> inside;
          int64_t found = 0;
          own.below += scan_(piece, low, span, inside.data(), &found, is_nan);
          for (int64_t i = 0; i < found; ++i) ++own.bins[(inside[i] - low) >> shift];
        });
    for (const Found& own : founds) {
      for (size_t bin = 0; bin < own.bins.size(); ++bin) total[bin] += own.bins[bin];
      total[bins] += own.below;
    }
    total[bins + 1] = nan + 1;
    return result;
  }

  at::Tensor ties(Key key, const std::vector<at::Tensor>& edges) const {
    int64_t stretches = 0;
    std::vector<int64_t> first;
    for (const at::Tensor& own : edges) {
      first.push_back(stretches);
      stretches += own.numel() - 1;
    }
    std::vector<std::atomic<int64_t>> total(stretches);
    all_.for_each([&](int64_t c) {
      const auto& chunk = all_.chunks[c];
      const at::Tensor& own = edges[chunk.tensor];
      const auto* begin = own.const_data_ptr<int64_t>();
      const auto* end = begin + own.numel();
      std::array<Key, block_size> keys;
      const int64_t chunk_end = chunk.begin + chunk.length;
      // The last edge at or before the chunk's first entry, or else the first edge.
      const auto* edge = std::upper_bound(begin, end, chunk.begin);
      if (edge != begin) --edge;
      for (; edge + 1 < end && *edge < chunk_end; ++edge) {
        const int64_t to = std::min(chunk_end, edge[1]);
        int64_t equal = 0;
        for (int64_t at = std::max(chunk.begin, *edge); at < to; at += block_size) {
          const int64_t n = std::min(block_size, to - at);
          bool nan = false;
          all_.entries[chunk.tensor].read(at, n, keys.data(), &nan);
          equal += std::count(keys.begin(), keys.begin() + n, key);
        }
        if (equal > 0) total[first[chunk.tensor] + (edge - begin)] += equal;
      }
    });
    at::Tensor result = zero_counts(stretches);
    std::copy(total.begin(), total.end(), result.mutable_data_ptr<int64_t>());
    return result;
  }

  std::vector<at::Tensor> masks(Key key, at::IntArrayRef splits) const {
    const std::vector<at::Tensor> masks = all_.empty_masks();
    all_.for_each_piece([&](int64_t c, const Piece<Acc>& piece, int64_t at, bool* nan) {
      const auto& chunk = all_.chunks[c];
      const int64_t begin = chunk.begin + at;
      const int64_t equals_until = splits[chunk.tensor] - begin;  // those before it are pruned
      all_.with_mask(masks, c, at, piece.n, false, [&](uint8_t* mask) {
        const int64_t equal = keep_(piece, key, equals_until <= 0, mask, nan);
        if (equal == 0 || equals_until <= 0 || equals_until >= piece.n) return;
        std::array<Key, block_size> keys;
        all_.entries[chunk.tensor].read(begin, piece.n, keys.data(), nan);
        for (int64_t i = equals_until; i < piece.n; ++i) mask[i] |= keys[i] == key ? 1 : 0;
      });
    });
    return masks;
  }

 private:
  // What one thread counts, on cache lines of its own.
  struct alignas(64) Found {
    int64_t below = 0;
    std::vector<int64_t> bins;
  };

  Chunks<Acc> all_;
  typename ScoreKernels<Acc>::Scan scan_;
  typename ScoreKernels<Acc>::Keep keep_;
};

template <class Run>
auto with_shards(const ScoreArguments& call, Run run) {
  return score_dtype(call.weights) == at::kDouble ? run(Shards<double>(call), uint64_t{})
                                                  : run(Shards<float>(call), uint32_t{});
}

}  // namespace

at::Tensor shard_counts(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t low, int64_t shift, int64_t bins) {
  const auto call =
      check_scores(weights, masks, references, row_scales, column_scales, names, score);
  check_shard_counts(call.weights, low, shift, bins);
  return with_shards(call, [&](const auto& shards, auto zero) {
    return shards.counts(static_cast<decltype(zero)>(low), shift, bins);
  });
}

at::Tensor shard_ties(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t key, at::TensorList edges) {
  const auto call =
      check_scores(weights, masks, references, row_scales, column_scales, names, score);
  check_shard_key(call.weights, key);
  const std::vector<at::Tensor> own = check_edges(call.weights, edges, call.names);
  return with_shards(call, [&](const auto& shards, auto zero) {
    return shards.ties(static_cast<decltype(zero)>(key), own);
  });
}

std::vector<at::Tensor> shard_masks(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    std::string score, int64_t key, at::IntArrayRef splits) {
  const auto call =
      check_scores(weights, masks, references, row_scales, column_scales, names, score);
  check_shard_key(call.weights, key);
  check_splits(call.weights, splits, call.names);
  return with_shards(call, [&](const auto& shards, auto zero) {
    return shards.masks(static_cast<decltype(zero)>(key), splits);
  });
}

}  // namespace torchalignprune
