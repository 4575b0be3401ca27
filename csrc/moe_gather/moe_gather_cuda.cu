// A warp copies kWords * 32 words of a row, 16 bytes each where all rows begin at such addresses:
//
//   blockIdx.x, threadIdx.y      the row n
//   blockIdx.y, i, threadIdx.x   the word
//
// Copying is bound by memory: every load is on its way before the first store waits for one.
#include "common/cuda.cuh"
#include "moe_gather/moe_gather.h"

namespace mixlora {
namespace {

constexpr int kWarps = 4, kWords = 4;

template <class Word>
__global__ void gather_kernel(MoeGatherParams p) {
  const int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (n >= p.N) return;
  const int slot = p.row_slot_N[n];
  CHECK_INDEX(slot, -1, p.N);
  const Word* x_D =
      reinterpret_cast<const Word*>(p.x_TD + slot / static_cast<int>(p.K) * p.row_bytes);
  Word* out_D = reinterpret_cast<Word*>(p.x_ND + n * p.row_bytes);
  const int64_t num_words = p.row_bytes / sizeof(Word);
  const int64_t first = int64_t{blockIdx.y} * kWords * kLanes + threadIdx.x;

  Word words[kWords] = {};
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (slot >= 0 && first + i * kLanes < num_words) words[i] = x_D[first + i * kLanes];
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (first + i * kLanes < num_words) out_D[first + i * kLanes] = words[i];
  }
}

template <class Word>
void gather(const MoeGatherParams& p, CudaQueue& queue) {
  const int64_t num_words = p.row_bytes / sizeof(Word);
  const dim3 grid(divide_up(p.N, kWarps), divide_up(num_words, kWords * kLanes));
  launch<gather_kernel<Word>>(grid, dim3(kLanes, kWarps), 0, queue, p);
}

}  // namespace

void moe_gather_cuda(const MoeGatherParams& p, CudaQueue& queue) {
  if (p.N == 0 || p.row_bytes == 0) return;
  if (all_aligned(16, p.row_bytes, {p.x_TD, p.x_ND})) {
    gather<Pack<uint32_t, 4>>(p, queue);
  } else if (all_aligned(4, p.row_bytes, {p.x_TD, p.x_ND})) {
    gather<uint32_t>(p, queue);
  } else {
    gather<uint16_t>(p, queue);
  }
}

}  // namespace mixlora
