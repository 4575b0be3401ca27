// What shared_glu's forward and backward share: the order in which rows are computed, the products
// of small matrices, and gate_k and up_k of a tile of rows. S is float or double, in which all is
// computed.
//
// A row is a slot with an expert. Rows are cut three times, by sizes alone: into blocks of tokens,
// whose sums over experts stay in the level-2 cache; within a block by expert, into tiles; and
// along F into chunks, so that a tile and its expert's matrices stay in the level-1 cache. Ranks
// are cut into blocks of kRanks. What is cut is padded with zeros: ranks, the last chunk, and an
// expert's rows in a block, to a multiple of kStepRows. So all sizes of a product are constants.
#pragma once

#include <algorithm>
#include <vector>

#include "common/activation.h"
#include "common/buffer.h"
#include "common/low_rank.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "shared_glu/shared_glu.h"

namespace mixlora::MIXLORA_ISA {

inline constexpr int kColumns = 256;  // of a chunk
inline constexpr int kTileRows = 8;
inline constexpr int64_t kBlockTokens = 256;
inline constexpr int kStepRows = kVectorBytes == 64 ? 8 : 4;  // of a product, in registers
static_assert(kColumns % kChain == 0 && kTileRows % kStepRows == 0);

struct Tile {
  int64_t expert, begin, end;  // rows
};

struct Block {
  int64_t first_token, tokens;  // of token_order_T
  int64_t begin, end;           // rows
  std::vector<Tile> tiles;
};

struct Rows {
  std::vector<int32_t> slot_N;   // t * K + k, or -1 for padding
  std::vector<int32_t> place_N;  // its token's place in the block, or, for padding, one behind all
  std::vector<Block> blocks;
  std::vector<bool> is_used_E;
};

// Tokens are taken in token_order_T, which brings a block few experts with many rows each.
inline Rows rows_of(const SharedGluParams& p) {
  Rows rows;
  rows.is_used_E.resize(p.experts);
  std::vector<std::vector<int32_t>> slots_E(p.experts), places_E(p.experts);
  for (int64_t first = 0; first < p.tokens; first += kBlockTokens) {
    Block block{.first_token = first, .tokens = std::min(kBlockTokens, p.tokens - first)};
    block.begin = rows.slot_N.size();
    for (int64_t place = 0; place < block.tokens; ++place) {
      for (int64_t k = 0; k < p.slots; ++k) {
        const int64_t slot = p.token_order_T[first + place] * p.slots + k;
        if (p.expert_TK[slot] < 0) continue;
        slots_E[p.expert_TK[slot]].push_back(slot);
        places_E[p.expert_TK[slot]].push_back(place);
      }
    }
    for (int64_t e = 0; e < p.experts; ++e) {
      if (slots_E[e].empty()) continue;
      rows.is_used_E[e] = true;
      const int64_t padded = round_up(slots_E[e].size(), kStepRows);
      slots_E[e].resize(padded, -1);
      places_E[e].resize(padded, block.tokens);
      const int64_t begin = rows.slot_N.size(), end = begin + padded;
      rows.slot_N.insert(rows.slot_N.end(), slots_E[e].begin(), slots_E[e].end());
      rows.place_N.insert(rows.place_N.end(), places_E[e].begin(), places_E[e].end());
      for (int64_t i = begin; i < end; i += kTileRows) {
        block.tiles.push_back({e, i, std::min(end, i + kTileRows)});
      }
      slots_E[e].clear();
      places_E[e].clear();
    }
    block.end = rows.slot_N.size();
    rows.blocks.push_back(std::move(block));
  }
  return rows;
}

// y[m][i] = from(m)[i] + sum_j c(m, j) a[j][i] for m < M, i < kI and j < steps * kTerms, with
// c(m, j) = c[m * kRow + j * kTerm]; M is a multiple of kStepRows.
template <int kRow, int kTerm, int kTerms, int kI, class S, class From>
INLINE void add_product(const S* c, const S* a, int64_t M, int64_t steps, const From& from, S* y) {
  constexpr int kW = kWidth<S>, kVectors = kI % (2 * kW) == 0 ? 2 : 1;
  for (int64_t m0 = 0; m0 < M; m0 += kStepRows) {
    for (int64_t i = 0; i < kI; i += kVectors * kW) {
      Vec<S> sum[kStepRows][kVectors] = {};
      const S *c_j = c + m0 * kRow, *a_j = a + i;
      for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int j = 0; j < kTerms; ++j) {
          Vec<S> terms[kVectors];
          for (int v = 0; v < kVectors; ++v) terms[v] = load(a_j + j * kI + v * kW);
          for (int m = 0; m < kStepRows; ++m) {
            const Vec<S> factor = splat(c_j[m * kRow + j * kTerm]);
            for (int v = 0; v < kVectors; ++v) sum[m][v] = factor * terms[v] + sum[m][v];
          }
        }
        c_j += kTerms * kTerm;
        a_j += kTerms * kI;
      }
      for (int m = 0; m < kStepRows; ++m) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = i + v * kW;
          store(y + (m0 + m) * kI + at, load(from(m0 + m) + at) + sum[m][v]);
        }
      }
    }
  }
}

