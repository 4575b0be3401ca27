// What shared_glu's forward and backward share: the order in which rows are computed, the factors
// of their products, and gate_k and up_k of a few rows. T is the type of gate and up, S that of all
// sums, P that of factors (common/factors.h).
//
// A row is a slot with an expert. Rows are cut three times, by sizes alone: into blocks of tokens,
// whose sums over experts stay in the level-2 cache; within a block by expert, into tiles; and a
// tile into steps of kRows rows, whose products stay in registers. F is cut into chunks, so that a
// step and its expert's factors stay near. An expert's rows in a block are padded to whole steps.
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

inline constexpr int kRows = kVectorBytes == 64 ? 8 : 4;         // of a step
inline constexpr int kStepVectors = kVectorBytes == 64 ? 1 : 2;  // of its products in registers
inline constexpr int64_t kMostColumns = 384;                     // of a chunk
// Of a chunk's rows in memory: where it was a power of two they would share few sets of a cache.
inline constexpr int64_t kStride = kMostColumns + 32;
inline constexpr int64_t kBlockTokens = 256;

struct Row {
  int32_t slot, token;     // t * K + k and t, or -1 for padding
  int32_t place;           // its token's in the block; behind all for padding
  bool is_first, is_last;  // of its token's
};

struct Tile {
  int64_t expert, begin, end;  // rows
};

struct Block {
  int64_t first_token, tokens;  // of token_order_T
  int64_t begin, end;           // rows
  std::vector<Tile> tiles;
};

struct Rows {
  std::vector<Row> all;
  std::vector<Block> blocks;
  std::vector<bool> is_used_E;
  std::vector<int64_t> idle_tokens;  // without an expert
};

// Tokens are taken in token_order_T, which brings a block few experts with many rows each.
inline Rows rows_of(const SharedGluParams& p, int64_t tile_rows) {
  Rows rows;
  rows.is_used_E.resize(p.experts);
  std::vector<std::vector<Row>> rows_E(p.experts);
  for (int64_t first = 0; first < p.tokens; first += kBlockTokens) {
    Block block{.first_token = first, .tokens = std::min(kBlockTokens, p.tokens - first)};
    std::vector<int64_t> left(block.tokens), seen(block.tokens);
    for (int32_t place = 0; place < block.tokens; ++place) {
      const int32_t t = p.token_order_T[first + place];
      for (int32_t slot = t * p.slots; slot < (t + 1) * p.slots; ++slot) {
        if (p.expert_TK[slot] < 0) continue;
        rows_E[p.expert_TK[slot]].push_back({.slot = slot, .token = t, .place = place});
        ++left[place];
      }
      if (left[place] == 0) rows.idle_tokens.push_back(t);
    }
    block.begin = rows.all.size();
    for (int64_t e = 0; e < p.experts; ++e) {
      if (rows_E[e].empty()) continue;
      rows.is_used_E[e] = true;
      for (Row& row : rows_E[e]) {
        row.is_first = seen[row.place]++ == 0;
        row.is_last = --left[row.place] == 0;
      }
      const Row padding{
          .slot = -1, .token = -1, .place = static_cast<int32_t>(block.tokens), .is_first = true};
      rows_E[e].resize(round_up(rows_E[e].size(), kRows), padding);
      const int64_t begin = rows.all.size(), end = begin + rows_E[e].size();
      rows.all.insert(rows.all.end(), rows_E[e].begin(), rows_E[e].end());
      for (int64_t i = begin; i < end; i += tile_rows) {
        block.tiles.push_back({e, i, std::min(end, i + tile_rows)});
      }
      rows_E[e].clear();
    }
    block.end = rows.all.size();
    rows.blocks.push_back(std::move(block));
  }
  return rows;
}

// One of the two projections that enter the activation; null is what is not there.
template <class T, class P>
struct Side {
  using S = Wide<T>;
  const T* base_TF;
  Buffer<P> a, b;              // s a of every row by rank, B by rank
  Buffer<S> scale_EF, bias_F;  // of padded rows
};

// gate_k or up_k of a step.
template <class T>
struct SideRows {
  using S = Wide<T>;
  const T* base[kRows];
  const S *scale, *bias;

