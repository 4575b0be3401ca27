#include "shared_glu/glu.h"

namespace mixlora::MIXLORA_ISA {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kPartialBlocks = 8;  // partial sums are kept for so many blocks of tokens

template <class T, class P>
class Backward : Glu<T, P> {
  using Base = Glu<T, P>;
  using Base::p, Base::chunks, Base::rows, Base::N, Base::R, Base::F, Base::has_down, Base::kW;
  using typename Base::S;

 public:
  explicit Backward(const SharedGluParams& params) : Base(params, kTileRows) {
    const bool is_plain = this->is_plain();
    with_activation(p.act, [&](auto kAct) {
      differentiate_rows_ =
          is_plain ? differentiate_rows<kAct, true> : differentiate_rows<kAct, false>;
    });
  }

  void run() {
    const int64_t blocks = rows.blocks.size();
    for (int64_t first = 0; first < blocks; first += kPartialBlocks) {
      const int64_t last = std::min(blocks, first + kPartialBlocks);
      partial_rows_ = std::max(partial_rows_, rows.blocks[last - 1].end - rows.blocks[first].begin);
    }
    prepare(gate_, p.a_gate_TKR, p.b_gate_EFR, p.da_gate_TKR, p.db_gate_EFR, p.dscale_gate_EF);
    prepare(up_, p.a_up_TKR, p.b_up_EFR, p.da_up_TKR, p.db_up_EFR, p.dscale_up_EF);
    if (has_down) {
      dz_ = this->rows_by_rank(p.dz_TKR, 1);
      dz_by_row_ = this->rows_by_row(p.dz_TKR, 1);
      a_down_ = this->a_by_rank(p.a_down_ERF);
      da_down_ = buffer<S>(sums_at(p.experts, 0));
    }
    dweight_ = buffer<S>(chunks * partial_rows_);

    // Chunks of F are independent; what they add up over F is summed in their order afterwards.
    parallel_for(chunks, [&](int64_t chunk) { clear(chunk); });
    for (int64_t first = 0; first < blocks; first += kPartialBlocks) {
      const int64_t last = std::min(blocks, first + kPartialBlocks);
      first_row_ = rows.blocks[first].begin;
      parallel_for(chunks, [&](int64_t chunk) {
        for (int64_t i = first; i < last; ++i) block_rows(rows.blocks[i], chunk);
      });
      add_partials(rows.blocks[last - 1].end);
    }
    parallel_for(chunks, [&](int64_t chunk) { write(chunk); });
    for (void* y_TF : {p.dgate_TF, p.dup_TF}) this->write_idle(y_TF);
    for (int64_t slot = 0; slot < p.tokens * p.slots; ++slot) {
      if (p.expert_TK[slot] < 0) put_zeros(slot);
    }
  }

 private:
  // Of a side with an adapter; null is what is not wanted.
  struct SideGradient {
    Buffer<P> a_by_row, b;  // what dB and da are made of
    Buffer<S> own_db, da, dscale;
    S* db = nullptr;  // [E, F, R]
    void *da_TKR, *db_EFR, *dscale_EF;
  };

  struct Step {
    int64_t columns;
    Products<P, 3> products;
    SideRows<T> gate, up;
    Ahead<T, 5> ahead;
    const T* dhbar[kRows];
    S weight[kRows];
    const S* mask;
    TokenSum<T> dgate[kRows], dup[kRows];
    S *dweight, *dscale_gate, *dscale_up;
    P *dgate_by_row, *dup_by_row, *h_by_row;  // [kRows / kTerms, kStride]
    Kept<P>*dgate_kept, *dup_kept;            // [kRows, kStride]
  };

  void (*differentiate_rows_)(const Step&);
  SideGradient gate_, up_;
  Buffer<P> dz_, dz_by_row_, a_down_;
  Buffer<S> da_down_;  // [E, F, R]
  Buffer<S> dweight_;  // chunk by chunk, of the rows from first_row_ on; so is da
  int64_t first_row_ = 0, partial_rows_ = 0;

