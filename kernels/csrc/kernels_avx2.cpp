// AVX2 + FMA + F16C. maddubs multiplies unsigned codes by signed activations and adds pairs into int16 (codes stay
// below 128, so nothing saturates; wider codes go in as magnitudes, their signs moved to the activations); 32 codes
// give 8 sums, which become floats and are multiplied by weight scale * activation scale.

#include "quant_blocks.h"

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the AVX2 flags of CMakeLists.txt"
#endif

#include <immintrin.h>

#include "expand.inc"

namespace moe {
namespace {

// One quantized activation row, see activation_bytes().
struct Act {
    const uint8_t* q;
    const float* d;
    const float* s;
};

inline Act act_at(const uint8_t* record, int64_t n_pad) {
    const float* d = reinterpret_cast<const float*>(record + n_pad);
    return {record, d, d + n_pad / 32};
}

inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256i twice16(const uint8_t* p) { return _mm256_broadcastsi128_si256(load16(p)); }

inline __m256 low_doubled(__m256 v) { return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)); }
inline __m256 high_doubled(__m256 v) { return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)); }

inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline __m256 products(__m256i codes, __m256i q) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), _mm256_set1_epi16(1)));
}
inline __m256 signed_products(__m256i w, __m256i q) {
    return products(_mm256_sign_epi8(w, w), _mm256_sign_epi8(q, w));
}

// Feeds a row to Kernel::chunk for N activation rows at once, 256 elements a step, then adds up.
// The result is the total of acc minus that of low.
template <class Kernel, int N>
inline void dot_rows(const uint8_t* row, int64_t n_in, const uint8_t* const* acts, float* out) {
    const int64_t n_pad = padded(n_in);
    Act act[N];
    __m256 acc[N][2], low[N];
    for (int t = 0; t < N; ++t) {
        act[t] = act_at(acts[t], n_pad);
        acc[t][0] = acc[t][1] = low[t] = _mm256_setzero_ps();
    }
    const int64_t whole = n_in / kChunk;
    for (int64_t c = 0; c < whole; ++c) {
        Kernel::template chunk<N>(row + c * Kernel::chunk_bytes, act, acc, low);
        for (int t = 0; t < N; ++t) act[t] = {act[t].q + kChunk, act[t].d + 8, act[t].s + 16};
    }
    if (Kernel::block_size < kChunk && n_in % kChunk != 0) {
        uint8_t rest[Kernel::chunk_bytes] = {};
        const int64_t n_blocks = n_in % kChunk / Kernel::block_size;
        std::memcpy(rest, row + whole * Kernel::chunk_bytes,
                    static_cast<size_t>(n_blocks * Kernel::chunk_bytes * Kernel::block_size / kChunk));
        Kernel::template chunk<N>(rest, act, acc, low);
    }
    for (int t = 0; t < N; ++t) out[t] = total(_mm256_sub_ps(_mm256_add_ps(acc[t][0], acc[t][1]), low[t]));
}

template <class Kernel>
void dot(const uint8_t* row, int64_t n_in, const uint8_t* const* acts, int64_t n_acts, float* out, uint8_t*) {
    int64_t t = 0;
    for (; t + 2 <= n_acts; t += 2) dot_rows<Kernel, 2>(row, n_in, acts + t, out + t);
    if (t < n_acts) dot_rows<Kernel, 1>(row, n_in, acts + t, out + t);
}

// The 6-bit scales (lanes 0-7) and minima (lanes 8-15) of Q4_K and Q5_K as bytes.
inline __m128i k_scale_bytes(const uint8_t* b) {
    const __m128i s = load16(b);  // d, dmin, 4: low scales, 8: low minima, 12: high nibbles of both
    const __m128i low = _mm_shuffle_epi8(s, _mm_setr_epi8(4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11, -1, -1, -1, -1));
    const __m128i nibble = _mm_srlv_epi32(
        _mm_shuffle_epi8(s, _mm_setr_epi8(-1, -1, -1, -1, 12, 13, 14, 15, -1, -1, -1, -1, 12, 13, 14, 15)),
        _mm_setr_epi32(0, 0, 0, 4));
    const __m128i top = _mm_srli_epi32(
        _mm_shuffle_epi8(s, _mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11)), 2);
    return _mm_or_si128(_mm_and_si128(low, _mm_set1_epi8(63)),
                        _mm_or_si128(_mm_and_si128(nibble, _mm_set1_epi8(15)), _mm_and_si128(top, _mm_set1_epi8(48))));
}

template <bool five_bits>
struct DotK45 {
    static constexpr int block_size = 256, chunk_bytes = five_bits ? 176 : 144;

