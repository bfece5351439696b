// The tier in use and the row products built on it.

#pragma once

#include "moe_cpu.h"
#include "quant_blocks.h"

namespace moe {

const TierKernels& kernels();  // of the current tier

// Rows of activations for one matrix product: float32 and, where an integer product needs them, quantized.
struct Activations {
    const float* x;            // [n, n_in]
    const uint8_t* quantized;  // [n, activation_bytes(n_in)] or null
};

inline int64_t row_bytes(int type_id, int64_t n_in) {
    return n_in / kTypeInfo[type_id].block_size * kTypeInfo[type_id].block_bytes;
}

// Whether a product of this type reads quantized activations.
inline bool uses_integers(int type_id, bool float_activations) {
    return !float_activations && !kTypeInfo[type_id].is_float;
}

// For threads that wait: fetches the beginning of rows, as far as the kernels' own prefetches leave it out.
// Inlined always: GCC leaves out calls of functions that only prefetch.
__attribute__((always_inline)) inline void fetch(const uint8_t* rows, int64_t n_bytes) {
    for (int64_t line = 0; line < n_bytes && line < kPrefetchDistance; line += 64)
        __builtin_prefetch(rows + line);
}

// Writes one record of activation_bytes(n_in), with these of its planes: all of it, or blocks of 32
// [first, first + n_blocks) of it.
void quantize_activations(const float* x, int64_t n_in, unsigned planes, uint8_t* record);
void quantize_range(const float* x, int64_t first, int64_t n_blocks, int64_t n_in, unsigned planes, uint8_t* record);
void clear_padding(int64_t n_in, unsigned planes, uint8_t* record);

// From this many tokens on (of one expert, of one matrix) integer products take the many-token form. Fewer leave too
// many of its 16 lanes empty. Measured: types with scales of 32 elements at 7 or 8, the others, which scale twice as many
// sums, at 9; Q4_K's and Q5_K's own row kernels, with Q6_K beside them, 17 to 25 % faster at 8, about equal at 11.
constexpr int64_t many_threshold(int type_id) {
    if (type_id == Q4_K || type_id == Q5_K || type_id == Q6_K) return 11;
    return has_scales_of_32(type_id) ? 7 : 9;
}

// Scratch bytes of row_products for rows of n_in elements: decoded rows.
inline int64_t row_scratch_bytes(int64_t n_in) { return (kFloatRows * n_in * 4 + 63) / 64 * 64; }

// products[r * n + t] = weight row r . activation row tokens[t] (row t where tokens is null).
void row_products(int type_id, const Rows& rows, const Activations& acts, const int32_t* tokens, int64_t n,
                  bool float_activations, uint8_t* scratch, float* products);

}  // namespace moe
