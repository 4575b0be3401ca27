// What shared_glu's forward and backward share: which lane has what, the products, the sums.
//
// A warp takes 16 tokens of token_order_T, which brings them few experts, and walks along F in
// steps of kColumns columns. Of a tile [16, kColumns] a lane has
//
//   rows      lane / 4 and lane / 4 + 8
//   columns   kPer that lie side by side, from lane % 4 * kPer on: one load of each row
//
// A product y[m][n] = sum_j left[m][j] right[n][j] is taken 16 rows, 8 columns and 16 terms at a
// time (common/mma.cuh). Terms lie side by side in both operands, and which of them is called the
// j-th does not matter where both agree: lane l has four terms of left's rows l / 4 and l / 4 + 8,
// and four of right's row l / 4. So a tile is a left operand as it lies in registers, its columns
// being the terms, and an operand in memory is loaded four numbers at a time.
//
// Experts' matrices and slots' rows are copied first, in the type of the products: the terms of a
// product side by side, ranks and columns padded with zeros.
#pragma once

#include <cstring>

#include "common/activation.cuh"
#include "common/mma.cuh"
#include "common/philox.cuh"
#include "shared_glu/shared_glu.h"

namespace mixlora {
namespace {

constexpr int kWarps = 4, kRows = 16, kBlockRows = kWarps * kRows;
constexpr int kMaxExperts = 64;  // bits of a word

template <class T>
constexpr int kPer = sizeof(T) == 2 ? 8 : 4;
template <class T>
constexpr int kColumns = 4 * kPer<T>;

template <class T>
using Four = Pack<T, 4>;

// sums[j].x[2 * h + i]: row h of the lane's two, column 2 * j + i of its kPer.
template <class T>
struct Tile {
  SumsOf<Wide<T>> sums[kPer<T> / 2];

  __device__ Wide<T>& at(int h, int c) { return sums[c / 2].x[2 * h + c % 2]; }
  __device__ const Wide<T>& at(int h, int c) const { return sums[c / 2].x[2 * h + c % 2]; }
};

// Calls body(h, c) for each of the lane's two rows and kSize columns.
template <int kSize, class Body>
__device__ void for_each_place(const Body& body) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int c = 0; c < kSize; ++c) body(h, c);
  }
}

template <class X>
__device__ X smaller(X a, X b) {
  return a < b ? a : b;
}
inline __device__ int lane_row() { return threadIdx.x / 4; }
inline __device__ int lane_quarter() { return threadIdx.x % 4; }

// -- products -------------------------------------------------------------------------------------

// 16 rows of 16 terms, of which a lane has four of its two rows.
template <class T>
struct Left {
  Four<T> rows[2];
};
template <>
struct Left<Bf16> {
  TileA x;
};

template <class T>
__device__ Left<T> left_of(const Four<T> (&rows)[2]) {
  if constexpr (std::is_same_v<T, Bf16>) {
    uint32_t words[2][2];
    memcpy(words, rows, sizeof words);
    return {{words[0][0], words[1][0], words[0][1], words[1][1]}};
  } else {
    return {rows[0], rows[1]};
  }
}

// Of rows in memory; `rows` are this lane's two.
template <class T>
__device__ Left<T> load_left(const T* row0, const T* row1) {
  const int j = 4 * lane_quarter();
  return left_of<T>({load_pack<4>(row0 + j), load_pack<4>(row1 + j)});
}

// sums += left right; at(n, quarter) points to four terms of right's row n. Where there are no
// tensor cores for T, lanes get each other's terms of left.
template <class T, class At>
__device__ void add_product(SumsOf<Wide<T>>& sums, const Left<T>& left, const At& at) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const Four<T> row = load_pack<4>(at(lane_row(), lane_quarter()));
    TileB right;
    memcpy(right.x, row.x, sizeof right.x);
    multiply<T>(sums, left.x, right);
  } else {
#pragma unroll 1
    for (int d = 0; d < 4; ++d) {
      const int quarter = lane_quarter() ^ d;
      const Four<T> right[2] = {load_pack<4>(at(2 * lane_quarter(), quarter)),
                                load_pack<4>(at(2 * lane_quarter() + 1, quarter))};
      for_each_place<4>([&](int h, int j) {
        const T x = __shfl_xor_sync(kAllLanes, left.rows[h].x[j], d);
        sums.x[2 * h] += x * right[0].x[j];
        sums.x[2 * h + 1] += x * right[1].x[j];
      });
    }
  }
}