// Rows that are soon read: they lie on pages of their own, where no prefetcher of the processor
// foresees them. Their lines are fetched one by one beside the arithmetic, since many at once would
// make it wait.
template <size_t kTensors>
struct Ahead {
  const char* rows[kTensors];
  int64_t bytes;  // of an element

  INLINE void fetch(int64_t column) const {
    for (const char* row : rows) __builtin_prefetch(row + column * bytes);
  }
};

// One of the two projections that enter the activation.
template <class S>
struct Side {
  const void* base_TF;
  Buffer<S> a_NR;  // times s; null: no adapter
  Buffer<S> b_ERF;
  const S *scale_EF, *bias_F;  // null: no DoRA, no bias
};

// Matrices [R, kColumns] and [kColumns, R] of every chunk of every expert stand side by side, and
// within one, its blocks of ranks; of rows [N, R], first the first block's of all rows.
template <class S, int kRanks>
class Glu {
 public:
  explicit Glu(const SharedGluParams& params)
      : p(params),
        rank_blocks((p.rank + kRanks - 1) / kRanks),
        chunks((p.ffn + kColumns - 1) / kColumns),
        rows(rows_of(p)),
        N(rows.slot_N.size()),
        weight_TK(static_cast<const S*>(p.weight_TK)),
        has_down(p.a_down_ERF != nullptr) {
    const auto side = [&](auto* base, auto* a, auto* b, auto* scale, auto* bias) {
      return Side<S>{base,
                     rows_by_expert(a, p.scaling),
                     b_matrices(b, true),
                     static_cast<const S*>(scale),
                     static_cast<const S*>(scale ? bias : nullptr)};
    };
    gate = side(p.gate_TF, p.a_gate_TKR, p.b_gate_EFR, p.scale_gate_EF, p.bias_gate_F);
    up = side(p.up_TF, p.a_up_TKR, p.b_up_EFR, p.scale_up_EF, p.bias_up_F);
  }

 protected:
  const SharedGluParams& p;
  const int64_t rank_blocks, chunks;
  const Rows rows;
  const int64_t N;
  const S* weight_TK;
  const bool has_down;
  Side<S> gate, up;
  alignas(64) S zeros[kColumns] = {};

  int64_t real(int64_t chunk) const {
    return std::min<int64_t>(kColumns, p.ffn - chunk * kColumns);
  }
  int64_t real_ranks(int64_t block) const {
    return std::min<int64_t>(kRanks, p.rank - block * kRanks);
  }
  int64_t matrix_at(int64_t e, int64_t chunk, int64_t block) const {
    return ((e * chunks + chunk) * rank_blocks + block) * kRanks * kColumns;
  }
  int64_t row_at(int64_t n, int64_t block) const { return (block * N + n) * kRanks; }
  S weight_of(int64_t n) const { return rows.slot_N[n] < 0 ? 0 : weight_TK[rows.slot_N[n]]; }

