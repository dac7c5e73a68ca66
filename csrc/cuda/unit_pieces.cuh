// How the kernels distribute the units of a list of tensors, and how they read their entries.
//
// The entries of a unit are cut into pieces in a way that depends only on its tensor, so that sums
// depend neither on the GPU nor on the other tensors. Their last bits do depend on the alignment of
// the weight, the mask and the reference: if one of them is not aligned, entries are read one by
// one and distributed to the threads in another way.
//
// Many tensors go into one launch: what the kernels need to know of them fits into the arguments of
// a launch, so that nothing is copied to the device.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "launchers.h"

namespace torchalignprune {
namespace cuda {

constexpr int unit_threads = 256;
constexpr int unit_warps = unit_threads / warp_size;
constexpr int most_width = 4;            // entries that a thread reads at a time
constexpr int64_t piece_entries = 4096;  // that a warp takes, where units lie side by side
constexpr int64_t piece_rows = 32;       // that a thread takes, where they are columns
constexpr int64_t most_pieces = 2048;    // of a unit, or their sums would take long to add up
constexpr int most_batch = 30;

struct UnitPieces {
  UnitTensor tensor;
  int64_t pieces = 1;    // of each unit
  int64_t length = 0;    // entries of a piece, or rows of the tensor
  int64_t partial = 0;   // the number of partial sums before its own
  int32_t lanes = 1;     // threads side by side, in a piece or in a row
  uint8_t width = 1;     // entries that are read at a time
  bool columns = false;  // neighbours in memory belong to different units
};

struct UnitBatch {
  UnitPieces tensors[most_batch];
  int64_t first_blocks[most_batch];
  int64_t blocks = 0;
  int64_t length = 0;
};
static_assert(sizeof(UnitBatch) + 64 <= 4096, "the arguments of a kernel have 4 KiB");

inline int bytes_of(Element element) {
  return element == Element::f64 ? 8 : element == Element::f32 ? 4 : 2;
}

inline int64_t shares(int64_t n, int64_t each) { return (n + each - 1) / each; }

inline UnitPieces pieces_of(const UnitTensor& tensor) {
  const auto in_place = [](const void* data, int bytes) {
    return reinterpret_cast<uintptr_t>(data) % std::min(16, most_width * bytes) == 0;
  };
  const bool aligned = in_place(tensor.weight, bytes_of(tensor.weight_element)) &&
                       in_place(tensor.mask, 1) &&
                       in_place(tensor.reference, bytes_of(tensor.reference_element)) &&
                       in_place(tensor.out, bytes_of(tensor.weight_element));
  const auto lanes_for = [](int64_t n) {
    int32_t lanes = 1;
    while (lanes < warp_size && lanes < n) lanes *= 2;
    return lanes;
  };
  UnitPieces pieces;
  pieces.tensor = tensor;
  pieces.columns = tensor.inner == 1 && tensor.outer > 1;
  if (pieces.columns) {
    pieces.width = aligned && tensor.units % most_width == 0 ? most_width : 1;
    pieces.lanes = lanes_for(tensor.units / pieces.width);
    pieces.length =
        std::max(piece_rows * (unit_threads / pieces.lanes), shares(tensor.outer, most_pieces));
    pieces.pieces = shares(tensor.outer, pieces.length);
    return pieces;
  }
  const int64_t entries = tensor.outer * tensor.inner;
  const bool all_in_place = tensor.inner % most_width == 0 || tensor.outer * tensor.units == 1;
  pieces.width = aligned && all_in_place ? most_width : 1;
  pieces.lanes = lanes_for(shares(entries, pieces.width));
  pieces.length =
      std::max(piece_entries, shares(shares(entries, most_pieces), most_width) * most_width);
  pieces.pieces = shares(entries, pieces.length);
  return pieces;
}

// How many blocks a tensor takes.
inline int64_t blocks_of(const UnitPieces& pieces) {
  const int64_t units = pieces.tensor.units;
  return pieces.columns ? shares(units, pieces.lanes * pieces.width) * pieces.pieces
                        : shares(units * pieces.pieces, unit_threads / pieces.lanes);
}

// The size in bytes of the reference's entries, or 0 if it is the weight itself.
inline int reference_bytes_of(const UnitTensor& tensor) {
  return tensor.reference == nullptr ? 0 : bytes_of(tensor.reference_element);
}

// Calls launch(batch) for stretches of the list that one kernel can take.
template <class BlocksOf, class Launch>
cudaError_t in_batches(
    const UnitPieces* tensors, int64_t length, BlocksOf blocks_of_one, Launch launch) {
  const auto go_together = [](const UnitPieces& a, const UnitPieces& b) {
    return a.columns == b.columns &&
           bytes_of(a.tensor.weight_element) == bytes_of(b.tensor.weight_element) &&
           reference_bytes_of(a.tensor) == reference_bytes_of(b.tensor);
  };
  UnitBatch batch;
  for (int64_t i = 0; i < length; ++i) {
    batch.tensors[batch.length] = tensors[i];
    batch.first_blocks[batch.length++] = batch.blocks;
    batch.blocks += blocks_of_one(tensors[i]);
    const bool last = i + 1 == length || batch.length == most_batch;
    if (!last && go_together(tensors[i], tensors[i + 1])) continue;
    if (batch.blocks > 0) TAP_CHECK(launch(batch));
    batch = UnitBatch();
  }
  return cudaSuccess;
}

template <int bytes>
using Bytes = std::integral_constant<int, bytes>;

// Calls use(Bytes<w>(), Bytes<r>()) with the sizes of the entries of a batch's tensors.
template <class Use>
cudaError_t with_sizes(const UnitBatch& batch, Use use) {
  const UnitTensor& tensor = batch.tensors[0].tensor;
  const auto with_reference = [&](auto weight) {
    switch (reference_bytes_of(tensor)) {
      case 0:
        return use(weight, Bytes<0>());
      case 2:
        return use(weight, Bytes<2>());
      case 4:
        return use(weight, Bytes<4>());
      default:
        return use(weight, Bytes<8>());
    }
  };
  switch (bytes_of(tensor.weight_element)) {
    case 2:
      return with_reference(Bytes<2>());
    case 4:
      return with_reference(Bytes<4>());
    default:
      return with_reference(Bytes<8>());
  }
}

template <class Kernel, class... Arguments>
cudaError_t launch_units(
    Kernel kernel, const UnitBatch& batch, cudaStream_t stream, Arguments... arguments) {
  int blocks = 0;
  TAP_CHECK(resident_blocks(kernel, unit_threads, batch.blocks, &blocks));
  kernel<<<blocks, unit_threads, 0, stream>>>(batch, arguments...);
  return cudaGetLastError();
}

// Calls use(tensor, block) for the blocks of work that are this block's, counted in each tensor.
template <class Use>
__device__ __forceinline__ void for_each_block(const UnitBatch& batch, Use use) {
  for (int64_t block = blockIdx.x; block < batch.blocks; block += gridDim.x) {
    const int64_t which = last_not_above(batch.first_blocks, batch.length, block);
    use(batch.tensors[which], block - batch.first_blocks[which]);
  }
}

// Entries as they lie in memory; the alignment makes them one load, or two.
template <int bytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using type = uint8_t;
};
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};
template <int bytes, int width>
struct alignas(bytes* width < 16 ? bytes * width : 16) Raw {
  typename BitsOf<bytes>::type at[width];
};

