// Masks that prune exactly `count` entries of a list of tensors, those with the lowest scores.
//
// A sample brackets the score of the last pruned entry; one pass counts the entries below the
// bracket and collects those inside it, which are few; a last pass writes the masks. Where the
// bracket misses or its entries are too many to hold, a histogram of them narrows it for another
// pass. Entries are never copied as a whole, concatenated or sorted.
#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <vector>

#include "chunks.h"
#include "operators.h"

namespace torchalignprune {
namespace {

constexpr int64_t bin_count = int64_t{1} << 11;  // they stay in the first-level cache
constexpr int64_t always_held = int64_t{1} << 18;
constexpr double held_share = 0.015;  // of the memory of the weights
constexpr int64_t sample_run = 16;
constexpr int64_t sample_runs = int64_t{1} << 13;

template <class Acc>
class Selection {
  using Key = typename KeyOf<Acc>::type;
  static constexpr Key highest = not_a_candidate<Key> - 1;

 public:
  explicit Selection(const ScoreArguments& call)
      : all_(call),
        scan_(kernels().of<Acc>().scan[static_cast<int>(call.score)]),
        keep_(kernels().of<Acc>().keep[static_cast<int>(call.score)]) {}

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

  // What one thread finds in a bracket, on cache lines of its own.
  struct alignas(64) Found {
    int64_t below = 0;
    std::vector<int64_t> bins = std::vector<int64_t>(bin_count, 0);
    std::vector<Key> keys;
    int64_t held = 0;
    bool overflow = false;

    Key* room(int64_t n) {
      const auto wanted = static_cast<size_t>(held + n);
      if (keys.size() < wanted) keys.resize(std::max(2 * keys.size(), wanted));
      return keys.data() + held;
    }
  };

  template <class Visit>
  void for_each_piece(Visit visit) {
    const int64_t wrong = all_.for_each_piece(visit);
    TORCH_CHECK_VALUE(
        wrong < 0, "the scores of ", all_.names[wrong], " should be numbers, got NaN");
  }

  int64_t count_alive() {
    std::atomic<int64_t> alive{0};
    all_.for_each([&](int64_t c) {
      std::array<uint8_t, block_size> buffer;
      const auto& chunk = all_.chunks[c];
      const auto& mask = all_.entries[chunk.tensor].mask;
      int64_t total = mask ? 0 : chunk.length;
      for (int64_t at = 0; mask && at < chunk.length; at += block_size) {
        const int64_t n = std::min(block_size, chunk.length - at);
        total += kernels().count_true(read_mask(*mask, chunk.begin + at, n, buffer.data()), n);
      }
      alive += total;
    });
    return alive;
  }

  // Two keys that most probably bracket the rank-th smallest of all.
  std::pair<Key, Key> bracket(int64_t rank, int64_t alive) {
    if (all_.size <= always_held) return {0, highest};
    std::vector<Key> sample(sample_runs * sample_run, not_a_candidate<Key>);
    std::vector<int64_t> ends;
    int64_t end = 0;
    for (const auto& chunk : all_.chunks) ends.push_back(end += chunk.length);
    at::parallel_for(0, sample_runs, 1024, [&](int64_t from, int64_t to) {
      for (int64_t run = from; run < to; ++run) {
        // Spread evenly, with a fixed jitter that no row length is in step with.
        const double scatter = std::fmod(static_cast<double>(run) * 0.6180339887498949, 1.0);
        const auto position = static_cast<int64_t>(
            (static_cast<double>(run) + scatter) * (static_cast<double>(all_.size) / sample_runs));
        const auto c =
            std::upper_bound(ends.begin(), ends.end(), std::min(position, all_.size - 1)) -
            ends.begin();
        const auto& chunk = all_.chunks[c];
        const int64_t at = std::min(position, all_.size - 1) - (ends[c] - chunk.length);
        const int64_t n = std::min(sample_run, chunk.length - at);
        bool nan = false;  // the passes report it
        all_.entries[chunk.tensor].read(
            chunk.begin + at, n, sample.data() + run * sample_run, &nan);
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
    auto [low, high] = bracket(rank, alive);
    double bytes = 0;
    for (const auto& entries : all_.entries) bytes += static_cast<double>(entries.weight.nbytes());
    const int64_t threads = at::get_num_threads();
    const auto most_held =
        std::max(always_held, static_cast<int64_t>(held_share * bytes / sizeof(Key)) / threads);
    while (true) {
      const Key span = high - low;
      int shift = 0;
      while ((span >> shift) >= static_cast<Key>(bin_count)) ++shift;
      std::vector<Found> founds(static_cast<size_t>(threads));
      for_each_piece([&](int64_t, const Piece<Acc>& piece, int64_t, bool* nan) {
        Found& own = founds[static_cast<size_t>(at::get_thread_num())];
        std::array<Key, block_size + 16> scratch;
        Key* inside = own.overflow ? scratch.data() : own.room(piece.n + 16);
        int64_t found = 0;
        own.below += scan_(piece, low, span, inside, &found, nan);
        for (int64_t i = 0; i < found; ++i) ++own.bins[(inside[i] - low) >> shift];
        own.held += own.overflow ? 0 : found;
        own.overflow = own.overflow || own.held > most_held;
      });
      int64_t below = 0;
      bool overflow = false;
      for (const Found& own : founds) {
        below += own.below;
        overflow = overflow || own.overflow;
      }
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
        for (const Found& own : founds) in_bin += own.bins[bin];
        if (below + in_bin >= rank) break;
        below += in_bin;
      }
      if (bin > last) {
        low = high + 1;
        high = highest;
        continue;
      }
      low = low + (static_cast<Key>(bin) << shift);
      const Key width = (Key{1} << shift) - 1;
      if (high - low > width) high = low + width;
      if (shift == 0) return {low, in_bin, rank - below};
      if (!overflow) return pick(founds, rank - below, low, high);
    }
  }

  // The threshold at the rank-th smallest of the keys in [low, high], all of which are held.
  static Threshold pick(const std::vector<Found>& founds, int64_t rank, Key low, Key high) {
    std::vector<std::vector<Key>> parts(founds.size());
    at::parallel_for(0, static_cast<int64_t>(founds.size()), 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const auto begin = founds[i].keys.begin();
        std::copy_if(begin, begin + founds[i].held, std::back_inserter(parts[i]), [&](Key key) {
          return low <= key && key <= high;
        });
      }
    });
    std::vector<Key> keys;
    for (const auto& part : parts) keys.insert(keys.end(), part.begin(), part.end());
    const auto nth = keys.begin() + (rank - 1);
    std::nth_element(keys.begin(), nth, keys.end());
    const Key key = *nth;
    const auto smaller = std::count_if(keys.begin(), keys.end(), [&](Key k) { return k < key; });
    return {key, std::count(keys.begin(), keys.end(), key), rank - smaller};
  }