    template <int N>
    static inline void chunk(const uint8_t* b, const Act* act, __m256 (*acc)[2], __m256* low) {
        const __m128i bytes = k_scale_bytes(b);
        const __m256 scale = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(load_f16(b)));
        const __m256 min = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))),
                                         _mm256_set1_ps(load_f16(b + 2)));
        float scales[N][8];
        for (int t = 0; t < N; ++t) {
            low[t] = _mm256_fmadd_ps(low_doubled(min), _mm256_loadu_ps(act[t].s), low[t]);
            low[t] = _mm256_fmadd_ps(high_doubled(min), _mm256_loadu_ps(act[t].s + 8), low[t]);
            _mm256_storeu_ps(scales[t], _mm256_mul_ps(scale, _mm256_loadu_ps(act[t].d)));
        }
        const __m256i nibble = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(16);
        const __m256i qh = five_bits ? load32(b + 16) : _mm256_setzero_si256();
        const uint8_t* qs = b + (five_bits ? 48 : 16);
        for (int c = 0; c < 4; ++c) {
            const __m256i raw = load32(qs + 32 * c);
            __m256i codes[2] = {_mm256_and_si256(raw, nibble), _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble)};
            if (five_bits) {
                // Bits 2c and 2c + 1 of every byte, moved to bit 4.
                const __m256i even = c < 2 ? _mm256_slli_epi16(qh, 4 - 2 * c) : _mm256_srli_epi16(qh, 2 * c - 4);
                const __m256i odd = c < 2 ? _mm256_slli_epi16(qh, 3 - 2 * c) : _mm256_srli_epi16(qh, 2 * c - 3);
                codes[0] = _mm256_or_si256(codes[0], _mm256_and_si256(even, bit));
                codes[1] = _mm256_or_si256(codes[1], _mm256_and_si256(odd, bit));
            }
            for (int k = 0; k < 2; ++k)
                for (int t = 0; t < N; ++t)
                    acc[t][k] = _mm256_fmadd_ps(products(codes[k], load32(act[t].q + 64 * c + 32 * k)),
                                                _mm256_broadcast_ss(&scales[t][2 * c + k]), acc[t][k]);
        }
    }
};

// scales[16] of 16 codes each, times the activations' scales; offset * scale goes to the block sums.
template <int N>
inline void scales16(__m256 first, __m256 second, float offset, const Act* act, float (*scales)[16], __m256* low) {
    const __m256 factor = _mm256_set1_ps(offset);
    const __m256 min0 = _mm256_mul_ps(first, factor), min1 = _mm256_mul_ps(second, factor);
    for (int t = 0; t < N; ++t) {
        low[t] = _mm256_fmadd_ps(min0, _mm256_loadu_ps(act[t].s), low[t]);
        low[t] = _mm256_fmadd_ps(min1, _mm256_loadu_ps(act[t].s + 8), low[t]);
        const __m256 d = _mm256_loadu_ps(act[t].d);
        _mm256_storeu_ps(scales[t], _mm256_mul_ps(first, low_doubled(d)));
        _mm256_storeu_ps(scales[t] + 8, _mm256_mul_ps(second, high_doubled(d)));
    }
}

// Lanes 0-3 the first scale, lanes 4-7 the second: what 32 codes of two sub-blocks need.
inline __m256 scale_pair(const float* scales) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(scales)), _mm_broadcast_ss(scales + 1), 1);
}

struct DotQ6K {
    static constexpr int block_size = 256, chunk_bytes = 210;

    template <int N>
    static inline void chunk(const uint8_t* b, const Act* act, __m256 (*acc)[2], __m256* low) {
        const __m128i bytes = load16(b + 192);
        const __m256 d = _mm256_set1_ps(load_f16(b + 208));
        const __m256 first = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), d);
        const __m256 second = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))), d);
        float scales[N][16];
        scales16<N>(first, second, 32.0f, act, scales, low);
        const __m256i nibble = _mm256_set1_epi8(15), top = _mm256_set1_epi8(0x30);
        for (int c = 0; c < 2; ++c) {
            const __m256i l0 = load32(b + 64 * c), l1 = load32(b + 64 * c + 32), h = load32(b + 128 + 32 * c);
            const __m256i codes[4] = {
                _mm256_or_si256(_mm256_and_si256(l0, nibble), _mm256_and_si256(_mm256_slli_epi16(h, 4), top)),
                _mm256_or_si256(_mm256_and_si256(l1, nibble), _mm256_and_si256(_mm256_slli_epi16(h, 2), top)),
                _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(l0, 4), nibble), _mm256_and_si256(h, top)),
                _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(l1, 4), nibble),
                                _mm256_and_si256(_mm256_srli_epi16(h, 2), top)),
            };
            for (int k = 0; k < 4; ++k)
                for (int t = 0; t < N; ++t)
                    acc[t][k % 2] = _mm256_fmadd_ps(products(codes[k], load32(act[t].q + 128 * c + 32 * k)),
                                                    scale_pair(&scales[t][8 * c + 2 * k]), acc[t][k % 2]);
        }
    }
};

