#include "shared_glu/few_rows.h"
#include "shared_glu/glu.h"

namespace mixlora::MIXLORA_ISA {
namespace {

constexpr int64_t kStripChunks = 4;  // the sums of z are for so many

template <class T, class P>
class Forward : Glu<T, P> {
  using Base = Glu<T, P>;
  using Base::p, Base::chunks, Base::rows, Base::N, Base::R, Base::has_down, Base::kW;
  using typename Base::S;

 public:
  explicit Forward(const SharedGluParams& params) : Base(params, kRows) {
    const bool is_plain = this->is_plain();
    with_activation(p.act, [&](auto kAct) {
      activate_rows_ = is_plain ? activate_rows<kAct, true> : activate_rows<kAct, false>;
    });
  }

  void run() {
    const int64_t strips = (chunks + kStripChunks - 1) / kStripChunks;
    a_down_ = this->a_by_feature(p.a_down_ERF);
    z_NR_ = buffer<S>(has_down ? strips * N * R : 0);
    parallel_for(rows.blocks.size() * strips, [&](int64_t i) {
      const int64_t strip = i % strips, first = strip * kStripChunks;
      const int64_t last = std::min(chunks, first + kStripChunks);
      strip_of_block(rows.blocks[i / strips], first, last, z_NR_.get() + strip * N * R);
    });
    this->write_idle(p.hbar_TF);
    if (has_down) add_strips(strips);
  }

 private:
  struct Step {
    int64_t columns;
    Products<P, 2> products;
    SideRows<T> gate, up;
    Ahead<T, 3> ahead;
    TokenSum<T> hbar[kRows];
    S weight[kRows];
    const S* mask;
    Kept<P>* h;  // [kRows, kStride]
  };

  void (*activate_rows_)(const Step&);
  Buffer<P> a_down_;
  Buffer<S> z_NR_;  // strip by strip

  // h = act(gate) up, and weight h for hbar.
  template <Activation kAct, bool kPlain>
  static void activate_rows(const Step& step) {
    for (int64_t f0 = 0; f0 < step.columns; f0 += kStepVectors * kW) {
      Vec<S> product[kStepVectors][2][kRows];
      step.products.at(f0, product);
      for (int v = 0; v < kStepVectors; ++v) {
        const int64_t f = f0 + v * kW;
        step.ahead.fetch(f);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
          Vec<S> h, slope, before;
          activate<kAct, Kept<P>>(
              step.gate.template at<!kPlain>(m, f, product[v][0][m], before), h, slope);
          h *= step.up.template at<!kPlain>(m, f, product[v][1][m], before);
          step.hbar[m].add(f, splat(step.weight[m]) * h);
          if (!kPlain && step.mask != nullptr) h *= load(step.mask + m * kStride + f);
          store_normal(step.h + m * kStride + f, h);
        }
      }
    }
  }

  void strip_of_block(const Block& block, int64_t first, int64_t last, S* z_NR) const {
    const auto sums = buffer<S>((block.tokens + 1) * kStride);
    const auto mask = buffer<S>(kRows * kStride);
    const auto copies = buffer<T>(2 * kRows * kStride);
    const auto h = buffer<Kept<P>>(kRows * kStride);
    if (has_down) std::fill(z_NR + block.begin * R, z_NR + block.end * R, S(0));
    for (int64_t chunk = first; chunk < last; ++chunk) {
      for (const Tile& tile : block.tiles) {
        const int64_t n = tile.begin;
        T* up_copies = copies.get() + kRows * kStride;
        Step step{.columns = this->padded_columns(chunk),
                  .products = this->template products<2>({{this->gate.a.get(), this->gate.b.get()},
                                                          {this->up.a.get(), this->up.b.get()}},
                                                         tile,
                                                         n,
                                                         chunk),
                  .gate = this->side_rows(this->gate, tile, n, chunk, copies.get()),
                  .up = this->side_rows(this->up, tile, n, chunk, up_copies),
                  .ahead = this->template ahead<3>(
                      {this->gate.base_TF, this->up.base_TF, static_cast<const T*>(p.hbar_TF)},
                      block,
                      n + kRows,
                      chunk),
                  .mask = this->draw_mask(n, chunk, mask.get()),
                  .h = h.get()};
        for (int m = 0; m < kRows; ++m) {
          step.hbar[m] = this->token_sum(n + m, chunk, sums.get(), p.hbar_TF);
          step.weight[m] = this->weight_of(n + m);
        }
        activate_rows_(step);
        if (!has_down) continue;
        const P* a_down = &a_down_[this->by_feature_at(tile.expert, chunk * this->width)];
        this->reduce_features(h.get(), a_down, chunk, z_NR + n * R);
      }
      this->write_ragged(block, chunk, sums.get(), p.hbar_TF);
    }
  }

  void add_strips(int64_t strips) const {
    S* z_TKR = static_cast<S*>(p.z_TKR);
    for (int64_t slot = 0; slot < p.tokens * p.slots; ++slot) {
      if (p.expert_TK[slot] < 0) std::fill_n(z_TKR + slot * p.rank, p.rank, S(0));
    }
    parallel_chunks(N, rows_per_chunk(strips * p.rank), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        if (rows.all[n].slot < 0) continue;
        S* z = z_TKR + rows.all[n].slot * p.rank;
        for (int64_t strip = 0; strip < strips; ++strip) {
          const S* more = &z_NR_[(strip * N + n) * R];
          for (int64_t r = 0; r < p.rank; ++r) z[r] = (strip == 0 ? 0 : z[r]) + more[r];
        }
      }
    });
  }
};

}  // namespace

void shared_glu_cpu(const SharedGluParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!FewRowsGlu<T>::fits(p)) return run_glu<Forward>(p);
    with_activation(p.act, [&](auto kAct) { FewRowsGlu<T>(p).template run<kAct>(); });
  });
}

}  // namespace mixlora::MIXLORA_ISA