  // `product` is s B a; `before` becomes what DoRA scales, where it may be there.
  template <bool kDora>
  INLINE Vec<S> at(int m, int64_t f, Vec<S> product, Vec<S>& before) const {
    before = load(base[m] + f) + product;
    if (!kDora || scale == nullptr) return before;
    if (bias == nullptr) return load(scale + f) * before;
    before -= load(bias + f);
    return load(scale + f) * before + load(bias + f);
  }
};

// kCount products of a step: c [J, kRows] with a [.., J, kWidth], vectors of features.
template <class P, int kCount>
struct Products {
  const P *c[kCount], *a[kCount];
  int64_t J;

  // y[v][i] is of product i and the features from f + v * kWidth on.
  template <class V>
  INLINE void at(int64_t f, V (&y)[kStepVectors][kCount][kRows]) const {
    constexpr int64_t kW = kWidth<Wide<Kept<P>>>;
    constexpr int kTogether = kStepVectors == 1 ? kCount : 1;  // what registers hold
    for (int i0 = 0; i0 < kCount; i0 += kTogether) {
      V sum[kStepVectors][kTogether][kRows] = {};
      const P* a_f[kTogether];
      for (int i = 0; i < kTogether; ++i) a_f[i] = a[i0 + i] + f * J;
#pragma GCC unroll 2
      for (int64_t j = 0; j < J; ++j) {
        for (int i = 0; i < kTogether; ++i) {
          for (int v = 0; v < kStepVectors; ++v) {
            auto a_j = load_factors(a_f[i] + (v * J + j) * kW);
            in_register(a_j);
            for (int m = 0; m < kRows; ++m) {
              sum[v][i][m] = add_product(c[i0 + i] + j * kRows + m, a_j, sum[v][i][m]);
            }
          }
        }
      }
      for (int v = 0; v < kStepVectors; ++v) {
        for (int i = 0; i < kTogether; ++i) {
          for (int m = 0; m < kRows; ++m) y[v][i0 + i][m] = sum[v][i][m];
        }
      }
    }
  }
};

// Rows that are soon read or written: they lie on pages of their own, where no prefetcher of the
// processor foresees them. Their lines are fetched one by one beside the arithmetic, since many at
// once would make it wait, and into the level-2 cache: the first has no room for a step's rows
// beside its experts' factors.
template <class T, int kTensors>
struct Ahead {
  const T* rows[kTensors][kRows];

  INLINE void fetch(int64_t f) const {
    if (f * sizeof(T) % 64 != 0) return;
    for (const auto& tensor : rows) {
      for (const T* row : tensor) __builtin_prefetch(row + f, 0, 2);
    }
  }
};

// A sum over a token's rows: the first of them begins it, the last hands it out.
template <class T>
struct TokenSum {
  using S = Wide<T>;
  const S* old;
  S* sum;
  T* out;  // null but for the last row

  INLINE void add(int64_t f, Vec<S> x) const {
    const Vec<S> total = load(old + f) + x;
    if (out == nullptr) {
      store(sum + f, total);
    } else {
      store_normal(out + f, total);
    }
  }
};

// Factors of all experts lie as their products take them: those that reduce ranks as
// [E, F / kWidth, J, kWidth], those that reduce features as [E, F / kTerms, R]. Padding is zero.
template <class T, class P>
class Glu {
 protected:
  using S = Wide<T>;
  static constexpr int64_t kW = kWidth<S>, kPad = std::max<int64_t>(kStepVectors * kW, kRows);

  const SharedGluParams& p;
  const int64_t J, R, F;        // factors of a sum over ranks; ranks and features, padded
  const int64_t width, chunks;  // of F
  const Rows rows;
  const int64_t N;
  const bool has_down;
  const Buffer<S> zeros;  // a chunk's features, or a chunk of a matrix that is not there
  Side<T, P> gate, up;

  Glu(const SharedGluParams& params, int64_t tile_rows)
      : p(params),
        J((p.rank + kTerms<P> - 1) / kTerms<P>),
        R(round_up(p.rank, kW)),
        F(round_up(p.ffn, kPad)),
        width(chunk_width(p.ffn)),
        chunks((p.ffn + width - 1) / width),
        rows(rows_of(p, tile_rows)),
        N(rows.all.size()),
        has_down(p.a_down_ERF != nullptr),
        zeros(zeroed(width * std::max<int64_t>(J, 1))) {
    const auto side = [&](auto* base, auto* a, auto* b, auto* scale, auto* bias) {
      return Side<T, P>{static_cast<const T*>(base),
                        rows_by_rank(a, p.scaling),
                        b_by_rank(b),
                        padded_rows(scale, p.experts),
                        padded_rows(scale == nullptr ? nullptr : bias, 1)};
    };
    gate = side(p.gate_TF, p.a_gate_TKR, p.b_gate_EFR, p.scale_gate_EF, p.bias_gate_F);
    up = side(p.up_TF, p.a_up_TKR, p.b_up_EFR, p.scale_up_EF, p.bias_up_F);
  }

