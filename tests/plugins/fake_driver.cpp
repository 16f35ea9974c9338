// A CUDA driver of one specialization, as far as our launches ask one: its kernels are those of the host, its memory too.
#include "host_cuda.cpp"

static char context, module, functions[2];  // their addresses are the handles

#define FAIL_UNLESS(condition) if (!(condition)) return 1  // CUDA_ERROR_INVALID_VALUE

extern "C" int cuInit(unsigned) { return 0; }

extern "C" int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }

extern "C" int cuDevicePrimaryCtxRetain(void** handle, int) { *handle = &context; return 0; }

extern "C" int cuCtxSetCurrent(void* handle) { FAIL_UNLESS(handle == &context); return 0; }

extern "C" int cuModuleLoadData(void** handle, const void* image)
{
    FAIL_UNLESS(std::strstr(static_cast<const char*>(image), ".entry " NAME_OF(TOKEN_GATHER) "("));
    *handle = &module;
    return 0;
}

extern "C" int cuModuleGetFunction(void** handle, void* from, const char* name)
{
    FAIL_UNLESS(from == &module);
    const bool gather = !std::strcmp(name, NAME_OF(TOKEN_GATHER));
    FAIL_UNLESS(gather || !std::strcmp(name, NAME_OF(TOKEN_SCATTER)));
    *handle = &functions[gather];
    return 0;
}

extern "C" int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
    unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra)
{
    FAIL_UNLESS(grid_y == 1 && grid_z == 1 && block_z == 1 && shared_bytes == 0 && stream == (void*) 7 && !extra);
    const char* name = function == &functions[1] ? NAME_OF(TOKEN_GATHER) : NAME_OF(TOKEN_SCATTER);
    return host_launch(name, grid_x, block_x, block_y, parameters);
}

#define ENTRY(function) if (!std::strcmp(name, #function)) { *address = (void*) function; return 0; }

extern "C" int cuGetProcAddress_v2(const char* name, void** address, int, unsigned long long, void* status)
{
    (void) status;
    ENTRY(cuInit) ENTRY(cuDeviceGet) ENTRY(cuDevicePrimaryCtxRetain) ENTRY(cuCtxSetCurrent)
    ENTRY(cuModuleLoadData) ENTRY(cuModuleGetFunction) ENTRY(cuLaunchKernel)
    *address = nullptr;
    return 500;  // CUDA_ERROR_NOT_FOUND
}
