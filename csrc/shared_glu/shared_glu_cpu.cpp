#include <algorithm>
#include <memory>
#include <vector>

#include "common/activation.h"
#include "common/panel.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "shared_glu/shared_glu.h"

namespace mixlora::MIXLORA_ISA {
namespace {

constexpr int64_t kColumns = 128;   // of F at once: a panel's buffers stay in the L1 and L2 caches
constexpr int64_t kGroupRows = 24;  // tokens at once, all with the same experts
constexpr int64_t kBlockTokens = 2048;  // the backward's partial sums are for so many tokens

template <class S>
std::unique_ptr<S[]> uninitialized(int64_t count) {
  return std::make_unique_for_overwrite<S[]>(count);
}

// Tokens token_order_T[start] .. [start + size - 1] have the same experts.
struct Group {
  int64_t start, size;
};

std::vector<Group> groups_of(const SharedGluParams& p) {
  const auto experts = [&](int64_t i) {
    return p.expert_TK + int64_t{p.token_order_T[i]} * p.slots;
  };
  std::vector<Group> groups;
  for (int64_t start = 0, end; start < p.tokens; start = end) {
    end = start + 1;
    while (end < p.tokens && end - start < kGroupRows &&
           std::equal(experts(start), experts(start) + p.slots, experts(end))) {
      ++end;
    }
    groups.push_back({start, end - start});
  }
  return groups;
}

// One of the two projections that enter the activation, as an expert's rows see it.
template <class T>
struct Side {
  using W = Wide<T>;
  const T* base_TF;
  const W* a_TKR;               // null: no adapter
  std::unique_ptr<W[]> bt_ERF;  // B transposed, rows padded to ffn_padded
  const W *scale_EF, *bias_F;   // null: no DoRA, no bias
};

template <class T, Activation kAct>
class SharedGlu {
 public:
  using W = Wide<T>;
  using V = Vec<W>;
  static constexpr int kW = kWidth<W>;

  explicit SharedGlu(const SharedGluParams& params)
      : p(params),
        R(padded<W>(p.rank)),
        F(padded<W>(p.ffn)),
        groups(groups_of(p)),
        weight_TK(static_cast<const W*>(p.weight_TK)),
        has_down(p.a_down_ERF != nullptr) {
    const auto side =
        [&](const void* base, const void* a, const void* b, const void* scale, const void* bias) {
          return Side<T>{static_cast<const T*>(base),
                         static_cast<const W*>(a),
                         transposed(b, p.ffn, p.rank, F),
                         static_cast<const W*>(scale),
                         static_cast<const W*>(scale ? bias : nullptr)};
        };
    gate = side(p.gate_TF, p.a_gate_TKR, p.b_gate_EFR, p.scale_gate_EF, p.bias_gate_F);
    up = side(p.up_TF, p.a_up_TKR, p.b_up_EFR, p.scale_up_EF, p.bias_up_F);
  }

  void forward() {
    const auto at_down_EFR = transposed(p.a_down_ERF, p.rank, p.ffn, R);
    parallel_for(groups.size(), [&](int64_t i) { forward_group(groups[i], at_down_EFR.get()); });
  }

  void backward() {
    const int64_t chunks = (F + kColumns - 1) / kColumns;
    const auto b_gate_EFR = padded_rows(p.b_gate_EFR, p.ffn, p.rank, R);
    const auto b_up_EFR = padded_rows(p.b_up_EFR, p.ffn, p.rank, R);
    const auto a_down_ERF = padded_rows(p.a_down_ERF, p.rank, p.ffn, F);
    Gradients sums;
    if (p.b_gate_EFR != nullptr) sums.db_gate_EFR = uninitialized<W>(p.experts * F * R);
    if (p.b_up_EFR != nullptr) sums.db_up_EFR = uninitialized<W>(p.experts * F * R);
    if (has_down) sums.da_down_EFR = uninitialized<W>(p.experts * F * R);
    // Blocks of whole groups; within one, chunks of F are independent, and what they add up over F
    // is summed in their order afterwards.
    partial =
        uninitialized<W>(chunks * std::min(p.tokens, kBlockTokens) * p.slots * partial_size());
    for (size_t first = 0, last; first < groups.size() || first == 0; first = last) {
      for (last = first; last < groups.size(); ++last) {
        if (groups[last].start + groups[last].size - groups[first].start > kBlockTokens) break;
      }
      parallel_for(chunks, [&](int64_t chunk) {
        if (first == 0) clear(sums, chunk);
        for (size_t i = first; i < last; ++i) {
          backward_group(groups[i],
                         groups[i].start - groups[first].start,
                         chunk,
                         chunks,
                         sums,
                         b_gate_EFR.get(),
                         b_up_EFR.get(),
                         a_down_ERF.get());
        }
        if (last == groups.size()) write(sums, chunk);
      });
      if (last == first) break;  // no tokens at all
      const int64_t begin = groups[first].start;
      const int64_t end = groups[last - 1].start + groups[last - 1].size;
      parallel_for(end - begin, [&](int64_t i) { add_partials(begin + i, i, chunks); });
    }
  }

