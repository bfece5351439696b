#include "gemm.h"

#include <algorithm>
#include <cstring>

namespace moe {

namespace {

void put_block(const int8_t* q, float d, const float* s, int64_t block, int64_t lane, PanelChunk* panel) {
    PanelChunk& chunk = panel[block / 8];
    const int64_t j = block % 8;
    for (int64_t k = 0; k < 8; ++k) std::memcpy(chunk.q[8 * j + k][lane], q + 4 * k, 4);
    chunk.d[j][lane] = d;
    chunk.s[2 * j][lane] = s[0];
    chunk.s[2 * j + 1][lane] = s[1];
}

}  // namespace

bool takes_many(int type_id, int64_t n_tokens, bool float_activations) {
    return n_tokens >= many_threshold(type_id) && uses_integers(type_id, float_activations) &&
           kernels().types[type_id].expand != nullptr;
}

int64_t rows_in_cache(int64_t n_in, int64_t n_matrices) {
    const int64_t tiles = (int64_t{512} << 10) / (n_matrices * tiles_bytes(kTileRows, n_in));
    return tiles * kTileRows < 64 ? 32 : 64;
}

void pack_record(const uint8_t* record, int64_t n_in, int64_t lane, PanelChunk* panel) {
    const int64_t n_pad = n_chunks(n_in) * kChunk;
    const float* d = reinterpret_cast<const float*>(record + n_pad);
    const float* s = d + n_pad / 32;
    for (int64_t b = 0; b < n_in / 32; ++b)
        put_block(reinterpret_cast<const int8_t*>(record) + 32 * b, d[b], s + 2 * b, b, lane, panel);
}

void pack_floats(const float* x, int64_t first, int64_t n_blocks, int64_t lane, PanelChunk* panel) {
    int8_t q[kChunk];
    float d[kChunk / 32], s[kChunk / 16];
    for (int64_t b = 0; b < n_blocks; b += 8) {
        const int64_t n = std::min<int64_t>(8, n_blocks - b);
        kernels().quantize_blocks(x + 32 * b, n, q, d, s);
        for (int64_t i = 0; i < n; ++i) put_block(q + 32 * i, d[i], s + 2 * i, first + b + i, lane, panel);
    }
}

void pack_zeros(int64_t first, int64_t n_blocks, int64_t lane, PanelChunk* panel) {
    const int8_t q[32] = {};
    const float s[2] = {};
    for (int64_t b = first; b < first + n_blocks; ++b) put_block(q, 0.0f, s, b, lane, panel);
}

void expand_rows(int type_id, const uint8_t* rows, int64_t row_stride, int64_t n_rows, int64_t n_in,
                 TileChunk* tiles) {
    const ExpandFn expand = kernels().types[type_id].expand;
    for (int64_t r = 0; r < n_rows; r += kTileRows, tiles += n_chunks(n_in))
        expand(rows + r * row_stride, row_stride, std::min<int64_t>(n_rows - r, kTileRows), n_in, tiles);
}

void multiply_panels(int type_id, const TileChunk* tiles, int64_t n_rows, const PanelChunk* panels,
                     int64_t n_panels, int64_t n_in, float* products, int64_t stride) {
    kernels().types[type_id].multiply(
        {tiles, (n_rows + kTileRows - 1) / kTileRows, panels, n_panels, n_in, products, stride});
}

}  // namespace moe