template <int bytes, int width>
__device__ __forceinline__ Raw<bytes, width> load(const void* data, int64_t offset) {
  using Bits = typename BitsOf<bytes>::type;
  return *reinterpret_cast<const Raw<bytes, width>*>(static_cast<const Bits*>(data) + offset);
}

template <class Acc>
__device__ __forceinline__ Acc widened(uint16_t bits, Element element) {
  return static_cast<Acc>(element == Element::f16 ? from_f16(bits) : from_bf16(bits));
}
template <class Acc>
__device__ __forceinline__ Acc widened(uint32_t bits, Element) {
  return static_cast<Acc>(bits_as<float>(bits));
}
template <class Acc>
__device__ __forceinline__ Acc widened(uint64_t bits, Element) {
  return static_cast<Acc>(bits_as<double>(bits));
}

// A weight in float64 is compared with its reference in float64, any other in float32.
template <int weight_bytes>
using AccFor = std::conditional_t<weight_bytes == 8, double, float>;

// How many times a thread reads before it computes, and how many blocks its registers should leave
// room for on a processor, so that enough bytes are under way to hide the latency of the memory.
template <int weight_bytes, int reference_bytes>
constexpr int reads_ahead = weight_bytes == 8 || reference_bytes == 8   ? 2
                            : weight_bytes == 4 || reference_bytes == 4 ? 4
                                                                        : 6;