  std::vector<at::Tensor> write(const Threshold& threshold) {
    const std::vector<at::Tensor> masks = all_.empty_masks();
    // If only some of the entries that equal the threshold are pruned, all are first written like
    // the larger group of them; then the chunks that hold the others are corrected.
    const bool keep_equal = 2 * threshold.pruned < threshold.equal || threshold.equal == 0;
    std::vector<int64_t> equal(all_.chunks.size(), 0);
    for_each_piece([&](int64_t c, const Piece<Acc>& piece, int64_t at, bool* nan) {
      all_.with_mask(masks, c, at, piece.n, false, [&](uint8_t* mask) {
        equal[c] += keep_(piece, threshold.key, keep_equal, mask, nan);
      });
    });
    if (threshold.pruned == 0 || threshold.pruned == threshold.equal) return masks;
    std::vector<int64_t> rank(all_.chunks.size(), 0);
    int64_t total = 0;
    for (size_t c = 0; c < all_.chunks.size(); ++c) {
      rank[c] = total;
      total += equal[c];
    }
    all_.for_each([&](int64_t c) {
      const bool wrong =
          keep_equal ? rank[c] < threshold.pruned : rank[c] + equal[c] > threshold.pruned;
      if (equal[c] == 0 || !wrong) return;
      std::array<Key, block_size> keys;
      const auto& chunk = all_.chunks[c];
      int64_t place = rank[c];
      for (int64_t at = 0; at < chunk.length; at += block_size) {
        const int64_t n = std::min(block_size, chunk.length - at);
        bool nan = false;
        all_.entries[chunk.tensor].read(chunk.begin + at, n, keys.data(), &nan);
        all_.with_mask(masks, c, at, n, true, [&](uint8_t* mask) {
          for (int64_t i = 0; i < n; ++i) {
            if (keys[i] == threshold.key) mask[i] = place++ >= threshold.pruned ? 1 : 0;
          }
        });
      }
    });
    return masks;
  }

  Chunks<Acc> all_;
  typename ScoreKernels<Acc>::Scan scan_;
  typename ScoreKernels<Acc>::Keep keep_;
};

}  // namespace

std::vector<at::Tensor> select_global(
    at::TensorList weights, at::ArrayRef<std::optional<at::Tensor>> masks,
    at::ArrayRef<std::optional<at::Tensor>> references,
    at::ArrayRef<std::optional<at::Tensor>> row_scales,
    at::ArrayRef<std::optional<at::Tensor>> column_scales, at::ArrayRef<std::string> names,
    int64_t count, std::string score) {
  const auto call =
      check_scores(weights, masks, references, row_scales, column_scales, names, score);
  TORCH_CHECK_VALUE(count >= 0, "count should not be negative, got ", count);
  return score_dtype(call.weights) == at::kDouble ? Selection<double>(call).masks(count)
                                                  : Selection<float>(call).masks(count);
}

}  // namespace torchalignprune