// y[row][column] = sum over r of a[row][r] b[column][r]; a0 and a1 are those of the lane's rows.
template <class T>
__device__ Tile<T> expand(const T* a0, const T* a1, const T* b_FR, int R) {
  Tile<T> y = {};
#pragma unroll 1
  for (int r = 0; r < R; r += 16) {
    const Left<T> left = load_left(a0 + r, a1 + r);
#pragma unroll
    for (int j = 0; j < kPer<T> / 2; ++j) {
      add_product(y.sums[j], left, [&](int n, int quarter) {
        const int column = n / 2 * kPer<T> + 2 * j + n % 2;
        return b_FR + column * R + r + 4 * quarter;
      });
    }
  }
  return y;
}

// sums[row][r] += sum over columns of x[row][column] a[r][column], in the rows that are `mine`.
// Eight ranks are kLanes groups of four sums.
template <class T>
__device__ void shrink(
    const Tile<T>& x, const T* a_RF, int64_t F, int R, const bool (&mine)[2], Wide<T>* sums) {
  Left<T> left[kPer<T> / 4];
#pragma unroll
  for (int j = 0; j < kPer<T> / 4; ++j) {
    Four<T> rows[2];
    for_each_place<4>([&](int h, int c) { narrow(x.at(h, 4 * j + c), rows[h].x[c]); });
    left[j] = left_of<T>(rows);
  }
#pragma unroll 1
  for (int r = 0; r < R; r += 8, sums += 4 * kLanes) {
    SumsOf<Wide<T>> y = {};
#pragma unroll
    for (int j = 0; j < kPer<T> / 4; ++j) {
      add_product(y, left[j], [&](int n, int quarter) {
        return a_RF + (r + n) * F + quarter * kPer<T> + 4 * j;
      });
    }
    auto total = load_pack<4>(sums);
    for_each_place<2>([&](int h, int i) { total.x[2 * h + i] += mine[h] ? y.x[2 * h + i] : 0; });
    store_pack(sums, total);
  }
}

// -- rows and what they are in
// ---------------------------------------------------------------------

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

// The tokens of this lane's two rows; -1 behind the last.
struct Rows {
  int64_t token[2];
};

inline __device__ Rows rows_from(const SharedGluParams& p, int64_t first) {
  Rows rows;
  for (int h = 0; h < 2; ++h) {
    const int64_t place = first + lane_row() + 8 * h;
    const int token = place < p.tokens ? p.token_order_T[place] : -1;
    CHECK_INDEX(token, -1, p.tokens);
    rows.token[h] = token;
  }
  return rows;
}

// A tile's rows in their k-th slot; `mine` are those with the expert.
struct Visit {
  Rows rows;
  int64_t k, slot[2];
  int expert;
  bool mine[2];
};

inline __device__ int expert_of(const SharedGluParams& p, int64_t token, int64_t k) {
  const int expert = token < 0 ? -1 : p.expert_TK[token * p.slots + k];
  CHECK_INDEX(expert, -1, p.experts);
  return expert;
}

// experts_KW[k * kWarps + w]: a bit for each expert that the rows of warp w have in their k-th
// slot. All threads of the block take part.
inline __device__ void find_experts(const SharedGluParams& p, Rows rows, uint64_t* experts_KW) {
  for (int64_t k = 0; k < p.slots; ++k) {
    unsigned long long experts = 0;
    for (int64_t token : rows.token) {
      const int expert = expert_of(p, token, k);
      if (expert >= 0) experts |= 1ull << expert;
    }
    for (int distance = 4; distance < kLanes; distance *= 2) {
      experts |= __shfl_xor_sync(kAllLanes, experts, distance);
    }
    if (threadIdx.x == 0) experts_KW[k * kWarps + threadIdx.y] = experts;
  }
  __syncthreads();
}

// Calls body(visit) for every slot and every expert that warps first .. last - 1 have in it.
template <class Body>
__device__ void for_each_visit(const SharedGluParams& p,
                               Rows rows,
                               const uint64_t* experts_KW,
                               int first,
                               int last,
                               const Body& body) {
  for (int64_t k = 0; k < p.slots; ++k) {
    unsigned long long experts = 0;
    for (int w = first; w < last; ++w) experts |= experts_KW[k * kWarps + w];
    for (; experts; experts &= experts - 1) {
      Visit visit{rows, k, {}, __ffsll(experts) - 1, {}};
      for (int h = 0; h < 2; ++h) {
        visit.slot[h] = rows.token[h] < 0 ? 0 : rows.token[h] * p.slots + k;
        visit.mine[h] = expert_of(p, rows.token[h], k) == visit.expert;
      }
      body(visit);
    }
  }
}

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
      dropout.bits |= (factors.x[i] != 0 ? 1u : 0) << (h * kPer<T> + 4 * j + i);
    }
  });
  return dropout;
}

