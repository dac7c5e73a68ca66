// The portable kernels, and the choice among the levels.
#include "kernels.h"

#define TAP_LEVEL portable
#define TAP_LEVEL_NAME "portable"
#define TAP_LEVEL_BITS 0
#include "kernels_impl.h"

namespace torchalignprune {

#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

const Kernels& kernels() {
  static const Kernels& best = []() -> const Kernels& {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return avx512::table;
    }
    if (__builtin_cpu_supports("avx2")) return avx2::table;
#endif
    return portable::table;
  }();
  return best;
}

}  // namespace torchalignprune
