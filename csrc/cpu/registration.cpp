// The CPU registration of the operators of operators.h, in one place because torch's header for it
// takes longer to compile than most of them.
#include <torch/library.h>

#include "operators.h"

namespace torchalignprune {

TORCH_LIBRARY_IMPL(torchalignprune, CPU, m) {
  m.impl("select_global", &select_global);
  m.impl("select_rows", &select_rows);
  m.impl("shard_counts", &shard_counts);
  m.impl("shard_ties", &shard_ties);
  m.impl("shard_masks", &shard_masks);
  m.impl("cosine_gains", &cosine_gains);
  m.impl("square_sums", &square_sums);
  m.impl("greedy_match", &greedy_match);
  m.impl("match_in_order", &match_in_order);
  m.impl("pack_entries", &pack_entries);
  m.impl("unpack_entries", &unpack_entries);
  m.impl("count_bits", &count_bits);
  m.impl("unit_products", &unit_products);
  m.impl("unit_combination", &unit_combination);
}

}  // namespace torchalignprune