 private:
  struct Gradients {
    std::unique_ptr<W[]> db_gate_EFR, db_up_EFR, da_down_EFR;  // R padded
  };

  const SharedGluParams& p;
  const int64_t R, F;  // padded
  const std::vector<Group> groups;
  const W* weight_TK;
  const bool has_down;
  Side<T> gate, up;
  std::unique_ptr<W[]> partial;  // [chunk][token of the block][slot][da_gate R, da_up R, dweight]

  int64_t partial_size() const { return 2 * R + kW; }

  // An expert's matrix [rows, columns] -> [columns, to]; null stays null.
  std::unique_ptr<W[]> transposed(const void* src,
                                  int64_t rows,
                                  int64_t columns,
                                  int64_t to) const {
    if (src == nullptr) return nullptr;
    auto dst = uninitialized<W>(p.experts * columns * to);
    parallel_for(p.experts, [&](int64_t e) {
      transpose(static_cast<const W*>(src) + e * rows * columns,
                rows,
                columns,
                dst.get() + e * columns * to,
                to);
    });
    return dst;
  }

  std::unique_ptr<W[]> padded_rows(const void* src,
                                   int64_t rows,
                                   int64_t columns,
                                   int64_t to) const {
    if (src == nullptr) return nullptr;
    auto dst = uninitialized<W>(p.experts * rows * to);
    parallel_for(p.experts, [&](int64_t e) {
      for (int64_t i = e * rows; i < (e + 1) * rows; ++i) {
        const W* row = static_cast<const W*>(src) + i * columns;
        std::fill(
            std::copy(row, row + columns, dst.get() + i * to), dst.get() + (i + 1) * to, W{0});
      }
    });
    return dst;
  }

  int64_t token(const Group& group, int64_t m) const { return p.token_order_T[group.start + m]; }
  int32_t expert(const Group& group, int64_t k) const {
    return p.expert_TK[token(group, 0) * p.slots + k];
  }
  int64_t real(int64_t f0) const { return std::min(kColumns, p.ffn - f0); }  // columns that exist

  // Slot k's rank-R rows of a group's tokens, times `factor`, padded: [size, R].
  void rank_rows(const W* src_TKR, const Group& group, int64_t k, W factor, W* dst) const {
    for (int64_t m = 0; m < group.size; ++m) {
      const W* row = src_TKR + (token(group, m) * p.slots + k) * p.rank;
      for (int64_t r = 0; r < R; ++r) dst[m * R + r] = r < p.rank ? factor * row[r] : W{0};
    }
  }

  static void widen_row(const T* src, int64_t n, int64_t padded_n, W* dst) {
    int64_t j = 0;
    for (; j + kW <= n; j += kW) store(dst + j, load(src + j));
    if (j < padded_n) store(dst + j, load_part(src + j, n - j));
  }
  static void narrow_row(const W* src, int64_t n, T* dst) {
    int64_t j = 0;
    for (; j + kW <= n; j += kW) store(dst + j, load(src + j));
    if (j < n) store_part(dst + j, load(src + j), n - j);
  }

  // y [size, kColumns] = what the side is for expert e: base + s B a, or DoRA's. `before` takes
  // what DoRA scales, where it is not null.
  void side_rows(const Side<T>& side,
                 const Group& group,
                 int32_t e,
                 const W* a,
                 int64_t f0,
                 W* y,
                 W* before) const {
    const int64_t n = real(f0), columns = padded<W>(n);
    for (int64_t m = 0; m < group.size; ++m) {
      widen_row(side.base_TF + token(group, m) * p.ffn + f0, n, columns, y + m * kColumns);
      for (int64_t j = 0; side.bias_F != nullptr && j < n; ++j) {
        y[m * kColumns + j] -= side.bias_F[f0 + j];
      }
    }
    if (side.a_TKR == nullptr) return;
    panel(a,
          R,
          1,
          side.bt_ERF.get() + e * p.rank * F + f0,
          F,
          p.rank,
          y,
          kColumns,
          group.size,
          columns);
    if (side.scale_EF == nullptr) return;
    for (int64_t m = 0; m < group.size; ++m) {
      for (int64_t j = 0; j < n; ++j) {
        W& value = y[m * kColumns + j];
        if (before != nullptr) before[m * kColumns + j] = value;
        value *= side.scale_EF[e * p.ffn + f0 + j];
        if (side.bias_F != nullptr) value += side.bias_F[f0 + j];
      }
    }
  }

