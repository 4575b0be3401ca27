// `width` lanes share a token, the power of two that holds its experts, at most 32: lane l of them
// has the experts l, l + width, .., kPerLane in all. Eight experts: a warp has four tokens.
//
//   blockIdx.x                        the chunk of kChunk tokens
//   threadIdx.y, threadIdx.x / width  the token within a round
//   threadIdx.x % width, i            the expert e = i * width + l
//
// The sums over tokens: each lane adds up its tokens in turn, the block adds its lanes and writes a
// line of sums, and one warp per sum adds the lines: in fp64, in an order that T and E alone give.

#include "common/cuda.cuh"
#include "topk_router/topk_router.h"

namespace mixlora {
namespace {

constexpr int kWarps = 4, kChunk = 64;

// NaN is above every number, as in torch.sort.
template <class S>
__device__ bool above(S a, S b) {
  return !(a <= b) && !isnan(b);
}

// A token's softmax, and what this lane has of it. Where there is no such expert, prob_i is 0.
template <class T, int kPerLane>
struct Token {
  using S = Wide<T>;

  int E, width, lane;
  S logit[kPerLane], prob[kPerLane];
  S logsumexp, entropy;

  __device__ int expert(int i) const { return i * width + lane; }

  // With shifted = logit - largest: prob = e^shifted / total, and because -log prob is
  // log total - shifted, the entropy needs one logarithm.
  __device__ void read(const T* row_E) {
    S largest = -static_cast<S>(INFINITY);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      logit[i] = expert(i) < E ? widen(row_E[expert(i)]) : -static_cast<S>(INFINITY);
      largest = logit[i] > largest ? logit[i] : largest;
    }
    largest = max_lanes(largest, width);
    S total = 0, moment = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const S shifted = logit[i] - largest;
      prob[i] = expert(i) < E ? exp(shifted) : 0;
      total += prob[i];
      moment += prob[i] == 0 ? 0 : prob[i] * shifted;
    }
    total = sum_lanes(total, width);
    moment = sum_lanes(moment, width);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) prob[i] /= total;
    const S log_total = log(total);
    logsumexp = largest + log_total;
    entropy = log_total - moment / total;
  }

  // Bit i: this lane's expert i is one of the K with the largest logits, the first of equals.
  __device__ unsigned choose(int K) const {
    unsigned chosen = 0;
    for (int k = 0; k < K; ++k) {
      int best = E;
      S best_logit = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const bool free = expert(i) < E && !(chosen >> i & 1);
        if (free && (best == E || above(logit[i], best_logit))) {
          best = expert(i);
          best_logit = logit[i];
        }
      }
      for (int distance = width / 2; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(kAllLanes, best, distance);
        const S other_logit = __shfl_xor_sync(kAllLanes, best_logit, distance);
        const bool equal = !above(best_logit, other_logit) && !above(other_logit, best_logit);
        const bool better = above(other_logit, best_logit) || (equal && other < best);
        if (other < E && (best == E || better)) {
          best = other;
          best_logit = other_logit;
        }
      }
      if (best % width == lane) chosen |= 1u << best / width;
    }
    return chosen;
  }

  // How often expert i of this lane is among the token's K, and the sum of prob over the K.
  __device__ S count_uses(int K, const int32_t* expert_K, int (&uses)[kPerLane]) const {
    S total = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      uses[i] = 0;
      for (int k = 0; k < K; ++k) uses[i] += expert_K[k] == expert(i);
      total += uses[i] * prob[i];
    }
    return sum_lanes(total, width);
  }
};

// The chosen experts in ascending order; all lanes of the warp take part.
template <class T, int kPerLane>
__device__ void write_chosen(const Token<T, kPerLane>& token, unsigned chosen, int32_t* expert_K) {
  const int first_lane = threadIdx.x / token.width * token.width;
  const unsigned of_token = token.width == kLanes ? kAllLanes : (1u << token.width) - 1;
  int before = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool mine = chosen >> i & 1;
    const unsigned all = __ballot_sync(kAllLanes, mine) >> first_lane & of_token;
    const int k = before + __popc(all & ((1u << token.lane) - 1));
    if (mine && expert_K) expert_K[k] = token.expert(i);
    before += __popc(all);
  }
}

