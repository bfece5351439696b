// AVX-512 (F, BW, DQ, VL) and BMI2; compiled once more with VNNI (kernels_avx512_vnni.cpp), and with VBMI and GFNI besides
// (kernels_avx512_vbmi.cpp). VNNI's dpbusd multiplies unsigned codes by signed activations and adds four neighbours, so
// 64 codes give 16 sums; those become floats and are multiplied by weight scale * activation scale. The offset of the
// codes and the minima are one more dot product, with the activations' precomputed block sums.

#include "quant_blocks.h"

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__) || \
    !defined(__BMI2__)
#error "compile this file with the AVX-512 flags of CMakeLists.txt"
#endif

#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "rows.inc"

namespace moe {
namespace {

// Intel's cores since Sapphire Rapids: there gathers beat single loads by a third to a half (older ones got slow gathers
// from a security fix), and two rows at once one after the other.
inline bool is_recent_intel() { return __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512bf16"); }

inline __m512i load64(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i twice32(const uint8_t* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

#if defined(__AVX512VNNI__)
constexpr bool kHasVnni = true;
#else
constexpr bool kHasVnni = false;
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__)
#define MOE_WITH_VBMI
#endif

// Adds four neighbours' products, of unsigned codes and signed activations, to each of 16 sums. Without VNNI two
// of them must fit 16 bits: codes are 128 at most.
inline __m512i add_dots(__m512i sums, __m512i codes, __m512i q) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sums, codes, q);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, q), _mm512_set1_epi16(1)));
#endif
}

// The same with n vectors of codes, so small that without VNNI 2 n products fit 16 bits: 64 at most
// for n = 2, 32 for n = 4.
template <int n>
__attribute__((always_inline)) inline __m512i add_small_dots(__m512i sums, const __m512i (&codes)[n],
                                                             const __m512i (&q)[n]) {
#if defined(__AVX512VNNI__)
    for (int i = 0; i < n; ++i) sums = _mm512_dpbusd_epi32(sums, codes[i], q[i]);
    return sums;
#else
    __m512i pairs = _mm512_maddubs_epi16(codes[0], q[0]);
    for (int i = 1; i < n; ++i) pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(codes[i], q[i]));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

// Codes too wide for that go in as magnitudes, without their offset, and their signs move to the activations.
constexpr bool goes_in_signed(int type_id) { return has_wide_codes(type_id) && !kHasVnni; }

inline __m512i negated_where(__mmask64 minus, __m512i q) {
    return _mm512_mask_sub_epi8(q, minus, _mm512_setzero_si512(), q);
}

// Eight values, the first ones of a vector, to sixteen, each twice.
inline __m512 doubled(__m512 v) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), v);
}
inline __m512 doubled(__m256 v) { return doubled(_mm512_castps256_ps512(v)); }

// Chunk<T>: 256 elements of a row, read from their bytes. scale and min serve 16 elements a lane, codes(c)
// are the elements 64 c to 64 c + 63. This general form decodes with Block<T>; the specializations below are
// the fast ones.
template <int T>
struct Chunk {
    __m512 scale, min;
    alignas(64) uint8_t code[kChunk];

    explicit Chunk(const uint8_t* b) {
        float scales[16], mins[16] = {};
        expand_chunk<T>(b, code, scales, mins);
        scale = _mm512_loadu_ps(scales);
        min = _mm512_loadu_ps(mins);
    }
    __m512i codes(int c) const { return load64(code + 64 * c); }
};

#include "chunks_avx512.inc"
#include "chunks_ternary_avx512.inc"
#include "chunks_iq_avx512.inc"
#include "grid_signs_avx512.inc"
#include "grids_avx512.inc"
#include "small_grids_avx512.inc"
#include "lookups_avx512.inc"
#include "signed_codes_avx512.inc"
#include "eights_avx512.inc"
#include "planes_avx512.inc"
#include "nibbles_avx512.inc"
#include "superblocks_avx512.inc"
#include "ternary_avx512.inc"
#include "gemm_avx512.inc"
#include "floats_avx512.inc"

