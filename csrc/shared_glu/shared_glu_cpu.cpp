#include "shared_glu/glu.h"

namespace mixlora::MIXLORA_ISA {
namespace {

constexpr int64_t kForwardRows = 12;  // of a tile
constexpr int64_t kStripChunks = 8;   // the sums of z are for so many

// h = act(gate) up, in gate's place; sum += weight h.
template <Activation kAct, class S>
void activate_row(S* gate, const S* up, S weight, S* sum, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kWidth<S>) {
    Vec<S> value, slope;
    activate<kAct>(load(gate + j), value, slope);
    value *= load(up + j);
    store(gate + j, value);
    store(sum + j, load(sum + j) + splat(weight) * value);
  }
}

template <class S>
class Forward : Glu<S> {
  using Glu<S>::p, Glu<S>::R, Glu<S>::chunks, Glu<S>::rows, Glu<S>::weight_TK, Glu<S>::has_down;

 public:
  explicit Forward(const SharedGluParams& params) : Glu<S>(params, kForwardRows) {
    with_activation(p.act, [&](auto kAct) { activate_row_ = activate_row<kAct, S>; });
  }

  void run() {
    const int64_t strips = (chunks + kStripChunks - 1) / kStripChunks, N = rows.slot_N.size();
    if (has_down) {
      a_down_EFR_ = this->panels(p.a_down_ERF, R, [&](const S* a_RF, int64_t chunk, S* dst) {
        transpose(a_RF + chunk * kColumns, p.rank, this->real(chunk), p.ffn, dst, R);
      });
      z_NR_ = buffer<S>(strips * N * R);
    }
    parallel_for(rows.blocks.size() * strips, [&](int64_t i) {
      const int64_t strip = i % strips, first = strip * kStripChunks;
      strip_of_block(rows.blocks[i / strips],
                     first,
                     std::min(chunks, first + kStripChunks),
                     has_down ? &z_NR_[strip * N * R] : nullptr);
    });
    if (has_down) add_strips(strips, N);
  }

 private:
  void (*activate_row_)(S*, const S*, S, S*, int64_t);
  Buffer<S> a_down_EFR_;  // in panels
  Buffer<S> z_NR_;        // strip by strip

  void strip_of_block(const Block& block, int64_t first, int64_t last, S* z_NR) const {
    const int64_t tile_size = kForwardRows * kColumns, sums_size = block.tokens * kColumns;
    const auto buffers = buffer<S>(2 * tile_size + sums_size);
    S *gate = buffers.get(), *up = gate + tile_size, *sums = up + tile_size;
    if (has_down) std::fill(z_NR + block.begin * R, z_NR + block.end * R, S(0));
    for (int64_t chunk = first; chunk < last; ++chunk) {
      std::fill(sums, sums + sums_size, S(0));
      for (const Tile& tile : block.tiles) {
        this->side_rows(this->gate, tile, chunk, gate, nullptr);
        this->side_rows(this->up, tile, chunk, up, nullptr);
        for (int64_t n = tile.begin; n < tile.end; ++n) {
          const int64_t m = (n - tile.begin) * kColumns;
          S* sum = sums + rows.place_N[n] * kColumns;
          const S weight = weight_TK[rows.slot_N[n]];
          activate_row_(gate + m, up + m, weight, sum, this->whole_vectors(chunk));
          if (has_down && p.dropout > 0) this->drop(gate + m, rows.slot_N[n], chunk);
        }
        if (!has_down) continue;
        panel<S>({gate, kColumns, 1},
                 &a_down_EFR_[this->panel_at(tile.expert, chunk, R)],
                 R,
                 tile.end - tile.begin,
                 this->real(chunk),
                 R,
                 z_NR + tile.begin * R,
                 R);
      }
      for (int64_t i = 0; i < block.tokens; ++i) {
        const int64_t t = p.token_order_T[block.first_token + i];
        this->write_chunk(sums + i * kColumns, p.hbar_TF, t, chunk);
      }
    }
  }

  void add_strips(int64_t strips, int64_t N) const {
    S* z_TKR = static_cast<S*>(p.z_TKR);
    for (int64_t slot = 0; slot < p.tokens * p.slots; ++slot) {
      if (p.expert_TK[slot] < 0) std::fill_n(z_TKR + slot * p.rank, p.rank, S(0));
    }
    parallel_chunks(N, rows_per_chunk(strips * R), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        S* z = z_TKR + rows.slot_N[n] * p.rank;
        std::copy_n(&z_NR_[n * R], p.rank, z);
        for (int64_t strip = 1; strip < strips; ++strip) {
          const S* more = &z_NR_[(strip * N + n) * R];
          for (int64_t r = 0; r < p.rank; ++r) z[r] += more[r];
        }
      }
    });
  }
};

}  // namespace

void shared_glu_cpu(const SharedGluParams& p) {
  if (p.dtype == GluDtype::kDouble) return Forward<double>(p).run();
  Forward<float>(p).run();
}

}  // namespace mixlora::MIXLORA_ISA