  static Buffer<S> zeroed(int64_t count) {
    auto x = buffer<S>(count);
    std::fill_n(x.get(), count, S(0));
    return x;
  }

  // An even number of chunks, of one width but for the last: two threads share them evenly.
  static int64_t chunk_width(int64_t ffn) {
    const int64_t chunks =
        std::max<int64_t>(2, round_up((ffn + kMostColumns - 1) / kMostColumns, 2));
    return std::max(kPad, round_up((ffn + chunks - 1) / chunks, kPad));
  }
  int64_t columns_of(int64_t chunk) const { return std::min(width, p.ffn - chunk * width); }
  // A chunk whose last columns would share a vector with what is behind them.
  bool is_ragged(int64_t chunk) const { return columns_of(chunk) % kPad != 0; }
  int64_t padded_columns(int64_t chunk) const { return round_up(columns_of(chunk), kPad); }
  int64_t by_rank_at(int64_t e, int64_t f) const { return (e * F + f) * J; }
  int64_t by_feature_at(int64_t e, int64_t f) const { return (e * F + f) / kTerms<P> * R; }

  // put(an expert's matrix in src, first feature, features, the same of the factors), a chunk at a
  // time; `at` says where its factors begin.
  template <class At, class Put>
  Buffer<P> factors(const void* src, const At& at, const Put& put) const {
    if (src == nullptr) return nullptr;
    auto dst = buffer<P>(at(p.experts, 0));
    parallel_for(p.experts * chunks, [&](int64_t i) {
      const int64_t e = i / chunks, chunk = i % chunks, f = chunk * width;
      if (!rows.is_used_E[e]) return;
      P* to = &dst[at(e, f)];
      const int64_t size = at(0, padded_columns(chunk)) * sizeof(P);
      if (is_ragged(chunk)) std::fill_n(reinterpret_cast<char*>(to), size, 0);
      put(static_cast<const S*>(src) + e * p.rank * p.ffn, f, columns_of(chunk), to);
    });
    return dst;
  }
  template <class Put>
  Buffer<P> by_rank(const void* src, const Put& put) const {
    const auto at = [&](int64_t e, int64_t f) { return by_rank_at(e, f); };
    return factors(src, at, [&](const S* from, int64_t f, int64_t columns, P* to) {
      for (int64_t i = 0; i < columns; i += kW) {
        put(from, f + i, std::min(kW, columns - i), to + by_rank_at(0, i));
      }
    });
  }
  template <class Put>
  Buffer<P> by_feature(const void* src, const Put& put) const {
    return factors(src, [&](int64_t e, int64_t f) { return by_feature_at(e, f); }, put);
  }
  Buffer<P> b_by_rank(const void* b_EFR) const {
    return by_rank(b_EFR, [&](const S* b_FR, int64_t f, int64_t columns, P* to) {
      pack_transposed(b_FR + f * p.rank, columns, p.rank, p.rank, to, kW);
    });
  }
  Buffer<P> a_by_rank(const void* a_ERF) const {
    return by_rank(a_ERF, [&](const S* a_RF, int64_t f, int64_t columns, P* to) {
      pack(a_RF + f, p.rank, columns, p.ffn, to, kW);
    });
  }
  Buffer<P> b_by_feature(const void* b_EFR) const {
    return by_feature(b_EFR, [&](const S* b_FR, int64_t f, int64_t columns, P* to) {
      pack(b_FR + f * p.rank, columns, p.rank, p.rank, to, R);
    });
  }
  Buffer<P> a_by_feature(const void* a_ERF) const {
    return by_feature(a_ERF, [&](const S* a_RF, int64_t f, int64_t columns, P* to) {
      pack_transposed(a_RF + f, p.rank, columns, p.ffn, to, R);
    });
  }

