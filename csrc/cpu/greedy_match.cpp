// The greedy matching of rows and columns: the largest entry first, its row and its column struck.
//
// The entries are taken in bands, from the largest ones down: every round collects those above a
// bound that a sample chose, sorts them, and goes through them one after the other. A bound decides
// how many entries a round has, and nothing else. With a few times as many entries as there are
// free rows or columns, most of those find their match, and the next round has only the rest left.
#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <vector>

#include "entries.h"
#include "operators.h"

namespace torchalignprune {
namespace {

// How many entries a round collects for each free row or column, whichever are fewer. A round
// leaves about one in 1 + `first_share` of those free, or many more if they compete for the same
// partners; then the share is doubled.
constexpr int64_t first_share = 6;
// How many sampled entries should lie above the bound, unless that takes too large a sample.
constexpr int64_t sampled_above = 64;
constexpr double most_sampled = 1.0 / 32;
// Neighbours in memory that are sampled together.
constexpr int64_t sampled_run = 8;

template <class Acc>
struct Entry {
  Acc value;
  uint32_t row, column;
  bool operator<(const Entry& other) const {
    if (value != other.value) return value > other.value;
    if (row != other.row) return row < other.row;
    return column < other.column;
  }
};

// One matrix of a batch, as its free rows and columns are used up.
template <class Acc>
class Matcher {
 public:
  Matcher(const at::Tensor& similarity, int64_t matrix, int64_t* index)
      : similarity_(similarity),
        rows_(similarity.size(-2)),
        columns_(similarity.size(-1)),
        first_(matrix * rows_ * columns_),
        index_(index),
        is_taken_(columns_, 0) {
    std::fill_n(index, rows_, int64_t{-1});
    free_rows_.resize(rows_);
    free_columns_.resize(columns_);
    for (int64_t row = 0; row < rows_; ++row) free_rows_[row] = static_cast<uint32_t>(row);
    for (int64_t column = 0; column < columns_; ++column) {
      free_columns_[column] = static_cast<uint32_t>(column);
    }
  }

  // Returns false if there is NaN.
  bool run() {
    int64_t share = first_share;
    bool is_whole = false;
    while (!is_whole && !free_rows_.empty() && !free_columns_.empty()) {
      const int64_t fewer = std::min<int64_t>(free_rows_.size(), free_columns_.size());
      const Bound bound = choose_bound(share * fewer);
      is_whole = bound.value == -infinity;
      if (!collect(bound)) return false;
      std::sort(band_.begin(), band_.end());
      for (const Entry<Acc>& entry : band_) match(entry.row, entry.column);
      if (!is_whole && !bound.is_in) match_equals(bound.value);
      drop_matched();
      const int64_t left = std::min<int64_t>(free_rows_.size(), free_columns_.size());
      if (2 * left > fewer) share *= 2;
    }
    return true;
  }

 private:
  static constexpr Acc infinity = std::numeric_limits<Acc>::infinity();

  // A round takes the entries above the bound, and those equal to it if it `is_in`.
  struct Bound {
    Acc value;
    bool is_in;
  };

  Acc value_at(uint32_t row, uint32_t column) const {
    Acc buffer;
    return *read_values(similarity_, first_ + row * columns_ + column, 1, &buffer);
  }

  // A bound that about `wanted` entries of free rows and columns are above. -infinity stands for
  // all entries there are: a pair of that similarity is never matched.
  Bound choose_bound(int64_t wanted) const {
    const auto rows = static_cast<int64_t>(free_rows_.size());
    const auto columns = static_cast<int64_t>(free_columns_.size());
    const double all = static_cast<double>(rows) * static_cast<double>(columns);
    const double share = static_cast<double>(wanted) / all;
    if (share > 0.5 || all < 4096) return {-infinity, false};
    const double drawn = std::min(sampled_above / share, 128 + most_sampled * all);
    const auto size = static_cast<int64_t>(drawn);
    const auto above = std::max<int64_t>(1, static_cast<int64_t>(share * drawn));
    std::vector<Acc> sample;
    sample.reserve(size + sampled_run);
    // Fractions of the golden ratio spread evenly, and over rows and columns alike.
    double place = 0;
    while (static_cast<int64_t>(sample.size()) < size) {
      place += 0.6180339887498949;
      place -= std::floor(place);
      const double at = place * static_cast<double>(rows);
      const auto row = std::min(static_cast<int64_t>(at), rows - 1);
      double within = (at - std::floor(at)) * 7919.0;
      within -= std::floor(within);
      const auto start =
          std::min(static_cast<int64_t>(within * static_cast<double>(columns)), columns - 1);
      const int64_t end = std::min(start + sampled_run, columns);
      for (int64_t column = start; column < end; ++column) {
        const Acc value = value_at(free_rows_[row], free_columns_[column]);
        if (value != value) return {-infinity, false};  // the scan will tell
        sample.push_back(value);
      }
    }
    std::nth_element(
        sample.begin(), sample.begin() + (above - 1), sample.end(), std::greater<Acc>());
    const Acc value = sample[above - 1];
    const auto reached =
        std::count_if(sample.begin(), sample.end(), [&](Acc other) { return other >= value; });
    // So many equals would make the band too large, and need no sorting.
    return {value, value > -infinity && reached <= 2 * above + 8};
  }

