#include "shared_glu/glu.h"

namespace mixlora::MIXLORA_ISA {
namespace {

constexpr int64_t kBackwardRows = 24;  // of a tile
constexpr int64_t kPartialBlocks = 8;  // partial sums are kept for so many blocks of tokens

// What a row's act and product give back, chunk by chunk.
template <class S>
struct RowGradient {
  S *gate, *up;  // in: gate_k and up_k; out: their gradients
  S* h;          // in: what comes from z, dropped; out: h_k
  const S* dhbar;
  S weight;
};

// Returns <dhbar, h>.
template <Activation kAct, class S>
S differentiate_row(RowGradient<S> row, int64_t columns) {
  Vec<S> dweight = {};
  for (int64_t j = 0; j < columns; j += kWidth<S>) {
    Vec<S> value, slope;
    activate<kAct>(load(row.gate + j), value, slope);
    const Vec<S> up = load(row.up + j), dhbar = load(row.dhbar + j), h = value * up;
    const Vec<S> dh = splat(row.weight) * dhbar + load(row.h + j);
    dweight += dhbar * h;
    store(row.gate + j, dh * up * slope);
    store(row.up + j, dh * value);
    store(row.h + j, h);
  }
  return sum(dweight);
}

template <class S>
void add_row(const S* x, S* sum, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kWidth<S>) store(sum + j, load(sum + j) + load(x + j));
}

template <class S>
class Backward : Glu<S> {
  using Glu<S>::p, Glu<S>::R, Glu<S>::chunks, Glu<S>::rows, Glu<S>::weight_TK, Glu<S>::has_down;

 public:
  explicit Backward(const SharedGluParams& params) : Glu<S>(params, kBackwardRows) {
    with_activation(p.act, [&](auto kAct) { differentiate_row_ = differentiate_row<kAct, S>; });
  }

  void run() {
    dz_NR_ = this->rows_by_expert(p.dz_TKR);
    b_gate_EFR_ = panels_of_b(p.b_gate_EFR);
    b_up_EFR_ = panels_of_b(p.b_up_EFR);
    a_down_ERF_ = this->panels(p.a_down_ERF, p.rank, [&](const S* a_RF, int64_t chunk, S* dst) {
      for (int64_t r = 0; r < p.rank; ++r) {
        const S* from = a_RF + r * p.ffn + chunk * kColumns;
        copy_padded(from, this->real(chunk), kColumns, dst + r * kColumns);
      }
    });
    const int64_t sums_size = p.experts * chunks * kColumns * R;
    for (auto [gradient, sums] : {std::pair{p.db_gate_EFR, &db_gate_EFR_},
                                  {p.db_up_EFR, &db_up_EFR_},
                                  {p.da_down_ERF, &da_down_EFR_}}) {
      if (gradient != nullptr) *sums = buffer<S>(sums_size);
    }

    // Chunks of F are independent; what they add up over F is summed in their order afterwards.
    const int64_t blocks = rows.blocks.size();
    int64_t most_rows = 0;
    for (int64_t first = 0; first < blocks; first += kPartialBlocks) {
      const int64_t last = std::min(blocks, first + kPartialBlocks);
      most_rows = std::max(most_rows, rows.blocks[last - 1].end - rows.blocks[first].begin);
    }
    partial_rows_ = most_rows;
    partial_ = buffer<S>(chunks * most_rows * partial_size());
    for (int64_t first = 0; first < std::max<int64_t>(blocks, 1); first += kPartialBlocks) {
      const int64_t last = std::min(blocks, first + kPartialBlocks);
      parallel_for(chunks, [&](int64_t chunk) {
        if (first == 0) clear(chunk);
        for (int64_t i = first; i < last; ++i) {
          block_rows(rows.blocks[i], chunk, rows.blocks[first].begin);
        }
        if (last == blocks) write(chunk);
      });
      if (first == last) break;
      add_partials(rows.blocks[first].begin, rows.blocks[last - 1].end);
    }
    for (int64_t slot = 0; slot < p.tokens * p.slots; ++slot) {
      if (p.expert_TK[slot] < 0) put_zeros(slot);
    }
  }

 private:
  S (*differentiate_row_)(RowGradient<S>, int64_t);
  Buffer<S> dz_NR_;
  Buffer<S> b_gate_EFR_, b_up_EFR_, a_down_ERF_;     // in panels
  Buffer<S> db_gate_EFR_, db_up_EFR_, da_down_EFR_;  // sums, in panels
  Buffer<S> partial_;  // [chunk][row of some blocks][da_gate R, da_up R, dweight]
  int64_t partial_rows_;