  int64_t sums_at(int64_t e, int64_t f) const { return (e * F + f) * R; }

  void prepare(SideGradient& side,
               const void* a_TKR,
               const void* b_EFR,
               void* da_TKR,
               void* db_EFR,
               void* dscale_EF) {
    side.da_TKR = da_TKR;
    side.db_EFR = db_EFR;
    side.dscale_EF = dscale_EF;
    if (b_EFR == nullptr) return;  // a too, and without tokens a may be null anyway
    side.a_by_row = this->rows_by_row(a_TKR, p.scaling);
    side.b = this->b_by_feature(b_EFR);
    side.da = buffer<S>(chunks * partial_rows_ * R);
    side.db = static_cast<S*>(db_EFR);
    if (F != p.ffn || R != p.rank) {
      side.own_db = buffer<S>(sums_at(p.experts, 0));
      side.db = side.own_db.get();
    }
    if (dscale_EF != nullptr) side.dscale = buffer<S>(p.experts * F);
  }

  void clear(int64_t chunk) const {
    const int64_t f = chunk * this->width, columns = this->padded_columns(chunk);
    for (int64_t e = 0; e < p.experts; ++e) {
      for (S* sums : {gate_.db, up_.db, da_down_.get()}) {
        if (sums != nullptr) std::fill_n(sums + sums_at(e, f), columns * R, S(0));
      }
      for (S* dscale : {gate_.dscale.get(), up_.dscale.get()}) {
        if (dscale != nullptr) std::fill_n(dscale + e * F + f, columns, S(0));
      }
    }
  }

  void write(int64_t chunk) const {
    const int64_t f = chunk * this->width, columns = this->columns_of(chunk);
    for (int64_t e = 0; e < p.experts; ++e) {
      for (const SideGradient* side : {&gate_, &up_}) {
        for (int64_t i = 0; side->own_db != nullptr && i < columns; ++i) {
          S* to = static_cast<S*>(side->db_EFR) + (e * p.ffn + f + i) * p.rank;
          std::copy_n(side->db + sums_at(e, f + i), p.rank, to);
        }
        if (side->dscale == nullptr) continue;
        S* to = static_cast<S*>(side->dscale_EF) + e * p.ffn + f;
        std::copy_n(&side->dscale[e * F + f], columns, to);
      }
      if (!has_down) continue;
      S* to = static_cast<S*>(p.da_down_ERF) + e * p.rank * p.ffn + f;
      transpose(&da_down_[sums_at(e, f)], columns, p.rank, R, to, p.ffn);
    }
  }

