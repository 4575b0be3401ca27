// One kernel source, one kernel per instruction set.
//
// setup.py compiles every <op>_cpu.cpp once per name in kIsaNames, each time with MIXLORA_ISA
// set to that variant's namespace. The op's header declares all variants, the entry picks one:
//
//   <op>.h        DECLARE_CPU_KERNEL(void, foo_cpu, const FooParams& p)
//   <op>_cpu.cpp  namespace mixlora::MIXLORA_ISA { void foo_cpu(const FooParams& p) { ... } }
//   <op>.cpp      CPU_KERNEL(foo_cpu)(params);
//
// Where there is one instruction set only, MIXLORA_ONLY_ISA is its name, and all files have
// MIXLORA_ISA.
#pragma once

namespace mixlora {

// The best variant this processor can run: an index into kIsaNames. The environment variable
// MIXLORA_ISA names a lesser one, so that every variant can be tested on one machine.
int chosen_isa();

}  // namespace mixlora

#if !defined(MIXLORA_ONLY_ISA)

namespace mixlora {
inline constexpr const char* kIsaNames[] = {"default", "avx2", "avx512", "avx512_bf16"};
}

#define DECLARE_CPU_KERNEL(result, name, ...) \
  namespace cpu_default {                     \
  result name(__VA_ARGS__);                   \
  }                                           \
  namespace cpu_avx2 {                        \
  result name(__VA_ARGS__);                   \
  }                                           \
  namespace cpu_avx512 {                      \
  result name(__VA_ARGS__);                   \
  }                                           \
  namespace cpu_avx512_bf16 {                 \
  result name(__VA_ARGS__);                   \
  }

#define CPU_KERNEL(name)                                                                 \
  [] {                                                                                   \
    constexpr decltype(&cpu_default::name) variants[] = {                                \
        &cpu_default::name, &cpu_avx2::name, &cpu_avx512::name, &cpu_avx512_bf16::name}; \
    return variants[mixlora::chosen_isa()];                                              \
  }()

#else

namespace mixlora {
inline constexpr const char* kIsaNames[] = {MIXLORA_ONLY_ISA};
}

#define DECLARE_CPU_KERNEL(result, name, ...) \
  namespace MIXLORA_ISA {                     \
  result name(__VA_ARGS__);                   \
  }

#define CPU_KERNEL(name) (&MIXLORA_ISA::name)

#endif