  int64_t partial_size() const { return 2 * R + kWidth<S>; }

  Buffer<S> panels_of_b(const void* b_EFR) const {
    return this->panels(b_EFR, R, [&](const S* b_FR, int64_t chunk, S* dst) {
      for (int64_t f = 0; f < this->real(chunk); ++f) {
        copy_padded(b_FR + (chunk * kColumns + f) * p.rank, p.rank, R, dst + f * R);
      }
    });
  }

  void clear(int64_t chunk) const {
    for (int64_t e = 0; e < p.experts; ++e) {
      for (S* sums : {db_gate_EFR_.get(), db_up_EFR_.get(), da_down_EFR_.get()}) {
        if (sums == nullptr) continue;
        std::fill_n(sums + this->panel_at(e, chunk, R), kColumns * R, S(0));
      }
      for (void* dscale : {p.dscale_gate_EF, p.dscale_up_EF}) {
        if (dscale == nullptr) continue;
        S* row = static_cast<S*>(dscale) + e * p.ffn + chunk * kColumns;
        std::fill_n(row, this->real(chunk), S(0));
      }
    }
  }

  void write(int64_t chunk) const {
    const S s = static_cast<S>(p.scaling);
    const int64_t f0 = chunk * kColumns, n = this->real(chunk);
    for (int64_t e = 0; e < p.experts; ++e) {
      const int64_t at = this->panel_at(e, chunk, R);
      const auto put_b = [&](const Buffer<S>& sums, void* db_EFR) {
        for (int64_t f = 0; db_EFR != nullptr && f < n; ++f) {
          S* to = static_cast<S*>(db_EFR) + (e * p.ffn + f0 + f) * p.rank;
          for (int64_t r = 0; r < p.rank; ++r) to[r] = s * sums[at + f * R + r];
        }
      };
      put_b(db_gate_EFR_, p.db_gate_EFR);
      put_b(db_up_EFR_, p.db_up_EFR);
      if (!has_down) continue;
      S* to = static_cast<S*>(p.da_down_ERF) + e * p.rank * p.ffn + f0;
      transpose(&da_down_EFR_[at], n, p.rank, R, to, p.ffn);
    }
  }

  void block_rows(const Block& block, int64_t chunk, int64_t first_row) const {
    const int64_t tile_size = kBackwardRows * kColumns, sums_size = block.tokens * kColumns;
    const int64_t columns = this->whole_vectors(chunk);
    const auto buffers = buffer<S>(5 * tile_size + kColumns + 2 * sums_size);
    S *gate = buffers.get(), *up = gate + tile_size, *h = up + tile_size, *dhbar = h + tile_size;
    S *gate_before = dhbar + kColumns, *up_before = gate_before + tile_size;
    S *dgate = up_before + tile_size, *dup = dgate + sums_size;
    std::fill(dgate, dgate + 2 * sums_size, S(0));
    for (const Tile& tile : block.tiles) {
      const int64_t M = tile.end - tile.begin, e = tile.expert;
      S* partials =
          partial_.get() + (chunk * partial_rows_ + tile.begin - first_row) * partial_size();
      this->side_rows(this->gate, tile, chunk, gate, gate_before);
      this->side_rows(this->up, tile, chunk, up, up_before);
      std::fill(h, h + M * kColumns, S(0));
      if (has_down) {
        panel<S>({&dz_NR_[tile.begin * R], R, 1},
                 &a_down_ERF_[this->panel_at(e, chunk, p.rank)],
                 kColumns,
                 M,
                 p.rank,
                 columns,
                 h,
                 kColumns);
      }
      for (int64_t m = 0; m < M; ++m) {
        const int64_t slot = rows.slot_N[tile.begin + m], at = m * kColumns;
        const bool drops = has_down && p.dropout > 0;
        if (drops) this->drop(h + at, slot, chunk);
        const S* dhbar_m = this->chunk_of(p.dhbar_TF, slot / p.slots, chunk, dhbar);
        S* dweight = partials + m * partial_size() + 2 * R;
        *dweight =
            differentiate_row_({gate + at, up + at, h + at, dhbar_m, weight_TK[slot]}, columns);
        if (drops) this->drop(h + at, slot, chunk);
      }
      unscale(this->gate, tile, chunk, gate_before, gate, p.dscale_gate_EF);
      unscale(this->up, tile, chunk, up_before, up, p.dscale_up_EF);
      for (int64_t m = 0; m < M; ++m) {
        const int64_t place = rows.place_N[tile.begin + m] * kColumns;
        add_row(gate + m * kColumns, dgate + place, columns);
        add_row(up + m * kColumns, dup + place, columns);
      }
      adapter(this->gate, tile, chunk, gate, b_gate_EFR_, partials, db_gate_EFR_);
      adapter(this->up, tile, chunk, up, b_up_EFR_, partials + R, db_up_EFR_);
      if (has_down) add_products(tile, chunk, h, dz_NR_, da_down_EFR_);
    }
    for (int64_t i = 0; i < block.tokens; ++i) {
      const int64_t t = p.token_order_T[block.first_token + i];
      this->write_chunk(dgate + i * kColumns, p.dgate_TF, t, chunk);
      this->write_chunk(dup + i * kColumns, p.dup_TF, t, chunk);
    }
  }

