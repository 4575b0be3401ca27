#include "common/parallel.h"
#include "common/philox.h"
#include "dropout/dropout.h"

namespace mixlora::MIXLORA_ISA {

void dropout_cpu(const DropoutParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x_ND = static_cast<const T*>(p.x_ND);
    T* y_ND = static_cast<T*>(p.y_ND);
    parallel_chunks(p.N, rows_per_chunk(p.D), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        philox_dropout(x_ND + n * p.D, p.D, *p.seed, n, 0, p.p, y_ND + n * p.D);
      }
    });
  });
}

}  // namespace mixlora::MIXLORA_ISA
