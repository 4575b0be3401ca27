#include "common/few_rows.h"
#include "common/parallel.h"
#include "few_rows_linear/few_rows_linear.h"

namespace mixlora::MIXLORA_ISA {

constexpr int64_t kShort = 64;  // features, as the rank of a LoRA's B

void few_rows_linear_cpu(const FewRowsLinearParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Wide<T>;
    const T *x_TI = static_cast<const T*>(p.x_TI), *w_OI = static_cast<const T*>(p.w_OI);
    T* y_TO = static_cast<T*>(p.y_TO);
    std::vector<S> bias_O(p.O);
    if (p.bias_O != nullptr) convert(static_cast<const T*>(p.bias_O), p.O, bias_O.data());
    const FewRows<T> x(p.T, p.I, [&](int64_t t) { return x_TI + t * p.I; });
    const bool is_short = p.I <= kShort && p.I % kWidth<S> == 0;
    const int64_t outputs = round_up(rows_per_chunk(p.I), kFewTileOutputs);
    parallel_chunks(p.O, outputs, [&](int64_t begin, int64_t end) {
      const int64_t columns = end - begin;
      std::vector<S> y(p.T * columns);
      std::vector<S*> y_T(p.T);
      for (int64_t t = 0; t < p.T; ++t) y_T[t] = y.data() + t * columns;
      const T* w = w_OI + begin * p.I;
      if (is_short) {
        few_rows_expand(x.rows.data(), p.T, w, columns, p.I, y_T.data());
      } else {
        few_rows_shrink(x.rows.data(), p.T, w, columns, p.I, p.I, y_T.data());
      }
      for (int64_t t = 0; t < p.T; ++t) {
        for (int64_t o = 0; p.bias_O != nullptr && o < columns; ++o) y_T[t][o] += bias_O[begin + o];
        convert(y_T[t], columns, y_TO + t * p.O + begin);
      }
    });
  });
}

}  // namespace mixlora::MIXLORA_ISA
