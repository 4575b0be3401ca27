// A warp computes 16 tokens' hbar in one range of columns:
//
//   blockIdx.x, threadIdx.y    the 16 tokens of token_order_T
//   blockIdx.y                 the range of F
//   loop                       the step along F: gate and up are read, hbar is written
//   loop                       the slot and, of the experts that the 16 tokens have in it, one
//
// It is bound by memory: gate, up and hbar move once, and what is read of the experts' matrices
// serves 16 tokens, and from the cache the block's other warps.
#include "shared_glu/glu.cuh"

namespace mixlora {
namespace {

constexpr int64_t kManyBlocks = 1024;

template <class T>
__global__ void glu_kernel(const __grid_constant__ Glu<T> glu,
                           const T* a_down_ERF,
                           const __grid_constant__ RowSums<Wide<T>> z) {
  using S = Wide<T>;
  const SharedGluParams& p = glu.p;
  DYNAMIC_SHARED(uint64_t, experts_KW);
  S* shared_sums = reinterpret_cast<S*>(experts_KW + p.slots * kWarps);
  const int64_t range = blockIdx.y, tile = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  const int64_t first = range * glu.range, last = smaller(glu.F, first + glu.range);
  const int warp = threadIdx.y;
  const Rows rows = rows_from(p, tile * kRows);
  find_experts(p, rows, experts_KW);
  S* sums = z.begin(p, range, tile, shared_sums);

  for (int64_t f = first; f < last; f += kColumns<T>) {
    Tile<T> hbar = {};
    for_each_visit(p, rows, experts_KW, warp, warp + 1, [&](const Visit& visit) {
      Tile<T> h = side_of(glu, glu.gate, visit, f), slope;
      activate_tile(p.act, h, slope);
      const Tile<T> up_k = side_of(glu, glu.up, visit, f);
      for_each_place<kPer<T>>([&](int i, int c) { h.at(i, c) *= up_k.at(i, c); });
      const auto weight = weights_of<T>(p, visit);
      for_each_place<kPer<T>>([&](int i, int c) {
        if (visit.mine[i]) hbar.at(i, c) += weight.x[i] * h.at(i, c);
      });
      if (!a_down_ERF) return;
      const Dropout<T> factors = dropout_of(glu, visit, f);
      for_each_place<kPer<T>>([&](int i, int c) { h.at(i, c) *= factors.at(i, c); });
      shrink(h,
             columns_of_matrix(glu, a_down_ERF, visit.expert, f),
             glu.F,
             glu.R,
             visit.mine,
             sums + visit.k * z.count * 4 * kLanes);
    });
    store_rows(glu, hbar, rows, f, p.hbar_TF);
  }
  z.end(p, range, tile, sums);
}

template <class T>
void forward(const SharedGluParams& p, CudaQueue& queue) {
  using S = Wide<T>;
  const int64_t blocks = divide_up(p.tokens, kBlockRows), steps = divide_up(p.ffn, kColumns<T>);
  const int64_t range_steps = divide_up(steps, std::max<int64_t>(1, kManyBlocks / blocks));
  const int64_t range = std::max<int64_t>(1, range_steps) * kColumns<T>;
  const int64_t ranges = std::max<int64_t>(1, divide_up(p.ffn, range));

  Copier<T> copier(p, queue);
  const Glu<T> glu = glu_for<T>(p, range, copier);
  const T* a_down_ERF = copier.by_rank(p.a_down_ERF, 1, p.ffn);
  copier.run();
  const int groups = a_down_ERF ? glu.R / 8 : 0;
  const RowOutput<S> output{static_cast<S*>(p.z_TKR), p.rank, groups, 1};
  const auto z = row_sums_for<S>(p, queue, ranges, {output});
  launch<glu_kernel<T>>(dim3(blocks, ranges),
                        dim3(kLanes, kWarps),
                        experts_bytes(p) + z.shared_bytes,
                        queue,
                        glu,
                        a_down_ERF,
                        z);
  add_rows(p, z, queue);
}

}  // namespace

void shared_glu_cuda(const SharedGluParams& p, CudaQueue& queue) {
  if (p.tokens == 0) return;
  run_glu(p, queue, [&](auto zero) { forward<decltype(zero)>(p, queue); });
}

}  // namespace mixlora
