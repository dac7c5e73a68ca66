// The entries where a mask is true, and +0 elsewhere.
#include "masked.cuh"

namespace torchalignprune {
namespace cuda {
namespace {

template <int bytes, int width>
__global__ void __launch_bounds__(mask_threads) run_kernel(RunBatch batch) {
  using Bits = typename BitsOf<bytes>::type;
  using Values = Raw<bytes, width>;
  for_each_turn<width>(batch, [](const MaskedRun& run, const int64_t* places, const bool* whole) {
    auto* out = static_cast<Bits*>(run.out);
    Raw<1, width> mask[mask_ahead];
    Values values[mask_ahead];
#pragma unroll
    for (int j = 0; j < mask_ahead; ++j) {
      if (!whole[j]) continue;
      mask[j] = load<1, width>(run.mask, places[j]);
      values[j] = load<bytes, width>(run.values, places[j]);
    }
#pragma unroll
    for (int j = 0; j < mask_ahead; ++j) {
      if (!whole[j]) continue;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (mask[j].at[i] == 0) values[j].at[i] = 0;
      }
      *reinterpret_cast<Values*>(out + places[j]) = values[j];
    }
    for_each_left<width>(run, places, whole, [&](int64_t i) {
      out[i] = run.mask[i] == 0 ? Bits{0} : static_cast<const Bits*>(run.values)[i];
    });
  });
}

template <class Bits>
__global__ void __launch_bounds__(mask_threads) view_kernel(MaskedViews call) {
  auto* out = static_cast<Bits*>(const_cast<void*>(call.out.data));
  const auto* values = static_cast<const Bits*>(call.values.data);
  for_each_entry(call.size, [&](int64_t i) {
    out[offset_of(call.out, i)] =
        is_true(call.mask, i) ? values[offset_of(call.values, i)] : Bits{0};
  });
}

}  // namespace

cudaError_t apply_mask(const MaskedRun& run, cudaStream_t stream) {
  return in_run_batches(&run, 1, [&](const RunBatch& batch, auto bytes, auto width) {
    return launch_runs(run_kernel<decltype(bytes)::value, decltype(width)::value>, batch, stream);
  });
}

cudaError_t apply_mask(const MaskedViews& call, cudaStream_t stream) {
  if (call.bytes == 2) return launch_views(view_kernel<uint16_t>, call, stream);
  if (call.bytes == 4) return launch_views(view_kernel<uint32_t>, call, stream);
  return launch_views(view_kernel<uint64_t>, call, stream);
}

}  // namespace cuda
}  // namespace torchalignprune
