// Sets the pruned entries of tensors to +0, in place.
#include "masked.cuh"

namespace torchalignprune {
namespace cuda {
namespace {

// Entries are read only if some are pruned, and written only if they are not +0 already.
template <int bytes, int width>
__global__ void __launch_bounds__(mask_threads) run_kernel(RunBatch batch) {
  using Bits = typename BitsOf<bytes>::type;
  using Values = Raw<bytes, width>;
  for_each_turn<width>(batch, [](const MaskedRun& run, const int64_t* places, const bool* whole) {
    auto* out = static_cast<Bits*>(run.out);
    Raw<1, width> mask[mask_ahead];
    Values values[mask_ahead];
    bool some[mask_ahead];
#pragma unroll
    for (int j = 0; j < mask_ahead; ++j) {
      if (whole[j]) mask[j] = load<1, width>(run.mask, places[j]);
    }
#pragma unroll
    for (int j = 0; j < mask_ahead; ++j) {
      some[j] = whole[j] && count_kept(mask[j]) < width;
      if (some[j]) values[j] = load<bytes, width>(run.values, places[j]);
    }
#pragma unroll
    for (int j = 0; j < mask_ahead; ++j) {
      if (!some[j]) continue;
      Bits wrong = 0;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (mask[j].at[i] != 0) continue;
        wrong |= values[j].at[i];
        values[j].at[i] = 0;
      }
      if (wrong != 0) *reinterpret_cast<Values*>(out + places[j]) = values[j];
    }
    for_each_left<width>(run, places, whole, [&](int64_t i) {
      if (run.mask[i] == 0) out[i] = 0;
    });
  });
}

template <class Bits>
__global__ void __launch_bounds__(mask_threads) view_kernel(MaskedViews call) {
  auto* out = static_cast<Bits*>(const_cast<void*>(call.out.data));
  for_each_entry(call.size, [&](int64_t i) {
    if (!is_true(call.mask, i)) out[offset_of(call.out, i)] = 0;
  });
}

}  // namespace

cudaError_t zero_pruned(const MaskedRun* runs, int64_t length, cudaStream_t stream) {
  return in_run_batches(runs, length, [&](const RunBatch& batch, auto bytes, auto width) {
    return launch_runs(run_kernel<decltype(bytes)::value, decltype(width)::value>, batch, stream);
  });
}

cudaError_t zero_pruned(const MaskedViews& call, cudaStream_t stream) {
  if (call.bytes == 2) return launch_views(view_kernel<uint16_t>, call, stream);
  if (call.bytes == 4) return launch_views(view_kernel<uint32_t>, call, stream);
  return launch_views(view_kernel<uint64_t>, call, stream);
}

}  // namespace cuda
}  // namespace torchalignprune
