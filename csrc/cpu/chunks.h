// The entries of a list of tensors, cut into chunks that are distributed to the threads.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "entries.h"
#include "factories.h"
#include "huge_pages.h"

namespace torchalignprune {

inline constexpr int64_t chunk_size = 64 * block_size;

template <class Acc>
class Chunks {
 public:
  using Key = typename KeyOf<Acc>::type;

  struct Chunk {
    int64_t tensor, begin, length;
  };

  explicit Chunks(const ScoreArguments& call) : names(call.names) {
    const auto contiguous = [](const std::optional<at::Tensor>& scale) {
      return scale ? std::optional(scale->contiguous()) : std::nullopt;
    };
    for (size_t i = 0; i < call.weights.size(); ++i) {
      entries.push_back(
          {call.weights[i], call.masks[i], call.references[i], contiguous(call.row_scales[i]),
           contiguous(call.column_scales[i]), call.score});
      const int64_t n = call.weights[i].numel();
      for (int64_t begin = 0; begin < n; begin += chunk_size) {
        chunks.push_back({static_cast<int64_t>(i), begin, std::min(chunk_size, n - begin)});
      }
      size += n;
    }
    // A thread is not worth starting for less than a few blocks.
    grain_ = 1 + static_cast<int64_t>(chunks.size()) * 32 * block_size / std::max<int64_t>(1, size);
  }

  // Calls use(chunk index) for every chunk.
  template <class Use>
  void for_each(Use use) const {
    at::parallel_for(0, static_cast<int64_t>(chunks.size()), grain_, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) use(c);
    });
  }

  // Calls visit(chunk index, piece, begin within the chunk, nan) for every piece. Returns the first
  // tensor for which `nan` was set, or -1.
  template <class Visit>
  int64_t for_each_piece(Visit visit) const {
    constexpr int64_t none = std::numeric_limits<int64_t>::max();
    std::atomic<int64_t> first_nan{none};
    for_each([&](int64_t c) {
      const Chunk& chunk = chunks[c];
      bool nan = false;
      for (int64_t at = 0; at < chunk.length; at += block_size) {
        const int64_t n = std::min(block_size, chunk.length - at);
        entries[chunk.tensor].for_each_piece(
            chunk.begin + at, n,
            [&](const Piece<Acc>& piece, int64_t offset) { visit(c, piece, at + offset, &nan); });
      }
      int64_t seen = first_nan.load();
      while (nan && chunk.tensor < seen && !first_nan.compare_exchange_weak(seen, chunk.tensor)) {
      }
    });
    return first_nan == none ? -1 : first_nan.load();
  }

  std::vector<at::Tensor> empty_masks() const {
    std::vector<at::Tensor> masks;
    for (const auto& own : entries) {
      masks.push_back(empty_like(own.weight, at::kBool));
      advise_huge_pages(masks.back());
    }
    return masks;
  }

  // Calls `edit` with n contiguous bytes, the mask from `at` in a chunk on, and writes them back by
  // the strides of the mask. Without `load` their content is undefined at first.
  template <class Edit>
  void with_mask(
      const std::vector<at::Tensor>& masks, int64_t c, int64_t at, int64_t n, bool load,
      Edit edit) const {
    const at::Tensor& mask = masks[chunks[c].tensor];
    const int64_t begin = chunks[c].begin + at;
    auto* data = static_cast<uint8_t*>(mask.data_ptr());
    if (mask.is_contiguous()) return edit(data + begin);
    std::array<uint8_t, block_size> buffer;
    if (load) read_mask(mask, begin, n, buffer.data());
    edit(buffer.data());
    for_each_run(mask, begin, n, [&](int64_t from, int64_t offset, int64_t stride, int64_t length) {
      for (int64_t i = 0; i < length; ++i) data[offset + i * stride] = buffer[from + i];
    });
  }

  std::vector<Entries<Acc>> entries;
  std::vector<std::string> names;
  std::vector<Chunk> chunks;
  int64_t size = 0;

 private:
  int64_t grain_ = 1;
};

}  // namespace torchalignprune