// The f16 scales of eight consecutive blocks.
template <int block_bytes>
inline __m256 eight_scales(const uint8_t* b) {
    constexpr int n = block_bytes;
    return _mm256_cvtph_ps(_mm_setr_epi16(load<int16_t>(b), load<int16_t>(b + n), load<int16_t>(b + 2 * n),
                                          load<int16_t>(b + 3 * n), load<int16_t>(b + 4 * n), load<int16_t>(b + 5 * n),
                                          load<int16_t>(b + 6 * n), load<int16_t>(b + 7 * n)));
}

// 32-element blocks: nibbles, nibbles with a table, or whole bytes; all as signed or small unsigned codes.
template <int T>
struct Dot32 {
    static constexpr int block_size = 32;
    static constexpr int block_bytes = kTypeInfo[T].block_bytes, chunk_bytes = 8 * block_bytes;
    static constexpr bool has_table = T == IQ4_NL || T == MXFP4;
    static constexpr bool is_signed = has_table || T == Q8_0;  // the others are small unsigned codes

    static inline __m256 scales8(const uint8_t* b) {
        if (T != MXFP4) return eight_scales<block_bytes>(b);
        return _mm256_setr_ps(e8m0_half(b[0]), e8m0_half(b[17]), e8m0_half(b[34]), e8m0_half(b[51]), e8m0_half(b[68]),
                              e8m0_half(b[85]), e8m0_half(b[102]), e8m0_half(b[119]));
    }

    static inline __m256i codes(const uint8_t* b) {
        if (T == Q8_0) return load32(b + 2);
        const __m256i raw = _mm256_srlv_epi32(twice16(b + block_bytes - 16), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        const __m256i nibbles = _mm256_and_si256(raw, _mm256_set1_epi8(15));
        if (has_table) {
            const __m256i offset = _mm256_set1_epi8(static_cast<char>(Block<T>::offset));
            return _mm256_shuffle_epi8(_mm256_sub_epi8(twice16(T == MXFP4 ? kE2m1 : kNl), offset), nibbles);
        }
        if (T == Q5_0) {
            const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
            const __m256i select = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
            const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(b + 2)), spread);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, select), select);
            return _mm256_or_si256(nibbles, _mm256_and_si256(set, _mm256_set1_epi8(16)));
        }
        return nibbles;
    }

    template <int N>
    static inline void chunk(const uint8_t* b, const Act* act, __m256 (*acc)[2], __m256* low) {
        const __m256 scale = scales8(b);
        const __m256 min = _mm256_mul_ps(scale, _mm256_set1_ps(static_cast<float>(Block<T>::offset)));
        float scales[N][8];
        for (int t = 0; t < N; ++t) {
            if (!is_signed) {
                low[t] = _mm256_fmadd_ps(low_doubled(min), _mm256_loadu_ps(act[t].s), low[t]);
                low[t] = _mm256_fmadd_ps(high_doubled(min), _mm256_loadu_ps(act[t].s + 8), low[t]);
            }
            _mm256_storeu_ps(scales[t], _mm256_mul_ps(scale, _mm256_loadu_ps(act[t].d)));
        }
        for (int k = 0; k < 8; ++k) {
            const __m256i w = codes(b + k * block_bytes);
            for (int t = 0; t < N; ++t) {
                const __m256i q = load32(act[t].q + 32 * k);
                acc[t][k % 2] = _mm256_fmadd_ps(is_signed ? signed_products(w, q) : products(w, q),
                                                _mm256_broadcast_ss(&scales[t][k]), acc[t][k % 2]);
            }
        }
    }
};

