// The portable kernels, and the choice among the levels.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

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

namespace {

#if defined(__x86_64__) && defined(__GNUC__)
// Not every compiler knows it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

std::vector<const Kernels*> levels() {
  std::vector<const Kernels*> found{&portable::table};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (!has_f16c()) return found;
  if (__builtin_cpu_supports("avx2")) found.push_back(&avx2::table);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&avx512::table);
  }
#endif
  return found;
}

const Kernels& choose() {
  const auto found = levels();
  const char* wish = std::getenv("TORCHALIGNPRUNE_SIMD");
  if (wish == nullptr || *wish == '\0') return *found.back();
  std::string names;
  for (const Kernels* level : found) {
    if (std::string(wish) == level->level) return *level;
    names += (names.empty() ? "" : ", ") + std::string(level->level);
  }
  throw std::invalid_argument(
      "TORCHALIGNPRUNE_SIMD should be one of the levels of this processor (" + names + "), got '" +
      wish + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace torchalignprune