  // put(first of an expert's matrix, first column, columns, first rank, ranks, to)
  template <class Put>
  Buffer<S> matrices(const void* src, const Put& put) const {
    if (src == nullptr) return nullptr;
    auto dst = buffer<S>(matrix_at(p.experts, 0, 0));
    parallel_for(p.experts * chunks, [&](int64_t i) {
      const int64_t e = i / chunks, chunk = i % chunks;
      if (!rows.is_used_E[e]) return;
      for (int64_t block = 0; block < rank_blocks; ++block) {
        S* to = &dst[matrix_at(e, chunk, block)];
        std::fill_n(to, kRanks * kColumns, S(0));
        const S* from = static_cast<const S*>(src) + e * p.rank * p.ffn;
        put(from, chunk * kColumns, real(chunk), block * kRanks, real_ranks(block), to);
      }
    });
    return dst;
  }
  // B as [kColumns, R], transposed as [R, kColumns]
  Buffer<S> b_matrices(const void* b_EFR, bool transposed) const {
    const auto put =
        [&](const S* b_FR, int64_t f, int64_t columns, int64_t r, int64_t ranks, S* to) {
          const S* from = b_FR + f * p.rank + r;
          if (transposed) return transpose(from, columns, ranks, p.rank, to, kColumns);
          for (int64_t i = 0; i < columns; ++i) convert(from + i * p.rank, ranks, to + i * kRanks);
        };
    return matrices(b_EFR, put);
  }
  // A as [R, kColumns], transposed as [kColumns, R]
  Buffer<S> a_matrices(const void* a_ERF, bool transposed) const {
    const auto put =
        [&](const S* a_RF, int64_t f, int64_t columns, int64_t r, int64_t ranks, S* to) {
          const S* from = a_RF + r * p.ffn + f;
          if (transposed) return transpose(from, ranks, columns, p.ffn, to, kRanks);
          for (int64_t i = 0; i < ranks; ++i) convert(from + i * p.ffn, columns, to + i * kColumns);
        };
    return matrices(a_ERF, put);
  }

