#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/vec.h"
#include "topk_router/topk_router.h"

namespace mixlora::MIXLORA_ISA {
namespace {

// Tokens of one partial sum. All results depend on it, so it does not depend on the threads.
constexpr int64_t kChunk = 256;

// NaN is above every number, as in torch.sort.
template <class S>
bool above(S a, S b) {
  return !(a <= b) && !std::isnan(b);
}

// What both directions compute of one token. The rows are filled up to whole vectors, logits with
// -inf and probabilities with 0.
template <class T>
struct Token {
  using S = Wide<T>;
  using V = Vec<S>;

  int64_t E, padded;
  std::vector<S> logit_E, prob_E;
  S logsumexp, entropy;

  explicit Token(int64_t E)
      : E(E),
        padded((E + kWidth<T> - 1) / kWidth<T> * kWidth<T>),
        logit_E(padded, -std::numeric_limits<S>::infinity()),
        prob_E(padded) {}

  // With shifted = logit - largest: prob = e^shifted / total, and because -log prob is
  // log total - shifted, the entropy needs one logarithm.
  void read(const T* row_E) {
    for_each_vector<T>(
        E, [&](int64_t e, auto n) { store_part(&logit_E[e], load_part(row_E + e, n), n); });
    V max_V = load(&logit_E[0]);
    for (int64_t e = kWidth<T>; e < padded; e += kWidth<T>) {
      const V logit = load(&logit_E[e]);
      max_V = logit > max_V ? logit : max_V;
    }
    const S largest = max(max_V);
    const V low = splat(S(sizeof(S) == 4 ? -87 : -708));  // e^x of less counts as 0
    V total_V{}, moment_V{};
    for (int64_t e = 0; e < padded; e += kWidth<T>) {
      const V shifted = load(&logit_E[e]) - splat(largest);
      const V raised = shifted < low ? V{} : exp(shifted);
      total_V += raised;
      moment_V += raised * (shifted < low ? low : shifted);
      store(&prob_E[e], raised);
    }
    const S total = sum(total_V), log_total = std::log(total);
    for (S& prob : prob_E) prob /= total;
    logsumexp = largest + log_total;
    entropy = log_total - sum(moment_V) / total;
  }

  // The K largest logits, the first of equals: by insertion, then in ascending order.
  void choose(int64_t K, int32_t* expert_K) const {
    for (int64_t e = 0; e < E; ++e) {
      int64_t k = std::min(e, K);
      for (; k > 0 && above(logit_E[e], logit_E[expert_K[k - 1]]); --k) {
        if (k < K) expert_K[k] = expert_K[k - 1];
      }
      if (k < K) expert_K[k] = e;
    }
    std::sort(expert_K, expert_K + K);
  }

  void weigh(int64_t K, const int32_t* expert_K, S* weight_K) const {
    S total = 0;
    for (int64_t k = 0; k < K; ++k) total += prob_E[expert_K[k]];
    for (int64_t k = 0; k < K; ++k) weight_K[k] = prob_E[expert_K[k]] / total;
  }
};

// Sums over tokens, in the order count_E, prob_E, entropy, z, num_tokens.
template <class T>
void add_token(const Token<T>& token, int64_t K, const int32_t* expert_K, double* sums) {
  const int64_t E = token.E;
  for (int64_t k = 0; k < K; ++k) sums[expert_K[k]] += 1;
  for (int64_t e = 0; e < E; ++e) sums[E + e] += token.prob_E[e];
  sums[2 * E] += token.entropy;
  sums[2 * E + 1] += token.logsumexp * token.logsumexp;
  sums[2 * E + 2] += 1;
}

template <class T>
void route(const TopkRouterParams& p) {
  using S = Wide<T>;
  const T* logits_TE = static_cast<const T*>(p.logits_TE);
  S* weight_TK = static_cast<S*>(p.weight_TK);
  const int64_t num_sums = 2 * p.E + 3, chunks = (p.T + kChunk - 1) / kChunk;
  std::vector<double> sums((1 + chunks) * num_sums, 0.);
  double* chunk_sums = sums.data() + num_sums;

  parallel_chunks(p.T, kChunk, [&](int64_t begin, int64_t end) {
    Token<T> token(p.E);
    for (int64_t t = begin; t < end; ++t) {
      int32_t* expert_K = p.expert_TK + t * p.K;
      token.read(logits_TE + t * p.E);
      if (p.given_TK) {
        std::copy_n(p.given_TK + t * p.K, p.K, expert_K);
      } else {
        token.choose(p.K, expert_K);
      }
      token.weigh(p.K, expert_K, weight_TK + t * p.K);
      if (p.mask_T && !p.mask_T[t]) continue;
      add_token(token, p.K, expert_K, chunk_sums + begin / kChunk * num_sums);
    }
  });

  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < num_sums; ++i) sums[i] += chunk_sums[chunk * num_sums + i];
  }
  std::copy_n(&sums[0], p.E, static_cast<S*>(p.count_E));
  std::copy_n(&sums[p.E], p.E, static_cast<S*>(p.prob_E));
  *static_cast<S*>(p.entropy) = sums[2 * p.E];
  *static_cast<S*>(p.z) = sums[2 * p.E + 1];
  *static_cast<S*>(p.num_tokens) = sums[2 * p.E + 2];
}

template <class T>
void route_backward(const TopkRouterBackwardParams& p) {
  using S = Wide<T>;
  const T* logits_TE = static_cast<const T*>(p.logits_TE);
  const S* dweight_TK = static_cast<const S*>(p.dweight_TK);
  const S* dprob_E = static_cast<const S*>(p.dprob_E);
  const S dz = *static_cast<const S*>(p.dz);
  T* dlogits_TE = static_cast<T*>(p.dlogits_TE);

  parallel_chunks(p.T, kChunk, [&](int64_t begin, int64_t end) {
    Token<T> token(p.E);
    std::vector<S> weight_K(p.K), dlogit_E(p.E);
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* expert_K = p.expert_TK + t * p.K;
      const S* dweight_K = dweight_TK + t * p.K;
      token.read(logits_TE + t * p.E);
      token.weigh(p.K, expert_K, weight_K.data());

      std::fill(dlogit_E.begin(), dlogit_E.end(), 0);
      if (!p.mask_T || p.mask_T[t]) {
        S mean = 0;
        for (int64_t e = 0; e < p.E; ++e) mean += token.prob_E[e] * dprob_E[e];
        const S common = 2 * token.logsumexp * dz - mean;
        for (int64_t e = 0; e < p.E; ++e) dlogit_E[e] = token.prob_E[e] * (dprob_E[e] + common);
      }
      S mean = 0;
      for (int64_t k = 0; k < p.K; ++k) mean += weight_K[k] * dweight_K[k];
      for (int64_t k = 0; k < p.K; ++k) {
        dlogit_E[expert_K[k]] += weight_K[k] * (dweight_K[k] - mean);
      }
      for_each_vector<T>(p.E, [&](int64_t e, auto n) {
        store_part(dlogits_TE + t * p.E + e, load_part(&dlogit_E[e], n), n);
      });
    }
  });
}

}  // namespace

void topk_router_cpu(const TopkRouterParams& p) {
  with_type(p.dtype, [&](auto zero) { route<decltype(zero)>(p); });
}

void topk_router_backward_cpu(const TopkRouterBackwardParams& p) {
  with_type(p.dtype, [&](auto zero) { route_backward<decltype(zero)>(p); });
}

}  // namespace mixlora::MIXLORA_ISA
