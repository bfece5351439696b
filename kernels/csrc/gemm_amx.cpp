// The many-token products of AVX-512 once more, with the integer sums made by AMX: a tile instruction
// multiplies 16 weight rows with 16 tokens over the 32 elements that share a scale. Sums and their order are
// those of gemm_avx512.inc, so the results are the same bits. Types with a scale for every 16 elements stay
// with AVX-512: a tile would be half empty and the scaling twice the work, measured no faster.

#include "quant_blocks.h"

#include <immintrin.h>

#if defined(MOE_EMULATE_AMX)
#include "gemm_amx_emulated.h"
#else
#define TILE_CONFIG(config) _tile_loadconfig(config)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define TILE_DOT(c, a, b) _tile_dpbusd(c, a, b)
#endif

namespace moe {
namespace {

// Tiles 0 and 1 hold sums, 2 and 3 weights, 4 and 5 activations: two of each, so that neighbours overlap.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 32, 32, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 8, 8};
};
constexpr TileConfig kConfig;

struct alignas(64) Sums {
    int32_t value[kTileRows][kLanes];
};

inline void add_block(const TileChunk& tile, const PanelChunk& panel, int j, const Sums& sums,
                      __m512* total) {
    const __m512 d = _mm512_load_ps(panel.d[j]);
    const __m512 s = _mm512_add_ps(_mm512_load_ps(panel.s[2 * j]), _mm512_load_ps(panel.s[2 * j + 1]));
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
        const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(tile.scale[r][2 * j]));
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.value[r]));
        total[r] = _mm512_fmadd_ps(sum, scale, total[r]);
        total[r] = _mm512_fnmadd_ps(s, _mm512_set1_ps(tile.low[r][2 * j]), total[r]);
    }
}

// One chunk of a tile times one of a panel; the sums so far are in out. First all integer sums, then their
// scaling: a tile takes long from its load to the moment when its sums can be read back.
inline void multiply_chunk(const TileChunk& tile, const PanelChunk& panel, int n_blocks, bool is_first,
                           float* out, int64_t out_stride) {
    Sums sums[kChunk / 32];
    for (int j = 0; j < n_blocks; j += 2) {
        TILE_ZERO(0);
        TILE_LOAD(2, tile.code[j], 32);
        TILE_LOAD(4, panel.q[8 * j], 64);
        TILE_DOT(0, 2, 4);
        TILE_STORE(0, sums[j].value, 64);
        if (j + 1 == n_blocks) break;
        TILE_ZERO(1);
        TILE_LOAD(3, tile.code[j + 1], 32);
        TILE_LOAD(5, panel.q[8 * j + 8], 64);
        TILE_DOT(1, 3, 5);
        TILE_STORE(1, sums[j + 1].value, 64);
    }
    __m512 total[kTileRows];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
        total[r] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * out_stride);
    for (int j = 0; j < n_blocks; ++j) add_block(tile, panel, j, sums[j], total);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) _mm512_storeu_ps(out + r * out_stride, total[r]);
}

// Two tiles and two panels at a time, chunk by chunk: all four chunks stay in the first-level cache.
void multiply(const Product& p) {
    const int64_t n_chunks = (p.n_in + kChunk - 1) / kChunk;
    TILE_CONFIG(&kConfig);
    for (int64_t panel = 0; panel < p.n_panels; panel += 2)
        for (int64_t tile = 0; tile < p.n_tiles; tile += 2)
            for (int64_t c = 0; c < n_chunks; ++c) {
                const int64_t left = (p.n_in - c * kChunk) / 32;
                const int n_blocks = left < kChunk / 32 ? static_cast<int>(left) : kChunk / 32;
                for (int64_t t = tile; t < tile + 2 && t < p.n_tiles; ++t)
                    for (int64_t n = panel; n < panel + 2 && n < p.n_panels; ++n)
                        multiply_chunk(p.tiles[t * n_chunks + c], p.panels[n * n_chunks + c], n_blocks,
                                       c == 0, p.out + t * kTileRows * p.out_stride + n * kLanes,
                                       p.out_stride);
            }
    TILE_RELEASE();
}

}  // namespace

const MultiplyFn kAmxMultiply = multiply;

}  // namespace moe