  void drop(W* row, int64_t slot, int64_t f0, int64_t n) const {
    if (p.dropout > 0) philox_dropout(row, padded<W>(n), p.seed, slot, f0, p.dropout);
  }

  void forward_group(const Group& group, const W* at_down_EFR) const {
    const int64_t size = group.size, K = p.slots, tile = size * kColumns;
    const auto buffer = uninitialized<W>(3 * tile + 3 * K * size * R);
    W *gate_F = buffer.get(), *up_F = gate_F + tile, *sum_F = up_F + tile;
    W *a_gate = sum_F + tile, *a_up = a_gate + K * size * R, *z = a_up + K * size * R;
    std::fill(z, z + K * size * R, W{0});
    for (int64_t k = 0; k < K; ++k) {
      const W s = static_cast<W>(p.scaling);
      if (expert(group, k) < 0) continue;
      if (gate.a_TKR != nullptr) rank_rows(gate.a_TKR, group, k, s, a_gate + k * size * R);
      if (up.a_TKR != nullptr) rank_rows(up.a_TKR, group, k, s, a_up + k * size * R);
    }
    for (int64_t f0 = 0; f0 < p.ffn; f0 += kColumns) {
      const int64_t n = real(f0);
      std::fill(sum_F, sum_F + tile, W{0});
      for (int64_t k = 0; k < K; ++k) {
        const int32_t e = expert(group, k);
        if (e < 0) continue;
        side_rows(gate, group, e, a_gate + k * size * R, f0, gate_F, nullptr);
        side_rows(up, group, e, a_up + k * size * R, f0, up_F, nullptr);
        for (int64_t m = 0; m < size; ++m) {
          const int64_t slot = token(group, m) * K + k;
          W *h = gate_F + m * kColumns, *sum = sum_F + m * kColumns;
          for (int64_t j = 0; j < n; j += kW) {
            V value, slope;
            activate<kAct>(load(h + j), value, slope);
            value *= load(up_F + m * kColumns + j);
            store(h + j, value);
            store(sum + j, load(sum + j) + splat(weight_TK[slot]) * value);
          }
          if (has_down) drop(h, slot, f0, n);
        }
        if (has_down) {
          panel(gate_F,
                kColumns,
                1,
                at_down_EFR + (e * p.ffn + f0) * R,
                R,
                n,
                z + k * size * R,
                R,
                size,
                R);
        }
      }
      for (int64_t m = 0; m < size; ++m) {
        narrow_row(
            sum_F + m * kColumns, n, static_cast<T*>(p.hbar_TF) + token(group, m) * p.ffn + f0);
      }
    }
    if (!has_down) return;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t m = 0; m < size; ++m) {
        const W* row = z + (k * size + m) * R;
        std::copy(row, row + p.rank, static_cast<W*>(p.z_TKR) + (token(group, m) * K + k) * p.rank);
      }
    }
  }

  // The chunk's part of the weights' gradients: zero, or written out.
  void clear(Gradients& sums, int64_t chunk) const {
    const int64_t f0 = chunk * kColumns, f1 = std::min(F, f0 + kColumns);
    for (int64_t e = 0; e < p.experts; ++e) {
      for (W* sum : {sums.db_gate_EFR.get(), sums.db_up_EFR.get(), sums.da_down_EFR.get()}) {
        if (sum != nullptr) std::fill(sum + (e * F + f0) * R, sum + (e * F + f1) * R, W{0});
      }
      for (void* scale : {p.dscale_gate_EF, p.dscale_up_EF}) {
        if (scale == nullptr) continue;
        W* row = static_cast<W*>(scale) + e * p.ffn;
        std::fill(row + f0, row + f0 + real(f0), W{0});
      }
    }
  }