  // Calls use(column) for the entries of a row that the bound admits, whatever their column, until
  // it returns true. Returns whether there was NaN among those that it saw.
  template <class Use>
  bool scan(uint32_t row, Bound bound, Use use) const {
    const auto above = kernels().of<Acc>().above[bound.is_in ? 1 : 0];
    std::array<Acc, block_size> buffer;
    std::array<uint32_t, block_size> hits;
    bool nan = false;
    for (int64_t at = 0; at < columns_; at += block_size) {
      const int64_t n = std::min(block_size, columns_ - at);
      const Acc* values = read_values(similarity_, first_ + row * columns_ + at, n, buffer.data());
      const int64_t found = above(values, n, bound.value, hits.data(), &nan);
      for (int64_t hit = 0; hit < found; ++hit) {
        if (use(static_cast<uint32_t>(at + hits[hit]), values[hits[hit]])) return nan;
      }
    }
    return nan;
  }

  bool collect(Bound bound) {
    band_.clear();
    std::mutex mutex;
    std::atomic<bool> nan{false};
    const int64_t grain = std::max<int64_t>(1, 65536 / columns_);
    at::parallel_for(0, free_rows_.size(), grain, [&](int64_t from, int64_t to) {
      std::vector<Entry<Acc>> own;
      for (int64_t i = from; i < to; ++i) {
        const uint32_t row = free_rows_[i];
        const bool found_nan = scan(row, bound, [&](uint32_t column, Acc value) {
          if (is_taken_[column] == 0) own.push_back({value, row, column});
          return false;
        });
        if (found_nan) nan = true;
      }
      // They are sorted afterwards, and no two of them are equal.
      const std::lock_guard<std::mutex> lock(mutex);
      band_.insert(band_.end(), own.begin(), own.end());
    });
    return !nan;
  }

  // Matches entries of one similarity by row, then by column; all larger ones are done.
  void match_equals(Acc value) {
    for (const uint32_t row : free_rows_) {
      if (index_[row] >= 0) continue;
      scan(row, {value, true}, [&](uint32_t column, Acc) {
        match(row, column);
        return index_[row] >= 0;
      });
    }
  }

  void match(uint32_t row, uint32_t column) {
    if (index_[row] >= 0 || is_taken_[column] != 0) return;
    index_[row] = column;
    is_taken_[column] = 1;
  }

  void drop_matched() {
    const auto drop = [](std::vector<uint32_t>& units, auto is_matched) {
      units.erase(std::remove_if(units.begin(), units.end(), is_matched), units.end());
    };
    drop(free_rows_, [&](uint32_t row) { return index_[row] >= 0; });
    drop(free_columns_, [&](uint32_t column) { return is_taken_[column] != 0; });
  }

  const at::Tensor& similarity_;
  const int64_t rows_, columns_, first_;
  int64_t* index_;
  std::vector<uint8_t> is_taken_;
  std::vector<uint32_t> free_rows_, free_columns_;
  std::vector<Entry<Acc>> band_;
};

template <class Acc>
void greedy_match_as(const at::Tensor& similarity, const std::string& name, int64_t* index) {
  const int64_t rows = similarity.size(-2);
  const int64_t each = rows * similarity.size(-1);
  const int64_t batch = similarity.numel() / each;
  std::atomic<bool> nan{false};
  const auto run = [&](int64_t from, int64_t to) {
    for (int64_t matrix = from; matrix < to; ++matrix) {
      if (!Matcher<Acc>(similarity, matrix, index + matrix * rows).run()) nan = true;
    }
  };
  // Threads share the matrices if they are small, and the rows of each if they are large.
  if (each < 65536) {
    at::parallel_for(0, batch, std::max<int64_t>(1, 16384 / each), run);
  } else {
    run(0, batch);
  }
  TORCH_CHECK_VALUE(!nan, name, " should be numbers, got NaN");
}

}  // namespace

at::Tensor greedy_match(const at::Tensor& similarity, std::string name) {
  check_greedy_match(similarity, name);
  at::Tensor index = similarity.new_full(
      similarity.sizes().slice(0, similarity.dim() - 1), -1, similarity.options().dtype(at::kLong));
  if (similarity.numel() == 0) return index;
  const at::Tensor own = similarity.contiguous();
  auto* data = index.mutable_data_ptr<int64_t>();
  if (similarity.scalar_type() == at::kDouble) {
    greedy_match_as<double>(own, name, data);
  } else {
    greedy_match_as<float>(own, name, data);
  }
  return index;
}

}  // namespace torchalignprune