// lines[blockIdx.x]: the block's count_E, prob_E, entropy, z, num_tokens.
template <class T, int kPerLane>
__global__ void route_kernel(TopkRouterParams p, int width, double* lines) {
  using S = Wide<T>;
  const int E = p.E, K = p.K, tokens_in_warp = kLanes / width;
  const T* logits_TE = static_cast<const T*>(p.logits_TE);
  Token<T, kPerLane> token{E, width, static_cast<int>(threadIdx.x) % width};
  double count[kPerLane] = {}, prob[kPerLane] = {}, entropy = 0, z = 0, num_tokens = 0;

  const int in_round = threadIdx.y * tokens_in_warp + threadIdx.x / width;
  for (int first = 0; first < kChunk; first += kWarps * tokens_in_warp) {
    const int64_t t = int64_t{blockIdx.x} * kChunk + first + in_round;
    // Lanes without a token take part with the last one's, and write and count nothing.
    const bool valid = t < p.T && first + in_round < kChunk;
    const int64_t some_t = valid ? t : p.T - 1;
    token.read(logits_TE + some_t * E);
    int32_t* expert_K = p.expert_TK + some_t * K;
    if (p.given_TK) {
      for (int k = token.lane; k < K && valid; k += width) {
        const int expert = p.given_TK[t * K + k];
        CHECK_INDEX(expert, 0, E);
        expert_K[k] = expert;
      }
    } else {
      write_chosen(token, token.choose(K), valid ? expert_K : nullptr);
    }
    __syncwarp();

    int uses[kPerLane];
    const S total = token.count_uses(valid ? K : 0, expert_K, uses);
    if (!valid) continue;
    S* weight_K = static_cast<S*>(p.weight_TK) + t * K;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      for (int k = 0; k < K && uses[i]; ++k) {
        if (expert_K[k] == token.expert(i)) weight_K[k] = token.prob[i] / total;
      }
    }
    if (p.mask_T && !p.mask_T[t]) continue;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      count[i] += uses[i];
      prob[i] += token.prob[i];
    }
    entropy += token.entropy;
    z += token.logsumexp * token.logsumexp;
    num_tokens += 1;
  }

  // sums[w]: of the warp w.
  DYNAMIC_SHARED(double, sums);
  const int num_sums = 2 * E + 3;
  double* sums_of_warp = sums + threadIdx.y * num_sums;
  const auto add_tokens = [&](double x) {
    for (int distance = kLanes / 2; distance >= width; distance /= 2) {
      x += __shfl_xor_sync(kAllLanes, x, distance);
    }
    return x;
  };
  const bool first_token = static_cast<int>(threadIdx.x) < width;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const double whole_count = add_tokens(count[i]), whole_prob = add_tokens(prob[i]);
    if (first_token && token.expert(i) < E) {
      sums_of_warp[token.expert(i)] = whole_count;
      sums_of_warp[E + token.expert(i)] = whole_prob;
    }
  }
  entropy = add_tokens(entropy);
  z = add_tokens(z);
  num_tokens = add_tokens(num_tokens);
  if (threadIdx.x == 0) {
    sums_of_warp[2 * E] = entropy;
    sums_of_warp[2 * E + 1] = z;
    sums_of_warp[2 * E + 2] = num_tokens;
  }
  __syncthreads();
  for (int i = threadIdx.y * kLanes + threadIdx.x; i < num_sums; i += kWarps * kLanes) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * num_sums + i];
    lines[int64_t{blockIdx.x} * num_sums + i] = sum;
  }
}

// A warp adds up one column of the lines.
template <class S>
__global__ void add_lines_kernel(TopkRouterParams p, const double* lines, int num_lines) {
  const int E = p.E, num_sums = 2 * E + 3, i = blockIdx.x;
  double sum = 0;
  for (int line = threadIdx.x; line < num_lines; line += kLanes) {
    sum += lines[int64_t{line} * num_sums + i];
  }
  sum = sum_lanes(sum);
  if (threadIdx.x != 0) return;
  S* out = i < E            ? static_cast<S*>(p.count_E) + i
           : i < 2 * E      ? static_cast<S*>(p.prob_E) + i - E
           : i == 2 * E     ? static_cast<S*>(p.entropy)
           : i == 2 * E + 1 ? static_cast<S*>(p.z)
                            : static_cast<S*>(p.num_tokens);
  *out = sum;
}

