// The entry points of the CUDA runtime that code compiled by nvcc calls, for a machine without a GPU: they tell a hook what
// would be launched, and another what memory the ops take. Also those of torch that need a device. Plain C++, so that
// nothing of CUDA is linked.
#include <cstddef>
#include <cstdint>
#include <map>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

// kernel, grid and block (3 numbers each), bytes of dynamic shared memory, and where each argument lies.
using Hook = void (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared, void** arguments);
Hook hook = nullptr;
using MemoryHook = void (*)(void* data, int64_t bytes);
MemoryHook memory_hook = nullptr;

std::map<const void*, const char*>& kernels() {  // by the address of the function that stands for one on the host
  static std::map<const void*, const char*> names;
  return names;
}

struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

int tell(const char* name, Dim3 grid, Dim3 block, void** arguments, size_t shared) {
  if (hook == nullptr || name == nullptr) return 1;
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  hook(name, g, b, shared, arguments);
  return 0;
}

}  // namespace

extern "C" {

void neox_set_hooks(Hook launch, MemoryHook memory) { hook = launch, memory_hook = memory; }

// The linker puts this in the place of aoti_torch_empty_strided, by which the ops make their results and their scratch.
int32_t __real_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device, int32_t index, void** made);
int32_t aoti_torch_get_data_ptr(void* tensor, void** data);
int32_t aoti_torch_get_storage_size(void* tensor, int64_t* bytes);
int32_t __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device, int32_t index, void** made) {
  if (__real_aoti_torch_empty_strided(dims, sizes, strides, dtype, device, index, made) != 0) return 1;
  void* data;
  int64_t bytes;
  if (aoti_torch_get_data_ptr(*made, &data) != 0 || aoti_torch_get_storage_size(*made, &bytes) != 0) return 1;
  if (memory_hook != nullptr) memory_hook(data, bytes);
  return 0;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[stub] = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return 0;
}

// CUDA 13 asks for a handle of the kernel first. Here that is its name.
int __cudaGetKernel(const void** kernel, const void* stub) {
  const auto found = kernels().find(stub);
  *kernel = found == kernels().end() ? nullptr : found->second;
  return *kernel == nullptr;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return tell(static_cast<const char*>(kernel), grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  const auto found = kernels().find(stub);
  return tell(found == kernels().end() ? nullptr : found->second, grid, block, arguments, shared);
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "no CUDA here"; }
int cudaFuncSetAttribute(const void*, int, int) { return 0; }

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  static int something;
  *guard = &something;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }

}  // extern "C"