// -- sums over the columns of a range, one after the other over ranges
// -----------------------------

// What becomes of eight ranks' sums or more: y_NR = scale * sum.
template <class S>
struct RowOutput {
  S* y_NR;
  int64_t R;
  int count;  // groups of eight ranks
  S scale;
};

// Of each slot of a tile of 16 rows `count` groups of eight ranks. A block keeps them in shared
// memory where they fit, else where they are left for add_rows_kernel.
template <class S>
struct RowSums {
  S* left;  // [range, tile, K, count, lane, 4]
  int64_t tiles, ranges, count;
  int64_t shared_bytes;  // 0: they do not fit
  RowOutput<S> outputs[3];

  __device__ S* left_of_tile(const SharedGluParams& p, int64_t range, int64_t tile) const {
    return left + ((range * tiles + tile) * p.slots * count * kLanes + threadIdx.x) * 4;
  }

  // This lane's sums, zeroed.
  __device__ S* begin(const SharedGluParams& p, int64_t range, int64_t tile, S* shared) const {
    const int64_t size = p.slots * count;
    S* sums = shared_bytes ? shared + (threadIdx.y * size * kLanes + threadIdx.x) * 4
                           : left_of_tile(p, range, tile);
    for (int64_t i = 0; i < size; ++i) store_pack(sums + i * 4 * kLanes, Four<S>{});
    return sums;
  }

  __device__ void end(const SharedGluParams& p, int64_t range, int64_t tile, const S* sums) const {
    S* to = left_of_tile(p, range, tile);
    for (int64_t i = 0; shared_bytes && i < p.slots * count; ++i) {
      store_pack(to + i * 4 * kLanes, load_pack<4>(sums + i * 4 * kLanes));
    }
  }
};

// A warp adds one group's ranges.
template <class S>
__global__ void add_rows_kernel(const __grid_constant__ SharedGluParams p,
                                const __grid_constant__ RowSums<S> sums) {
  const int64_t groups = p.slots * sums.count, size = sums.tiles * groups;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (i >= size) return;
  Four<S> total = {};
  for (int64_t range = 0; range < sums.ranges; ++range) {
    const auto more = load_pack<4>(sums.left + ((range * size + i) * kLanes + threadIdx.x) * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) total.x[j] += more.x[j];
  }
  const Rows rows = rows_from(p, i / groups * kRows);
  const int64_t k = i % groups / sums.count;
  int group = i % sums.count;
  const RowOutput<S>* output = sums.outputs;
  for (; group >= output->count; ++output) group -= output->count;
  for_each_place<2>([&](int h, int j) {
    const int r = 8 * group + 2 * lane_quarter() + j;
    if (rows.token[h] < 0 || r >= output->R) return;
    const int64_t slot = rows.token[h] * p.slots + k;
    output->y_NR[slot * output->R + r] = output->scale * total.x[2 * h + j];
  });
}

// -- copies
// ----------------------------------------------------------------------------------------

constexpr int kCopyThreads = 256, kMaxCopies = 8;

// dst[b][i][j] = src[b][i][j] in T, 0 where src has no such row or column.
template <class T>
struct Copy {
  const Wide<T>* src;
  T* dst;
  int64_t batches, rows, columns, row_stride, column_stride, padded_rows, padded_columns;

  __host__ __device__ int64_t size() const { return batches * padded_rows * padded_columns; }
};

template <class T>
struct Copies {
  Copy<T> copies[kMaxCopies];
};

template <class T>
__global__ void copy_kernel(const __grid_constant__ Copies<T> copies) {
  const Copy<T>& copy = copies.copies[blockIdx.y];
  const int64_t at = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x;
  if (at >= copy.size()) return;
  const int64_t j = at % copy.padded_columns, i = at / copy.padded_columns % copy.padded_rows;
  const int64_t batch = at / copy.padded_columns / copy.padded_rows;
  Wide<T> x = 0;
  if (i < copy.rows && j < copy.columns) {
    x = copy.src[batch * copy.rows * copy.columns + i * copy.row_stride + j * copy.column_stride];
  }
  narrow(x, copy.dst[at]);
}