template <int T, int N>
__attribute__((always_inline)) inline void dot_rows(const uint8_t* row, int64_t n_in,
                                                    const Ahead& ahead, const uint8_t* const* acts,
                                                    __m512* sums_of_rows) {
    static_assert(has_wide_codes(T) == (Block<T>::offset == 128));
    constexpr bool is_signed = goes_in_signed(T);
    const int64_t n_pad = padded(n_in);
    __m512 acc[N][2], low[N];
    for (int t = 0; t < N; ++t) acc[t][0] = acc[t][1] = low[t] = _mm512_setzero_ps();
    for_each_chunk<T>(row, n_in, ahead, [&](const uint8_t* bytes, int64_t first) __attribute__((always_inline)) {
        const Chunk<T> chunk(bytes);
        // What one unit of activation sum takes away: the codes' offset and the minimum.
        __m512 min = Block<T>::has_min ? chunk.min : _mm512_setzero_ps();
        if (Block<T>::offset && !is_signed) min = _mm512_fmadd_ps(chunk.scale, _mm512_set1_ps(Block<T>::offset), min);
        __m512 scales[N];
        for (int t = 0; t < N; ++t) {
            const float* s = reinterpret_cast<const float*>(acts[t] + n_pad + n_pad / 8) + first / 16;
            if (!is_signed) low[t] = _mm512_fmadd_ps(min, _mm512_loadu_ps(s), low[t]);
            scales[t] = _mm512_mul_ps(chunk.scale, doubled_steps(acts[t], n_pad, first));
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            __m512i codes = chunk.codes(c);
            __mmask64 minus = 0;
            if constexpr (is_signed) {
                const __m512i signed_codes = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
                minus = _mm512_movepi8_mask(signed_codes);
                codes = _mm512_abs_epi8(signed_codes);
            }
            // A scale of 16 codes serves 4 of the 16 sums.
            const __m512i lanes = _mm512_add_epi32(
                _mm512_set1_epi32(4 * c), _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
            for (int t = 0; t < N; ++t) {
                __m512i q = load64(acts[t] + first + 64 * c);
                if (is_signed) q = negated_where(minus, q);
                const __m512i sums = add_dots(_mm512_setzero_si512(), codes, q);
                acc[t][c % 2] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums),
                                                _mm512_permutexvar_ps(lanes, scales[t]), acc[t][c % 2]);
            }
        }
    });
    for (int t = 0; t < N; ++t) sums_of_rows[t] = _mm512_sub_ps(_mm512_add_ps(acc[t][0], acc[t][1]), low[t]);
}

// How many rows that follow each other are read at once. Not by every kernel: where it is faster (see there).
constexpr int rows_at_once(int type_id, bool intel, int64_t n_tokens) {
    if (has_eights(type_id, intel) || has_row_pairs(type_id, intel))
        return n_tokens == 1 && !intel && has_large_grid(type_id) ? 4 : 2;
    return is_superblock(type_id) && intel && n_tokens == 1 ? 2 : 1;
}

// R rows times N tokens: vectors [R, N] whose elements add up to the products.
template <int T, bool Intel, int R, int N>
__attribute__((always_inline)) inline void dot_best(const uint8_t* row, int64_t stride, int64_t n_in,
                                                    const Ahead& ahead, const uint8_t* const* acts, __m512* sums) {
    if constexpr (has_eights(T, Intel))
        dot_eights<T, Intel, R / 2, N>(row, stride, n_in, ahead, acts, sums);
    else if constexpr (has_row_pairs(T, Intel))
        dot_grid<T, PairsOfRows<T, Intel, R / 2>, R, N>(row, stride, n_in, ahead, acts, sums);
    else if constexpr (has_grid(T))
        dot_grid<T, OneRow<BestGrid<T, Intel>>, 1, N>(row, 0, n_in, ahead, acts, sums);
    else if constexpr (has_planes(T))
        dot_grid<T, OneRow<PlanesOf<T>>, 1, N>(row, 0, n_in, ahead, acts, sums);
    else if constexpr (is_superblock(T))
        dot_superblocks<T, R, N>(row, stride, n_in, ahead, acts, sums);
    else if constexpr (has_nibbles(T))
        dot_nibbles<T, N>(row, n_in, ahead, acts, sums);
    else if constexpr (is_ternary(T))
        dot_ternary<T, N>(row, n_in, ahead, acts, sums);
    else
        dot_rows<T, N>(row, n_in, ahead, acts, sums);
}

