// A block computes the gradients of a range of tokens in a range of columns:
//
//   blockIdx.x                 the range of token_order_T
//   blockIdx.y                 the range of F
//   loop, threadIdx.y          64 tokens, 16 for each warp
//   loop                       the step along F: gate, up, dhbar are read, dgate, dup written
//   loop                       the slot and, of the experts that the 64 tokens have in it, one
//
// gate_k and up_k are computed again. What is summed over F (da, dweight) is left for each range of
// columns, what is summed over tokens (dB, dA, DoRA's dm) for each range of tokens, and both are
// added in the order of the ranges afterwards. The latter are products of 16 columns, 8 ranks and
// the block's 64 tokens, which lie side by side in shared memory for that: each warp has some of
// them, and of those each lane its own sums, in memory that no other block has.
//
// It is bound by memory: gate, up, dhbar, dgate and dup move once.
#include "shared_glu/glu.cuh"

namespace mixlora {
namespace {

constexpr int64_t kRangeColumns = 256, kManyBlocks = 256;
constexpr int kRanksAtOnce = 64;          // of a product over tokens
constexpr int kStride = kBlockRows + 16;  // so that rows begin in different banks

// The gradient of a matrix, sum over an expert's rows of y[row][column] a[row][r].
template <class T>
struct Gradient {
  using S = Wide<T>;
  const T* a_NR;  // null: a is 1 and has one rank, for DoRA's scales
  int R;          // padded
  int64_t rank;
  S *sums, *d_EFR;  // null: not asked for; sums is [row range, E, step, product, lane, 4]
  int64_t f_stride, r_stride;
  S scale;

  static constexpr int kDown = kColumns<T> / 16;  // products below each other
  static_assert(kDown * kRanksAtOnce / 8 % kWarps == 0, "a product is always the same warp's");

