// Token rows gathered and scattered by index: rows of `tokens` (B, N, D) at `indices` (B, n).
//
// A warp moves a row, so the index is read once and nothing is divided per element; a block has as many rows as it
// has warps (blockDim.y), and the grid is flat over all B * n rows, because only its x may exceed 65535.
// Rows are moved as words, whatever their elements are. Whoever compiles this defines:
//
//   TOKEN_WORD    the widest of uint4, uint2, unsigned int and unsigned short of which a row is a multiple
//   TOKEN_INDEX   int or long long
//   TOKEN_GATHER, TOKEN_SCATTER   the kernels' names, which differ where the code does
//
// Sizes come as int, which is all that TensorRT hands to a kernel; offsets are computed in 64 bits.
// A row whose index is outside [0, N) is neither read nor written: a builder may time kernels on memory nobody wrote.

typedef TOKEN_WORD Word;
typedef TOKEN_INDEX Index;
typedef unsigned short Half;  // the narrowest element there is

enum
{
    LANES = 32,
    IN_FLIGHT = 4  // words that a thread loads before it stores any: one alone does not fill the memory's pipe
};

__device__ __forceinline__ void copy_words(const Word* __restrict__ source, Word* __restrict__ target, int count)
{
#pragma unroll 1
    for (int first = threadIdx.x; first < count; first += IN_FLIGHT * LANES)
    {
        Word held[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k)
            if (first + k * LANES < count)
                held[k] = source[first + k * LANES];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k)
            if (first + k * LANES < count)
                target[first + k * LANES] = held[k];
    }
}

__device__ __forceinline__ void copy_halves(const Half* __restrict__ source, Half* __restrict__ target, int count)
{
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += LANES)
        target[i] = source[i];
}

// A tensor that is a part of another may start anywhere between two words, where a wide access would be a fault.
__device__ __forceinline__ void copy_row(const Word* source, Word* target, int num_words)
{
    if (((size_t) source | (size_t) target) % sizeof(Word) == 0)
        copy_words(source, target, num_words);
    else
        copy_halves((const Half*) source, (Half*) target, num_words * (int) (sizeof(Word) / sizeof(Half)));
}

// Which of the B * n rows this warp moves, and which of the B * N tokens that is. False: none.
__device__ __forceinline__ bool find_row(
    const Index* indices, int batch, int num_tokens, int num_kept, long long* row, long long* token)
{
    *row = (long long) blockIdx.x * blockDim.y + threadIdx.y;
    if (*row >= (long long) batch * num_kept)
        return false;
    const Index index = indices[*row];
    if (index < 0 || index >= num_tokens)
        return false;
    *token = *row / num_kept * num_tokens + index;
    return true;
}

// gathered (B, n, D): row i of the batch is the token at indices[i].
extern "C" __global__ void TOKEN_GATHER(const Word* __restrict__ tokens, const Index* __restrict__ indices, int batch,
    int num_tokens, int num_kept, int num_words, Word* __restrict__ gathered)
{
    long long row, token;
    if (find_row(indices, batch, num_tokens, num_kept, &row, &token))
        copy_row(tokens + token * num_words, gathered + row * num_words, num_words);
}

// scattered (B, N, D): the token at indices[i] becomes row i of the batch. In place: `tokens` is the same memory as
// `scattered`, and only there because an aliased output is an input too. If an index comes twice, either row may win.
extern "C" __global__ void TOKEN_SCATTER(const Word*, const Index* __restrict__ indices, const Word* __restrict__ rows,
    int batch, int num_tokens, int num_kept, int num_words, Word* __restrict__ scattered)
{
    long long row, token;
    if (find_row(indices, batch, num_tokens, num_kept, &row, &token))
        copy_row(rows + row * num_words, scattered + token * num_words, num_words);
}
