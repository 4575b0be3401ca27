// gate_k, up_k and what else forward and backward compute of a tile of rows in one of their slots.
#pragma once

#include "common/activation.cuh"
#include "common/philox.cuh"
#include "shared_glu/copies.cuh"
#include "shared_glu/row_sums.cuh"
#include "shared_glu/rows.cuh"

namespace mixlora {
namespace {

// One of the two projections that enter the activation.
template <class T>
struct Side {
  const T* base_TF;
  const T *a_NR, *b_EFR;            // copies; null: no adapter
  const Wide<T>*scale_EF, *bias_F;  // null: no DoRA, no bias
};

template <class T>
struct Glu {
  SharedGluParams p;
  int R;             // padded, as F
  int64_t F, range;  // columns of a range: a block's
  bool aligned;      // whether all rows of T are, to what a lane has of them
  Side<T> gate, up;
  DropoutMask<Wide<T>> mask;
};

// What a lane has of a tile of gate, up or hbar, as it is stored.
template <class T>
struct Stored {
  Pack<T, kPer<T>> rows[2];
};

template <class T>
__device__ Stored<T> load_rows(const Glu<T>& glu, const void* x_TF, Rows rows, int64_t f) {
  const int64_t F = glu.p.ffn, first = f + lane_quarter() * kPer<T>;
  Stored<T> x = {};
  for (int h = 0; h < 2; ++h) {
    if (rows.token[h] < 0) continue;
    const T* row = static_cast<const T*>(x_TF) + rows.token[h] * F + first;
    if (glu.aligned && first + kPer<T> <= F) {
      x.rows[h] = load_pack<kPer<T>>(row);
    } else {
#pragma unroll
      for (int c = 0; c < kPer<T>; ++c) {
        if (first + c < F) x.rows[h].x[c] = row[c];
      }
    }
  }
  return x;
}

template <class T>
__device__ void store_rows(const Glu<T>& glu, const Tile<T>& x, Rows rows, int64_t f, void* y_TF) {
  const int64_t F = glu.p.ffn, first = f + lane_quarter() * kPer<T>;
  Stored<T> y;
  for_each_place<kPer<T>>([&](int h, int c) { narrow(x.at(h, c), y.rows[h].x[c]); });
  for (int h = 0; h < 2; ++h) {
    if (rows.token[h] < 0) continue;
    T* row = static_cast<T*>(y_TF) + rows.token[h] * F + first;
    if (glu.aligned && first + kPer<T> <= F) {
      store_pack(row, y.rows[h]);
    } else {
#pragma unroll
      for (int c = 0; c < kPer<T>; ++c) {
        if (first + c < F) row[c] = y.rows[h].x[c];
      }
    }
  }
}

template <class T>
__device__ Tile<T> widened(const Stored<T>& x) {
  Tile<T> y;
  for_each_place<kPer<T>>([&](int h, int c) { y.at(h, c) = widen(x.rows[h].x[c]); });
  return y;
}

// x_F of this lane's columns, 0 behind the last and where there is no x_F.
template <class T>
__device__ Pack<Wide<T>, kPer<T>> load_columns(const Glu<T>& glu, const Wide<T>* x_F, int64_t f) {
  Pack<Wide<T>, kPer<T>> x = {};
  const int64_t first = f + lane_quarter() * kPer<T>;
#pragma unroll
  for (int c = 0; c < kPer<T>; ++c) {
    if (x_F && first + c < glu.p.ffn) x.x[c] = x_F[first + c];
  }
  return x;
}

// Of an expert's copied matrix [F, R], from row f on; or [R, F], from column f on.
template <class T>
__device__ const T* rows_of_matrix(const Glu<T>& glu, const T* b_EFR, int expert, int64_t f) {
  return b_EFR + (expert * glu.F + f) * glu.R;
}
template <class T>
__device__ const T* columns_of_matrix(const Glu<T>& glu, const T* a_ERF, int expert, int64_t f) {
  return a_ERF + expert * glu.R * glu.F + f;
}

// B of the rows of a visit: [16, kColumns].
template <class T>
__device__ Tile<T> expand_rows(
    const Glu<T>& glu, const T* a_NR, const T* b_EFR, const Visit& visit, int64_t f) {
  const T* b_FR = rows_of_matrix(glu, b_EFR, visit.expert, f);
  return expand(a_NR + visit.slot[0] * glu.R, a_NR + visit.slot[1] * glu.R, b_FR, glu.R);
}

// base + s B a, or what DoRA scales: the same without the bias. A token's base comes from memory
// for the first of its slots, and from the cache for the others.
template <class T>
__device__ Tile<T> unscaled_side(const Glu<T>& glu,
                                 const Side<T>& side,
                                 const Visit& visit,
                                 int64_t f) {
  const Stored<T> base = load_rows(glu, side.base_TF, visit.rows, f);
  const Wide<T> scaling = glu.p.scaling;
  Tile<T> y = expand_rows(glu, side.a_NR, side.b_EFR, visit, f);
  const auto bias = load_columns(glu, side.scale_EF ? side.bias_F : nullptr, f);
  for_each_place<kPer<T>>([&](int h, int c) {
    y.at(h, c) = widen(base.rows[h].x[c]) - bias.x[c] + scaling * y.at(h, c);
  });
  return y;
}

// gate_k or up_k of a visit.
template <class T>
__device__ Tile<T> side_of(const Glu<T>& glu, const Side<T>& side, const Visit& visit, int64_t f) {
  if (!side.a_NR) return widened(load_rows(glu, side.base_TF, visit.rows, f));
  Tile<T> y = unscaled_side(glu, side, visit, f);
  if (!side.scale_EF) return y;
  const auto scale = load_columns(glu, side.scale_EF + visit.expert * glu.p.ffn, f);
  const auto bias = load_columns(glu, side.bias_F, f);
  for_each_place<kPer<T>>([&](int h, int c) { y.at(h, c) = scale.x[c] * y.at(h, c) + bias.x[c]; });
  return y;
}

// value = act(gate), in gate's place, and slope = act'(gate).
template <class T>
__device__ void activate_tile(int act, Tile<T>& gate, Tile<T>& slope) {
  with_activation(act, [&](auto act) {
    for_each_place<kPer<T>>([&](int h, int c) {
      // The compiler would compute all places at once, for which registers do not suffice.
      if (c % 2 == 0) __syncwarp();
      Wide<T> value;
      activate<decltype(act)::value>(gate.at(h, c), value, slope.at(h, c));
      gate.at(h, c) = value;
    });
  });
}

template <class T>
__device__ Pack<Wide<T>, 2> weights_of(const SharedGluParams& p, const Visit& visit) {
  const auto* weight_TK = static_cast<const Wide<T>*>(p.weight_TK);
  return {{weight_TK[visit.slot[0]], weight_TK[visit.slot[1]]}};
}

// What dropout multiplies h with, a bit for each place; 1 without dropout.
template <class T>
struct Dropout {
  uint32_t bits;
  Wide<T> kept;

