#include "common/few_rows.h"
#include "common/parallel.h"
#include "few_rows_lora/few_rows_lora.h"

namespace mixlora::MIXLORA_ISA {

void few_rows_lora_cpu(const FewRowsLoraParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Wide<T>;
    const T *x_TI = static_cast<const T*>(p.x_TI), *a_RI = static_cast<const T*>(p.lora_a_RI);
    const T *y_TO = static_cast<const T*>(p.y_TO), *b_OR = static_cast<const T*>(p.lora_b_OR);
    T* sum_TO = static_cast<T*>(p.sum_TO);

    const FewRows<T> x(p.T, p.I, [&](int64_t t) { return x_TI + t * p.I; });
    std::vector<S> z_TR(p.T * p.R);
    const int64_t ranks = round_up(rows_per_chunk(p.T * p.I), kFewTileOutputs);
    parallel_chunks(p.R, ranks, [&](int64_t begin, int64_t end) {
      std::vector<S*> z_T(p.T);
      for (int64_t t = 0; t < p.T; ++t) z_T[t] = z_TR.data() + t * p.R + begin;
      few_rows_add(x.rows.data(), p.T, a_RI + begin * p.I, end - begin, p.I, z_T.data());
    });
    for (S& z : z_TR) z *= static_cast<S>(p.scaling);

    const int64_t outputs = round_up(rows_per_chunk(p.T * p.R), kWidth<S>);
    parallel_chunks(p.O, outputs, [&](int64_t begin, int64_t end) {
      const int64_t columns = end - begin;
      std::vector<S> sum(p.T * columns);
      std::vector<S*> sum_T(p.T);
      std::vector<const S*> z_T(p.T);
      for (int64_t t = 0; t < p.T; ++t) {
        sum_T[t] = sum.data() + t * columns;
        z_T[t] = z_TR.data() + t * p.R;
        convert(y_TO + t * p.O + begin, columns, sum_T[t]);
      }
      few_rows_add(z_T.data(), p.T, b_OR + begin * p.R, columns, p.R, sum_T.data());
      for (int64_t t = 0; t < p.T; ++t) convert(sum_T[t], columns, sum_TO + t * p.O + begin);
    });
  });
}

}  // namespace mixlora::MIXLORA_ISA
