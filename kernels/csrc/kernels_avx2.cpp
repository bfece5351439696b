// AVX2 + FMA + F16C. maddubs multiplies unsigned codes by signed activations and adds pairs into int16 (codes
// stay below 128, so nothing saturates; wider codes go in as magnitudes, their signs moved to the
// activations); the sums of four times 32 codes are brought together in 8 lanes, and then are multiplied by weight
// scale * activation scale.

#include "quant_blocks.h"

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the AVX2 flags of CMakeLists.txt"
#endif

#include <immintrin.h>

#include <new>
#include <type_traits>

#include "rows.inc"

namespace moe {
namespace {

inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256i twice16(const uint8_t* p) { return _mm256_broadcastsi128_si256(load16(p)); }

inline __m256 low_doubled(__m256 v) {
    return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
inline __m256 high_doubled(__m256 v) {
    return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
}

inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline __m256i pair_sums(__m256i products) { return _mm256_madd_epi16(products, _mm256_set1_epi16(1)); }

// Whether codes(k) of a type are signed (offset taken off) because the unsigned ones would not fit maddubs.
template <int T>
constexpr bool is_signed() {
    return has_wide_codes(T);
}

// Whether a type's values are magnitudes(k) with signs minus(k), 0xff where negative.
template <int T>
constexpr bool has_signs() {
    return T == IQ2_XXS || T == IQ2_XS || T == IQ2_S || T == IQ3_XXS || T == IQ3_S;
}

// Whether a type's grid(k) is multiplied as it is, and what is taken away for that differs by block: it is in `mins`.
template <int T>
constexpr bool has_own_offsets() {
    return T == IQ1_S;
}

// Whether four of a type's int16 sums of two products fit an int16 together.
template <int T>
constexpr bool adds_narrow() {
    return T == Q4_0 || T == Q4_1 || T == Q5_0 || T == Q5_1 || T == Q2_K || T == Q3_K || T == Q4_K || T == Q5_K ||
           T == IQ1_S || T == IQ1_M || T == IQ3_S || T == TQ1_0 || T == TQ2_0 || T == MXFP4 || T == NVFP4;
}

// Whether two of them do.
template <int T>
constexpr bool adds_pairs() {
    return adds_narrow<T>() || T == Q6_K || T == IQ2_XXS || T == IQ2_XS || T == IQ2_S || T == IQ3_XXS;
}

// Of four times 32 elements int32: lanes 0 to 3 have the sums of the first 16 of each, lanes 4 to 7 of the others.
template <int T>
inline __m256i sums_of_four(__m256i a, __m256i b, __m256i c, __m256i d) {
    const auto two = [](__m256i x, __m256i y) {  // of each half two words of x, and two of y
        if (!adds_pairs<T>()) x = pair_sums(x), y = pair_sums(y);
        const __m256i low = _mm256_unpacklo_epi64(x, y), high = _mm256_unpackhi_epi64(x, y);
        const __m256i sums = adds_pairs<T>() ? _mm256_add_epi16(low, high) : _mm256_add_epi32(low, high);
        return _mm256_castsi256_ps(adds_pairs<T>() && !adds_narrow<T>() ? pair_sums(sums) : sums);
    };
    const __m256 ab = two(a, b), cd = two(c, d);
    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(ab, cd, 0x88)),
                  odd = _mm256_castps_si256(_mm256_shuffle_ps(ab, cd, 0xdd));
    return adds_narrow<T>() ? pair_sums(_mm256_add_epi16(even, odd)) : _mm256_add_epi32(even, odd);
}

// Chunk<T>: 256 elements of a row, read from their bytes. codes(k) are the elements 32 k to 32 k + 31; scale(half) and
// min(half) serve 16 elements a lane, scales and mins 32 where all blocks are that long.
template <int T>
struct Chunk;

// The elements 32 k to 32 k + 31 of a chunk, as they are multiplied with activations.
template <int T>
struct Factors {
    __m256i codes, signs;  // signs: of the codes, or 0xff where an element is negative
    Factors(const Chunk<T>& chunk, int k) {
        if constexpr (has_signs<T>()) {
            codes = chunk.magnitudes(k);
            signs = chunk.minus(k);
        } else if constexpr (has_own_offsets<T>()) {
            codes = signs = chunk.grid(k);
        } else {
            signs = chunk.codes(k);
            codes = is_signed<T>() ? _mm256_abs_epi8(signs) : signs;
        }
    }
    // int16: sums of two products.
    __m256i times(__m256i q) const {
        if constexpr (has_signs<T>()) q = _mm256_sub_epi8(_mm256_xor_si256(q, signs), signs);
        if constexpr (is_signed<T>()) q = _mm256_sign_epi8(q, signs);
        return _mm256_maddubs_epi16(codes, q);
    }
};

struct ScalesOf32 {
    __m256 scales, mins;
    __m256 scale(int half) const { return half ? high_doubled(scales) : low_doubled(scales); }
    __m256 min(int half) const { return half ? high_doubled(mins) : low_doubled(mins); }
};

struct ScalesOf16 {
    __m256 scales[2], mins[2];
    __m256 scale(int half) const { return scales[half]; }
    __m256 min(int half) const { return mins[half]; }
};

#include "chunks_avx2.inc"
#include "chunks_iq_avx2.inc"
#include "gemm_avx2.inc"
#include "floats_avx2.inc"

// What one unit of activation sum takes away: the codes' offset and the minimum.
template <int T>
inline __m256 taken_away(__m256 scale, __m256 min) {
    if (!Block<T>::offset || has_own_offsets<T>()) return min;
    return _mm256_fmadd_ps(scale, _mm256_set1_ps(Block<T>::offset), Block<T>::has_min ? min : _mm256_setzero_ps());
}

// A product of N tokens on its way.
template <int N>
struct Sums {
    __m256 acc[N][2], low[N];
    Sums() {
        for (int t = 0; t < N; ++t) acc[t][0] = acc[t][1] = low[t] = _mm256_setzero_ps();
    }
    float of(int t) const { return total(_mm256_sub_ps(_mm256_add_ps(acc[t][0], acc[t][1]), low[t])); }
};

// A chunk that many tokens are multiplied with, decoded once.
template <int T>
struct Kept : std::conditional_t<has_scales_of_32(T), ScalesOf32, ScalesOf16> {
    Factors<T> kept[8];
    explicit Kept(const Chunk<T>& chunk)
        : kept{{chunk, 0}, {chunk, 1}, {chunk, 2}, {chunk, 3}, {chunk, 4}, {chunk, 5}, {chunk, 6}, {chunk, 7}} {
        std::memcpy(&this->scales, &chunk.scales, sizeof(chunk.scales));
        if (Block<T>::has_min || has_own_offsets<T>()) std::memcpy(&this->mins, &chunk.mins, sizeof(chunk.mins));
    }
};

template <int T>
inline Factors<T> factors_of(const Chunk<T>& chunk, int k) { return Factors<T>(chunk, k); }
template <int T>
inline const Factors<T>& factors_of(const Kept<T>& chunk, int k) { return chunk.kept[k]; }

// The products of a chunk, a Chunk<T> or Kept<T>, with elements `first` and on.
template <int T, int N, class AnyChunk>
__attribute__((always_inline)) inline void add_chunk(const AnyChunk& chunk, const uint8_t* const* acts, int64_t n_pad,
                                                     int64_t first, Sums<N>& to) {
    constexpr bool has_low = !is_signed<T>() && !has_signs<T>() && (Block<T>::offset != 0 || Block<T>::has_min);
    __m256 steps[N][2];  // of four times 32 elements, in the order of their sums
    for (int t = 0; t < N; ++t) {
        if constexpr (has_scales_of_32(T)) {
            const float* pairs = reinterpret_cast<const float*>(acts[t] + pairs_offset(n_pad)) + first / 16;
            if (has_low)
                to.low[t] = _mm256_fmadd_ps(taken_away<T>(chunk.scales, chunk.mins), _mm256_loadu_ps(pairs + 8),
                                            to.low[t]);
            const __m256 eight = _mm256_mul_ps(chunk.scales, _mm256_loadu_ps(pairs));
            steps[t][0] = _mm256_permute2f128_ps(eight, eight, 0x00);
            steps[t][1] = _mm256_permute2f128_ps(eight, eight, 0x11);
        } else {
            const float* d = reinterpret_cast<const float*>(acts[t] + n_pad) + first / 32;
            const float* s = reinterpret_cast<const float*>(acts[t] + n_pad + n_pad / 8) + first / 16;
            for (int half = 0; half < 2; ++half) {
                const __m256 scale = chunk.scales[half];
                if (has_low)
                    to.low[t] = _mm256_fmadd_ps(taken_away<T>(scale, chunk.mins[half]), _mm256_loadu_ps(s + 8 * half),
                                                to.low[t]);
                const __m256i even_odd = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
                const __m256 d4 = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(d + 4 * half));
                steps[t][half] = _mm256_mul_ps(_mm256_permutevar8x32_ps(scale, even_odd), d4);
            }
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        __m256i sums[N][4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const Factors<T>& factors = factors_of<T>(chunk, 4 * half + k);
            for (int t = 0; t < N; ++t)
                sums[t][k] = factors.times(load32(acts[t] + first + 128 * half + 32 * k));
        }
        for (int t = 0; t < N; ++t) {
            const __m256i four = sums_of_four<T>(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
            to.acc[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(four), steps[t][half], to.acc[t][half]);
        }
    }
}

template <int T, int N>
__attribute__((always_inline)) inline void dot_rows(const uint8_t* row, int64_t n_in, const Ahead& ahead,
                                                    const uint8_t* const* acts, float* out) {
    Sums<N> sums;
    for_each_chunk<T>(row, n_in, ahead, [&](const uint8_t* bytes, int64_t first) __attribute__((always_inline)) {
        add_chunk<T>(Chunk<T>(bytes), acts, padded(n_in), first, sums);
    });
    for (int t = 0; t < N; ++t) out[t] = sums.of(t);
}

// Chunks are decoded once for all tokens, as many at a time as the first-level cache holds beside activations.
constexpr int kKept = 8;
constexpr int64_t kTokensToKeep = 8;
template <int T>
constexpr bool pays_to_keep() {  // codes of these two cost less than what is kept of them
    return T != Q8_0 && T != TQ2_0;
}

template <int T>
__attribute__((noinline)) void dot_kept(const uint8_t* row, int64_t n_in, const Ahead& ahead,
                                        const uint8_t* const* acts, int64_t n_acts, float* out) {
    alignas(32) unsigned char space[kKept * sizeof(Kept<T>)];
    Kept<T>* kept = reinterpret_cast<Kept<T>*>(space);
    Sums<2> sums[kTokenGroup / 2];
    int n_kept = 0;
    const auto multiply = [&](int64_t stop) {  // the element behind what is kept
        const int64_t first = stop - n_kept * kChunk;
        for (int64_t t = 0; t < n_acts; t += 2) {
            const uint8_t* pair[2] = {acts[t], acts[t + 1 < n_acts ? t + 1 : t]};
            Sums<2> here = sums[t / 2];
            for (int c = 0; c < n_kept; ++c) add_chunk<T>(kept[c], pair, padded(n_in), first + c * kChunk, here);
            sums[t / 2] = here;
        }
        n_kept = 0;
    };
    for_each_chunk<T>(row, n_in, ahead, [&](const uint8_t* bytes, int64_t first) {
        if (n_kept == kKept) multiply(first);
        new (static_cast<void*>(kept + n_kept++)) Kept<T>(Chunk<T>(bytes));
    });
    multiply(padded(n_in));
    for (int64_t t = 0; t < n_acts; ++t) out[t] = sums[t / 2].of(static_cast<int>(t % 2));
}

// One token. A function of its own: the compiler makes constants once, not for every row.
template <int T>
__attribute__((noinline)) void dot_one(const Rows rows, const uint8_t* act, float* out, int64_t out_stride) {
    const Ahead ahead(rows);
    for (const uint8_t* row = rows.data; row < rows.end(); row += rows.stride, out += out_stride)
        dot_rows<T, 1>(row, rows.n_in, ahead, &act, out);
}

template <int T>
void dot(const Rows& rows, const uint8_t* const* acts, int64_t n_acts, float* out, int64_t out_stride) {
    if (n_acts == 1) return dot_one<T>(rows, acts[0], out, out_stride);
    const Ahead ahead(rows);
    for (const uint8_t* row = rows.data; row < rows.end(); row += rows.stride, out += out_stride) {
        if (pays_to_keep<T>() && n_acts >= kTokensToKeep) {
            dot_kept<T>(row, rows.n_in, ahead, acts, n_acts, out);
            continue;
        }
        int64_t t = 0;
        for (; t + 2 <= n_acts; t += 2) dot_rows<T, 2>(row, rows.n_in, ahead, acts + t, out + t);
        if (t < n_acts) dot_rows<T, 1>(row, rows.n_in, ahead, acts + t, out + t);
    }
}

template <int T>
void dequantize_row(const uint8_t* row, int64_t n_in, float* out) {
    decode_row<T>(row, n_in, out, [](const uint8_t* bytes, float* values) {
        const Chunk<T> chunk(bytes);
        float scale[16], min[16];
        for (int half = 0; half < 2; ++half) {
            _mm256_storeu_ps(scale + 8 * half, chunk.scale(half));
            if (Block<T>::has_min) _mm256_storeu_ps(min + 8 * half, chunk.min(half));
        }
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
            const __m256i codes = chunk.codes(k);
            const __m128i halves[2] = {_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)};
            for (int part = 0; part < 4; ++part) {
                const __m128i eight = part % 2 ? _mm_srli_si128(halves[part / 2], 8) : halves[part / 2];
                const __m256i q = is_signed<T>() ? _mm256_cvtepi8_epi32(eight)
                                                 : _mm256_sub_epi32(_mm256_cvtepu8_epi32(eight),
                                                                    _mm256_set1_epi32(Block<T>::offset));
                const int j = 2 * k + part / 2;
                __m256 value = _mm256_mul_ps(_mm256_set1_ps(scale[j]), _mm256_cvtepi32_ps(q));
                if (Block<T>::has_min) value = _mm256_sub_ps(value, _mm256_set1_ps(min[j]));
                _mm256_storeu_ps(values + 32 * k + 8 * part, value);
            }
        }
    });
}

inline int total_i32(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

void quantize_blocks(const float* x, int64_t n_blocks, int8_t* q, float* d, float* s) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t b = 0; b < n_blocks; ++b) {
        __m256 v[4], top = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
        for (int k = 0; k < 4; ++k) {
            v[k] = _mm256_loadu_ps(x + 32 * b + 8 * k);
            top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v[k]));
            nan = _mm256_or_ps(nan, _mm256_cmp_ps(v[k], v[k], _CMP_UNORD_Q));
        }
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        const float max = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
        const float scale = _mm256_movemask_ps(nan) ? __builtin_nanf("") : max < kTiny ? 0.0f : max / 127.0f;
        const __m256 inverse = _mm256_set1_ps(max < kTiny ? 0.0f : 127.0f / max);
        __m256i whole[4];
        for (int k = 0; k < 4; ++k) whole[k] = _mm256_cvtps_epi32(_mm256_mul_ps(v[k], inverse));
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                                  _mm256_packs_epi32(whole[2], whole[3]));
        // The packs work within 128-bit halves; put the groups of four back in order.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + 32 * b),
                            _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        d[b] = scale;
        s[2 * b] = scale * static_cast<float>(total_i32(_mm256_add_epi32(whole[0], whole[1])));
        s[2 * b + 1] = scale * static_cast<float>(total_i32(_mm256_add_epi32(whole[2], whole[3])));
    }
}

