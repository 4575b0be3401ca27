#include "common/few_rows.h"
#include "common/parallel.h"
#include "grouped_shrink/grouped_shrink.h"

namespace mixlora::MIXLORA_ISA {
namespace {

// Tokens whose sums are in the making together: a panel of them stays in a level-2 cache.
constexpr int64_t kTokens = 512;

constexpr int64_t kLittle = 1 << 18;  // multiplications that do not pay for waking a thread

// Calls body(i) once for each i in [0, count).
void for_items(const GroupedShrinkParams& p, int64_t count, const auto& body) {
  if (p.expert_start_E1[p.E] * p.R * p.I > kLittle) return parallel_for(count, body);
  for (int64_t i = 0; i < count; ++i) body(i);
}

// An expert's B is read where it lies, so much of it at once that the processor reads ahead.
constexpr int64_t kFewPanelColumns = 256;

int64_t num_panels(int64_t features) { return (features + kPanelColumns - 1) / kPanelColumns; }

// Features [i, i + columns) of every rank of expert e, as if w were not transposed; ranks are what
// is summed over.
template <class T>
struct WeightPanel {
  const T* w;
  bool transposed;
  int64_t R, I;

  template <class P>
  void read(int64_t e, int64_t i, int64_t columns, P* to_RI, int64_t stride) const {
    if (!transposed) {
      pack(w + e * R * I + i, R, columns, I, to_RI, stride);
      return;
    }
    // A row of ranks is one of factors, which move as the numbers do that are as large.
    const int64_t padded = round_up(R, kTerms<P>);
    std::vector<Kept<P>> w_IR(columns * padded);
    for (int64_t c = 0; c < columns; ++c) {
      convert(w + (e * I + i + c) * R, R, w_IR.data() + c * padded);
    }
    const int64_t J = num_factors<P>(R);
    transpose(reinterpret_cast<const SumOf<P>*>(w_IR.data()),
              columns,
              J,
              J,
              reinterpret_cast<SumOf<P>*>(to_RI),
              stride);
  }
};

// a of every row, in the order of rows, whose ranks are whole factors.
template <class P, class T>
std::vector<Kept<P>> rows_of_a(const GroupedShrinkParams& p) {
  const T* a_TKR = static_cast<const T*>(p.a_TKR);
  const int64_t N = p.expert_start_E1[p.E], padded = round_up(p.R, kTerms<P>);
  std::vector<Kept<P>> a_NR(N * padded);
  for (int64_t n = 0; n < N; ++n) {
    convert(a_TKR + p.row_slot_N[n] * p.R, p.R, a_NR.data() + n * padded);
  }
  return a_NR;
}

template <class T>
void shrink_rows(const GroupedShrinkParams& p, const auto* w_ERI) {
  const T* x_TI = static_cast<const T*>(p.x_TI);
  T* a_TKR = static_cast<T*>(p.result);
  const auto blocks = row_blocks(p.expert_start_E1, p.E);
  for_items(p, blocks.size(), [&](int64_t i) {
    const auto [expert, begin, end] = blocks[i];
    const int64_t rows = end - begin;
    const T* x_N[kBlockRows];
    for (int64_t n = 0; n < rows; ++n) x_N[n] = x_TI + p.row_slot_N[begin + n] / p.K * p.I;
    std::vector<Wide<T>> z_NR(rows * p.R);
    const auto* w_RI = w_ERI + expert * p.R * p.I;
    if (p.T * p.K <= kFewRows) {
      const FewRows<T> x(rows, p.I, [&](int64_t n) { return x_N[n]; });
      Wide<T>* z_N[kBlockRows];
      for (int64_t n = 0; n < rows; ++n) z_N[n] = z_NR.data() + n * p.R;
      few_rows_shrink(x.rows.data(), rows, w_RI, p.R, p.I, p.I, z_N);
    } else {
      shrink<T>(x_N, rows, w_RI, p.R, p.I, 1, z_NR.data());
    }
    for (int64_t n = 0; n < rows; ++n) {
      convert(z_NR.data() + n * p.R, p.R, a_TKR + p.row_slot_N[begin + n] * p.R);
    }
  });
  for (int64_t slot = 0; slot < p.T * p.K; ++slot) {
    if (p.expert_TK[slot] < 0) std::fill_n(a_TKR + slot * p.R, p.R, T{});
  }
}

// w the other way round, of experts that have rows.
template <class T>
std::unique_ptr<Kept<FactorOf<T>>[]> turned(const GroupedShrinkParams& p) {
  using S = Wide<T>;
  const WeightPanel<T> w{static_cast<const T*>(p.w), true, p.R, p.I};
  auto w_ERI = std::make_unique_for_overwrite<Kept<FactorOf<T>>[]>(p.E * p.R * p.I);
  const int64_t panels = num_panels(p.I);
  for_items(p, p.E * panels, [&](int64_t item) {
    const int64_t e = item / panels, i = item % panels * kPanelColumns;
    if (p.expert_start_E1[e] == p.expert_start_E1[e + 1]) return;
    const int64_t columns = std::min<int64_t>(kPanelColumns, p.I - i);
    std::vector<S> w_RI(p.R * columns);
    w.read(e, i, columns, w_RI.data(), columns);
    for (int64_t r = 0; r < p.R; ++r) {
      convert(w_RI.data() + r * columns, columns, &w_ERI[(e * p.R + r) * p.I + i]);
    }
  });
  return w_ERI;
}

// A panel of columns of kTokens tokens at a time, to which every expert adds its rows.
template <class T>
void expand_rows(const GroupedShrinkParams& p) {
  using S = Wide<T>;
  using P = FactorOf<T>;
  const WeightPanel<T> w{static_cast<const T*>(p.w), p.transposed, p.R, p.I};
  T* x_TI = static_cast<T*>(p.result);
  const std::vector<Kept<P>> a_NR = rows_of_a<P, T>(p);
  const int64_t J = num_factors<P>(p.R);
  const int64_t panels = num_panels(p.I), chunks = (p.T + kTokens - 1) / kTokens;
  for_items(p, chunks * panels, [&](int64_t item) {
    const int64_t t0 = item / panels * kTokens, t1 = std::min(p.T, t0 + kTokens);
    const int64_t i = item % panels * kPanelColumns;
    const int64_t columns = std::min<int64_t>(kPanelColumns, p.I - i);
    const int64_t padded = round_up(columns, kWidth<S>);
    std::vector<S> x_MI((t1 - t0) * kPanelColumns);
    std::vector<P> w_RI(J * kPanelColumns);
    for (int64_t e = 0; e < p.E; ++e) {
      const int32_t *first = p.row_slot_N + p.expert_start_E1[e],
                    *last = p.row_slot_N + p.expert_start_E1[e + 1];
      first = std::lower_bound(first, last, t0 * p.K);  // an expert's rows are sorted by slot
      last = std::lower_bound(first, last, t1 * p.K);
      if (first == last) continue;
      w.read(e, i, columns, w_RI.data(), kPanelColumns);
      for (; first < last; first += kBlockRows) {
        const int64_t rows = std::min<int64_t>(kBlockRows, last - first);
        const P* a = reinterpret_cast<const P*>(a_NR.data()) + (first - p.row_slot_N) * J;
        S* x_N[kBlockRows];
        for (int64_t n = 0; n < rows; ++n) {
          x_N[n] = x_MI.data() + (first[n] / p.K - t0) * kPanelColumns;
        }
        panel<P>({a, J, 1}, w_RI.data(), kPanelColumns, rows, J, padded, x_N);
      }
    }
    for (int64_t t = t0; t < t1; ++t) {
      convert(x_MI.data() + (t - t0) * kPanelColumns, columns, x_TI + t * p.I + i);
    }
  });
}

// The same of few rows, for which w is read in place.
template <class T>
void expand_few_rows(const GroupedShrinkParams& p) {
  using S = Wide<T>;
  using P = FactorOf<T>;
  const T* w_EIR = static_cast<const T*>(p.w);
  T* x_TI = static_cast<T*>(p.result);
  const std::vector<Kept<P>> a_NR = rows_of_a<P, T>(p);
  const auto blocks = row_blocks(p.expert_start_E1, p.E);
  for_items(p, (p.I + kFewPanelColumns - 1) / kFewPanelColumns, [&](int64_t panel) {
    const int64_t i = panel * kFewPanelColumns, columns = std::min(kFewPanelColumns, p.I - i);
    std::vector<S> sums(p.T * columns);
    for (const auto [expert, begin, end] : blocks) {
      const Kept<P>* a_N[kFewRows];
      S* x_N[kFewRows];
      for (int64_t n = begin; n < end; ++n) {
        a_N[n - begin] = a_NR.data() + n * p.R;
        x_N[n - begin] = sums.data() + p.row_slot_N[n] / p.K * columns;
      }
      few_rows_expand(a_N, end - begin, w_EIR + (expert * p.I + i) * p.R, columns, p.R, x_N);
    }
    for (int64_t t = 0; t < p.T; ++t) {
      convert(sums.data() + t * columns, columns, x_TI + t * p.I + i);
    }
  });
}

// w of each expert, a panel of columns at a time: its terms are the expert's rows, in their order.
template <class T>
void outer(const GroupedShrinkParams& p) {
  const T* x_TI = static_cast<const T*>(p.x_TI);
  T* w = static_cast<T*>(p.result);
  using P = FactorOf<T>;
  const T* a_TKR = static_cast<const T*>(p.a_TKR);
  // By pairs of an expert's rows: one of an odd number of them leaves a gap.
  const int64_t padded = round_up(p.R, kWidth<T>);
  const auto factors_before = [&](int64_t e) {
    return (p.expert_start_E1[e] + e * (kTerms<P> - 1)) / kTerms<P>;
  };
  std::vector<P> a_NR(factors_before(p.E) * padded);
  for (int64_t e = 0; e < p.E; ++e) {
    const int32_t* slot_N = p.row_slot_N + p.expert_start_E1[e];
    pack_rows(
        p.expert_start_E1[e + 1] - p.expert_start_E1[e],
        p.R,
        [&](int64_t n) { return a_TKR + slot_N[n] * p.R; },
        a_NR.data() + factors_before(e) * padded,
        padded);
  }
  const int64_t panels = num_panels(p.I);
  for_items(p, p.E * panels, [&](int64_t item) {
    const int64_t e = item / panels, i = item % panels * kPanelColumns;
    const int64_t columns = std::min<int64_t>(kPanelColumns, p.I - i);
    const int64_t begin = p.expert_start_E1[e], end = p.expert_start_E1[e + 1];
    std::vector<Wide<T>> w_RI(p.R * columns);
    expand<P>(
        {a_NR.data() + factors_before(e) * padded, 1, padded},
        p.R,
        end - begin,
        columns,
        [&](int64_t j) { return x_TI + p.row_slot_N[begin + j] / p.K * p.I + i; },
        [&](int64_t r, const Wide<T>* y) { std::copy_n(y, columns, &w_RI[r * columns]); });
    if (p.transposed) {
      std::vector<Wide<T>> w_IR(columns * p.R);
      transpose(w_RI.data(), p.R, columns, columns, w_IR.data(), p.R);
      convert(w_IR.data(), columns * p.R, w + (e * p.I + i) * p.R);
    } else {
      for (int64_t r = 0; r < p.R; ++r) {
        convert(&w_RI[r * columns], columns, w + (e * p.R + r) * p.I + i);
      }
    }
  });
}

}  // namespace

void grouped_shrink_cpu(const GroupedShrinkParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.transposed) {
      shrink_rows<T>(p, turned<T>(p).get());
    } else {
      shrink_rows<T>(p, static_cast<const T*>(p.w));
    }
  });
}

void grouped_expand_cpu(const GroupedShrinkParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool is_few = p.T * p.K <= kFewRows && p.R % kWidth<T> == 0;
    return p.transposed && is_few ? expand_few_rows<T>(p) : expand_rows<T>(p);
  });
}

void grouped_outer_cpu(const GroupedShrinkParams& p) {
  with_type(p.dtype, [&](auto zero) { outer<decltype(zero)>(p); });
}

}  // namespace mixlora::MIXLORA_ISA
