#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "moe_sort/moe_sort.h"

namespace mixlora::MIXLORA_ISA {
namespace {

// Long enough to pay for waking a thread.
constexpr int64_t kChunk = 32768;

// Stable parallel counting sort of items 0..count-1: key(item) is the item's bin, and
// place(item, position) receives its place in the order. Returns where each bin starts.
template <class Key, class Place>
std::vector<int32_t> counting_sort(int64_t count,
                                   int64_t bins,
                                   const Key& key,
                                   const Place& place) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  // First the number of items by chunk and bin, then the place of the next of them.
  std::vector<int32_t> cursor(chunks * bins, 0);
  const auto for_each_chunk = [&](const auto& visit) {
    parallel_for(chunks, [&](int64_t chunk) {
      int32_t* chunk_cursor = cursor.data() + chunk * bins;
      const int64_t end = std::min(count, (chunk + 1) * kChunk);
      for (int64_t item = chunk * kChunk; item < end; ++item) visit(item, chunk_cursor[key(item)]);
    });
  };

  for_each_chunk([](int64_t, int32_t& cursor) { ++cursor; });

  std::vector<int32_t> bin_start(bins);
  int32_t total = 0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    bin_start[bin] = total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      total += std::exchange(cursor[chunk * bins + bin], total);
    }
  }

  for_each_chunk([&](int64_t item, int32_t& cursor) { place(item, cursor++); });
  return bin_start;
}

// Empty slots take a bin of their own behind the experts: its start is the number of valid rows.
void sort_rows(const MoeSortParams& p) {
  const auto bin = [&](int64_t slot) {
    const int32_t expert = p.expert_TK[slot];
    return expert < 0 ? p.E : expert;
  };
  const auto place = [&](int64_t slot, int32_t row) {
    const bool empty = p.expert_TK[slot] < 0;
    p.row_slot_N[row] = empty ? -1 : slot;
    p.slot_row_TK[slot] = empty ? -1 : row;
  };
  const auto bin_start = counting_sort(p.T * p.K, p.E + 1, bin, place);
  std::copy(bin_start.begin(), bin_start.end(), p.expert_start_E1);
}

// One stable sort per slot, the last slot first, is the lexicographic order of the tuples.
void sort_tokens(const MoeSortParams& p) {
  std::vector<int32_t> order(p.T), next(p.T);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t k = p.K - 1; k >= 0; --k) {
    const auto bin = [&](int64_t i) { return 1 + p.expert_TK[order[i] * p.K + k]; };
    const auto place = [&](int64_t i, int32_t position) { next[position] = order[i]; };
    counting_sort(p.T, p.E + 1, bin, place);
    order.swap(next);
  }
  std::copy(order.begin(), order.end(), p.token_order_T);
}

}  // namespace

void moe_sort_cpu(const MoeSortParams& p) {
  sort_rows(p);
  sort_tokens(p);
}

}  // namespace mixlora::MIXLORA_ISA
