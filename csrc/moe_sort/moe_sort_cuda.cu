// Stable counting sorts, two launches each. A block sorts one chunk of the items:
//
//   blockIdx.x      the chunk of kChunk items; a warp has kRounds * 32 of them, one after the other
//   blockIdx.y      which sort: of slots by expert (rows), or of tokens by their experts
//   threadIdx       the lane and the warp
//
//   count_kernel    counts[sort][chunk][bin] = items of the bin in the chunk
//   place_kernel    an item's place = items of lesser bins + items of its bin in chunks before, in
//                   warps before, in rounds before, in lanes before
//
// The tuples of a token are sorted by as many slots at a time as have at most kManyBins values, the
// last slots first. It is bound by the time of a launch: up to 10 experts, two slots a token take
// two launches in all.
#include "common/cuda.cuh"
#include "moe_sort/moe_sort.h"

namespace mixlora {
namespace {

constexpr int kWarps = 4, kRounds = 4, kChunk = kWarps * kRounds * kLanes;
constexpr int kManyBins = 128, kMaxBins = 2048;

// Of slots, where `order` and `sorted` are not used; or of tokens by their slots k0 .. k1 - 1.
struct Sort {
  int64_t count;
  int bins, k0, k1;
  const int32_t* order;  // null: 0, 1, ..
  int32_t* sorted;
  int32_t* counts;  // [chunks, bins]
};

struct Sorts {
  Sort sorts[2];
  int num_chunks[2];
  bool rows_first;  // whether sorts[0] is that of slots
};

__device__ int item_at(const Sort& sort, int64_t position) {
  return sort.order ? sort.order[position] : static_cast<int>(position);
}

// Empty slots have a bin behind the experts; among tokens they come first.
__device__ int bin_of(const MoeSortParams& p, const Sort& sort, bool rows, int item) {
  if (rows) {
    const int expert = p.expert_TK[item];
    CHECK_INDEX(expert, -1, p.E);
    return expert < 0 ? static_cast<int>(p.E) : expert;
  }
  int bin = 0;
  for (int k = sort.k0; k < sort.k1; ++k) {
    const int expert = p.expert_TK[item * p.K + k];
    CHECK_INDEX(expert, -1, p.E);
    bin = bin * (static_cast<int>(p.E) + 1) + expert + 1;
  }
  return bin;
}

// Calls visit(item, bin) for the items of this thread, in their order; all lanes take part, those
// without an item with bin -1.
template <class Visit>
__device__ void for_each_item(const MoeSortParams& p,
                              const Sort& sort,
                              bool rows,
                              const Visit& visit) {
  const int64_t first = int64_t{blockIdx.x} * kChunk + threadIdx.y * kRounds * kLanes;
  for (int round = 0; round < kRounds; ++round) {
    const int64_t position = first + round * kLanes + threadIdx.x;
    const bool valid = position < sort.count;
    const int item = valid ? item_at(sort, position) : 0;
    visit(item, valid ? bin_of(p, sort, rows, item) : -1);
  }
}

// count_WB[w * bins + b] = items of the bin b in the warp w.
__device__ void count_items(
    const MoeSortParams& p, const Sort& sort, bool rows, int* count_WB, int thread) {
  for (int i = thread; i < kWarps * sort.bins; i += kWarps * kLanes) count_WB[i] = 0;
  __syncthreads();
  int* count_B = count_WB + threadIdx.y * sort.bins;
  for_each_item(p, sort, rows, [&](int, int bin) {
    if (bin >= 0) atomicAdd(&count_B[bin], 1);
  });
  __syncthreads();
}

__global__ void count_kernel(MoeSortParams p, const __grid_constant__ Sorts sorts) {
  const Sort& sort = sorts.sorts[blockIdx.y];
  const bool rows = sorts.rows_first && blockIdx.y == 0;
  if (static_cast<int>(blockIdx.x) >= sorts.num_chunks[blockIdx.y]) return;
  DYNAMIC_SHARED(int, count_WB);
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  count_items(p, sort, rows, count_WB, thread);
  for (int b = thread; b < sort.bins; b += kWarps * kLanes) {
    int count = 0;
    for (int w = 0; w < kWarps; ++w) count += count_WB[w * sort.bins + b];
    sort.counts[int64_t{blockIdx.x} * sort.bins + b] = count;
  }
}

// start_B becomes the sum of all before it; one warp does it.
__device__ void sum_before(int* start_B, int bins) {
  const int length = (bins + kLanes - 1) / kLanes, begin = threadIdx.x * length;
  const int end = begin + length < bins ? begin + length : bins;
  int total = 0;
  for (int b = begin; b < end; ++b) total += start_B[b];
  int before = total;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, distance);
    if (static_cast<int>(threadIdx.x) >= distance) before += other;
  }
  before -= total;
  for (int b = begin; b < end; ++b) {
    const int count = start_B[b];
    start_B[b] = before;
    before += count;
  }
}

