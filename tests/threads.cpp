// Every kernel in several threads, for ThreadSanitizer (tools/sanitize.py): torch and OpenMP, which
// it cannot look into, are not here. Prints the kernels whose bits depend on the threads.
//
// With MIXLORA_CUDA_ON_CPU these are the CUDA kernels, executed by tests/cuda_on_cpu.cpp, which
// tells it that each thread of a block is a thread of its own.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/parallel.h"
#include "dropout/dropout.h"
#include "few_rows_linear/few_rows_linear.h"
#include "few_rows_lora/few_rows_lora.h"
#include "grouped_lora/grouped_lora.h"
#include "grouped_shrink/grouped_shrink.h"
#include "moe_gather/moe_gather.h"
#include "moe_scatter/moe_scatter.h"
#include "moe_sort/moe_sort.h"
#include "shared_glu/shared_glu.h"
#include "topk_router/topk_router.h"

namespace {

int num_threads = 1, largest_num_items = 0, num_wrong = 0;

}  // namespace

#if defined(MIXLORA_CUDA_ON_CPU)

constexpr bool kCuda = true;
#define RUN(name, ...) run_cuda([&](CudaQueue& queue) { name##_cuda(__VA_ARGS__, queue); })

extern "C" void on_cpu_set_order(int order, unsigned seed);

template <class Launch>
void run_cuda(const Launch& launch) {
  std::vector<std::unique_ptr<char[]>> memory;
  mixlora::CudaQueue queue{
      .allocate = [&](int64_t bytes) { return memory.emplace_back(new char[bytes]).get(); }};
  on_cpu_set_order(num_threads == 1 ? 0 : 2, 0);  // ascending, random
  launch(queue);
  if (queue.error.empty()) return;
  ++num_wrong;
  std::printf("%s\n", queue.error.c_str());
}

#else

constexpr bool kCuda = false;
#define RUN(name, ...) CPU_KERNEL(name##_cpu)(__VA_ARGS__)

