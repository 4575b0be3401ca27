// What shared_glu's forward and backward share: the order in which rows are computed, and gate_k
// and up_k of a tile of rows. S is float or double, in which all is computed.
//
// A row is a slot with an expert. Rows are cut three times, by sizes alone: into blocks of tokens,
// whose sums over experts stay in the level-2 cache; within a block by expert, into tiles; and
// along F into chunks, so that a tile and its expert's matrices stay in the level-1 cache.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "common/activation.h"
#include "common/low_rank.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "shared_glu/shared_glu.h"

namespace mixlora::MIXLORA_ISA {

inline constexpr int64_t kColumns = 96;  // of a chunk
inline constexpr int64_t kBlockTokens = 256;
inline constexpr int64_t kMostTileRows = 64;

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
template <class S>
using Buffer = std::unique_ptr<S[], FreeAligned>;

// Not initialized; on a cache line, since a vector that straddles two takes twice as long.
template <class S>
Buffer<S> buffer(int64_t count) {
  return Buffer<S>(static_cast<S*>(::operator new(count * sizeof(S), std::align_val_t{64})));
}

struct Tile {
  int64_t expert, begin, end;  // rows
};

struct Block {
  int64_t first_token, tokens;  // of token_order_T
  int64_t begin, end;           // rows
  std::vector<Tile> tiles;
};

struct Rows {
  std::vector<int32_t> slot_N;  // t * K + k
  std::vector<int32_t> token_N;
  std::vector<int32_t> place_N;  // its token's place in the block
  std::vector<Block> blocks;
  std::vector<bool> is_used_E;
};

// Tokens are taken in token_order_T, which brings a block few experts with many rows each.
inline Rows rows_of(const SharedGluParams& p, int64_t tile_rows) {
  Rows rows;
  rows.is_used_E.resize(p.experts);
  std::vector<std::vector<int32_t>> place_and_slot_E(p.experts);
  for (int64_t first = 0; first < p.tokens; first += kBlockTokens) {
    Block block{.first_token = first, .tokens = std::min(kBlockTokens, p.tokens - first)};
    block.begin = rows.slot_N.size();
    for (int64_t place = 0; place < block.tokens; ++place) {
      for (int64_t k = 0; k < p.slots; ++k) {
        const int64_t slot = p.token_order_T[first + place] * p.slots + k;
        if (p.expert_TK[slot] < 0) continue;
        auto& list = place_and_slot_E[p.expert_TK[slot]];
        list.insert(list.end(), {static_cast<int32_t>(place), static_cast<int32_t>(slot)});
      }
    }
    for (int64_t e = 0; e < p.experts; ++e) {
      auto& list = place_and_slot_E[e];
      if (list.empty()) continue;
      rows.is_used_E[e] = true;
      const int64_t begin = rows.slot_N.size(), end = begin + list.size() / 2;
      for (size_t i = 0; i < list.size(); i += 2) {
        rows.place_N.push_back(list[i]);
        rows.slot_N.push_back(list[i + 1]);
        rows.token_N.push_back(list[i + 1] / p.slots);
      }
      for (int64_t i = begin; i < end; i += tile_rows) {
        block.tiles.push_back({e, i, std::min(end, i + tile_rows)});
      }
      list.clear();
    }
    block.end = rows.slot_N.size();
    rows.blocks.push_back(std::move(block));
  }
  return rows;
}

// One of the two projections that enter the activation.
template <class S>
struct Side {
  const void* base_TF;
  Buffer<S> a_NR;              // null: no adapter
  Buffer<S> b_ERF;             // s B^T in panels, see panels()
  const S *scale_EF, *bias_F;  // null: no DoRA, no bias
};

template <class S>
class Glu {
 public:
  Glu(const SharedGluParams& params, int64_t tile_rows)
      : p(params),
        R(round_up(p.rank, kWidth<S>)),
        chunks((p.ffn + kColumns - 1) / kColumns),
        rows(rows_of(p, tile_rows)),
        weight_TK(static_cast<const S*>(p.weight_TK)),
        has_down(p.a_down_ERF != nullptr) {
    const auto side = [&](auto* base, auto* a, auto* b, auto* scale, auto* bias) {
      return Side<S>{base,
                     rows_by_expert(a),
                     panels_of_transposed(b),
                     static_cast<const S*>(scale),
                     static_cast<const S*>(scale ? bias : nullptr)};
    };
    gate = side(p.gate_TF, p.a_gate_TKR, p.b_gate_EFR, p.scale_gate_EF, p.bias_gate_F);
    up = side(p.up_TF, p.a_up_TKR, p.b_up_EFR, p.scale_up_EF, p.bias_up_F);
  }

 protected:
  const SharedGluParams& p;
  const int64_t R;  // padded to whole vectors
  const int64_t chunks;
  const Rows rows;
  const S* weight_TK;
  const bool has_down;
  Side<S> gate, up;

  int64_t real(int64_t chunk) const { return std::min(kColumns, p.ffn - chunk * kColumns); }
  int64_t whole_vectors(int64_t chunk) const { return round_up(real(chunk), kWidth<S>); }