__global__ void place_kernel(MoeSortParams p, const __grid_constant__ Sorts sorts) {
  const Sort& sort = sorts.sorts[blockIdx.y];
  const bool rows = sorts.rows_first && blockIdx.y == 0;
  const int num_chunks = sorts.num_chunks[blockIdx.y], chunk = blockIdx.x;
  if (chunk >= num_chunks) return;
  DYNAMIC_SHARED(int, count_WB);
  int* start_B = count_WB + kWarps * sort.bins;
  const int thread = threadIdx.y * kLanes + threadIdx.x;

  for (int b = thread; b < sort.bins; b += kWarps * kLanes) {
    int total = 0;
    for (int c = 0; c < num_chunks; ++c) total += sort.counts[int64_t{c} * sort.bins + b];
    start_B[b] = total;
  }
  count_items(p, sort, rows, count_WB, thread);
  if (threadIdx.y == 0) sum_before(start_B, sort.bins);
  __syncthreads();

  // Each warp's count of a bin becomes the place of its next item.
  for (int b = thread; b < sort.bins; b += kWarps * kLanes) {
    int place = start_B[b];
    if (rows && chunk == 0) p.expert_start_E1[b] = place;
    for (int c = 0; c < chunk; ++c) place += sort.counts[int64_t{c} * sort.bins + b];
    for (int w = 0; w < kWarps; ++w) {
      const int count = count_WB[w * sort.bins + b];
      count_WB[w * sort.bins + b] = place;
      place += count;
    }
  }
  __syncthreads();

  int* next_B = count_WB + threadIdx.y * sort.bins;
  for_each_item(p, sort, rows, [&](int item, int bin) {
    const unsigned same = __match_any_sync(kAllLanes, bin);
    const int before = __popc(same & ((1u << threadIdx.x) - 1));
    const int place = bin < 0 ? 0 : next_B[bin] + before;
    __syncwarp();
    if (bin >= 0 && before == 0) next_B[bin] += __popc(same);
    __syncwarp();
    if (bin < 0) return;
    if (rows) {
      const bool empty = bin == p.E;
      p.row_slot_N[place] = empty ? -1 : item;
      p.slot_row_TK[item] = empty ? -1 : place;
    } else {
      sort.sorted[place] = item;
    }
  });
}

int64_t shared_bytes(int64_t rows_of_counts, const Sorts& sorts, int num_sorts) {
  int bins = 0;
  for (int i = 0; i < num_sorts; ++i) bins = std::max(bins, sorts.sorts[i].bins);
  return rows_of_counts * bins * sizeof(int32_t);
}

}  // namespace

void moe_sort_cuda(const MoeSortParams& p, CudaQueue& queue) {
  const int64_t E1 = p.E + 1;
  if (E1 > kMaxBins) {
    queue.error = "num_experts must be at most " + std::to_string(kMaxBins - 1) +
                  " on a GPU, got " + std::to_string(p.E);
    return;
  }
  const auto new_ints = [&](int64_t count) {
    return static_cast<int32_t*>(queue.allocate(count * sizeof(int32_t)));
  };
  // Without any item there is one chunk still, for expert_start_E1.
  const auto chunks = [](int64_t count) { return std::max<int64_t>(1, divide_up(count, kChunk)); };
  const int64_t N = p.T * p.K, row_chunks = chunks(N), token_chunks = chunks(p.T);
  const Sort by_expert{N, static_cast<int>(E1), 0, 0, nullptr, nullptr, new_ints(row_chunks * E1)};

  // Passes from the last slots to the first; the last pass ends in token_order_T.
  int64_t slots_at_once = 1, bins = E1;
  while (slots_at_once < p.K && bins * E1 <= kManyBins) ++slots_at_once, bins *= E1;
  const int64_t num_passes = divide_up(p.K, slots_at_once);
  int32_t* counts = new_ints(token_chunks * bins);
  int32_t* other = num_passes > 1 ? new_ints(p.T) : nullptr;
  const int32_t* order = nullptr;
  for (int64_t pass = num_passes - 1, k1 = p.K; pass >= 0; --pass) {
    const int64_t k0 = std::max<int64_t>(0, k1 - slots_at_once);
    int64_t pass_bins = 1;
    for (int64_t k = k0; k < k1; ++k) pass_bins *= E1;
    int32_t* sorted = pass % 2 ? other : p.token_order_T;
    const Sort by_tuple{p.T,
                        static_cast<int>(pass_bins),
                        static_cast<int>(k0),
                        static_cast<int>(k1),
                        order,
                        sorted,
                        counts};
    Sorts sorts{{by_tuple, by_tuple},
                {static_cast<int>(token_chunks), static_cast<int>(token_chunks)},
                false};
    const bool first_pass = k1 == p.K;
    if (first_pass) {
      sorts.sorts[0] = by_expert;
      sorts.num_chunks[0] = row_chunks;
      sorts.rows_first = true;
    }
    const int num_sorts = first_pass ? 2 : 1;
    const dim3 grid(first_pass ? row_chunks : token_chunks, num_sorts), block(kLanes, kWarps);
    launch<count_kernel>(grid, block, shared_bytes(kWarps, sorts, num_sorts), queue, p, sorts);
    launch<place_kernel>(grid, block, shared_bytes(kWarps + 1, sorts, num_sorts), queue, p, sorts);
    order = sorted;
    k1 = k0;
  }
}

}  // namespace mixlora
