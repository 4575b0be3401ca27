// shared_glu's forward for few rows, as in decoding: an expert has one or two of them, so its
// matrices are read in place, once for each, a chunk of features after the other.
#pragma once

#include "common/activation.h"
#include "common/few_rows.h"
#include "common/parallel.h"
#include "shared_glu/shared_glu.h"

namespace mixlora::MIXLORA_ISA {

inline constexpr int64_t kFewColumns = 256;  // of a chunk

// T is the type of gate and up; all is computed in S.
template <class T>
class FewRowsGlu {
  using S = Wide<T>;

 public:
  static bool fits(const SharedGluParams& p) {
    return p.tokens * p.slots <= kFewRows && p.rank % kWidth<S> == 0 && p.dropout == 0;
  }

  explicit FewRowsGlu(const SharedGluParams& params) : p(params) {}

  template <Activation kAct>
  void run() const {
    const int64_t N = p.tokens * p.slots, chunks = (p.ffn + kFewColumns - 1) / kFewColumns;
    std::vector<S> z_NR(chunks * N * p.rank);
    parallel_for(chunks, [&](int64_t chunk) {
      for (int64_t t = 0; t < p.tokens; ++t) {
        chunk_of_token<kAct>(t, chunk * kFewColumns, z_NR.data() + chunk * N * p.rank);
      }
    });
    if (p.a_down_ERF == nullptr) return;
    S* z_TKR = static_cast<S*>(p.z_TKR);
    std::fill_n(z_TKR, N * p.rank, S(0));
    for (int64_t i = 0; i < chunks * N * p.rank; ++i) z_TKR[i % (N * p.rank)] += z_NR[i];
  }

 private:
  const SharedGluParams& p;

  template <Activation kAct>
  void chunk_of_token(int64_t t, int64_t f, S* z_NR) const {
    const int64_t columns = std::min(kFewColumns, p.ffn - f), at = t * p.ffn + f;
    alignas(64) S hbar[kFewColumns] = {}, gate[kFewColumns] = {}, up[kFewColumns] = {};
    for (int64_t k = 0; k < p.slots; ++k) {
      const int64_t slot = t * p.slots + k, e = p.expert_TK[slot];
      if (e < 0) continue;
      side(p.gate_TF, p.a_gate_TKR, p.b_gate_EFR, p.scale_gate_EF, p.bias_gate_F, slot, f, gate);
      side(p.up_TF, p.a_up_TKR, p.b_up_EFR, p.scale_up_EF, p.bias_up_F, slot, f, up);
      const Vec<S> weight = splat(static_cast<const S*>(p.weight_TK)[slot]);
      for (int64_t j = 0; j < kFewColumns; j += kWidth<S>) {
        Vec<S> value, slope;
        activate<kAct, S>(load(gate + j), value, slope);
        value *= load(up + j);
        store(gate + j, value);
        store(hbar + j, load(hbar + j) + weight * value);
      }
      if (p.a_down_ERF == nullptr) continue;
      const S* a_down = static_cast<const S*>(p.a_down_ERF) + e * p.rank * p.ffn + f;
      const S* h = gate;
      S* z = z_NR + slot * p.rank;
      few_rows_shrink(&h, 1, a_down, p.rank, columns, p.ffn, &z);
    }
    convert(hbar, columns, static_cast<T*>(p.hbar_TF) + at);
  }

  // gate_k or up_k of a slot, features [f, f + kFewColumns).
  void side(const void* base_TF,
            const void* a_TKR,
            const void* b_EFR,
            const void* scale_EF,
            const void* bias_F,
            int64_t slot,
            int64_t f,
            S* y) const {
    const int64_t columns = std::min(kFewColumns, p.ffn - f), e = p.expert_TK[slot];
    convert(static_cast<const T*>(base_TF) + slot / p.slots * p.ffn + f, columns, y);
    if (a_TKR == nullptr) return;
    const S* scale = static_cast<const S*>(scale_EF);
    const S* bias = scale == nullptr ? nullptr : static_cast<const S*>(bias_F);
    for (int64_t j = 0; bias != nullptr && j < columns; ++j) y[j] -= bias[f + j];
    std::vector<S> a_R(p.rank);
    for (int64_t r = 0; r < p.rank; ++r) {
      a_R[r] = static_cast<S>(p.scaling) * static_cast<const S*>(a_TKR)[slot * p.rank + r];
    }
    const S* a = a_R.data();
    const S* b = static_cast<const S*>(b_EFR) + (e * p.ffn + f) * p.rank;
    few_rows_expand(&a, 1, b, columns, p.rank, &y);
    for (int64_t j = 0; scale != nullptr && j < columns; ++j) {
      y[j] = scale[e * p.ffn + f + j] * y[j] + (bias == nullptr ? 0 : bias[f + j]);
    }
  }
};

}  // namespace mixlora::MIXLORA_ISA