  // take(step, its slots' rows [kRows, R] of src, times `scale`)
  template <class Take>
  void for_each_step(const void* src_TKR, double scale, const Take& take) const {
    // short chunks: of a thousand tokens' rows every thread has some
    parallel_chunks(N / kRows, rows_per_chunk(8 * kRows * R), [&](int64_t begin, int64_t end) {
      const auto step = buffer<S>(kRows * R);
      for (int64_t i = begin; i < end; ++i) {
        std::fill_n(step.get(), kRows * R, S(0));
        for (int m = 0; m < kRows; ++m) {
          const int64_t slot = rows.all[i * kRows + m].slot;
          if (slot < 0) continue;
          const S* from = static_cast<const S*>(src_TKR) + slot * p.rank;
          for_each_vector<S>(p.rank, [&](int64_t r, auto n) {
            store_part(&step[m * R + r], splat(static_cast<S>(scale)) * load_part(from + r, n), n);
          });
        }
        take(i, step.get());
      }
    });
  }
  // Of every step [J, kRows]
  Buffer<P> rows_by_rank(const void* src_TKR, double scale) const {
    if (src_TKR == nullptr) return nullptr;
    auto dst = buffer<P>(N * J);
    for_each_step(src_TKR, scale, [&](int64_t i, const S* step) {
      const auto kept = buffer<Kept<P>>(kRows * R);
      convert(step, kRows * R, kept.get());
      const P* row = reinterpret_cast<const P*>(kept.get());
      for (int m = 0; m < kRows; ++m, row += R / kTerms<P>) {
        for (int64_t j = 0; j < J; ++j) dst[(i * J + j) * kRows + m] = row[j];
      }
    });
    return dst;
  }
  // [N / kTerms, R]
  Buffer<P> rows_by_row(const void* src_TKR, double scale) const {
    if (src_TKR == nullptr) return nullptr;
    auto dst = buffer<P>(N / kTerms<P> * R);
    for_each_step(src_TKR, scale, [&](int64_t i, const S* step) {
      pack(step, kRows, R, R, &dst[i * kRows / kTerms<P> * R], R);
    });
    return dst;
  }