// exp by 2^k * polynomial on [-ln2/2, ln2/2]; relative error about 2e-7, inputs clamped to the float range.
inline __m256 exp256(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
    const __m256 k = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), 8);
    __m256 r = _mm256_fnmadd_ps(k, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(k, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float term : terms) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(term));
    const __m256i power =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

void silu_mul(const float* gate, const float* up, int64_t n, float* h) {
    for (int64_t i = 0; i < n; i += 8) {
        float g8[8] = {}, u8[8] = {}, h8[8];
        const size_t bytes = static_cast<size_t>(n - i < 8 ? n - i : 8) * 4;
        std::memcpy(g8, gate + i, bytes);
        std::memcpy(u8, up + i, bytes);
        const __m256 g = _mm256_loadu_ps(g8);
        const __m256 e = exp256(_mm256_sub_ps(_mm256_setzero_ps(), g));
        const __m256 sigmoid_g = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
        _mm256_storeu_ps(h8, _mm256_mul_ps(sigmoid_g, _mm256_loadu_ps(u8)));
        std::memcpy(h + i, h8, bytes);
    }
}

constexpr TierKernels make() {
    TierKernels k = type_kernels();
    k.quantize_blocks = quantize_blocks;
    k.silu_mul = silu_mul;
    return k;
}

constexpr TierKernels kTable = make();

}  // namespace

const TierKernels kAvx2Kernels = kTable;

}  // namespace moe