extern "C" int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t, void (*run)(int64_t, int64_t, void*), void* context) {
  largest_num_items = std::max<int>(largest_num_items, end - begin);
  // Items are dealt out, so that every thread has some however late it starts.
  const auto work = [&](int64_t i) {
    for (; i < end; i += num_threads) run(i, i + 1, context);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(work, begin + i);
  work(begin);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

#endif

namespace mixlora {
namespace {

template <class T>
using Numbers = std::vector<T>;

// Ragged everywhere: no size is a multiple of a vector, a tile, a panel or a chunk. On CUDA rows of
// I are copied 16 bytes at a time.
constexpr int64_t T = kCuda ? 157 : 4999, K = 3, E = 7, R = 5, F = kCuda ? 133 : 261, D = 41,
                  N = T * K, I = kCuda ? 136 : 203, O = 101;

template <class S>
Numbers<S> normal(int64_t count) {
  static std::mt19937 generator(0);
  std::normal_distribution<double> number;
  Numbers<S> numbers(count);
  for (S& x : numbers) {
    const float y = static_cast<float>(number(generator));
    if constexpr (std::is_same_v<S, Bf16>) {
      std::memcpy(&x, reinterpret_cast<const char*>(&y) + 2, 2);
    } else {
      x = y;
    }
  }
  return numbers;
}

Numbers<int32_t> experts() {
  std::mt19937 generator(1);
  Numbers<int32_t> expert_TK(N);
  for (int32_t& expert : expert_TK) expert = static_cast<int32_t>(generator() % (E + 1)) - 1;
  return expert_TK;
}

// For a result, of any type that has at most four bytes.
struct Memory {
  void* p;
  template <class P>
  operator P*() const {
    return static_cast<P*>(p);
  }
};

// run(out) must give the same bits for any number of threads, or order of them; `out(count)` is
// memory for a result.
template <class Run>
void check(const char* name, const Run& run) {
  Numbers<Numbers<int32_t>> results[2];
  largest_num_items = 0;
  for (int many = 0; many < 2; ++many) {
    num_threads = many ? 4 : 1;
    results[many].reserve(16);  // the pointers must stay
    run([&](int64_t count) { return Memory{results[many].emplace_back(count, 7).data()}; });
  }
  const bool right = results[0] == results[1] && (kCuda || largest_num_items >= 4);
  num_wrong += !right;
  std::printf("%-24s %4d items  %s\n", name, largest_num_items, right ? "equal" : "WRONG");
  std::fflush(stdout);
}

struct Plan {
  Numbers<int32_t> expert_TK = experts(), expert_start_E1 = Numbers<int32_t>(E + 1),
                   row_slot_N = Numbers<int32_t>(N), slot_row_TK = Numbers<int32_t>(N),
                   token_order_T = Numbers<int32_t>(T);

  Plan() {
    RUN(moe_sort,
        {expert_TK.data(),
         expert_start_E1.data(),
         row_slot_N.data(),
         slot_row_TK.data(),
         token_order_T.data(),
         T,
         K,
         E});
  }
};

void check_moe_sort() {
  // Its chunks are long.
  constexpr int64_t kTokens = kCuda ? 1'501 : 150'001;
  Numbers<int32_t> expert_TK;
  while (expert_TK.size() < kTokens * K) {
    const auto more = experts();
    expert_TK.insert(expert_TK.end(), more.begin(), more.end());
  }
  check("moe_sort", [&](const auto& out) {
    RUN(moe_sort,
        {expert_TK.data(),
         out(E + 1),
         out(kTokens * K),
         out(kTokens * K),
         out(kTokens),
         kTokens,
         K,
         E});
  });
}

void check_rows(const Plan& plan) {
  const auto x_TD = normal<float>(T * D), y_ND = normal<float>(N * D), weight_TK = normal<float>(N);
  const int64_t seed = 5;
#if !defined(MIXLORA_CUDA_ON_CPU)  // the library's product is as good there
  check("few_rows_linear", [&](const auto& out) {
    RUN(few_rows_linear,
        {.x_TI = x_TD.data(),
         .w_OI = y_ND.data(),
         .bias_O = nullptr,
         .y_TO = out(9 * N),
         .T = 9,
         .I = D,
         .O = N,
         .dtype = Dtype::kFloat32});
  });
  check("few_rows_lora", [&](const auto& out) {
    RUN(few_rows_lora,
        {.y_TO = y_ND.data(),
         .x_TI = x_TD.data(),
         .lora_a_RI = x_TD.data(),
         .lora_b_OR = y_ND.data(),
         .sum_TO = out(9 * N),
         .T = 9,
         .I = 1000,
         .O = N,
         .R = D,
         .scaling = 0.5,
         .dtype = Dtype::kFloat32});
  });
#endif
  check("dropout", [&](const auto& out) {
    RUN(dropout,
        {.x_ND = x_TD.data(),
         .y_ND = out(T * D),
         .seed = &seed,
         .N = T,
         .D = D,
         .p = 0.1,
         .dtype = Dtype::kFloat32});
  });
  check("moe_gather", [&](const auto& out) {
    RUN(moe_gather,
        {.x_TD = reinterpret_cast<const char*>(x_TD.data()),
         .row_slot_N = plan.row_slot_N.data(),
         .x_ND = out(N * D),
         .N = N,
         .K = K,
         .row_bytes = D * 4});
  });
  check("moe_scatter", [&](const auto& out) {
    RUN(moe_scatter,
        {.y_ND = y_ND.data(),
         .slot_row_TK = plan.slot_row_TK.data(),
         .weight_TK = weight_TK.data(),
         .y_TD = out(T * D),
         .T = T,
         .K = K,
         .D = D,
         .dtype = Dtype::kFloat32});
  });
  check("moe_scatter_backward", [&](const auto& out) {
    RUN(moe_scatter_backward,
        {.dy_TD = x_TD.data(),
         .y_ND = y_ND.data(),
         .row_slot_N = plan.row_slot_N.data(),
         .slot_row_TK = plan.slot_row_TK.data(),
         .weight_TK = weight_TK.data(),
         .dy_ND = out(N * D),
         .dweight_TK = out(N),
         .T = T,
         .K = K,
         .D = D,
         .dtype = Dtype::kFloat32});
  });
}

void check_router() {
  const auto logits_TE = normal<float>(T * E), dweight_TK = normal<float>(N),
             dprob_E = normal<float>(E), dz = normal<float>(1);
  bool mask_T[T];
  for (int64_t t = 0; t < T; ++t) mask_T[t] = t % 3 != 1;
  Numbers<int32_t> expert_TK(N);
  check("topk_router", [&](const auto& out) {
    RUN(topk_router,
        {.logits_TE = logits_TE.data(),
         .mask_T = mask_T,
         .given_TK = nullptr,
         .expert_TK = expert_TK.data(),
         .weight_TK = out(N),
         .count_E = out(E),
         .prob_E = out(E),
         .entropy = out(1),
         .z = out(1),
         .num_tokens = out(1),
         .T = T,
         .E = E,
         .K = K,
         .dtype = Dtype::kFloat32});
  });
  check("topk_router_backward", [&](const auto& out) {
    RUN(topk_router_backward,
        {.dweight_TK = dweight_TK.data(),
         .dprob_E = dprob_E.data(),
         .dz = dz.data(),
         .logits_TE = logits_TE.data(),
         .expert_TK = expert_TK.data(),
         .mask_T = mask_T,
         .dlogits_TE = out(T * E),
         .T = T,
         .E = E,
         .K = K,
         .dtype = Dtype::kFloat32});
  });
}

template <class S>
void check_grouped(const Plan& plan, Dtype dtype) {
  const auto x_TI = normal<S>(T * I), w = normal<S>(E * R * I), a_TKR = normal<S>(N * R);
  for (const bool transposed : {false, true}) {
    const GroupedShrinkParams p = {.x_TI = x_TI.data(),
                                   .w = w.data(),
                                   .a_TKR = a_TKR.data(),
                                   .expert_TK = plan.expert_TK.data(),
                                   .expert_start_E1 = plan.expert_start_E1.data(),
                                   .row_slot_N = plan.row_slot_N.data(),
                                   .T = T,
                                   .K = K,
                                   .E = E,
                                   .R = R,
                                   .I = I,
                                   .transposed = transposed,
                                   .dtype = dtype};
    const auto into = [&](void* result) {
      GroupedShrinkParams with_result = p;
      with_result.result = result;
      return with_result;
    };
    check("grouped_shrink", [&](const auto& out) { RUN(grouped_shrink, into(out(N * R))); });
    check("grouped_expand", [&](const auto& out) { RUN(grouped_expand, into(out(T * I))); });
    check("grouped_outer", [&](const auto& out) { RUN(grouped_outer, into(out(E * R * I))); });
  }

  // Empty groups, groups of few rows, and rows of no group.
  constexpr int kRows = kCuda ? 151 : 1511, G = 6;
  const Numbers<int32_t> start_G1 = {0, 0, 3, kRows / 2, kRows / 2 + 1, kRows / 2 + 1, kRows - 12};
  const auto x_NI = normal<S>(kRows * I), lora_a_GRI = normal<S>(G * R * I),
             lora_b_GOR = normal<S>(G * O * R), dy_NO = normal<S>(kRows * O);
  check("grouped_lora", [&](const auto& out) {
    RUN(grouped_lora,
        {.x_NI = x_NI.data(),
         .lora_a_GRI = lora_a_GRI.data(),
         .lora_b_GOR = lora_b_GOR.data(),
         .group_start_G1 = start_G1.data(),
         .N = kRows,
         .G = G,
         .R = R,
         .I = I,
         .O = O,
         .scaling = 1.7,
         .dtype = dtype,
         .y_NO = out(kRows * O)});
  });
  check("grouped_lora_backward", [&](const auto& out) {
    RUN(grouped_lora_backward,
        {.x_NI = x_NI.data(),
         .lora_a_GRI = lora_a_GRI.data(),
         .lora_b_GOR = lora_b_GOR.data(),
         .group_start_G1 = start_G1.data(),
         .N = kRows,
         .G = G,
         .R = R,
         .I = I,
         .O = O,
         .scaling = 1.7,
         .dtype = dtype,
         .dy_NO = dy_NO.data(),
         .dx_NI = out(kRows * I),
         .dlora_a_GRI = out(G * R * I),
         .dlora_b_GOR = out(G * O * R)});
  });
}

template <class S>
void check_glu(const Plan& plan, Dtype dtype) {
  const int64_t seed = 5;
  const auto gate_TF = normal<S>(T * F), up_TF = normal<S>(T * F),
             a_gate_TKR = normal<float>(N * R), a_up_TKR = normal<float>(N * R),
             b_gate_EFR = normal<float>(E * F * R), b_up_EFR = normal<float>(E * F * R),
             a_down_ERF = normal<float>(E * R * F), weight_TK = normal<float>(N),
             scale_EF = normal<float>(E * F), bias_F = normal<float>(F),
             dhbar_TF = normal<S>(T * F), dz_TKR = normal<float>(N * R);
  const SharedGluParams inputs{.dtype = dtype,
                               .act = 0,
                               .tokens = T,
                               .slots = K,
                               .experts = E,
                               .rank = R,
                               .ffn = F,
                               .gate_TF = gate_TF.data(),
                               .up_TF = up_TF.data(),
                               .a_gate_TKR = a_gate_TKR.data(),
                               .a_up_TKR = a_up_TKR.data(),
                               .b_gate_EFR = b_gate_EFR.data(),
                               .b_up_EFR = b_up_EFR.data(),
                               .a_down_ERF = a_down_ERF.data(),
                               .weight_TK = weight_TK.data(),
                               .scale_gate_EF = scale_EF.data(),
                               .scale_up_EF = scale_EF.data(),
                               .bias_gate_F = bias_F.data(),
                               .bias_up_F = bias_F.data(),
                               .expert_TK = plan.expert_TK.data(),
                               .token_order_T = plan.token_order_T.data(),
                               .scaling = 1.7,
                               .dropout = 0.1,
                               .seed = &seed};
  check("shared_glu", [&](const auto& out) {
    SharedGluParams p = inputs;
    p.hbar_TF = out(T * F);
    p.z_TKR = out(N * R);
    RUN(shared_glu, p);
  });
  check("shared_glu_backward", [&](const auto& out) {
    SharedGluParams p = inputs;
    p.dhbar_TF = dhbar_TF.data();
    p.dz_TKR = dz_TKR.data();
    p.dgate_TF = out(T * F);
    p.dup_TF = out(T * F);
    p.da_gate_TKR = out(N * R);
    p.da_up_TKR = out(N * R);
    p.dweight_TK = out(N);
    p.db_gate_EFR = out(E * F * R);
    p.db_up_EFR = out(E * F * R);
    p.da_down_ERF = out(E * R * F);
    p.dscale_gate_EF = out(E * F);
    p.dscale_up_EF = out(E * F);
    RUN(shared_glu_backward, p);
  });
}

}  // namespace
}  // namespace mixlora

int main() {
  mixlora::check_moe_sort();
  const mixlora::Plan plan;
  mixlora::check_rows(plan);
  mixlora::check_router();
  mixlora::check_grouped<float>(plan, mixlora::Dtype::kFloat32);
  mixlora::check_grouped<mixlora::Bf16>(plan, mixlora::Dtype::kBfloat16);
  mixlora::check_glu<float>(plan, mixlora::Dtype::kFloat32);
  mixlora::check_glu<mixlora::Bf16>(plan, mixlora::Dtype::kBfloat16);
  return num_wrong ? 1 : 0;
}
