// Masks that prune exactly `count` entries of a list of tensors, those of the lowest scores.
//
// A sample brackets the score of the last pruned entry; one pass counts the entries below the
// bracket and makes a histogram of those inside it; a last pass writes the masks. The histogram's
// bins are single scores unless the bracket is wide, when the entries of one bin are looked at in
// another pass. Entries are never copied as a whole, concatenated or sorted.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "entries.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace torchalignprune {
namespace {

constexpr int64_t chunk_size = 64 * block_size;
constexpr int64_t all_bins = int64_t{1} << 20;  // shared out among the threads: 8 MiB
constexpr int64_t most_bins = int64_t{1} << 19;
constexpr int64_t collect_limit = int64_t{1} << 20;
constexpr int64_t sample_run = 16;
constexpr int64_t sample_runs = int64_t{1} << 14;

struct Chunk {
  int64_t tensor, begin, length;
};

// Fresh memory comes in pages that the kernel has to clear; large pages make that cheap.
void advise_huge_pages(const at::Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t from = (begin + page - 1) / page * page;
  const uintptr_t to = (begin + tensor.nbytes()) / page * page;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

template <class Acc>
class Selection {
  using Key = typename KeyOf<Acc>::type;
  static constexpr Key highest = not_a_candidate<Key> - 1;

 public:
  Selection(std::vector<Entries<Acc>> entries, at::ArrayRef<std::string> names)
      : entries_(std::move(entries)), names_(names), kernels_(kernels().of<Acc>()) {
    for (size_t i = 0; i < entries_.size(); ++i) {
      const int64_t size = entries_[i].weight.numel();
      for (int64_t begin = 0; begin < size; begin += chunk_size) {
        chunks_.push_back({static_cast<int64_t>(i), begin, std::min(chunk_size, size - begin)});
      }
    }
  }

  std::vector<at::Tensor> masks(int64_t count) {
    const int64_t alive = count_alive();
    check_count(count, alive);
    Threshold threshold;
    if (count > 0) threshold = find(count, alive);
    return write(threshold);
  }

 private:
  // Prunes what is below `key`, and the first `pruned` of the `equal` entries that have it.
  struct Threshold {
    Key key = 0;
    int64_t equal = 0;
    int64_t pruned = 0;
  };

  // One thread's counts, apart from the others' in memory.
  struct alignas(64) Histogram {
    int64_t below = 0;
    std::vector<int64_t> bins;
  };

  // Calls visit(chunk index, keys, begin within the chunk, length) for every block.
  template <class Visit>
  void for_each_block(Visit visit) {
    std::atomic<int64_t> nan{std::numeric_limits<int64_t>::max()};
    at::parallel_for(0, static_cast<int64_t>(chunks_.size()), 1, [&](int64_t from, int64_t to) {
      std::array<Key, block_size> keys;
      for (int64_t c = from; c < to; ++c) {
        const Chunk& chunk = chunks_[c];
        for (int64_t at = 0; at < chunk.length; at += block_size) {
          const int64_t n = std::min(block_size, chunk.length - at);
          if (entries_[chunk.tensor].read(chunk.begin + at, n, keys.data())) {
            int64_t seen = nan.load();
            while (chunk.tensor < seen && !nan.compare_exchange_weak(seen, chunk.tensor)) {
            }
          }
          visit(c, keys.data(), at, n);
        }
      }
    });
    TORCH_CHECK_VALUE(
        nan == std::numeric_limits<int64_t>::max(), "the scores of ", names_[nan],
        " should be numbers, got NaN");
  }

  int64_t count_alive() {
    std::atomic<int64_t> alive{0};
    at::parallel_for(0, static_cast<int64_t>(chunks_.size()), 16, [&](int64_t from, int64_t to) {
      std::array<uint8_t, block_size> buffer;
      int64_t total = 0;
      for (int64_t c = from; c < to; ++c) {
        const Chunk& chunk = chunks_[c];
        const auto& mask = entries_[chunk.tensor].mask;
        if (!mask) {
          total += chunk.length;
          continue;
        }
        for (int64_t at = 0; at < chunk.length; at += block_size) {
          const int64_t n = std::min(block_size, chunk.length - at);
          total += kernels().count_true(read_mask(*mask, chunk.begin + at, n, buffer.data()), n);
        }
      }
      alive += total;
    });
    return alive;
  }

  // Two keys between which the rank-th smallest of all lies, most probably.
  std::pair<Key, Key> bracket(int64_t rank, int64_t alive) {
    int64_t size = 0;
    for (const Chunk& chunk : chunks_) size += chunk.length;
    if (size <= collect_limit) return {0, highest};
    std::vector<Key> sample(sample_runs * sample_run, not_a_candidate<Key>);
    std::vector<int64_t> ends;
    int64_t end = 0;
    for (const Chunk& chunk : chunks_) ends.push_back(end += chunk.length);
    at::parallel_for(0, sample_runs, 1024, [&](int64_t from, int64_t to) {
      for (int64_t run = from; run < to; ++run) {
        // Spread evenly, with a fixed scatter that no row length falls in step with.
        const double scatter = std::fmod(static_cast<double>(run) * 0.6180339887498949, 1.0);
        const auto position = static_cast<int64_t>(
            (static_cast<double>(run) + scatter) * (static_cast<double>(size) / sample_runs));
        const auto c = std::upper_bound(ends.begin(), ends.end(), std::min(position, size - 1)) -
                       ends.begin();
        const Chunk& chunk = chunks_[c];
        const int64_t at = std::min(position, size - 1) - (ends[c] - chunk.length);
        const int64_t n = std::min(sample_run, chunk.length - at);
        entries_[chunk.tensor].read(chunk.begin + at, n, sample.data() + run * sample_run);
      }
    });
    sample.erase(std::remove(sample.begin(), sample.end(), not_a_candidate<Key>), sample.end());
    if (sample.empty()) return {0, highest};
    // Five standard deviations of the sample's quantile; entries of one run resemble each other, so
    // that the sample counts for less than its size.
    const auto drawn = static_cast<double>(sample.size());
    const double share = static_cast<double>(rank) / static_cast<double>(alive);
    const double margin = 5 * std::sqrt(drawn * share * (1 - share)) + 8;
    const double low = share * drawn - margin;
    const double high = share * drawn + margin;
    std::pair<Key, Key> keys{0, highest};
    auto from = sample.begin();
    if (low >= 0) {
      from = sample.begin() + static_cast<int64_t>(low);
      std::nth_element(sample.begin(), from, sample.end());
      keys.first = *from;
    }
    if (high < drawn) {
      const auto to = sample.begin() + static_cast<int64_t>(high);
      std::nth_element(from, to, sample.end());
      keys.second = *to;
    }
    return keys;
  }

  Threshold find(int64_t rank, int64_t alive) {
    if (alive <= collect_limit) return collect(rank, 0, highest, 0);
    auto [low, high] = bracket(rank, alive);
    const int64_t threads = at::get_num_threads();
    const int64_t bin_count =
        std::clamp<int64_t>(all_bins / threads, int64_t{1} << 12, most_bins);
    while (true) {
      const Key span = high - low;
      int shift = 0;
      while ((span >> shift) >= static_cast<Key>(bin_count)) ++shift;
      std::vector<Histogram> histograms(static_cast<size_t>(threads));
      for_each_block([&](int64_t, const Key* keys, int64_t, int64_t n) {
        Histogram& own = histograms[static_cast<size_t>(at::get_thread_num())];
        if (own.bins.empty()) own.bins.resize(bin_count);
        std::array<Key, block_size + 16> inside;
        int64_t found = 0;
        own.below += kernels_.scan(keys, n, low, span, inside.data(), &found);
        for (int64_t i = 0; i < found; ++i) ++own.bins[(inside[i] - low) >> shift];
      });
      int64_t below = 0;
      for (const Histogram& own : histograms) below += own.below;
      if (rank <= below) {
        high = low - 1;
        low = 0;
        continue;
      }
      int64_t in_bin = 0;
      int64_t bin = 0;
      const auto last = static_cast<int64_t>(span >> shift);
      for (; bin <= last; ++bin) {
        in_bin = 0;
        for (const Histogram& own : histograms) in_bin += own.bins.empty() ? 0 : own.bins[bin];
        if (below + in_bin >= rank) break;
        below += in_bin;
      }
      if (bin > last) {
        low = high + 1;
        high = highest;
        continue;
      }
      low = low + (static_cast<Key>(bin) << shift);
      high = std::min(high, static_cast<Key>(low + ((Key{1} << shift) - 1)));
      if (shift == 0) return {low, in_bin, rank - below};
      if (in_bin <= collect_limit) return collect(rank, low, high, below);
    }
  }

  // The threshold among the few keys in [low, high], below which there are `below` others.
  Threshold collect(int64_t rank, Key low, Key high, int64_t below) {
    std::vector<std::vector<Key>> found(static_cast<size_t>(at::get_num_threads()));
    for_each_block([&](int64_t, const Key* keys, int64_t, int64_t n) {
      std::array<Key, block_size + 16> inside;
      int64_t m = 0;
      kernels_.scan(keys, n, low, high - low, inside.data(), &m);
      auto& own = found[static_cast<size_t>(at::get_thread_num())];
      own.insert(own.end(), inside.begin(), inside.begin() + m);
    });
    std::vector<Key> keys;
    for (const auto& own : found) keys.insert(keys.end(), own.begin(), own.end());
    const auto nth = keys.begin() + (rank - below - 1);
    std::nth_element(keys.begin(), nth, keys.end());
    const Key key = *nth;
    const auto smaller = std::count_if(keys.begin(), keys.end(), [&](Key k) { return k < key; });
    const auto equal = std::count(keys.begin(), keys.end(), key);
    return {key, equal, rank - below - smaller};
  }

  std::vector<at::Tensor> write(const Threshold& threshold) {
    std::vector<at::Tensor> masks;
    for (const auto& entries : entries_) {
      masks.push_back(at::empty_like(entries.weight, at::TensorOptions().dtype(at::kBool)));
      advise_huge_pages(masks.back());
    }
    // Where only some of the equals go, the larger party is written first, and the chunks that hold
    // the others are gone over again.
    const bool keep_equal = 2 * threshold.pruned < threshold.equal || threshold.equal == 0;
    std::vector<int64_t> equal(chunks_.size(), 0);
    for_each_block([&](int64_t c, const Key* keys, int64_t at, int64_t n) {
      with_mask(masks, c, at, n, false, [&](uint8_t* mask) {
        equal[c] += kernels_.keep(keys, n, threshold.key, keep_equal, mask);
      });
    });
    if (threshold.pruned == 0 || threshold.pruned == threshold.equal) return masks;
    std::vector<int64_t> rank(chunks_.size(), 0);
    int64_t total = 0;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      rank[c] = total;
      total += equal[c];
    }
    at::parallel_for(0, static_cast<int64_t>(chunks_.size()), 1, [&](int64_t from, int64_t to) {
      std::array<Key, block_size> keys;
      for (int64_t c = from; c < to; ++c) {
        const bool wrong =
            keep_equal ? rank[c] < threshold.pruned : rank[c] + equal[c] > threshold.pruned;
        if (equal[c] == 0 || !wrong) continue;
        const Chunk& chunk = chunks_[c];
        int64_t place = rank[c];
        for (int64_t at = 0; at < chunk.length; at += block_size) {
          const int64_t n = std::min(block_size, chunk.length - at);
          entries_[chunk.tensor].read(chunk.begin + at, n, keys.data());
          with_mask(masks, c, at, n, true, [&](uint8_t* mask) {
            for (int64_t i = 0; i < n; ++i) {
              if (keys[i] == threshold.key) mask[i] = place++ >= threshold.pruned ? 1 : 0;
            }
          });
        }
      }
    });
    return masks;
  }

  // Hands `edit` the n bytes of a mask, contiguous, and puts them where the mask's strides want
  // them. Without `load` they come in with any content.
  template <class Edit>
  void with_mask(
      const std::vector<at::Tensor>& masks, int64_t c, int64_t at, int64_t n, bool load,
      Edit edit) {
    const at::Tensor& mask = masks[chunks_[c].tensor];
    const int64_t begin = chunks_[c].begin + at;
    auto* data = static_cast<uint8_t*>(mask.data_ptr());
    if (mask.is_contiguous()) return edit(data + begin);
    std::array<uint8_t, block_size> buffer;
    if (load) read_mask(mask, begin, n, buffer.data());
    edit(buffer.data());
    for_each_run(mask, begin, n, [&](int64_t from, int64_t offset, int64_t stride, int64_t length) {
      for (int64_t i = 0; i < length; ++i) data[offset + i * stride] = buffer[from + i];
    });
  }

  std::vector<Entries<Acc>> entries_;
  at::ArrayRef<std::string> names_;
  const ScoreKernels<Acc>& kernels_;
  std::vector<Chunk> chunks_;
};

std::vector<at::Tensor> select_global(
    at::TensorList weights, const c10::List<std::optional<at::Tensor>>& mask_list,
    const c10::List<std::optional<at::Tensor>>& reference_list,
    const c10::List<std::optional<at::Tensor>>& row_scale_list,
    const c10::List<std::optional<at::Tensor>>& column_scale_list, c10::List<std::string> name_list,
    int64_t count, std::string score_name) {
  const auto masks = mask_list.vec();
  const auto references = reference_list.vec();
  const auto row_scales = row_scale_list.vec();
  const auto column_scales = column_scale_list.vec();
  const auto names = name_list.vec();
  const Score score = parse_score(score_name);
  check_select_global(
      weights, masks, references, row_scales, column_scales, names, count, score);
  const auto run = [&](auto zero) {
    using Acc = decltype(zero);
    std::vector<Entries<Acc>> entries;
    for (size_t i = 0; i < weights.size(); ++i) {
      const auto contiguous = [](const std::optional<at::Tensor>& scale) {
        return scale ? std::optional(scale->contiguous()) : std::nullopt;
      };
      entries.push_back(
          {weights[i], masks[i], references[i], contiguous(row_scales[i]),
           contiguous(column_scales[i]), score});
    }
    return Selection<Acc>(std::move(entries), names).masks(count);
  };
  return score_dtype(weights) == at::kDouble ? run(double{}) : run(float{});
}

TORCH_LIBRARY_IMPL(torchalignprune, CPU, m) { m.impl("select_global", &select_global); }

}  // namespace
}  // namespace torchalignprune