// Any type, from a row decoded to codes and scales of 16. Codes of types with offset 128 do not fit maddubs.
template <int offset, bool has_min, int N>
inline void dot_codes(const Expanded& w, int64_t n_pad, const uint8_t* const* acts, float* out) {
    constexpr bool wide = offset > 64;
    Act act[N];
    __m256 acc[N][2], low[N];
    for (int t = 0; t < N; ++t) {
        act[t] = act_at(acts[t], n_pad);
        acc[t][0] = acc[t][1] = low[t] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < n_pad; i += kChunk) {
        float scales[N][16];
        scales16<N>(_mm256_loadu_ps(w.scale + i / 16), _mm256_loadu_ps(w.scale + i / 16 + 8),
                    wide ? 0.0f : static_cast<float>(offset), act, scales, low);
        if (has_min)
            for (int t = 0; t < N; ++t)
                for (int k = 0; k < 16; k += 8)
                    low[t] = _mm256_fmadd_ps(_mm256_loadu_ps(w.min + i / 16 + k), _mm256_loadu_ps(act[t].s + k), low[t]);
        for (int k = 0; k < 8; ++k) {
            const __m256i codes = load32(w.code + i + 32 * k);
            const __m256i centred = _mm256_sub_epi8(codes, _mm256_set1_epi8(static_cast<char>(offset)));
            for (int t = 0; t < N; ++t) {
                const __m256i q = load32(act[t].q + 32 * k);
                acc[t][k % 2] = _mm256_fmadd_ps(wide ? signed_products(centred, q) : products(codes, q),
                                                scale_pair(&scales[t][2 * k]), acc[t][k % 2]);
            }
        }
        for (int t = 0; t < N; ++t) act[t] = {act[t].q + kChunk, act[t].d + 8, act[t].s + 16};
    }
    for (int t = 0; t < N; ++t) out[t] = total(_mm256_sub_ps(_mm256_add_ps(acc[t][0], acc[t][1]), low[t]));
}

template <int T>
void dot_expanded(const uint8_t* row, int64_t n_in, const uint8_t* const* acts, int64_t n_acts, float* out,
                  uint8_t* scratch) {
    constexpr int offset = Block<T>::offset;
    constexpr bool has_min = Block<T>::has_min;
    const Expanded w = expand_row<T>(row, n_in, scratch);
    const int64_t n_pad = padded(n_in);
    int64_t t = 0;
    for (; t + 2 <= n_acts; t += 2) dot_codes<offset, has_min, 2>(w, n_pad, acts + t, out + t);
    for (; t < n_acts; ++t) dot_codes<offset, has_min, 1>(w, n_pad, acts + t, out + t);
}

template <int N>
inline void dot_f32_rows(const float* weight, int64_t n_in, const float* const* acts, float* out) {
    __m256 acc[N][4];
    for (int t = 0; t < N; ++t)
        for (int k = 0; k < 4; ++k) acc[t][k] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n_in; i += 32)
        for (int k = 0; k < 4; ++k) {
            const __m256 w = _mm256_loadu_ps(weight + i + 8 * k);
            for (int t = 0; t < N; ++t) acc[t][k] = _mm256_fmadd_ps(w, _mm256_loadu_ps(acts[t] + i + 8 * k), acc[t][k]);
        }
    for (int t = 0; t < N; ++t) {
        float sum = total(_mm256_add_ps(_mm256_add_ps(acc[t][0], acc[t][1]), _mm256_add_ps(acc[t][2], acc[t][3])));
        for (int64_t j = i; j < n_in; ++j) sum += weight[j] * acts[t][j];
        out[t] = sum;
    }
}

void dot_f32(const float* weight, int64_t n_in, const float* const* acts, int64_t n_acts, float* out) {
    int64_t t = 0;
    for (; t + 2 <= n_acts; t += 2) dot_f32_rows<2>(weight, n_in, acts + t, out + t);
    for (; t < n_acts; ++t) dot_f32_rows<1>(weight, n_in, acts + t, out + t);
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
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
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
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23);
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
    TierKernels k = all_expanded();
    k.types[Q4_K].dot = dot<DotK45<false>>;
    k.types[Q5_K].dot = dot<DotK45<true>>;
    k.types[Q6_K].dot = dot<DotQ6K>;
    k.types[Q8_0].dot = dot<Dot32<Q8_0>>;
    k.types[Q4_0].dot = dot<Dot32<Q4_0>>;
    k.types[Q5_0].dot = dot<Dot32<Q5_0>>;
    k.types[IQ4_NL].dot = dot<Dot32<IQ4_NL>>;
    k.types[MXFP4].dot = dot<Dot32<MXFP4>>;
    k.dot_f32 = dot_f32;
    k.quantize_blocks = quantize_blocks;
    k.silu_mul = silu_mul;
    return k;
}

constexpr TierKernels kTable = make();

}  // namespace

const TierKernels kAvx2Kernels = kTable;

}  // namespace moe