constexpr int unit_blocks = 2;

// Entries that lie side by side. They are loaded first and widened later, so that many loads are
// under way at a time.
template <int weight_bytes, int reference_bytes, int width>
struct Entries {
  static constexpr int other_bytes = reference_bytes == 0 ? weight_bytes : reference_bytes;
  using Acc = AccFor<weight_bytes>;

  __device__ __forceinline__ void read(const UnitTensor& tensor, int64_t offset) {
    weights = load<weight_bytes, width>(tensor.weight, offset);
    if (tensor.mask != nullptr) {
      mask = load<1, width>(tensor.mask, offset);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) mask.at[i] = 1;
    }
  }
  __device__ __forceinline__ void read_reference(const UnitTensor& tensor, int64_t offset) {
    if constexpr (reference_bytes > 0) {
      references = load<reference_bytes, width>(tensor.reference, offset);
    }
  }
  // Only entry i.
  __device__ __forceinline__ void read_reference(const UnitTensor& tensor, int64_t offset, int i) {
    if constexpr (reference_bytes > 0) {
      references.at[i] = load<reference_bytes, 1>(tensor.reference, offset).at[0];
    }
  }

  __device__ __forceinline__ bool kept(int i) const { return mask.at[i] != 0; }
  __device__ __forceinline__ double weight(const UnitTensor& tensor, int i) const {
    return static_cast<double>(widened<Acc>(weights.at[i], tensor.weight_element));
  }
  __device__ __forceinline__ double reference(const UnitTensor& tensor, int i) const {
    if constexpr (reference_bytes == 0) {
      return weight(tensor, i);
    } else {
      return static_cast<double>(widened<Acc>(references.at[i], tensor.reference_element));
    }
  }

  Raw<weight_bytes, width> weights;
  Raw<other_bytes, width> references;
  Raw<1, width> mask;
};

// Calls use(entries, offset) for the entries [from, to) of a unit that are this lane's.
template <int weight_bytes, int reference_bytes, int width, class Use>
__device__ __forceinline__ void for_each_of_unit(
    const UnitPieces& pieces, int64_t unit, int64_t partner, int64_t from, int64_t to, Use use) {
  constexpr int ahead = reads_ahead<weight_bytes, reference_bytes>;
  const UnitTensor& tensor = pieces.tensor;
  const int lane = static_cast<int>(threadIdx.x) % pieces.lanes;
  const int64_t step = pieces.lanes * width;
  for (int64_t base = from + lane * width; base < to; base += ahead * step) {
    Entries<weight_bytes, reference_bytes, width> entries[ahead];
    int64_t offsets[ahead];
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int64_t at = base + j * step;
      if (at >= to) continue;
      const int64_t turn = tensor.outer == 1 ? 0 : quotient(at, tensor.inner);
      const int64_t position = at - turn * tensor.inner;
      offsets[j] = (turn * tensor.units + unit) * tensor.inner + position;
      entries[j].read(tensor, offsets[j]);
      entries[j].read_reference(tensor, (turn * tensor.units + partner) * tensor.inner + position);
    }
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      if (base + j * step < to) use(entries[j], offsets[j]);
    }
  }
}