  // The gradients of kRows rows by gate_k and up_k, and h as A2 took it.
  template <Activation kAct, bool kPlain>
  static void differentiate_rows(const Step& step) {
    Vec<S> dweight[kRows] = {};
    for (int64_t f0 = 0; f0 < step.columns; f0 += kStepVectors * kW) {
      Vec<S> products[kStepVectors][3][kRows];
      step.products.at(f0, products);
      for (int v = 0; v < kStepVectors; ++v) {
        const int64_t f = f0 + v * kW;
        const auto& product = products[v];
        Vec<S> dscale_gate{}, dscale_up{};
        step.ahead.fetch(f);
#pragma GCC unroll 8
        for (int m0 = 0; m0 < kRows; m0 += kTerms<P>) {
          Vec<S> dgate[kTerms<P>], dup[kTerms<P>], h[kTerms<P>];
          for (int i = 0; i < kTerms<P>; ++i) {
            const int m = m0 + i;
            Vec<S> value, slope, gate_before, up_before;
            const Vec<S> gate = step.gate.template at<!kPlain>(m, f, product[0][m], gate_before);
            const Vec<S> up = step.up.template at<!kPlain>(m, f, product[1][m], up_before);
            activate<kAct, Kept<P>>(gate, value, slope);
            const Vec<S> dhbar = load(step.dhbar[m] + f);
            Vec<S> dh = product[2][m];
            h[i] = value * up;
            dweight[m] += dhbar * h[i];
            if (!kPlain && step.mask != nullptr) {
              const Vec<S> mask = load(step.mask + m * kStride + f);
              dh *= mask;
              h[i] *= mask;
            }
            dh += splat(step.weight[m]) * dhbar;
            dgate[i] = dh * up * slope;
            dup[i] = dh * value;
            if (!kPlain && step.gate.scale != nullptr) {
              dscale_gate += dgate[i] * gate_before;
              dgate[i] *= load(step.gate.scale + f);
            }
            if (!kPlain && step.up.scale != nullptr) {
              dscale_up += dup[i] * up_before;
              dup[i] *= load(step.up.scale + f);
            }
            step.dgate[m].add(f, dgate[i]);
            step.dup[m].add(f, dup[i]);
            if constexpr (kTerms<P> > 1) {
              store_normal(step.dgate_kept + m * kStride + f, dgate[i]);
              store_normal(step.dup_kept + m * kStride + f, dup[i]);
            }
          }
          const int64_t at = m0 / kTerms<P> * kStride + f;
          store_factors(step.dgate_by_row + at, dgate);
          store_factors(step.dup_by_row + at, dup);
          store_factors(step.h_by_row + at, h);
        }
        if (!kPlain && step.gate.scale != nullptr) {
          store(step.dscale_gate + f, load(step.dscale_gate + f) + dscale_gate);
        }
        if (!kPlain && step.up.scale != nullptr) {
          store(step.dscale_up + f, load(step.dscale_up + f) + dscale_up);
        }
      }
    }
    for (int m = 0; m < kRows; ++m) step.dweight[m] = sum(dweight[m]);
  }

  void block_rows(const Block& block, int64_t chunk) const {
    const int64_t sums_size = (block.tokens + 1) * kStride, step_size = kRows * kStride;
    const int64_t tile_size = kTileRows / kTerms<P> * kStride;
    const auto sums = buffer<S>(2 * sums_size);
    const auto mask = buffer<S>(step_size);
    const auto copies = buffer<T>(3 * step_size);
    const auto by_row = buffer<P>(3 * tile_size);
    const auto kept = buffer<Kept<P>>(kTerms<P> > 1 ? 2 * step_size : 0);
    S *dgate_sums = sums.get(), *dup_sums = dgate_sums + sums_size;
    P *dgate = by_row.get(), *dup = dgate + tile_size, *h = dup + tile_size;
    const int64_t f = chunk * this->width;
    for (const Tile& tile : block.tiles) {
      const auto dscale = [&](const SideGradient& side) {
        return side.dscale == nullptr ? nullptr : &side.dscale[tile.expert * F + f];
      };
      for (int64_t n = tile.begin; n < tile.end; n += kRows) {
        const int64_t done = (n - tile.begin) / kTerms<P> * kStride;
        Step step{.columns = this->padded_columns(chunk),
                  .products = this->template products<3>({{this->gate.a.get(), this->gate.b.get()},
                                                          {this->up.a.get(), this->up.b.get()},
                                                          {dz_.get(), a_down_.get()}},
                                                         tile,
                                                         n,
                                                         chunk),
                  .gate = this->side_rows(this->gate, tile, n, chunk, copies.get()),
                  .up = this->side_rows(this->up, tile, n, chunk, copies.get() + step_size),
                  .ahead = this->template ahead<5>({this->gate.base_TF,
                                                    this->up.base_TF,
                                                    static_cast<const T*>(p.dhbar_TF),
                                                    static_cast<const T*>(p.dgate_TF),
                                                    static_cast<const T*>(p.dup_TF)},
                                                   block,
                                                   n + kRows,
                                                   chunk),
                  .mask = this->draw_mask(n, chunk, mask.get()),
                  .dweight = &dweight_[chunk * partial_rows_ + n - first_row_],
                  .dscale_gate = dscale(gate_),
                  .dscale_up = dscale(up_),
                  .dgate_by_row = dgate + done,
                  .dup_by_row = dup + done,
                  .h_by_row = h + done};
        if constexpr (kTerms<P> > 1) {
          step.dgate_kept = kept.get();
          step.dup_kept = kept.get() + step_size;
        } else {
          step.dgate_kept = step.dgate_by_row;
          step.dup_kept = step.dup_by_row;
        }
        const T* dhbar_TF = static_cast<const T*>(p.dhbar_TF);
        this->rows_of_tokens(dhbar_TF, n, chunk, copies.get() + 2 * step_size, step.dhbar);
        for (int m = 0; m < kRows; ++m) {
          step.weight[m] = this->weight_of(n + m);
          step.dgate[m] = this->token_sum(n + m, chunk, dgate_sums, p.dgate_TF);
          step.dup[m] = this->token_sum(n + m, chunk, dup_sums, p.dup_TF);
        }
        differentiate_rows_(step);
        add_da(gate_, tile, n, chunk, step.dgate_kept);
        add_da(up_, tile, n, chunk, step.dup_kept);
      }
      const int64_t at = sums_at(tile.expert, f);
      for (auto [side, y] : {std::pair{&gate_, dgate}, {&up_, dup}}) {
        if (side->db == nullptr) continue;
        this->reduce_rows(y, side->a_by_row.get(), tile, chunk, side->db + at);
      }
      if (has_down) this->reduce_rows(h, dz_by_row_.get(), tile, chunk, &da_down_[at]);
    }
    this->write_ragged(block, chunk, dgate_sums, p.dgate_TF);
    this->write_ragged(block, chunk, dup_sums, p.dup_TF);
  }

