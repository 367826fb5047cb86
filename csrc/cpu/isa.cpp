// Which instruction set the CPU kernels run with, chosen once; torch.ops.neox_kernels.cpu_isa tells it and sets it.
#include "cpu/isa.h"

#if defined(NEOX_CPU_DEFAULT)
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace neox {
namespace {

struct NamedIsa {
  const char* name;
  Isa isa;
  bool runs;
};

// From the portable to the best.
const NamedIsa kIsas[] = {
    {"default", Isa::kDefault, true},
#if defined(__x86_64__) && defined(NEOX_WITH_AVX2)
    {"avx2", Isa::kAvx2,
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
#if defined(__x86_64__) && defined(NEOX_WITH_AVX512)
    {"avx512", Isa::kAvx512,
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq")},
#endif
#if defined(__x86_64__) && defined(NEOX_WITH_AVX512_BF16)
    {"avx512_bf16", Isa::kAvx512Bf16,
     __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq")},
#endif
};

Isa best_isa() {
  Isa best = Isa::kDefault;
  for (const NamedIsa& entry : kIsas) {
    if (entry.runs) best = entry.isa;
  }
  return best;
}

std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

// cpu_isa("") tells the set in use; cpu_isa("best") and cpu_isa(name) choose one; the answer is always the one in use.
std::string cpu_isa(std::string name) {
  if (name == "best") {
    chosen_isa().store(best_isa(), std::memory_order_relaxed);
  } else if (!name.empty()) {
    const NamedIsa* found = nullptr;
    std::string known;
    for (const NamedIsa& entry : kIsas) {
      if (!entry.runs) continue;
      if (name == entry.name) found = &entry;
      known += std::string(known.empty() ? "" : ", ") + entry.name;
    }
    if (found == nullptr) {
      throw std::invalid_argument("cpu_isa: '" + name + "' does not run here; this build and processor have " + known);
    }
    chosen_isa().store(found->isa, std::memory_order_relaxed);
  }
  for (const NamedIsa& entry : kIsas) {
    if (entry.isa == current_isa()) return entry.name;
  }
  return "default";
}

}  // namespace

Isa current_isa() { return chosen_isa().load(std::memory_order_relaxed); }

}  // namespace neox

STABLE_TORCH_LIBRARY_IMPL(neox_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&neox::cpu_isa)); }
#endif