  __device__ Wide<T> at(int h, int c) const { return bits >> (h * kPer<T> + c) & 1 ? kept : 0; }
};

template <class T>
__device__ Dropout<T> dropout_of(const Glu<T>& glu, const Visit& visit, int64_t f) {
  Dropout<T> dropout{glu.p.dropout == 0 ? ~0u : 0, glu.mask.kept};
  if (glu.p.dropout == 0) return dropout;
  for_each_place<kPer<T> / 4>([&](int h, int j) {
    const int64_t quad = (f + lane_quarter() * kPer<T>) / 4 + j;
    const auto factors = glu.mask.factors(visit.slot[h], quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t is_kept = factors.x[i] != 0;
      dropout.bits |= is_kept << (h * kPer<T> + 4 * j + i);
    }
  });
  return dropout;
}

template <class T>
Glu<T> glu_for(const SharedGluParams& p, int64_t range, Copier<T>& copier) {
  const auto side =
      [&](const void* base, const void* a, const void* b, const void* scale, const void* bias) {
        using S = Wide<T>;
        return Side<T>{static_cast<const T*>(base),
                       copier.rows(a),
                       copier.by_column(b, p.rank, 1),
                       static_cast<const S*>(scale),
                       static_cast<const S*>(bias)};
      };
  const auto all_rows = {p.gate_TF, p.up_TF, p.dhbar_TF};
  return {p,
          static_cast<int>(copier.R),
          copier.F,
          range,
          all_aligned(sizeof(Pack<T, kPer<T>>), p.ffn * sizeof(T), all_rows),
          side(p.gate_TF, p.a_gate_TKR, p.b_gate_EFR, p.scale_gate_EF, p.bias_gate_F),
          side(p.up_TF, p.a_up_TKR, p.b_up_EFR, p.scale_up_EF, p.bias_up_F),
          DropoutMask<Wide<T>>(p.seed, p.dropout)};
}

// Calls body(zero) for the type of gate_TF.
template <class Body>
void run_glu(const SharedGluParams& p, CudaQueue& queue, const Body& body) {
  if (p.experts > kMaxExperts) {
    queue.error = "num_experts must be at most 64 on a GPU, got " + std::to_string(p.experts);
    return;
  }
  with_type(p.dtype, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), Fp16>) body(zero);
  });
}

}  // namespace
}  // namespace mixlora