inline int64_t round_up(int64_t x, int64_t step) { return divide_up(x, step) * step; }

template <class T>
T* allocate(CudaQueue& queue, int64_t count) {
  return static_cast<T*>(queue.allocate(count * sizeof(T)));
}

// Collects copies, and makes them by one launch.
template <class T>
class Copier {
 public:
  const int64_t R, F;  // padded

  Copier(const SharedGluParams& p, CudaQueue& queue)
      : R(round_up(p.rank, 16)), F(round_up(p.ffn, kColumns<T>)), p(p), queue(queue) {}

  // [N, R]
  const T* rows(const void* src) {
    const int64_t N = p.tokens * p.slots;
    return add(src, 1, N, p.rank, p.rank, 1, N, R);
  }
  // [E, F, R], of a matrix whose neighbours of a column are `f_stride` apart
  const T* by_column(const void* src, int64_t f_stride, int64_t r_stride) {
    return add(src, p.experts, p.ffn, p.rank, f_stride, r_stride, F, R);
  }
  // [E, R, F]
  const T* by_rank(const void* src, int64_t f_stride, int64_t r_stride) {
    return add(src, p.experts, p.rank, p.ffn, r_stride, f_stride, R, F);
  }

  void run() {
    int64_t size = 0;
    for (int i = 0; i < count; ++i) size = std::max(size, copies.copies[i].size());
    if (size == 0) return;
    const dim3 grid(divide_up(size, kCopyThreads), count);
    launch<copy_kernel<T>>(grid, dim3(kCopyThreads), 0, queue, copies);
  }

 private:
  const SharedGluParams& p;
  CudaQueue& queue;
  Copies<T> copies = {};
  int count = 0;

  const T* add(const void* src,
               int64_t batches,
               int64_t rows,
               int64_t columns,
               int64_t row_stride,
               int64_t column_stride,
               int64_t padded_rows,
               int64_t padded_columns) {
    if (!src) return nullptr;
    Copy<T>& copy = copies.copies[count++];
    copy = {static_cast<const Wide<T>*>(src),
            nullptr,
            batches,
            rows,
            columns,
            row_stride,
            column_stride,
            padded_rows,
            padded_columns};
    return copy.dst = allocate<T>(queue, copy.size());
  }
};

// -- launches
// --------------------------------------------------------------------------------------

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

constexpr int64_t kSumsBytes = 32768;  // of shared memory, at most, for sums of rows

template <class S>
RowSums<S> row_sums_for(const SharedGluParams& p,
                        CudaQueue& queue,
                        int64_t ranges,
                        std::initializer_list<RowOutput<S>> outputs) {
  RowSums<S> sums = {};
  sums.tiles = divide_up(p.tokens, kBlockRows) * kWarps;
  sums.ranges = ranges;
  for (const auto& output : outputs) sums.count += output.count;
  std::copy(outputs.begin(), outputs.end(), sums.outputs);
  const int64_t size = p.slots * sums.count * 4 * kLanes;
  sums.left = allocate<S>(queue, ranges * sums.tiles * size);
  sums.shared_bytes = kWarps * size * sizeof(S);
  if (sums.shared_bytes > kSumsBytes) sums.shared_bytes = 0;
  return sums;
}

inline int64_t experts_bytes(const SharedGluParams& p) {
  return p.slots * kWarps * sizeof(uint64_t);
}

template <class S>
void add_rows(const SharedGluParams& p, const RowSums<S>& sums, CudaQueue& queue) {
  const int64_t size = sums.tiles * p.slots * sums.count;
  if (size == 0) return;
  launch<add_rows_kernel<S>>(
      dim3(divide_up(size, kWarps)), dim3(kLanes, kWarps), 0, queue, p, sums);
}

// Calls body(zero) for the type of gate_TF.
template <class Body>
void run_glu(const SharedGluParams& p, CudaQueue& queue, const Body& body) {
  if (p.experts > kMaxExperts) {
    queue.error = "num_experts must be at most 64 on a GPU, got " + std::to_string(p.experts);
    return;
  }
  switch (p.dtype) {
    case GluDtype::kDouble:
      return body(double{});
    case GluDtype::kFloat:
      return body(float{});
    case GluDtype::kBf16:
      return body(Bf16{});
  }
}

}  // namespace
}  // namespace mixlora