  __host__ __device__ int products() const { return kDown * (R / 8); }
  __device__ S* at(const Glu<T>& glu, int64_t row_range, int expert, int64_t f) const {
    const int64_t steps = glu.F / kColumns<T>;
    const int64_t step = (row_range * glu.p.experts + expert) * steps + f / kColumns<T>;
    return sums + (step * products() * kLanes + threadIdx.x) * 4;
  }
};

// Of a side's adapter.
template <class T>
struct SideGradients {
  const T* b_ERF;  // a copy
  Gradient<T> b, scale;
};

template <class T>
struct GluBackward {
  Glu<T> glu;
  const T *a_down_EFR, *dz_NR;  // copies
  SideGradients<T> gate, up;
  Gradient<T> down;
  RowSums<Wide<T>> rows;
  int64_t row_blocks;  // of a range of rows
};

template <class T>
__device__ Four<T> ranks_of(const Gradient<T>& gradient, const Visit& visit, int h, int r) {
  Four<T> a = {};
  if (!visit.mine[h]) return a;
  if (gradient.a_NR) return load_pack<4>(gradient.a_NR + visit.slot[h] * gradient.R + r);
  narrow(r == 0, a.x[0]);
  return a;
}

// y of a visit, for add_outer.
template <class T>
__device__ void put(Wide<T> y, const Visit& visit, int h, int c, T* shared) {
  const int column = lane_quarter() * kPer<T> + c;
  const int m = threadIdx.y * kRows + lane_row() + 8 * h;
  narrow(visit.mine[h] ? y : Wide<T>(0), shared[column * kStride + m]);
}

// sums[column][r] += sum over the block's rows in the visit of y[row][column] a[row][r]; all of y
// has been put into shared memory.
template <class T>
__device__ void add_outer(
    const Glu<T>& glu, const Gradient<T>& gradient, const Visit& visit, int64_t f, T* shared) {
  using S = Wide<T>;
  constexpr int kDown = Gradient<T>::kDown;
  const T* y_CM = shared;
  T* a_RM = shared + kColumns<T> * kStride;
  S* sums = gradient.at(glu, blockIdx.x, visit.expert, f);
  const int m = threadIdx.y * kRows + lane_row();
  for (int first = 0; first < gradient.R; first += kRanksAtOnce) {
    const int ranks = smaller(kRanksAtOnce, gradient.R - first);
    for (int r = 4 * lane_quarter(); r < ranks; r += 16) {
      for (int h = 0; h < 2; ++h) {
        const Four<T> a = ranks_of(gradient, visit, h, first + r);
#pragma unroll
        for (int i = 0; i < 4; ++i) a_RM[(r + i) * kStride + m + 8 * h] = a.x[i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.y; i < kDown * (ranks / 8); i += kWarps) {
      const T* y_M = y_CM + (i % kDown * 16 + lane_row()) * kStride;
      const T* a_M = a_RM + i / kDown * 8 * kStride;
      S* sum = sums + (first / 8 * kDown + i) * 4 * kLanes;
      auto kept = load_pack<4>(sum);
      SumsOf<S> total;
#pragma unroll
      for (int j = 0; j < 4; ++j) total.x[j] = kept.x[j];
#pragma unroll 1
      for (int k = 0; k < kBlockRows; k += 16) {
        add_product(total, load_left(y_M + k, y_M + 8 * kStride + k), [&](int n, int quarter) {
          return a_M + n * kStride + k + 4 * quarter;
        });
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) kept.x[j] = total.x[j];
      store_pack(sum, kept);
    }
    __syncthreads();
  }
}

// From the gradient of gate_k, or of up_k: those of its scale, its base, its a and its B.
template <class T>
__device__ void side_backward(const Glu<T>& glu,
                              const Side<T>& side,
                              const SideGradients<T>& gradients,
                              const Visit& visit,
                              int64_t f,
                              Tile<T>& dy,
                              Tile<T>& dbase,
                              Wide<T>* da,
                              T* shared) {
  if (side.scale_EF) {
    const Tile<T> before = unscaled_side(glu, side, visit, f);
    const auto scale = load_columns(glu, side.scale_EF + visit.expert * glu.p.ffn, f);
    for_each_place<kPer<T>>([&](int h, int c) {
      put(dy.at(h, c) * before.at(h, c), visit, h, c, shared);
      dy.at(h, c) *= scale.x[c];
    });
    add_outer(glu, gradients.scale, visit, f, shared);
  }
  for_each_place<kPer<T>>([&](int h, int c) {
    if (visit.mine[h]) dbase.at(h, c) += dy.at(h, c);
  });
  if (!side.a_NR) return;
  for_each_place<kPer<T>>([&](int h, int c) { put(dy.at(h, c), visit, h, c, shared); });
  shrink(
      dy, columns_of_matrix(glu, gradients.b_ERF, visit.expert, f), glu.F, glu.R, visit.mine, da);
  add_outer(glu, gradients.b, visit, f, shared);
}

// The sums of this block over its rows, which each lane keeps for itself.
template <class T>
__device__ void clear(const Glu<T>& glu, const Gradient<T>& gradient, int64_t first, int64_t last) {
  if (!gradient.sums) return;
  for (int expert = 0; expert < glu.p.experts; ++expert) {
    for (int64_t f = first; f < last; f += kColumns<T>) {
      Wide<T>* sums = gradient.at(glu, blockIdx.x, expert, f);
      for (int i = threadIdx.y; i < gradient.products(); i += kWarps) {
        store_pack(sums + i * 4 * kLanes, Four<Wide<T>>{});
      }
    }
  }
}

template <class T>
__global__ void glu_backward_kernel(const __grid_constant__ GluBackward<T> b) {
  using S = Wide<T>;
  const Glu<T>& glu = b.glu;
  const SharedGluParams& p = glu.p;
  DYNAMIC_SHARED(uint64_t, experts_KW);
  S* shared_sums = reinterpret_cast<S*>(experts_KW + p.slots * kWarps);
  T* shared_factors =
      reinterpret_cast<T*>(reinterpret_cast<char*>(shared_sums) + b.rows.shared_bytes);
  const int64_t range = blockIdx.y;
  const int64_t first = range * glu.range, last = smaller(glu.F, first + glu.range);
  for (const Gradient<T>* x : {&b.gate.b, &b.gate.scale, &b.up.b, &b.up.scale, &b.down}) {
    clear(glu, *x, first, last);
  }

  const int64_t first_block = blockIdx.x * b.row_blocks;
  for (int64_t block = first_block; block < first_block + b.row_blocks; ++block) {
    const int64_t tile = block * kWarps + threadIdx.y;
    if (block * kBlockRows >= p.tokens) break;
    const Rows rows = rows_from(p, tile * kRows);
    __syncthreads();
    find_experts(p, rows, experts_KW);
    S* sums = b.rows.begin(p, range, tile, shared_sums);

    for (int64_t f = first; f < last; f += kColumns<T>) {
      Tile<T> dgate = {}, dup = {};
      for_each_visit(p, rows, experts_KW, 0, kWarps, [&](const Visit& visit) {
        Tile<T> value = side_of(glu, glu.gate, visit, f), slope, dh = {};
        activate_tile(p.act, value, slope);
        const Tile<T> up_k = side_of(glu, glu.up, visit, f);
        if (b.dz_NR) dh = expand_rows(glu, b.dz_NR, b.a_down_EFR, visit, f);
        const Stored<T> dhbar = load_rows(glu, p.dhbar_TF, rows, f);
        const Dropout<T> factors = dropout_of(glu, visit, f);
        const auto weight = weights_of<T>(p, visit);
        S dweight[2] = {};
        // From here on slope is the gradient of gate_k, and value that of up_k.
        for_each_place<kPer<T>>([&](int h, int c) {
          const S dhbar_c = widen(dhbar.rows[h].x[c]), h_c = value.at(h, c) * up_k.at(h, c);
          const S dh_c = weight.x[h] * dhbar_c + factors.at(h, c) * dh.at(h, c);
          dweight[h] += dhbar_c * h_c;
          put(factors.at(h, c) * h_c, visit, h, c, shared_factors);
          slope.at(h, c) *= dh_c * up_k.at(h, c);
          value.at(h, c) *= dh_c;
        });

        S* sums_k = sums + visit.k * b.rows.count * 4 * kLanes;
        S* of_up = sums_k + b.rows.outputs[0].count * 4 * kLanes;
        S* of_weight = of_up + b.rows.outputs[1].count * 4 * kLanes;
        for (int i = 0; i < 2; ++i) {
          const S sum = sum_lanes(dweight[i], 4);
          if (visit.mine[i] && lane_quarter() == 0) of_weight[2 * i] += sum;
        }
        if (b.dz_NR) add_outer(glu, b.down, visit, f, shared_factors);
        side_backward(glu, glu.gate, b.gate, visit, f, slope, dgate, sums_k, shared_factors);
        side_backward(glu, glu.up, b.up, visit, f, value, dup, of_up, shared_factors);
      });
      store_rows(glu, dgate, rows, f, p.dgate_TF);
      store_rows(glu, dup, rows, f, p.dup_TF);
    }
    b.rows.end(p, range, tile, sums);
  }
}

template <class T>
struct Gradients {
  Gradient<T> gradients[5];
};

// A warp adds one product's row ranges.
template <class T>
__global__ void add_gradients_kernel(const __grid_constant__ SharedGluParams p,
                                     const __grid_constant__ Gradients<T> gradients,
                                     int64_t row_ranges) {
  using S = Wide<T>;
  const Gradient<T>& gradient = gradients.gradients[blockIdx.y];
  const int64_t steps = (p.ffn + kColumns<T> - 1) / kColumns<T>, products = gradient.products();
  const int64_t size = p.experts * steps * products;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (!gradient.sums || at >= size) return;
  Four<S> total = {};
  for (int64_t range = 0; range < row_ranges; ++range) {
    const auto more =
        load_pack<4>(gradient.sums + ((range * size + at) * kLanes + threadIdx.x) * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) total.x[j] += more.x[j];
  }
  const int64_t expert = at / products / steps, step = at / products % steps;
  const int product = at % products, down = product % Gradient<T>::kDown;
  S* d_FR = gradient.d_EFR + expert * p.ffn * gradient.rank;
  for_each_place<2>([&](int h, int j) {
    const int64_t f = step * kColumns<T> + down * 16 + lane_row() + 8 * h;
    const int r = product / Gradient<T>::kDown * 8 + 2 * lane_quarter() + j;
    if (f >= p.ffn || r >= gradient.rank) return;
    d_FR[f * gradient.f_stride + r * gradient.r_stride] = gradient.scale * total.x[2 * h + j];
  });
}

template <class T>
void backward(const SharedGluParams& p, CudaQueue& queue) {
  using S = Wide<T>;
  const int64_t blocks = divide_up(p.tokens, kBlockRows);
  const int64_t ranges = std::max<int64_t>(1, divide_up(p.ffn, kRangeColumns));
  // A range of rows leaves E F R numbers for each matrix, tokens have F: few of the former.
  const int64_t few = p.tokens / (2 * p.experts * std::max<int64_t>(1, p.rank));
  const int64_t wanted = std::max<int64_t>(1, std::min({kManyBlocks / ranges, blocks, few}));
  const int64_t row_blocks = std::max<int64_t>(1, divide_up(blocks, wanted));
  const int64_t row_ranges = std::max<int64_t>(1, divide_up(blocks, row_blocks));

  Copier<T> copier(p, queue);
  const Glu<T> glu = glu_for<T>(p, kRangeColumns, copier);
  const int groups = glu.R / 8;
  const S scaling = static_cast<S>(p.scaling);
  const auto gradient = [&](Gradient<T> gradient) {
    const int64_t size = row_ranges * p.experts * (glu.F / kColumns<T>)*gradient.products();
    if (gradient.d_EFR) gradient.sums = allocate<S>(queue, size * kLanes * 4);
    return gradient;
  };
  const auto of_matrix = [&](const T* a_NR, void* d, int64_t f_stride, int64_t r_stride, S scale) {
    return gradient({a_NR, glu.R, p.rank, nullptr, static_cast<S*>(d), f_stride, r_stride, scale});
  };
  const auto of_side = [&](const Side<T>& side, const void* b_EFR, void* db_EFR, void* dscale_EF) {
    return SideGradients<T>{
        copier.by_rank(b_EFR, p.rank, 1),
        of_matrix(side.a_NR, db_EFR, p.rank, 1, scaling),
        gradient({nullptr, 8, 1, nullptr, static_cast<S*>(dscale_EF), 1, 1, 1})};
  };
  const auto of_rows = [&](void* da_TKR, int64_t rank, int groups, S scale) {
    return RowOutput<S>{static_cast<S*>(da_TKR), rank, groups, scale};
  };
  const T* a_down_EFR = copier.by_column(p.a_down_ERF, 1, p.ffn);
  const T* dz_NR = copier.rows(p.dz_TKR);
  const GluBackward<T> b{
      glu,
      a_down_EFR,
      dz_NR,
      of_side(glu.gate, p.b_gate_EFR, p.db_gate_EFR, p.dscale_gate_EF),
      of_side(glu.up, p.b_up_EFR, p.db_up_EFR, p.dscale_up_EF),
      of_matrix(dz_NR, p.da_down_ERF, 1, p.ffn, 1),
      row_sums_for<S>(p,
                      queue,
                      ranges,
                      {of_rows(p.da_gate_TKR, p.rank, glu.gate.a_NR ? groups : 0, scaling),
                       of_rows(p.da_up_TKR, p.rank, glu.up.a_NR ? groups : 0, scaling),
                       of_rows(p.dweight_TK, 1, 1, 1)}),
      row_blocks};
  copier.run();
  const int64_t factors_bytes =
      (kColumns<T> + std::min(kRanksAtOnce, std::max(glu.R, 8))) * kStride * sizeof(T);
  launch<glu_backward_kernel<T>>(dim3(row_ranges, ranges),
                                 dim3(kLanes, kWarps),
                                 experts_bytes(p) + b.rows.shared_bytes + factors_bytes,
                                 queue,
                                 b);
  add_rows(p, b.rows, queue);

  const Gradients<T> gradients{{b.gate.b, b.gate.scale, b.up.b, b.up.scale, b.down}};
  const int64_t size = p.experts * (glu.F / kColumns<T>)*Gradient<T>::kDown * std::max(groups, 1);
  if (size == 0) return;
  launch<add_gradients_kernel<T>>(
      dim3(divide_up(size, kWarps), 5), dim3(kLanes, kWarps), 0, queue, p, gradients, row_ranges);
}

}  // namespace

void shared_glu_backward_cuda(const SharedGluParams& p, CudaQueue& queue) {
  run_glu(p, queue, [&](auto zero) { backward<decltype(zero)>(p, queue); });
}

}  // namespace mixlora
