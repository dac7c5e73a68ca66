// Asks the system for large pages.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace torchalignprune {

// Fresh memory comes in pages that the system has to clear one by one; large pages make that cheap.
inline void advise_huge_pages(const at::Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t from = (begin + page - 1) / page * page;
  const uintptr_t to = (begin + tensor.nbytes()) / page * page;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace torchalignprune