// The elements of each of four vectors added up: a third of the instructions of one after the other.
inline __m128 sums_of_four(const __m512* v) {
    const auto halved = [](__m512 a, __m512 b) {
        return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    };
    const __m512d first = halved(v[0], v[1]), second = halved(v[2], v[3]);
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                          _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    const __m256 pair = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    return _mm_add_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1));
}

template <int T, bool Intel>
constexpr unsigned planes_read_by() {
    if (has_eights(T, Intel)) return kEights;
    if (has_row_pairs(T, Intel) || has_planes(T)) return kFours;
    if constexpr (has_grid(T)) return BestGrid<T, Intel>::by_fours ? kFours : kTurned;
    return is_superblock(T) || has_nibbles(T) || is_ternary(T) ? kTurned : 0u;
}
template <int T>
constexpr unsigned planes_read() {
    return planes_read_by<T, true>() | planes_read_by<T, false>();
}

// One token, four rows at a time; what is left behind them one by one, as four of the same. A function of its own, with
// copies of what it reads: the compiler makes most constants once, not for every row.
template <int T, bool Intel>
__attribute__((noinline)) void dot_one(const Rows rows, const uint8_t* act, float* out, int64_t out_stride) {
    constexpr int R = rows_at_once(T, Intel, 1);
    const Ahead ahead(rows);
    for (int64_t r = 0, n = 4; r < rows.n_rows; r += n) {
        if (rows.n_rows - r < 4) n = 1;
        const int64_t stride = n == 4 ? rows.stride : 0;
        __m512 sums[4];
#pragma GCC unroll 1
        for (int i = 0; i < 4; i += R)
            dot_best<T, Intel, R, 1>(rows.data + r * rows.stride + i * stride, stride, rows.n_in, ahead, &act, sums + i);
        alignas(16) float products[4];
        _mm_store_ps(products, sums_of_four(sums));
        for (int64_t i = 0; i < n; ++i) out[(r + i) * out_stride] = products[i];
    }
}

// R rows times any number of tokens.
template <int T, bool Intel, int R, int N>
__attribute__((always_inline)) inline void dot_tokens(const uint8_t* row, int64_t stride, int64_t n_in,
                                                      const Ahead& ahead, const uint8_t* const* acts, float* out,
                                                      int64_t out_stride) {
    __m512 sums[R * N < 4 ? 4 : R * N] = {};
    dot_best<T, Intel, R, N>(row, stride, n_in, ahead, acts, sums);
    alignas(16) float products[R * N < 4 ? 4 : R * N];
    for (int i = 0; i < R * N; i += 4) _mm_store_ps(products + i, sums_of_four(sums + i));
    for (int i = 0; i < R * N; ++i) out[i / N * out_stride + i % N] = products[i];
}

template <int T, bool Intel>
inline void dot_by(const Rows& rows, const uint8_t* const* acts, int64_t n_acts, float* out,
                   int64_t out_stride) {
    if (n_acts == 1) return dot_one<T, Intel>(rows, acts[0], out, out_stride);
    constexpr int R = rows_at_once(T, Intel, 2);
    const Ahead ahead(rows);
    for (int64_t r = 0; r < rows.n_rows; r += R) {
        // The last row twice, where two are taken.
        const bool more = r + R <= rows.n_rows;
        const uint8_t* row = rows.data + r * rows.stride;
        const int64_t stride = more ? rows.stride : 0, to_next = more ? out_stride : 0;
        float* products = out + r * out_stride;
        int64_t t = 0;
        for (; t + 4 <= n_acts; t += 4)
            dot_tokens<T, Intel, R, 4>(row, stride, rows.n_in, ahead, acts + t, products + t, to_next);
        for (; t + 2 <= n_acts; t += 2)
            dot_tokens<T, Intel, R, 2>(row, stride, rows.n_in, ahead, acts + t, products + t, to_next);
        if (t < n_acts) dot_tokens<T, Intel, R, 1>(row, stride, rows.n_in, ahead, acts + t, products + t, to_next);
    }
}

