#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/vec.h"
#include "moe_scatter/moe_scatter.h"

namespace mixlora::MIXLORA_ISA {
namespace {

template <class T>
struct Term {
  const T* y_D;
  Wide<T> weight;
};

// y_D = the sum of the terms, in their order; every element is rounded once.
template <class T>
void add_up(const std::vector<Term<T>>& terms, int64_t D, T* y_D) {
  for_each_vector<T>(D, [&](int64_t d, auto n) {
    Vec<Wide<T>> sum{};
    for (const Term<T>& term : terms) sum += splat(term.weight) * load_part(term.y_D + d, n);
    store_part(y_D + d, sum, n);
  });
}

template <class T>
void scatter(const MoeScatterParams& p) {
  const T* y_ND = static_cast<const T*>(p.y_ND);
  const Wide<T>* weight_TK = static_cast<const Wide<T>*>(p.weight_TK);
  T* y_TD = static_cast<T*>(p.y_TD);
  parallel_chunks(p.T, rows_per_chunk(p.K * p.D), [&](int64_t begin, int64_t end) {
    std::vector<Term<T>> terms;
    for (int64_t t = begin; t < end; ++t) {
      terms.clear();
      for (int64_t slot = t * p.K; slot < (t + 1) * p.K; ++slot) {
        const int64_t row = p.slot_row_TK[slot];
        if (row >= 0) terms.push_back({y_ND + row * p.D, weight_TK ? weight_TK[slot] : 1});
      }
      add_up(terms, p.D, y_TD + t * p.D);
    }
  });
}

// dx_D = weight dy_D, and <dy_D, y_D> is returned.
template <class T>
Wide<T> row_backward(Wide<T> weight, const T* dy_D, const T* y_D, int64_t D, T* dx_D) {
  Vec<Wide<T>> product{};
  for_each_vector<T>(D, [&](int64_t d, auto n) {
    const auto dy = load_part(dy_D + d, n);
    product += dy * load_part(y_D + d, n);
    store_part(dx_D + d, splat(weight) * dy, n);
  });
  return sum(product);
}

template <class T>
void scatter_backward(const MoeScatterBackwardParams& p) {
  const T* dy_TD = static_cast<const T*>(p.dy_TD);
  const T* y_ND = static_cast<const T*>(p.y_ND);
  const Wide<T>* weight_TK = static_cast<const Wide<T>*>(p.weight_TK);
  T* dy_ND = static_cast<T*>(p.dy_ND);
  Wide<T>* dweight_TK = static_cast<Wide<T>*>(p.dweight_TK);
  parallel_chunks(p.T, rows_per_chunk(p.K * p.D), [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin * p.K; slot < end * p.K; ++slot) {
      const int64_t row = p.slot_row_TK[slot];
      dweight_TK[slot] = row < 0 ? 0
                                 : row_backward(weight_TK[slot],
                                                dy_TD + slot / p.K * p.D,
                                                y_ND + row * p.D,
                                                p.D,
                                                dy_ND + row * p.D);
    }
  });
  parallel_chunks(p.T * p.K, rows_per_chunk(p.D), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (p.row_slot_N[n] < 0) std::fill_n(dy_ND + n * p.D, p.D, T{});
    }
  });
}

}  // namespace

void moe_scatter_cpu(const MoeScatterParams& p) {
  with_type(p.dtype, [&](auto zero) { scatter<decltype(zero)>(p); });
}

void moe_scatter_backward_cpu(const MoeScatterBackwardParams& p) {
  with_type(p.dtype, [&](auto zero) { scatter_backward<decltype(zero)>(p); });
}

}  // namespace mixlora::MIXLORA_ISA
