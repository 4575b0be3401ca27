// Which tokens and slots a warp's 16 rows are, and which experts they have.
#pragma once

#include "shared_glu/products.cuh"
#include "shared_glu/shared_glu.h"

namespace mixlora {
namespace {

constexpr int kMaxExperts = 64;  // bits of a word

// The tokens of this lane's two rows; -1 behind the last.
struct Rows {
  int64_t token[2];
};

inline __device__ Rows rows_from(const SharedGluParams& p, int64_t first) {
  Rows rows;
  for (int h = 0; h < 2; ++h) {
    const int64_t place = first + lane_row() + 8 * h;
    const int token = place < p.tokens ? p.token_order_T[place] : -1;
    CHECK_INDEX(token, -1, p.tokens);
    rows.token[h] = token;
  }
  return rows;
}

// A tile's rows in their k-th slot; `mine` are those with the expert.
struct Visit {
  Rows rows;
  int64_t k, slot[2];
  int expert;
  bool mine[2];
};

inline __device__ int expert_of(const SharedGluParams& p, int64_t token, int64_t k) {
  const int expert = token < 0 ? -1 : p.expert_TK[token * p.slots + k];
  CHECK_INDEX(expert, -1, p.experts);
  return expert;
}

// experts_KW[k * kWarps + w]: a bit for each expert that the rows of warp w have in their k-th
// slot. All threads of the block take part.
inline __device__ void find_experts(const SharedGluParams& p, Rows rows, uint64_t* experts_KW) {
  for (int64_t k = 0; k < p.slots; ++k) {
    unsigned long long experts = 0;
    for (int64_t token : rows.token) {
      const int expert = expert_of(p, token, k);
      if (expert >= 0) experts |= 1ull << expert;
    }
    for (int distance = 4; distance < kLanes; distance *= 2) {
      experts |= __shfl_xor_sync(kAllLanes, experts, distance);
    }
    if (threadIdx.x == 0) experts_KW[k * kWarps + threadIdx.y] = experts;
  }
  __syncthreads();
}

// Calls body(visit) for every slot and every expert that warps first .. last - 1 have in it.
template <class Body>
__device__ void for_each_visit(const SharedGluParams& p,
                               Rows rows,
                               const uint64_t* experts_KW,
                               int first,
                               int last,
                               const Body& body) {
  for (int64_t k = 0; k < p.slots; ++k) {
    unsigned long long experts = 0;
    for (int w = first; w < last; ++w) experts |= experts_KW[k * kWarps + w];
    for (; experts; experts &= experts - 1) {
      Visit visit{rows, k, {}, __ffsll(experts) - 1, {}};
      for (int h = 0; h < 2; ++h) {
        visit.slot[h] = rows.token[h] < 0 ? 0 : rows.token[h] * p.slots + k;
        visit.mine[h] = expert_of(p, rows.token[h], k) == visit.expert;
      }
      body(visit);
    }
  }
}

inline int64_t experts_bytes(const SharedGluParams& p) {
  return p.slots * kWarps * sizeof(uint64_t);
}

}  // namespace
}  // namespace mixlora