  // Panels [R, kColumns] (or [kColumns, R]) of every chunk of every expert stand side by side.
  int64_t panel_at(int64_t e, int64_t chunk, int64_t ranks) const {
    return (e * chunks + chunk) * ranks * kColumns;
  }
  template <class Body>
  Buffer<S> panels(const void* src, int64_t ranks, const Body& body) const {
    if (src == nullptr) return nullptr;
    auto dst = buffer<S>(p.experts * chunks * ranks * kColumns);
    parallel_for(p.experts * chunks, [&](int64_t i) {
      const int64_t e = i / chunks, chunk = i % chunks;
      if (!rows.is_used_E[e]) return;
      body(static_cast<const S*>(src) + e * p.rank * p.ffn, chunk, &dst[panel_at(e, chunk, ranks)]);
    });
    return dst;
  }
  Buffer<S> panels_of_transposed(const void* b_EFR) const {
    return panels(b_EFR, p.rank, [&](const S* b_FR, int64_t chunk, S* dst) {
      const S s = static_cast<S>(p.scaling);
      std::fill_n(dst, p.rank * kColumns, S(0));  // what is beyond F must not be NaN
      transpose(b_FR + chunk * kColumns * p.rank, real(chunk), p.rank, p.rank, dst, kColumns);
      for (int64_t i = 0; i < p.rank * kColumns; ++i) dst[i] *= s;
    });
  }

  // Slots' rows [N, R] in the order of `rows`, padded.
  Buffer<S> rows_by_expert(const void* src_TKR) const {
    if (src_TKR == nullptr) return nullptr;
    const int64_t N = rows.slot_N.size();
    auto dst = buffer<S>(N * R);
    parallel_chunks(N, rows_per_chunk(R), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const S* from = static_cast<const S*>(src_TKR) + rows.slot_N[n] * p.rank;
        copy_padded(from, p.rank, R, &dst[n * R]);
      }
    });
    return dst;
  }

  // A chunk of row t of x_TF: where it lies, or widened or padded in `copy`.
  const S* chunk_of(const void* x_TF, int64_t t, int64_t chunk, S* copy) const {
    const int64_t at = t * p.ffn + chunk * kColumns, n = real(chunk), padded = whole_vectors(chunk);
    if (p.dtype == GluDtype::kBf16) {
      if constexpr (std::is_same_v<S, float>) {
        copy_padded(static_cast<const Bf16*>(x_TF) + at, n, padded, copy);
      }
      return copy;
    }
    if (n == padded) return static_cast<const S*>(x_TF) + at;
    copy_padded(static_cast<const S*>(x_TF) + at, n, padded, copy);
    return copy;
  }
  void write_chunk(const S* x, void* y_TF, int64_t t, int64_t chunk) const {
    const int64_t at = t * p.ffn + chunk * kColumns;
    if (p.dtype == GluDtype::kBf16) {
      if constexpr (std::is_same_v<S, float>) {
        convert(x, real(chunk), static_cast<Bf16*>(y_TF) + at);
      }
    } else {
      convert(x, real(chunk), static_cast<S*>(y_TF) + at);
    }
  }

  // y [rows, kColumns] = a side of a tile: base + s B a, or DoRA's. `before` takes what DoRA
  // scales, where it is not null.
  void side_rows(const Side<S>& side, const Tile& tile, int64_t chunk, S* y, S* before) const {
    const int64_t M = tile.end - tile.begin, n = real(chunk), columns = whole_vectors(chunk);
    const S* bias = side.bias_F == nullptr ? nullptr : side.bias_F + chunk * kColumns;
    const S* from[kMostTileRows];
    for (int64_t m = 0; m < M; ++m) {
      S* y_m = y + m * kColumns;
      from[m] = chunk_of(side.base_TF, rows.token_N[tile.begin + m], chunk, y_m);
      if (from[m] != y_m && (bias != nullptr || side.a_NR == nullptr)) {
        std::copy(from[m], from[m] + columns, y_m);
        from[m] = y_m;
      }
      for (int64_t j = 0; bias != nullptr && j < n; ++j) y_m[j] -= bias[j];
    }
    if (side.a_NR == nullptr) return;
    panel<S>({&side.a_NR[tile.begin * R], R, 1},
             &side.b_ERF[panel_at(tile.expert, chunk, p.rank)],
             kColumns,
             M,
             p.rank,
             columns,
             y,
             kColumns,
             from);
    if (side.scale_EF == nullptr) return;
    const S* scale = side.scale_EF + tile.expert * p.ffn + chunk * kColumns;
    if (before != nullptr) std::copy(y, y + M * kColumns, before);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t j = 0; j < n; ++j) {
        S& value = y[m * kColumns + j];
        value = scale[j] * value + (bias == nullptr ? 0 : bias[j]);
      }
    }
  }

  void drop(S* x, int64_t slot, int64_t chunk) const {
    philox_dropout(x, real(chunk), p.seed, slot, chunk * kColumns, p.dropout, x);
  }
};

// Calls body(constant) with the Activation that `act` names, as a constant.
template <class Body>
void with_activation(int act, const Body& body) {
  switch (static_cast<Activation>(act)) {
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
  }
}

}  // namespace mixlora::MIXLORA_ISA