  // Slots' rows in the order of `rows`, times `scale`.
  Buffer<S> rows_by_expert(const void* src_TKR, double scale) const {
    if (src_TKR == nullptr) return nullptr;
    auto dst = buffer<S>(row_at(0, rank_blocks));
    parallel_chunks(N, rows_per_chunk(p.rank), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const S* from = static_cast<const S*>(src_TKR) + rows.slot_N[n] * p.rank;
        for (int64_t block = 0; block < rank_blocks; ++block) {
          const int64_t ranks = rows.slot_N[n] < 0 ? 0 : real_ranks(block);
          S* to = &dst[row_at(n, block)];
          for (int64_t r = 0; r < kRanks; ++r) {
            to[r] = r < ranks ? static_cast<S>(scale) * from[block * kRanks + r] : 0;
          }
        }
      }
    });
    return dst;
  }

  // A chunk of a row's token in x_TF: where it lies, or widened or padded in `copy`.
  const S* chunk_of(const void* x_TF, int64_t n, int64_t chunk, S* copy) const {
    if (rows.slot_N[n] < 0) return zeros;
    const int64_t t = rows.slot_N[n] / p.slots, columns = real(chunk);
    const int64_t at = t * p.ffn + chunk * kColumns;
    if (p.dtype == Dtype::kBfloat16) {
      if constexpr (std::is_same_v<S, float>) {
        copy_padded(static_cast<const Bf16*>(x_TF) + at, columns, kColumns, copy);
      }
      return copy;
    }
    if (columns == kColumns) return static_cast<const S*>(x_TF) + at;
    copy_padded(static_cast<const S*>(x_TF) + at, columns, kColumns, copy);
    return copy;
  }
  // Of the row that takes n's place in the next tile.
  template <size_t kTensors>
  Ahead<kTensors> ahead_of(const Block& block,
                           int64_t n,
                           int64_t chunk,
                           const void* const (&x_TF)[kTensors]) const {
    const int64_t next = std::min(n + kTileRows, block.end - 1);
    const int64_t at = std::max(rows.slot_N[next], 0) / p.slots * p.ffn + chunk * kColumns;
    Ahead<kTensors> ahead{};
    ahead.bytes = p.dtype == Dtype::kBfloat16 ? sizeof(Bf16) : sizeof(S);
    for (size_t i = 0; i < kTensors; ++i) {
      ahead.rows[i] = static_cast<const char*>(x_TF[i]) + at * ahead.bytes;
    }
    return ahead;
  }
  void write_chunk(const S* x, void* y_TF, int64_t t, int64_t chunk) const {
    const int64_t at = t * p.ffn + chunk * kColumns;
    if (p.dtype == Dtype::kBfloat16) {
      if constexpr (std::is_same_v<S, float>) {
        convert(x, real(chunk), static_cast<Bf16*>(y_TF) + at);
      }
    } else {
      convert(x, real(chunk), static_cast<S*>(y_TF) + at);
    }
  }

  // The three products of a tile: to and from kColumns features, and their matrix's gradient. Not
  // inlined: each has several callers.
  template <class From>
  __attribute__((noinline)) void expand_tile(
      const Tile& tile, const S* z_NR, const S* a_RF, const From& from, S* y) const {
    const int64_t M = tile.end - tile.begin;
    for (int64_t block = 0; block < rank_blocks; ++block) {
      const S *z = z_NR + row_at(tile.begin, block), *a = a_RF + block * kRanks * kColumns;
      const auto more = [&](int64_t m) { return y + m * kColumns; };
      if (block == 0) {
        add_product<kRanks, 1, kRanks, kColumns>(z, a, M, 1, from, y);
      } else {
        add_product<kRanks, 1, kRanks, kColumns>(z, a, M, 1, more, y);
      }
    }
  }
  // z points to the tile's first row; from one block of ranks to the next are z_stride numbers.
  __attribute__((noinline)) void shrink_tile(
      const Tile& tile, const S* x, const S* a_FR, S* z, int64_t z_stride) const {
    for (int64_t block = 0; block < rank_blocks; ++block, z += z_stride) {
      const auto old = [&](int64_t m) { return z + m * kRanks; };
      for (int64_t j = 0; j < kColumns; j += kChain) {
        const S* a = a_FR + (block * kColumns + j) * kRanks;
        add_product<kColumns, 1, kChain, kRanks>(x + j, a, tile.end - tile.begin, 1, old, z);
      }
    }
  }
  __attribute__((noinline)) void add_outer(const Tile& tile,
                                           const S* y,
                                           const S* z_NR,
                                           S* sums_FR) const {
    for (int64_t block = 0; block < rank_blocks; ++block) {
      S* sums = sums_FR + block * kColumns * kRanks;
      const auto old = [&](int64_t f) { return sums + f * kRanks; };
      const int64_t steps = (tile.end - tile.begin) / kStepRows;
      const S* z = z_NR + row_at(tile.begin, block);
      add_product<1, kColumns, kStepRows, kRanks>(y, z, kColumns, steps, old, sums);
    }
  }

  // y [rows, kColumns] = a side of a tile: base + s B a, or DoRA's. `before` takes what DoRA
  // scales, where it is not null.
  void side_rows(const Side<S>& side, const Tile& tile, int64_t chunk, S* y, S* before) const {
    const int64_t M = tile.end - tile.begin, columns = real(chunk);
    const S* bias = side.bias_F == nullptr ? nullptr : side.bias_F + chunk * kColumns;
    const S* from[kTileRows];
    for (int64_t m = 0; m < M; ++m) {
      S* y_m = y + m * kColumns;
      from[m] = chunk_of(side.base_TF, tile.begin + m, chunk, y_m);
      if (from[m] != y_m && (bias != nullptr || side.a_NR == nullptr)) {
        std::copy(from[m], from[m] + kColumns, y_m);
        from[m] = y_m;
      }
      for (int64_t j = 0; bias != nullptr && j < columns; ++j) y_m[j] -= bias[j];
    }
    if (side.a_NR == nullptr) return;
    const auto base = [&](int64_t m) { return from[m]; };
    expand_tile(tile, side.a_NR.get(), &side.b_ERF[matrix_at(tile.expert, chunk, 0)], base, y);
    if (side.scale_EF == nullptr) return;
    const S* scale = side.scale_EF + tile.expert * p.ffn + chunk * kColumns;
    if (before != nullptr) std::copy(y, y + M * kColumns, before);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t j = 0; j < columns; ++j) {
        S& value = y[m * kColumns + j];
        value = scale[j] * value + (bias == nullptr ? 0 : bias[j]);
      }
    }
  }

  void drop(S* x, int64_t n, int64_t chunk) const {
    if (rows.slot_N[n] < 0) return;
    philox_dropout(x, kColumns, *p.seed, rows.slot_N[n], chunk * kColumns, p.dropout, x);
  }
};

// Kernel<S, kRanks> with the block of ranks that fits best.
template <template <class, int> class Kernel>
void run_glu(const SharedGluParams& p) {
  if (p.dtype == Dtype::kFloat64) return Kernel<double, 8>(p).run();
  if (kWidth<float> <= 8 && (p.rank - 1) / 8 % 2 == 0) return Kernel<float, 8>(p).run();
  Kernel<float, 16>(p).run();
}

}  // namespace mixlora::MIXLORA_ISA