template <class T, int kPerLane>
__global__ void route_backward_kernel(TopkRouterBackwardParams p, int width) {
  using S = Wide<T>;
  const int E = p.E, K = p.K, tokens_in_warp = kLanes / width;
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.y) * tokens_in_warp;
  const int64_t t = first + threadIdx.x / width;
  const bool valid = t < p.T;
  const int64_t some_t = valid ? t : p.T - 1;
  const int32_t* expert_K = p.expert_TK + some_t * K;
  const S* dweight_K = static_cast<const S*>(p.dweight_TK) + some_t * K;
  const S* dprob_E = static_cast<const S*>(p.dprob_E);

  Token<T, kPerLane> token{E, width, static_cast<int>(threadIdx.x) % width};
  token.read(static_cast<const T*>(p.logits_TE) + some_t * E);
  int uses[kPerLane];
  const S total = token.count_uses(K, expert_K, uses);

  S mean_dprob = 0, mean_dweight = 0, dweight[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    dweight[i] = 0;  // the sum over the slots of expert i
    for (int k = 0; k < K && uses[i]; ++k) {
      if (expert_K[k] == token.expert(i)) dweight[i] += dweight_K[k];
    }
    if (token.expert(i) < E) mean_dprob += token.prob[i] * dprob_E[token.expert(i)];
    mean_dweight += token.prob[i] / total * dweight[i];
  }
  mean_dprob = sum_lanes(mean_dprob, width);
  mean_dweight = sum_lanes(mean_dweight, width);
  if (!valid) return;

  const bool real = !p.mask_T || p.mask_T[t];
  const S common = 2 * token.logsumexp * *static_cast<const S*>(p.dz) - mean_dprob;
  T* dlogits_E = static_cast<T*>(p.dlogits_TE) + t * E;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (token.expert(i) >= E) continue;
    S dlogit = real ? token.prob[i] * (dprob_E[token.expert(i)] + common) : 0;
    if (uses[i]) dlogit += token.prob[i] / total * (dweight[i] - uses[i] * mean_dweight);
    narrow(dlogit, dlogits_E[token.expert(i)]);
  }
}

int width_for(int64_t E) {
  int width = 1;
  while (width < E && width < kLanes) width *= 2;
  return width;
}

// Calls body(zero, constant) with the number of experts of a lane.
template <class Body>
void with_experts(Dtype dtype, int64_t E, CudaQueue& queue, const Body& body) {
  with_type(dtype, [&](auto zero) {
    if (E <= kLanes) {
      body(zero, std::integral_constant<int, 1>{});
    } else if (E <= 2 * kLanes) {
      body(zero, std::integral_constant<int, 2>{});
    } else if (E <= 8 * kLanes) {
      body(zero, std::integral_constant<int, 8>{});
    } else {
      queue.error = "there must be at most 256 experts on a GPU, got " + std::to_string(E);
    }
  });
}

}  // namespace

void topk_router_cuda(const TopkRouterParams& p, CudaQueue& queue) {
  const int64_t num_sums = 2 * p.E + 3, num_lines = divide_up(p.T, kChunk);
  double* lines = static_cast<double*>(queue.allocate(num_lines * num_sums * sizeof(double)));
  with_experts(p.dtype, p.E, queue, [&](auto zero, auto per_lane) {
    using T = decltype(zero);
    constexpr int kPerLane = decltype(per_lane)::value;
    const dim3 block(kLanes, kWarps);
    const int64_t bytes = kWarps * num_sums * sizeof(double);
    if (num_lines > 0) {
      launch<route_kernel<T, kPerLane>>(
          dim3(num_lines), block, bytes, queue, p, width_for(p.E), lines);
    }
    launch<add_lines_kernel<Wide<T>>>(
        dim3(num_sums), dim3(kLanes), 0, queue, p, lines, static_cast<int>(num_lines));
  });
}

void topk_router_backward_cuda(const TopkRouterBackwardParams& p, CudaQueue& queue) {
  if (p.T == 0) return;
  with_experts(p.dtype, p.E, queue, [&](auto zero, auto per_lane) {
    using T = decltype(zero);
    constexpr int kPerLane = decltype(per_lane)::value;
    const int width = width_for(p.E);
    const dim3 grid(divide_up(p.T, kWarps * (kLanes / width))), block(kLanes, kWarps);
    launch<route_backward_kernel<T, kPerLane>>(grid, block, 0, queue, p, width);
  });
}

}  // namespace mixlora