// Where units lie side by side: pieces in the order of the units, with `lanes` threads for each.
// Calls use(entries, offset) for all entries of a piece that are this lane's.
template <int weight_bytes, int reference_bytes, class Use>
__device__ __forceinline__ void for_each_of_piece(
    const UnitPieces& pieces, int64_t unit, int64_t piece, Use use) {
  const UnitTensor& tensor = pieces.tensor;
  const int64_t partner = tensor.index == nullptr ? unit : tensor.index[unit];
  int64_t from = piece * pieces.length;
  const int64_t to = min(from + pieces.length, tensor.outer * tensor.inner);
  if (pieces.width == most_width) {
    const int64_t whole = to - (to - from) % most_width;
    for_each_of_unit<weight_bytes, reference_bytes, most_width>(
        pieces, unit, partner, from, whole, use);
    from = whole;
  }
  for_each_of_unit<weight_bytes, reference_bytes, 1>(pieces, unit, partner, from, to, use);
}

// Where units are columns: calls use(entries, offset) for the rows of a piece that are this
// thread's, `width` columns at a time from `column` on. Neighbouring blocks take the same rows, so
// that the reference's rows are in the cache when an index scatters the reads of them.
template <int weight_bytes, int reference_bytes, int width, class Use>
__device__ __forceinline__ void for_each_of_columns(
    const UnitPieces& pieces, int64_t column, int64_t piece, Use use) {
  constexpr int most_ahead = reads_ahead<weight_bytes, reference_bytes>;
  constexpr int ahead = most_ahead < 4 ? most_ahead : 4;
  const UnitTensor& tensor = pieces.tensor;
  if (column >= tensor.units) return;
  int64_t partners[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    partners[i] = tensor.index == nullptr ? column + i : tensor.index[column + i];
  }
  const int64_t step = unit_threads / pieces.lanes;
  const int64_t from = piece * pieces.length + static_cast<int>(threadIdx.x) / pieces.lanes;
  const int64_t to = min((piece + 1) * pieces.length, tensor.outer);
  for (int64_t base = from; base < to; base += ahead * step) {
    Entries<weight_bytes, reference_bytes, width> entries[ahead];
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int64_t row = base + j * step;
      if (row >= to) continue;
      entries[j].read(tensor, row * tensor.units + column);
      if (tensor.index == nullptr) {
        entries[j].read_reference(tensor, row * tensor.units + column);
      } else {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          entries[j].read_reference(tensor, row * tensor.units + partners[i], i);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      const int64_t row = base + j * step;
      if (row < to) use(entries[j], row * tensor.units + column);
    }
  }
}

// Which piece of which unit, or which columns in which rows, are this thread's.
struct UnitPlace {
  int64_t unit, piece;
};

__device__ __forceinline__ UnitPlace place_of(const UnitPieces& pieces, int64_t block) {
  const int thread = static_cast<int>(threadIdx.x);
  if (pieces.columns) {
    const int64_t each = pieces.lanes * pieces.width;
    const int64_t tiles = quotient(pieces.tensor.units + each - 1, each);
    const int64_t piece = quotient(block, tiles);
    return {(block - piece * tiles) * each + thread % pieces.lanes * pieces.width, piece};
  }
  const int64_t item = block * (unit_threads / pieces.lanes) + thread / pieces.lanes;
  const int64_t unit = quotient(item, pieces.pieces);
  return {unit, item - unit * pieces.pieces};
}

}  // namespace cuda
}  // namespace torchalignprune