  void write(const Gradients& sums, int64_t chunk) const {
    const int64_t f0 = chunk * kColumns;
    for (int64_t e = 0; e < p.experts; ++e) {
      for (int64_t f = f0; f < f0 + real(f0); ++f) {
        const auto put = [&](const W* sum_EFR, void* out) {
          if (out == nullptr) return;
          const W* row = sum_EFR + (e * F + f) * R;
          std::copy(row, row + p.rank, static_cast<W*>(out) + (e * p.ffn + f) * p.rank);
        };
        put(sums.db_gate_EFR.get(), p.db_gate_EFR);
        put(sums.db_up_EFR.get(), p.db_up_EFR);
        if (!has_down) continue;
        const W* row = sums.da_down_EFR.get() + (e * F + f) * R;
        for (int64_t r = 0; r < p.rank; ++r) {
          static_cast<W*>(p.da_down_ERF)[(e * p.rank + r) * p.ffn + f] = row[r];
        }
      }
    }
  }

  void backward_group(const Group& group,
                      int64_t place,
                      int64_t chunk,
                      int64_t chunks,
                      Gradients& sums,
                      const W* b_gate_EFR,
                      const W* b_up_EFR,
                      const W* a_down_ERF) const {
    const int64_t f0 = chunk * kColumns, n = real(f0), columns = padded<W>(n);
    const int64_t size = group.size, K = p.slots, tile = size * kColumns;
    const auto buffer = uninitialized<W>(8 * tile + 3 * size * R);
    W *gate_F = buffer.get(), *up_F = gate_F + tile, *dh_F = up_F + tile, *dhbar_F = dh_F + tile;
    W *dgate_F = dhbar_F + tile, *dup_F = dgate_F + tile;
    W *gate_before = dup_F + tile, *up_before = gate_before + tile;
    W *a_gate = up_before + tile, *a_up = a_gate + size * R, *dz = a_up + size * R;
    std::fill(dgate_F, dgate_F + 2 * tile, W{0});
    for (int64_t m = 0; m < size; ++m) {
      widen_row(static_cast<const T*>(p.dhbar_TF) + token(group, m) * p.ffn + f0,
                n,
                columns,
                dhbar_F + m * kColumns);
    }
    const int64_t block_tokens = std::min(p.tokens, kBlockTokens);
    for (int64_t k = 0; k < K; ++k) {
      const int32_t e = expert(group, k);
      if (e < 0) continue;
      const W s = static_cast<W>(p.scaling);
      if (gate.a_TKR != nullptr) rank_rows(gate.a_TKR, group, k, s, a_gate);
      if (up.a_TKR != nullptr) rank_rows(up.a_TKR, group, k, s, a_up);
      side_rows(gate, group, e, a_gate, f0, gate_F, gate_before);
      side_rows(up, group, e, a_up, f0, up_F, up_before);

      std::fill(dh_F, dh_F + tile, W{0});
      if (has_down) {
        rank_rows(static_cast<const W*>(p.dz_TKR), group, k, W{1}, dz);
        panel(dz, R, 1, a_down_ERF + e * p.rank * F + f0, F, p.rank, dh_F, kColumns, size, columns);
      }
      W* partials = partial.get() + ((chunk * block_tokens + place) * K + k) * partial_size();
      for (int64_t m = 0; m < size; ++m) {
        const int64_t slot = token(group, m) * K + k, row = m * kColumns;
        drop(dh_F + row, slot, f0, n);
        V dweight = {};
        for (int64_t j = row; j < row + columns; j += kW) {
          V value, slope;
          activate<kAct>(load(gate_F + j), value, slope);
          const V up_k = load(up_F + j), dhbar = load(dhbar_F + j);
          const V dh = splat(weight_TK[slot]) * dhbar + load(dh_F + j);
          const V h = value * up_k;
          dweight += dhbar * h;
          store(gate_F + j, dh * up_k * slope);  // dgate_k, dup_k and h_k take the places of
          store(up_F + j, dh * value);           // gate_k, up_k and dh_k
          store(dh_F + j, h);
        }
        partials[m * K * partial_size() + 2 * R] = sum(dweight);
        if (has_down) drop(dh_F + row, slot, f0, n);
      }
      unscale(gate, e, group, f0, gate_before, gate_F, p.dscale_gate_EF);
      unscale(up, e, group, f0, up_before, up_F, p.dscale_up_EF);
      for (int64_t j = 0; j < tile; j += kW) {
        store(dgate_F + j, load(dgate_F + j) + load(gate_F + j));
        store(dup_F + j, load(dup_F + j) + load(up_F + j));
      }
      const int64_t stride = K * partial_size();
      const auto adapter = [&](const W* dy_F, const W* a, const W* b_EFR, W* da, W* db_EFR) {
        for (int64_t m = 0; m < size; ++m) std::fill(da + m * stride, da + m * stride + R, W{0});
        panel(dy_F, kColumns, 1, b_EFR + (e * p.ffn + f0) * R, R, n, da, stride, size, R);
        panel(dy_F, 1, kColumns, a, R, size, db_EFR + (e * F + f0) * R, R, n, R);
      };
      if (gate.a_TKR != nullptr) {
        adapter(gate_F, a_gate, b_gate_EFR, partials, sums.db_gate_EFR.get());
      }
      if (up.a_TKR != nullptr) {
        adapter(up_F, a_up, b_up_EFR, partials + R, sums.db_up_EFR.get());
      }
      if (has_down) {
        panel(dh_F, 1, kColumns, dz, R, size, sums.da_down_EFR.get() + (e * F + f0) * R, R, n, R);
      }
    }
    for (int64_t m = 0; m < size; ++m) {
      const int64_t at = token(group, m) * p.ffn + f0;
      narrow_row(dgate_F + m * kColumns, n, static_cast<T*>(p.dgate_TF) + at);
      narrow_row(dup_F + m * kColumns, n, static_cast<T*>(p.dup_TF) + at);
    }
  }

