// One source, several instruction sets. Every csrc/cpu/*.cpp is compiled once per set with NEOX_CPU_ISA naming the
// namespace that its kernels go to; NEOX_CPU_DEFAULT marks the compile for the baseline processor, which alone includes
// torch headers, registers the ops and picks a set at run time.
#pragma once

#if !defined(NEOX_CPU_ISA)
#error "NEOX_CPU_ISA is not defined: setup.py compiles this directory once per instruction set"
#endif

// Expands `declaration;` in the namespace of every instruction set of this build.
#define NEOX_DECLARE_DEFAULT(declaration) namespace isa_default { declaration; }
#if defined(NEOX_WITH_AVX2)
#define NEOX_DECLARE_AVX2(declaration) namespace isa_avx2 { declaration; }
#else
#define NEOX_DECLARE_AVX2(declaration)
#endif
#if defined(NEOX_WITH_AVX512)
#define NEOX_DECLARE_AVX512(declaration) namespace isa_avx512 { declaration; }
#else
#define NEOX_DECLARE_AVX512(declaration)
#endif
#if defined(NEOX_WITH_AVX512_BF16)
#define NEOX_DECLARE_AVX512_BF16(declaration) namespace isa_avx512_bf16 { declaration; }
#else
#define NEOX_DECLARE_AVX512_BF16(declaration)
#endif
#define NEOX_DECLARE_PER_ISA(declaration) \
  NEOX_DECLARE_DEFAULT(declaration)       \
  NEOX_DECLARE_AVX2(declaration)          \
  NEOX_DECLARE_AVX512(declaration)        \
  NEOX_DECLARE_AVX512_BF16(declaration)

namespace neox {

enum class Isa { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

// The best set that this build has and this processor runs; or the one that set_isa() chose (tests run them all).
Isa current_isa();

}  // namespace neox

// Calls `function` of the current set.
#if defined(NEOX_WITH_AVX2)
#define NEOX_CASE_AVX2(function) case ::neox::Isa::kAvx2: return ::neox::isa_avx2::function;
#else
#define NEOX_CASE_AVX2(function)
#endif
#if defined(NEOX_WITH_AVX512)
#define NEOX_CASE_AVX512(function) case ::neox::Isa::kAvx512: return ::neox::isa_avx512::function;
#else
#define NEOX_CASE_AVX512(function)
#endif
#if defined(NEOX_WITH_AVX512_BF16)
#define NEOX_CASE_AVX512_BF16(function) case ::neox::Isa::kAvx512Bf16: return ::neox::isa_avx512_bf16::function;
#else
#define NEOX_CASE_AVX512_BF16(function)
#endif
#define NEOX_SELECT_ISA(function)              \
  [] {                                         \
    switch (::neox::current_isa()) {           \
      NEOX_CASE_AVX2(function)                 \
      NEOX_CASE_AVX512(function)               \
      NEOX_CASE_AVX512_BF16(function)          \
      default:                                 \
        return ::neox::isa_default::function;  \
    }                                          \
  }()