template <int T>
void dot(const Rows& rows, const uint8_t* const* acts, int64_t n_acts, float* out, int64_t out_stride) {
    if constexpr (has_grid(T) || is_superblock(T))
        if (is_recent_intel()) return dot_by<T, true>(rows, acts, n_acts, out, out_stride);
    dot_by<T, false>(rows, acts, n_acts, out, out_stride);
}

template <int T>
void dequantize_row(const uint8_t* row, int64_t n_in, float* out) {
    decode_row<T>(row, n_in, out, [](const uint8_t* bytes, float* values) {
        const Chunk<T> chunk(bytes);
        float scale[16], min[16];
        _mm512_storeu_ps(scale, chunk.scale);
        if (Block<T>::has_min) _mm512_storeu_ps(min, chunk.min);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const __m512i codes = chunk.codes(c);
            const __m128i parts[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                                      _mm512_extracti32x4_epi32(codes, 2),
                                      _mm512_extracti32x4_epi32(codes, 3)};
            for (int k = 0; k < 4; ++k) {
                const int j = 4 * c + k;
                const __m512i q =
                    _mm512_sub_epi32(_mm512_cvtepu8_epi32(parts[k]), _mm512_set1_epi32(Block<T>::offset));
                __m512 value = _mm512_mul_ps(_mm512_set1_ps(scale[j]), _mm512_cvtepi32_ps(q));
                if (Block<T>::has_min) value = _mm512_sub_ps(value, _mm512_set1_ps(min[j]));
                _mm512_storeu_ps(values + 16 * j, value);
            }
        }
    });
}

void quantize_blocks(const float* x, int64_t n_blocks, int8_t* q, float* d, float* s) {
    for (int64_t b = 0; b < n_blocks; ++b) {
        const __m512 v0 = _mm512_loadu_ps(x + 32 * b), v1 = _mm512_loadu_ps(x + 32 * b + 16);
        const bool nan = _mm512_cmp_ps_mask(v0, v1, _CMP_UNORD_Q) != 0;
        const float max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(v0), _mm512_abs_ps(v1)));
        const float scale = nan ? __builtin_nanf("") : max < kTiny ? 0.0f : max / 127.0f;
        const __m512 inverse = _mm512_set1_ps(max < kTiny ? 0.0f : 127.0f / max);
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(v0, inverse));
        const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(v1, inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 32 * b), _mm512_cvtsepi32_epi8(low));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 32 * b + 16), _mm512_cvtsepi32_epi8(high));
        d[b] = scale;
        s[2 * b] = scale * static_cast<float>(_mm512_reduce_add_epi32(low));
        s[2 * b + 1] = scale * static_cast<float>(_mm512_reduce_add_epi32(high));
    }
}

// exp by 2^k * polynomial on [-ln2/2, ln2/2]; relative error about 2e-7, inputs clamped to the float range.
inline __m512 exp512(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    const __m512 k = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(k, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, k);
}

void silu_mul(const float* gate, const float* up, int64_t n, float* h) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1);
        const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i), u = _mm512_maskz_loadu_ps(mask, up + i);
        const __m512 one = _mm512_set1_ps(1.0f);
        const __m512 e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), g));
        _mm512_mask_storeu_ps(h + i, mask, _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(one, e)), u));
    }
}

constexpr TierKernels make() {
    TierKernels k = type_kernels();
    k.quantize_blocks = quantize_blocks;
    k.silu_mul = silu_mul;
    k.transpose = transpose;
    return k;
}

constexpr TierKernels kTable = make();

}  // namespace

#if defined(MOE_WITH_VBMI)
const TierKernels kAvx512VbmiKernels = kTable;
#elif defined(__AVX512VNNI__)
const TierKernels kAvx512VnniKernels = kTable;
#else
const TierKernels kAvx512Kernels = kTable;
#endif

}  // namespace moe