  // da = B^T dy of a step and a chunk, s apart.
  void add_da(const SideGradient& side,
              const Tile& tile,
              int64_t n,
              int64_t chunk,
              const Kept<P>* dy) const {
    if (side.b == nullptr) return;
    S* da = &side.da[(chunk * partial_rows_ + n - first_row_) * R];
    std::fill_n(da, kRows * R, S(0));
    const P* b = &side.b[this->by_feature_at(tile.expert, chunk * this->width)];
    this->reduce_features(dy, b, chunk, da);
  }

  // Of rows first_row_ .. end - 1: their sums over F.
  void add_partials(int64_t end) const {
    const auto add_row = [&](int64_t row, int64_t slot) {
      S dweight = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        dweight += dweight_[chunk * partial_rows_ + row];
      }
      static_cast<S*>(p.dweight_TK)[slot] = dweight;
      for (const SideGradient* side : {&gate_, &up_}) {
        if (side->da == nullptr) continue;
        S* to = static_cast<S*>(side->da_TKR) + slot * p.rank;
        std::fill_n(to, p.rank, S(0));
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const S* more = &side->da[(chunk * partial_rows_ + row) * R];
          for (int64_t r = 0; r < p.rank; ++r) to[r] += more[r];
        }
        for (int64_t r = 0; r < p.rank; ++r) to[r] *= static_cast<S>(p.scaling);
      }
    };
    const int64_t size = rows_per_chunk(chunks * (2 * p.rank + 1));
    parallel_chunks(end - first_row_, size, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        if (const int64_t slot = rows.all[first_row_ + i].slot; slot >= 0) add_row(i, slot);
      }
    });
  }

  void put_zeros(int64_t slot) const {
    static_cast<S*>(p.dweight_TK)[slot] = 0;
    for (void* da_TKR : {p.da_gate_TKR, p.da_up_TKR}) {
      if (da_TKR != nullptr) std::fill_n(static_cast<S*>(da_TKR) + slot * p.rank, p.rank, S(0));
    }
  }
};

}  // namespace

void shared_glu_backward_cpu(const SharedGluParams& p) { run_glu<Backward>(p); }

}  // namespace mixlora::MIXLORA_ISA
