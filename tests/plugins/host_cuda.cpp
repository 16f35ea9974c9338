// token_rows.cu as C++ for the host: one thread after the other, and a wide access to an odd address is reported, as a
// GPU would (-fsanitize=alignment calls the handler below; no runtime of it is needed).
#include <csetjmp>
#include <cstddef>
#include <cstring>
#include <utility>

#define __global__
#define __device__ static
#define __forceinline__ inline

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct Dim { unsigned x, y; };
static Dim blockIdx, blockDim, threadIdx;

static std::jmp_buf fault;
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { std::longjmp(fault, 1); }

#include TOKEN_SOURCE

#define QUOTED(text) #text
#define NAME_OF(macro) QUOTED(macro)

template <typename... P, std::size_t... I>
static void call(void (*kernel)(P...), void** parameters, std::index_sequence<I...>)
{
    kernel(*static_cast<P*>(parameters[I])...);
}

template <typename... P>
static int every_thread(void (*kernel)(P...), unsigned blocks, unsigned lanes, unsigned rows, void** parameters)
{
    if (setjmp(fault))
        return 1;
    blockDim = {lanes, rows};
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.y = 0; threadIdx.y < rows; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < lanes; ++threadIdx.x)
                call(kernel, parameters, std::index_sequence_for<P...>());
    return 0;
}

// 0: ran; 1: an address was misaligned; 2: no such kernel.
extern "C" int host_launch(const char* name, unsigned blocks, unsigned lanes, unsigned rows, void** parameters)
{
    if (!std::strcmp(name, NAME_OF(TOKEN_GATHER)))
        return every_thread(TOKEN_GATHER, blocks, lanes, rows, parameters);
    if (!std::strcmp(name, NAME_OF(TOKEN_SCATTER)))
        return every_thread(TOKEN_SCATTER, blocks, lanes, rows, parameters);
    return 2;
}