  // DoRA: the scale's gradient, and dy before the scale.
  void unscale(const Side<T>& side,
               int32_t e,
               const Group& group,
               int64_t f0,
               const W* before,
               W* dy,
               void* dscale_EF) const {
    if (side.scale_EF == nullptr) return;
    W* dscale = static_cast<W*>(dscale_EF) + e * p.ffn + f0;
    const W* scale = side.scale_EF + e * p.ffn + f0;
    for (int64_t m = 0; m < group.size; ++m) {
      for (int64_t j = 0; j < real(f0); ++j) {
        dscale[j] += dy[m * kColumns + j] * before[m * kColumns + j];
        dy[m * kColumns + j] *= scale[j];
      }
    }
  }

  // Token i of the order, the place-th of its block: its sums over F, chunk by chunk.
  void add_partials(int64_t i, int64_t place, int64_t chunks) const {
    const int64_t block_tokens = std::min(p.tokens, kBlockTokens);
    const W s = static_cast<W>(p.scaling);
    for (int64_t k = 0; k < p.slots; ++k) {
      const int64_t slot = p.token_order_T[i] * p.slots + k;
      const bool is_empty = p.expert_TK[slot] < 0;
      const auto total = [&](int64_t at) {
        W sum = 0;
        for (int64_t chunk = 0; !is_empty && chunk < chunks; ++chunk) {
          sum += partial[((chunk * block_tokens + place) * p.slots + k) * partial_size() + at];
        }
        return sum;
      };
      static_cast<W*>(p.dweight_TK)[slot] = total(2 * R);
      for (int64_t r = 0; r < p.rank; ++r) {
        const int64_t at = slot * p.rank + r;
        if (p.da_gate_TKR != nullptr) static_cast<W*>(p.da_gate_TKR)[at] = s * total(r);
        if (p.da_up_TKR != nullptr) static_cast<W*>(p.da_up_TKR)[at] = s * total(R + r);
      }
    }
  }
};

template <class T, class Run>
void with_activation(const SharedGluParams& p, const Run& run) {
  switch (static_cast<Activation>(p.act)) {
    case Activation::kSilu:
      return run(SharedGlu<T, Activation::kSilu>(p));
    case Activation::kGelu:
      return run(SharedGlu<T, Activation::kGelu>(p));
    case Activation::kGeluTanh:
      return run(SharedGlu<T, Activation::kGeluTanh>(p));
    case Activation::kRelu:
      return run(SharedGlu<T, Activation::kRelu>(p));
  }
}

template <class Run>
void with_types(const SharedGluParams& p, const Run& run) {
  switch (p.dtype) {
    case GluDtype::kFloat:
      return with_activation<float>(p, run);
    case GluDtype::kDouble:
      return with_activation<double>(p, run);
    case GluDtype::kBf16:
      return with_activation<Bf16>(p, run);
  }
}

}  // namespace

void shared_glu_cpu(const SharedGluParams& p) {
  with_types(p, [](auto&& glu) { glu.forward(); });
}

void shared_glu_backward_cpu(const SharedGluParams& p) {
  with_types(p, [](auto&& glu) { glu.backward(); });
}

}  // namespace mixlora::MIXLORA_ISA
