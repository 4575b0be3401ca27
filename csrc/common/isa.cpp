#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mixlora {
namespace {

int best_isa() {
#if !defined(MIXLORA_ONLY_ISA)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
  if (avx2 && avx512) return 2;
  if (avx2) return 1;
#endif
  return 0;
}

int wanted_isa() {
  const int best = best_isa();
  const char* wanted = std::getenv("MIXLORA_ISA");
  if (wanted == nullptr) return best;
  std::string usable;
  for (int i = 0; i <= best; ++i) {
    if (wanted == std::string(kIsaNames[i])) return i;
    usable += std::string(i ? ", " : "") + kIsaNames[i];
  }
  throw std::runtime_error("MIXLORA_ISA must be one of " + usable + ", got " + wanted);
}

}  // namespace

int chosen_isa() {
  static const int chosen = wanted_isa();
  return chosen;
}

}  // namespace mixlora
