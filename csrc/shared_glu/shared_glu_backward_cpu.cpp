#include "shared_glu/glu.h"

namespace mixlora::MIXLORA_ISA {
namespace {

constexpr int64_t kPartialBlocks = 8;  // partial sums are kept for so many blocks of tokens

// What a row's act and product give back, chunk by chunk.
template <class S>
struct RowGradient {
  S *gate, *up;  // in: gate_k and up_k; out: their gradients
  S* h;          // in: what comes from z, dropped; out: h_k
  const S* dhbar;
  S weight;
  Ahead<3> ahead;
};

// Returns <dhbar, h>.
template <Activation kAct, class S>
S differentiate_row(RowGradient<S> row) {
  Vec<S> dweight = {};
  for (int64_t j = 0; j < kColumns; j += kWidth<S>) {
    row.ahead.fetch(j);
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
void add_row(const S* x, S* sum) {
  for (int64_t j = 0; j < kColumns; j += kWidth<S>) store(sum + j, load(sum + j) + load(x + j));
}

template <class S, int kRanks>
class Backward : Glu<S, kRanks> {
  using Base = Glu<S, kRanks>;
  using Base::p, Base::rank_blocks, Base::chunks, Base::rows, Base::N, Base::has_down;

 public:
  explicit Backward(const SharedGluParams& params) : Base(params) {
    with_activation(p.act, [&](auto kAct) { differentiate_row_ = differentiate_row<kAct, S>; });
  }

  void run() {
    dz_NR_ = this->rows_by_expert(p.dz_TKR, 1);
    b_gate_EFR_ = this->b_matrices(p.b_gate_EFR, false);
    b_up_EFR_ = this->b_matrices(p.b_up_EFR, false);
    a_down_ERF_ = this->a_matrices(p.a_down_ERF, false);
    for (auto [gradient, sums] : {std::pair{p.db_gate_EFR, &db_gate_EFR_},
                                  {p.db_up_EFR, &db_up_EFR_},
                                  {p.da_down_ERF, &da_down_EFR_}}) {
      if (gradient != nullptr) *sums = buffer<S>(this->matrix_at(p.experts, 0, 0));
    }

    // Chunks of F are independent; what they add up over F is summed in their order afterwards.
    const int64_t blocks = rows.blocks.size();
    for (int64_t first = 0; first < blocks; first += kPartialBlocks) {
      const int64_t last = std::min(blocks, first + kPartialBlocks);
      partial_rows_ = std::max(partial_rows_, rows.blocks[last - 1].end - rows.blocks[first].begin);
    }
    for (auto [gradient, partial] : {std::pair{p.da_gate_TKR, &da_gate_}, {p.da_up_TKR, &da_up_}}) {
      if (gradient != nullptr) *partial = buffer<S>(chunks * partial_size());
    }
    dweight_ = buffer<S>(chunks * partial_rows_);
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
    for (int64_t slot = 0; slot < p.tokens * p.slots; ++slot) {
      if (p.expert_TK[slot] < 0) put_zeros(slot);
    }
  }

 private:
  S (*differentiate_row_)(RowGradient<S>);
  Buffer<S> dz_NR_;
  Buffer<S> b_gate_EFR_, b_up_EFR_, a_down_ERF_;     // matrices
  Buffer<S> db_gate_EFR_, db_up_EFR_, da_down_EFR_;  // sums, as matrices
  Buffer<S> da_gate_, da_up_, dweight_;  // chunk by chunk, of the rows from first_row_ on
  int64_t first_row_ = 0, partial_rows_ = 0;

  int64_t partial_size() const { return rank_blocks * partial_rows_ * kRanks; }

  void clear(int64_t chunk) const {
    for (int64_t e = 0; e < p.experts; ++e) {
      for (S* sums : {db_gate_EFR_.get(), db_up_EFR_.get(), da_down_EFR_.get()}) {
        if (sums == nullptr) continue;
        std::fill_n(sums + this->matrix_at(e, chunk, 0), rank_blocks * kRanks * kColumns, S(0));
      }
      for (void* dscale : {p.dscale_gate_EF, p.dscale_up_EF}) {
        if (dscale == nullptr) continue;
        S* row = static_cast<S*>(dscale) + e * p.ffn + chunk * kColumns;
        std::fill_n(row, this->real(chunk), S(0));
      }
    }
  }

  void write(int64_t chunk) const {
    const int64_t f = chunk * kColumns, columns = this->real(chunk);
    for (int64_t e = 0; e < p.experts; ++e) {
      for (int64_t block = 0; block < rank_blocks; ++block) {
        const int64_t at = this->matrix_at(e, chunk, block), r = block * kRanks;
        const int64_t ranks = this->real_ranks(block);
        const auto put_b = [&](const Buffer<S>& sums, void* db_EFR) {
          for (int64_t i = 0; db_EFR != nullptr && i < columns; ++i) {
            S* to = static_cast<S*>(db_EFR) + (e * p.ffn + f + i) * p.rank + r;
            std::copy_n(&sums[at + i * kRanks], ranks, to);
          }
        };
        put_b(db_gate_EFR_, p.db_gate_EFR);
        put_b(db_up_EFR_, p.db_up_EFR);
        if (!has_down) continue;
        S* to = static_cast<S*>(p.da_down_ERF) + (e * p.rank + r) * p.ffn + f;
        transpose(&da_down_EFR_[at], columns, ranks, kRanks, to, p.ffn);
      }
    }
  }

  void block_rows(const Block& block, int64_t chunk) const {
    const int64_t tile_size = kTileRows * kColumns, sums_size = (block.tokens + 1) * kColumns;
    const auto buffers = buffer<S>(5 * tile_size + kColumns + 2 * sums_size);
    S *gate = buffers.get(), *up = gate + tile_size, *h = up + tile_size, *dhbar = h + tile_size;
    S *gate_before = dhbar + kColumns, *up_before = gate_before + tile_size;
    S *dgate = up_before + tile_size, *dup = dgate + sums_size;
    std::fill(dgate, dgate + 2 * sums_size, S(0));
    for (const Tile& tile : block.tiles) {
      const int64_t M = tile.end - tile.begin, e = tile.expert;
      this->side_rows(this->gate, tile, chunk, gate, gate_before);
      this->side_rows(this->up, tile, chunk, up, up_before);
      const auto nothing = [&](int64_t) { return this->zeros; };
      if (has_down) {
        const S* a_RF = &a_down_ERF_[this->matrix_at(e, chunk, 0)];
        this->expand_tile(tile, dz_NR_.get(), a_RF, nothing, h);
      } else {
        std::fill(h, h + M * kColumns, S(0));
      }
      for (int64_t m = 0; m < M; ++m) {
        const int64_t n = tile.begin + m, at = m * kColumns;
        const bool drops = has_down && p.dropout > 0;
        if (drops) this->drop(h + at, n, chunk);
        const auto ahead = this->ahead_of(block, n, chunk, {p.gate_TF, p.up_TF, p.dhbar_TF});
        const S* dhbar_m = this->chunk_of(p.dhbar_TF, n, chunk, dhbar);
        dweight_[chunk * partial_rows_ + n - first_row_] =
            differentiate_row_({gate + at, up + at, h + at, dhbar_m, this->weight_of(n), ahead});
        if (drops) this->drop(h + at, n, chunk);
      }
      unscale(this->gate, tile, chunk, gate_before, gate, p.dscale_gate_EF);
      unscale(this->up, tile, chunk, up_before, up, p.dscale_up_EF);
      for (int64_t m = 0; m < M; ++m) {
        const int64_t place = rows.place_N[tile.begin + m] * kColumns;
        add_row(gate + m * kColumns, dgate + place);
        add_row(up + m * kColumns, dup + place);
      }
      adapter(this->gate, tile, chunk, gate, b_gate_EFR_, da_gate_, db_gate_EFR_);
      adapter(this->up, tile, chunk, up, b_up_EFR_, da_up_, db_up_EFR_);
      if (has_down) {
        this->add_outer(tile, h, dz_NR_.get(), &da_down_EFR_[this->matrix_at(e, chunk, 0)]);
      }
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

  // da = B^T dy, s apart, and dB += dy (s a)^T.
  void adapter(const Side<S>& side,
               const Tile& tile,
               int64_t chunk,
               const S* dy,
               const Buffer<S>& b_EFR,
               const Buffer<S>& da,
               const Buffer<S>& db_EFR) const {
    if (side.a_NR == nullptr) return;
    const int64_t at = this->matrix_at(tile.expert, chunk, 0);
    const int64_t rows_size = (tile.end - tile.begin) * kRanks, stride = partial_rows_ * kRanks;
    S* da_tile = &da[chunk * partial_size() + (tile.begin - first_row_) * kRanks];
    for (int64_t block = 0; block < rank_blocks; ++block) {
      std::fill_n(da_tile + block * stride, rows_size, S(0));
    }
    this->shrink_tile(tile, dy, &b_EFR[at], da_tile, stride);
    this->add_outer(tile, dy, side.a_NR.get(), &db_EFR[at]);
  }

  // Of rows first_row_ .. end - 1: their sums over F.
  void add_partials(int64_t end) const {
    const S s = static_cast<S>(p.scaling);
    const auto add_row = [&](int64_t row, int64_t slot) {
      S dweight = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        dweight += dweight_[chunk * partial_rows_ + row];
      }
      static_cast<S*>(p.dweight_TK)[slot] = dweight;
      for (auto [partial, da_TKR] :
           {std::pair{da_gate_.get(), p.da_gate_TKR}, {da_up_.get(), p.da_up_TKR}}) {
        for (int64_t block = 0; da_TKR != nullptr && block < rank_blocks; ++block) {
          S total[kRanks] = {};
          const S* more = partial + (block * partial_rows_ + row) * kRanks;
          for (int64_t chunk = 0; chunk < chunks; ++chunk, more += partial_size()) {
            for (int64_t r = 0; r < kRanks; ++r) total[r] += more[r];
          }
          S* to = static_cast<S*>(da_TKR) + slot * p.rank + block * kRanks;
          for (int64_t r = 0; r < this->real_ranks(block); ++r) to[r] = s * total[r];
        }
      }
    };
    const int64_t size = rows_per_chunk(chunks * (2 * p.rank + 1));
    parallel_chunks(end - first_row_, size, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        if (const int64_t slot = rows.slot_N[first_row_ + i]; slot >= 0) add_row(i, slot);
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