  Buffer<S> padded_rows(const void* src, int64_t count) const {
    if (src == nullptr) return nullptr;
    auto dst = zeroed(count * F);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(static_cast<const S*>(src) + i * p.ffn, p.ffn, &dst[i * F]);
    }
    return dst;
  }

  // The step that begins with row n, of a tile and a chunk.
  template <int kCount>
  Products<P, kCount> products(const std::pair<const P*, const P*> (&factors)[kCount],
                               const Tile& tile,
                               int64_t n,
                               int64_t chunk) const {
    Products<P, kCount> products{.J = J};
    for (int i = 0; i < kCount; ++i) {
      const auto [c, a] = factors[i];
      const P* nothing = reinterpret_cast<const P*>(zeros.get());
      products.c[i] = c == nullptr ? nothing : c + n * J;
      products.a[i] = c == nullptr ? nothing : a + by_rank_at(tile.expert, chunk * width);
    }
    return products;
  }
  SideRows<T> side_rows(
      const Side<T, P>& side, const Tile& tile, int64_t n, int64_t chunk, T* copies) const {
    SideRows<T> found{};
    rows_of_tokens(side.base_TF, n, chunk, copies, found.base);
    const int64_t f = chunk * width;
    if (side.scale_EF != nullptr) found.scale = &side.scale_EF[tile.expert * F + f];
    if (side.bias_F != nullptr) found.bias = &side.bias_F[f];
    return found;
  }
  // Where the tokens' features of a chunk lie in x_TF, or padded in `copies` [kRows, kStride].
  void rows_of_tokens(const T* x_TF, int64_t n, int64_t chunk, T* copies, const T** found) const {
    for (int m = 0; m < kRows; ++m, copies += kStride) {
      const int64_t t = rows.all[n + m].token;
      found[m] = reinterpret_cast<const T*>(zeros.get());
      if (t < 0) continue;
      found[m] = x_TF + t * p.ffn + chunk * width;
      if (!is_ragged(chunk)) continue;
      std::fill_n(copies, padded_columns(chunk), T{});
      found[m] = std::copy_n(found[m], columns_of(chunk), copies) - columns_of(chunk);
    }
  }
  // Of the step that begins with row n, be it the next one.
  template <int kTensors>
  Ahead<T, kTensors> ahead(const T* const (&x_TF)[kTensors],
                           const Block& block,
                           int64_t n,
                           int64_t chunk) const {
    Ahead<T, kTensors> found;
    for (int m = 0; m < kRows; ++m) {
      const int64_t t = std::max(rows.all[std::min(n + m, block.end - 1)].token, 0);
      for (int i = 0; i < kTensors; ++i) {
        found.rows[i][m] = x_TF[i] + t * p.ffn + chunk * width;
      }
    }
    return found;
  }
  // Of row n, `sums` being those of a block's tokens and of one more, [tokens + 1, kStride].
  TokenSum<T> token_sum(int64_t n, int64_t chunk, S* sums, void* y_TF) const {
    const Row& row = rows.all[n];
    S* sum = sums + row.place * kStride;
    T* out = nullptr;
    if (row.is_last && !is_ragged(chunk)) {
      out = static_cast<T*>(y_TF) + int64_t{row.token} * p.ffn + chunk * width;
    }
    return {row.is_first ? zeros.get() : sum, sum, out};
  }
  // What token_sum could not hand out.
  void write_ragged(const Block& block, int64_t chunk, const S* sums, void* y_TF) const {
    for (int64_t i = 0; is_ragged(chunk) && i < block.tokens; ++i) {
      const int64_t t = p.token_order_T[block.first_token + i];
      convert(
          sums + i * kStride, columns_of(chunk), static_cast<T*>(y_TF) + t * p.ffn + chunk * width);
    }
  }
  // After all else: those of tokens without an expert.
  void write_idle(void* y_TF) const {
    for (int64_t t : rows.idle_tokens) std::fill_n(static_cast<T*>(y_TF) + t * p.ffn, p.ffn, T{});
  }

  S weight_of(int64_t n) const {
    const int64_t slot = rows.all[n].slot;
    return slot < 0 ? 0 : static_cast<const S*>(p.weight_TK)[slot];
  }
  bool has_dropout() const { return has_down && p.dropout != 0; }
  // Without DoRA and dropout: to ask a row for them takes a tenth of the time.
  bool is_plain() const {
    return p.scale_gate_EF == nullptr && p.scale_up_EF == nullptr && !has_dropout();
  }
  // What dropout multiplies h by, or null.
  const S* draw_mask(int64_t n, int64_t chunk, S* mask) const {
    if (!has_dropout()) return nullptr;
    std::fill_n(mask, kRows * kStride, S(1));
    for (int m = 0; m < kRows; ++m) {
      const int64_t slot = rows.all[n + m].slot;
      S* row = mask + m * kStride;
      if (slot < 0) continue;
      philox_dropout(row, width, *p.seed, slot, chunk * width, p.dropout, row);
    }
    return mask;
  }

  // z [kRows, R] += a step's rows x [kRows, kStride] times a matrix by feature.
  __attribute__((noinline)) void reduce_features(const Kept<P>* x,
                                                 const P* a,
                                                 int64_t chunk,
                                                 S* z) const {
    constexpr int64_t kRow = kStride / kTerms<P>, kChainFactors = kChain / kTerms<P>;
    const P* c = reinterpret_cast<const P*>(x);
    const int64_t factors = padded_columns(chunk) / kTerms<P>;
    for (int64_t j = 0; j < factors; j += kChainFactors) {
      const int64_t count = std::min(kChainFactors, factors - j);
      add_products<kRows, kRow, 1>(c + j, a + j * R, count, R, z);
    }
  }
  // sums [features, R] += y^T z of a tile's rows, y [rows / kTerms, kStride] and z by row.
  __attribute__((noinline)) void reduce_rows(
      const P* y, const P* z, const Tile& tile, int64_t chunk, S* sums) const {
    const int64_t count = (tile.end - tile.begin) / kTerms<P>;
    for (int64_t f = 0; f < padded_columns(chunk); f += kRows) {
      add_products<kRows, 1, kStride>(
          y + f, z + tile.begin / kTerms<P> * R, count, R, sums + f * R);
    }
  }
};

// Kernel<T, P> for the type of gate and up.
template <template <class, class> class Kernel>
void run_glu(const SharedGluParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, Fp16>) Kernel<T, FactorOf<T>>(p).run();
  });
}

}  // namespace mixlora::MIXLORA_ISA
