#include "common/few_rows.h"
#include "common/parallel.h"
#include "few_rows_linear/few_rows_linear.h"

namespace mixlora::MIXLORA_ISA {

void few_rows_linear_cpu(const FewRowsLinearParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Wide<T>;
    const T *x_TI = static_cast<const T*>(p.x_TI), *w_OI = static_cast<const T*>(p.w_OI);
    T* y_TO = static_cast<T*>(p.y_TO);
    const T* bias_O = static_cast<const T*>(p.bias_O);
    const FewRows<T> x(p.T, p.I, [&](int64_t t) { return x_TI + t * p.I; });
    // twice as long, since a chunk's first rows of w are fetched by no chunk before it
    const int64_t outputs = round_up(2 * rows_per_chunk(p.I), kFewTileOutputs);
    parallel_chunks(p.O, outputs, [&](int64_t begin, int64_t end) {
      const int64_t columns = end - begin;
      std::vector<S> y(p.T * columns);
      std::vector<S*> y_T(p.T);
      for (int64_t t = 0; t < p.T; ++t) {
        y_T[t] = y.data() + t * columns;
        if (bias_O != nullptr) convert(bias_O + begin, columns, y_T[t]);
      }
      few_rows_add(x.rows.data(), p.T, w_OI + begin * p.I, columns, p.I, y_T.data());
      for (int64_t t = 0; t < p.T; ++t) convert(y_T[t], columns, y_TO + t * p.O + begin);
    });
  });
}

}  // namespace mixlora::MIXLORA_ISA
