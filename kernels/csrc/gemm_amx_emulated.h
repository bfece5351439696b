// The tile instructions that gemm_amx.cpp uses, in plain C++: with -DMOE_EMULATE_AMX=ON the amx tier runs on
// every AVX-512 machine, so that tests reach its indexing (not its speed). One macro for each instruction.

#pragma once

#include <cstring>

namespace moe {
namespace {

struct EmulatedTiles {
    uint8_t config[64];
    uint8_t bytes[8][16][64];
};
thread_local EmulatedTiles g_tiles;

inline int tile_rows(int t) { return g_tiles.config[48 + t]; }
inline int tile_row_bytes(int t) {
    uint16_t n;
    std::memcpy(&n, g_tiles.config + 16 + 2 * t, 2);
    return n;
}

inline void emulated_load(int t, const void* base, int64_t stride) {
    std::memset(g_tiles.bytes[t], 0, sizeof(g_tiles.bytes[t]));
    for (int r = 0; r < tile_rows(t); ++r)
        std::memcpy(g_tiles.bytes[t][r], static_cast<const uint8_t*>(base) + r * stride,
                    static_cast<size_t>(tile_row_bytes(t)));
}

inline void emulated_store(int t, void* base, int64_t stride) {
    for (int r = 0; r < tile_rows(t); ++r)
        std::memcpy(static_cast<uint8_t*>(base) + r * stride, g_tiles.bytes[t][r],
                    static_cast<size_t>(tile_row_bytes(t)));
}

// Unsigned bytes of a times signed bytes of b, four neighbours added into each 32-bit element of c.
inline void emulated_dot(int c, int a, int b) {
    for (int m = 0; m < tile_rows(c); ++m)
        for (int n = 0; n < tile_row_bytes(c) / 4; ++n) {
            int32_t sum;
            std::memcpy(&sum, &g_tiles.bytes[c][m][4 * n], 4);
            for (int k = 0; k < tile_row_bytes(a) / 4; ++k)
                for (int i = 0; i < 4; ++i)
                    sum += g_tiles.bytes[a][m][4 * k + i] *
                           static_cast<int8_t>(g_tiles.bytes[b][k][4 * n + i]);
            std::memcpy(&g_tiles.bytes[c][m][4 * n], &sum, 4);
        }
}

}  // namespace
}  // namespace moe

#define TILE_CONFIG(source) std::memcpy(g_tiles.config, source, 64)
#define TILE_RELEASE() std::memset(g_tiles.config, 0, 64)
#define TILE_ZERO(t) std::memset(g_tiles.bytes[t], 0, sizeof(g_tiles.bytes[t]))
#define TILE_LOAD(t, base, stride) emulated_load(t, base, stride)
#define TILE_STORE(t, base, stride) emulated_store(t, base, stride)
#define TILE_DOT(c, a, b) emulated_dot(c, a, b)
