// The optional module neox_kernels._build: what was compiled, and what this processor has.
// It uses neither torch nor the compiled library, so it answers when those cannot be loaded.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

// setup.py hands lists over as one comma-separated string each.
py::list split(const std::string& joined) {
  py::list parts;
  for (size_t begin = 0; begin < joined.size();) {
    const size_t end = std::min(joined.find(',', begin), joined.size());
    parts.append(joined.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict info() {
  const std::string nvcc = NEOX_BUILD_NVCC;
  py::dict facts;
  facts["cpu_isas"] = split(NEOX_BUILD_ISAS);
  facts["cuda"] = !nvcc.empty();
  facts["cuda_archs"] = split(NEOX_BUILD_CUDA_ARCHS);
  facts["nvcc"] = nvcc.empty() ? py::object(py::none()) : py::object(py::str(nvcc));
#if defined(__clang__)
  facts["compiler"] = __VERSION__;  // begins with the compiler's name
#else
  facts["compiler"] = "gcc " __VERSION__;
#endif
  facts["torch_target"] = NEOX_BUILD_TORCH_TARGET;
  return facts;
}

// Features of the processor that are usable: those __builtin_cpu_supports knows are checked against the operating
// system too. The last two are read from the processor itself, since older compilers do not know their names.
py::dict cpu() {
  py::dict has;
#if defined(__x86_64__)
  __builtin_cpu_init();
  has["avx2"] = __builtin_cpu_supports("avx2") != 0;
  has["fma"] = __builtin_cpu_supports("fma") != 0;
  has["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  has["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  has["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  has["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool basic = __get_cpuid(1, &a, &b, &c, &d) != 0;
  has["f16c"] = basic && ((c >> 29) & 1) && __builtin_cpu_supports("avx");
  const bool extended = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0;
  has["avx512_bf16"] = extended && ((a >> 5) & 1) && __builtin_cpu_supports("avx512f");
  const bool structured = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0;
  has["amx_bf16"] = structured && ((d >> 22) & 1) != 0;
#endif
  return has;
}

}  // namespace

PYBIND11_MODULE(_build, m, py::mod_gil_not_used()) {
  m.doc() = "What was compiled into neox_kernels, and what this processor has.";
  m.def("info", &info, "Facts of the build: instruction sets, CUDA architectures, nvcc, compiler, torch target.");
  m.def("cpu", &cpu, "Instruction sets of this processor, by name; empty on anything but x86-64.");
}
