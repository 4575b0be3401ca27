#include <algorithm>

#include "common/parallel.h"
#include "moe_gather/moe_gather.h"

namespace mixlora::MIXLORA_ISA {

void moe_gather_cpu(const MoeGatherParams& p) {
  parallel_chunks(p.N, rows_per_chunk(p.row_bytes / 4), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      char* x_D = p.x_ND + n * p.row_bytes;
      const int64_t slot = p.row_slot_N[n];
      if (slot < 0) {
        std::fill_n(x_D, p.row_bytes, 0);
      } else {
        std::copy_n(p.x_TD + slot / p.K * p.row_bytes, p.row_bytes, x_D);
      }
    }
  });
}

}  // namespace mixlora::MIXLORA_ISA