  // DoRA: the scale's gradient, and dy before the scale.
  void unscale(const Side<S>& side,
               const Tile& tile,
               int64_t chunk,
               const S* before,
               S* dy,
               void* dscale_EF) const {
    if (side.scale_EF == nullptr) return;
    const int64_t at = tile.expert * p.ffn + chunk * kColumns;
    const S* scale = side.scale_EF + at;
    S* dscale = static_cast<S*>(dscale_EF) + at;
    for (int64_t m = 0; m < tile.end - tile.begin; ++m) {
      for (int64_t j = 0; j < this->real(chunk); ++j) {
        dscale[j] += dy[m * kColumns + j] * before[m * kColumns + j];
        dy[m * kColumns + j] *= scale[j];
      }
    }
  }

  // da = B^T dy and dB += dy a^T, the scaling apart.
  void adapter(const Side<S>& side,
               const Tile& tile,
               int64_t chunk,
               const S* dy,
               const Buffer<S>& b_EFR,
               S* da,
               const Buffer<S>& db_EFR) const {
    if (side.a_NR == nullptr) return;
    const int64_t M = tile.end - tile.begin;
    for (int64_t m = 0; m < M; ++m) std::fill_n(da + m * partial_size(), R, S(0));
    panel<S>({dy, kColumns, 1},
             &b_EFR[this->panel_at(tile.expert, chunk, R)],
             R,
             M,
             this->real(chunk),
             R,
             da,
             partial_size());
    add_products(tile, chunk, dy, side.a_NR, db_EFR);
  }

  // sums [F, R] += y^T x
  void add_products(const Tile& tile,
                    int64_t chunk,
                    const S* y,
                    const Buffer<S>& x_NR,
                    const Buffer<S>& sums_EFR) const {
    panel<S>({y, 1, kColumns},
             &x_NR[tile.begin * R],
             R,
             this->real(chunk),
             tile.end - tile.begin,
             R,
             sums_EFR.get() + this->panel_at(tile.expert, chunk, R),
             R);
  }

  // Rows [begin, end): their sums over F.
  void add_partials(int64_t begin, int64_t end) const {
    const S s = static_cast<S>(p.scaling);
    parallel_chunks(
        end - begin, rows_per_chunk(chunks * partial_size()), [&](int64_t i0, int64_t i1) {
          std::vector<S> total(partial_size());
          for (int64_t i = i0; i < i1; ++i) {
            const int64_t slot = rows.slot_N[begin + i];
            std::fill(total.begin(), total.end(), S(0));
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
              const S* more = &partial_[(chunk * partial_rows_ + i) * partial_size()];
              for (int64_t at = 0; at <= 2 * R; ++at) total[at] += more[at];
            }
            static_cast<S*>(p.dweight_TK)[slot] = total[2 * R];
            for (int64_t r = 0; r < p.rank; ++r) {
              const int64_t at = slot * p.rank + r;
              if (p.da_gate_TKR != nullptr) static_cast<S*>(p.da_gate_TKR)[at] = s * total[r];
              if (p.da_up_TKR != nullptr) static_cast<S*>(p.da_up_TKR)[at] = s * total[R + r];
            }
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

void shared_glu_backward_cpu(const SharedGluParams& p) {
  if (p.dtype == GluDtype::kDouble) return Backward<double>(p).run();
  Backward<float>(p).run();
}

}  // namespace mixlora::MIXLORA_ISA
