#include "common/low_rank.h"
#include "common/parallel.h"
#include "grouped_shrink/grouped_shrink.h"

namespace mixlora::MIXLORA_ISA {
namespace {

template <class T>
void shrink_rows(const GroupedShrinkParams& p) {
  const T* x_TI = static_cast<const T*>(p.x_TI);
  const T* lora_a_ERI = static_cast<const T*>(p.lora_a_ERI);
  T* a_TKR = static_cast<T*>(p.a_TKR);
  const auto blocks = row_blocks(p.expert_start_E1, p.E);
  parallel_for(blocks.size(), [&](int64_t i) {
    const auto [expert, begin, end] = blocks[i];
    const int64_t rows = end - begin;
    const T* x_N[kBlockRows];
    for (int64_t n = 0; n < rows; ++n) x_N[n] = x_TI + p.row_slot_N[begin + n] / p.K * p.I;
    std::vector<Wide<T>> z_NR(rows * p.R);
    shrink<T>(x_N, rows, lora_a_ERI + expert * p.R * p.I, p.R, p.I, 1, z_NR.data());
    for (int64_t n = 0; n < rows; ++n) {
      convert(z_NR.data() + n * p.R, p.R, a_TKR + p.row_slot_N[begin + n] * p.R);
    }
  });
  for (int64_t slot = 0; slot < p.T * p.K; ++slot) {
    if (p.expert_TK[slot] < 0) std::fill_n(a_TKR + slot * p.R, p.R, T{});
  }
}

struct TokenBlock {
  int64_t begin, end;  // of token_order_T
};

// Neighbours in token_order_T that have the same experts slot by slot.
std::vector<TokenBlock> token_blocks(const GroupedShrinkBackwardParams& p) {
  const auto experts = [&](int64_t i) { return p.expert_TK + p.token_order_T[i] * p.K; };
  std::vector<TokenBlock> blocks;
  for (int64_t i = 0; i < p.T; ++i) {
    const bool joins = i > 0 && i - blocks.back().begin < kBlockRows &&
                       std::equal(experts(i), experts(i) + p.K, experts(i - 1));
    if (joins) {
      blocks.back().end = i + 1;
    } else {
      blocks.push_back({i, i + 1});
    }
  }
  return blocks;
}

// dx of a block of tokens is one product: its terms are the ranks of slot 0, of slot 1, ...
template <class T>
void token_backward(const GroupedShrinkBackwardParams& p, TokenBlock block) {
  const T* da_TKR = static_cast<const T*>(p.da_TKR);
  const T* lora_a_ERI = static_cast<const T*>(p.lora_a_ERI);
  T* dx_TI = static_cast<T*>(p.dx_TI);
  const int32_t* token = p.token_order_T + block.begin;
  const int32_t* expert_K = p.expert_TK + *token * p.K;
  const int64_t tokens = block.end - block.begin;
  const int64_t J = (p.K - std::count(expert_K, expert_K + p.K, -1)) * p.R;
  std::vector<const T*> a_J;
  std::vector<Wide<T>> da_MJ(tokens * J);
  for (int64_t k = 0; k < p.K; ++k) {
    if (expert_K[k] < 0) continue;
    for (int64_t m = 0; m < tokens; ++m) {
      convert(da_TKR + (token[m] * p.K + k) * p.R, p.R, da_MJ.data() + m * J + a_J.size());
    }
    for (int64_t r = 0; r < p.R; ++r) a_J.push_back(lora_a_ERI + (expert_K[k] * p.R + r) * p.I);
  }
  for_each_panel(p.I, [&](int64_t i, int64_t columns) {
    expand<Wide<T>>(
        {da_MJ.data(), J, 1},
        tokens,
        J,
        columns,
        [&](int64_t j) { return a_J[j] + i; },
        [&](int64_t m, const Wide<T>* y) { convert(y, columns, dx_TI + token[m] * p.I + i); });
  });
}

// dA of each expert, a panel of columns at a time: its terms are the expert's rows, in their order.
template <class T>
void lora_a_backward(const GroupedShrinkBackwardParams& p) {
  const T* x_TI = static_cast<const T*>(p.x_TI);
  const T* da_TKR = static_cast<const T*>(p.da_TKR);
  T* dlora_a_ERI = static_cast<T*>(p.dlora_a_ERI);
  const int64_t rows = p.expert_start_E1[p.E];
  std::vector<const T*> x_N(rows);
  std::vector<Wide<T>> da_NR(rows * p.R);
  for (int64_t n = 0; n < rows; ++n) {
    x_N[n] = x_TI + p.row_slot_N[n] / p.K * p.I;
    convert(da_TKR + p.row_slot_N[n] * p.R, p.R, da_NR.data() + n * p.R);
  }
  const int64_t panels = (p.I + kPanelColumns - 1) / kPanelColumns;
  parallel_for(p.E * panels, [&](int64_t item) {
    const int64_t e = item / panels, i = item % panels * kPanelColumns;
    const int64_t columns = std::min<int64_t>(kPanelColumns, p.I - i);
    const int64_t begin = p.expert_start_E1[e], end = p.expert_start_E1[e + 1];
    expand<Wide<T>>(
        {da_NR.data() + begin * p.R, 1, p.R},
        p.R,
        end - begin,
        columns,
        [&](int64_t j) { return x_N[begin + j] + i; },
        [&](int64_t r, const Wide<T>* y) {
          convert(y, columns, dlora_a_ERI + (e * p.R + r) * p.I + i);
        });
  });
}

}  // namespace

void grouped_shrink_cpu(const GroupedShrinkParams& p) {
  with_type(p.dtype, [&](auto zero) { shrink_rows<decltype(zero)>(p); });
}

void grouped_shrink_backward_cpu(const GroupedShrinkBackwardParams& p) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto blocks = token_blocks(p);
    parallel_for(blocks.size(), [&](int64_t i) { token_backward<T>(p, blocks[i]); });
    lora_a_backward<T>(p);
  });
}

}  // namespace mixlora::MIXLORA_ISA
