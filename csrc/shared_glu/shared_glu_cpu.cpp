#include "shared_glu/few_rows.h"
#include "shared_glu/glu.h"

namespace mixlora::MIXLORA_ISA {
namespace {

constexpr int64_t kStripChunks = 4;  // the sums of z are for so many

// h = act(gate) up, in gate's place; sum += weight h.
template <Activation kAct, class S>
void activate_row(S* gate, const S* up, S weight, S* sum, Ahead<2> ahead) {
  for (int64_t j = 0; j < kColumns; j += kWidth<S>) {
    ahead.fetch(j);
    Vec<S> value, slope;
    activate<kAct>(load(gate + j), value, slope);
    value *= load(up + j);
    store(gate + j, value);
    store(sum + j, load(sum + j) + splat(weight) * value);
  }
}

template <class S, int kRanks>
class Forward : Glu<S, kRanks> {
  using Base = Glu<S, kRanks>;
  using Base::p, Base::rank_blocks, Base::chunks, Base::rows, Base::N, Base::has_down;

 public:
  explicit Forward(const SharedGluParams& params) : Base(params) {
    with_activation(p.act, [&](auto kAct) { activate_row_ = activate_row<kAct, S>; });
  }

  void run() {
    const int64_t strips = (chunks + kStripChunks - 1) / kStripChunks;
    const int64_t z_size = N * rank_blocks * kRanks;
    if (has_down) {
      a_down_EFR_ = this->a_matrices(p.a_down_ERF, true);
      z_NR_ = buffer<S>(strips * z_size);
    }
    parallel_for(rows.blocks.size() * strips, [&](int64_t i) {
      const int64_t strip = i % strips, first = strip * kStripChunks;
      strip_of_block(rows.blocks[i / strips],
                     first,
                     std::min(chunks, first + kStripChunks),
                     has_down ? &z_NR_[strip * z_size] : nullptr);
    });
    if (has_down) add_strips(strips, z_size);
  }

 private:
  void (*activate_row_)(S*, const S*, S, S*, Ahead<2>);
  Buffer<S> a_down_EFR_;
  Buffer<S> z_NR_;  // strip by strip

  void strip_of_block(const Block& block, int64_t first, int64_t last, S* z_NR) const {
    const int64_t tile_size = kTileRows * kColumns, sums_size = (block.tokens + 1) * kColumns;
    const auto buffers = buffer<S>(2 * tile_size + sums_size);
    S *gate = buffers.get(), *up = gate + tile_size, *sums = up + tile_size;
    for (int64_t i = 0; has_down && i < rank_blocks; ++i) {
      std::fill(z_NR + this->row_at(block.begin, i), z_NR + this->row_at(block.end, i), S(0));
    }
    for (int64_t chunk = first; chunk < last; ++chunk) {
      std::fill(sums, sums + sums_size, S(0));
      for (const Tile& tile : block.tiles) {
        this->side_rows(this->gate, tile, chunk, gate, nullptr);
        this->side_rows(this->up, tile, chunk, up, nullptr);
        for (int64_t n = tile.begin; n < tile.end; ++n) {
          const int64_t m = (n - tile.begin) * kColumns;
          S* sum = sums + rows.place_N[n] * kColumns;
          const auto ahead = this->ahead_of(block, n, chunk, {p.gate_TF, p.up_TF});
          activate_row_(gate + m, up + m, this->weight_of(n), sum, ahead);
          if (has_down && p.dropout > 0) this->drop(gate + m, n, chunk);
        }
        if (!has_down) continue;
        const S* a_down = &a_down_EFR_[this->matrix_at(tile.expert, chunk, 0)];
        this->shrink_tile(tile, gate, a_down, z_NR + this->row_at(tile.begin, 0), N * kRanks);
      }
      for (int64_t i = 0; i < block.tokens; ++i) {
        const int64_t t = p.token_order_T[block.first_token + i];
        this->write_chunk(sums + i * kColumns, p.hbar_TF, t, chunk);
      }
    }
  }

  void add_strips(int64_t strips, int64_t z_size) const {
    S* z_TKR = static_cast<S*>(p.z_TKR);
    for (int64_t slot = 0; slot < p.tokens * p.slots; ++slot) {
      if (p.expert_TK[slot] < 0) std::fill_n(z_TKR + slot * p.rank, p.rank, S(0));
    }
    parallel_chunks(N, rows_per_chunk(strips * p.rank), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        if (rows.slot_N[n] < 0) continue;
        for (int64_t block = 0; block < rank_blocks; ++block) {
          S* z = z_TKR + rows.slot_N[n] * p.rank + block * kRanks;
          const S* more = &z_NR_[this->row_at(n, block)];
          for (int64_t strip = 0; strip < strips; ++strip, more += z_size) {
            for (int64_t r = 0; r < this->real_ranks(block); ++r) {
              z[r] = (strip == 0 ? 0 : z[r]) + more[r];
            }
          }
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
