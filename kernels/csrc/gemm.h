// Products with many tokens: weight rows are expanded once to bytes (tiles), tokens are packed 16 to a panel,
// and both stay in the cache while they are multiplied. The formats are in quant_blocks.h.

#pragma once

#include "dispatch.h"

namespace moe {

// Whether n_tokens activation rows go through a weight of this type in the many-token form (moe_cpu.h).
bool takes_many(int type_id, int64_t n_tokens, bool float_activations);

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int64_t n_chunks(int64_t n_in) { return (n_in + kChunk - 1) / kChunk; }
constexpr int64_t n_panels(int64_t n_tokens) { return (n_tokens + kLanes - 1) / kLanes; }
constexpr int64_t panel_bytes(int64_t n_in) {
    return n_chunks(n_in) * static_cast<int64_t>(sizeof(PanelChunk));
}
constexpr int64_t tiles_bytes(int64_t n_rows, int64_t n_in) {
    return (n_rows + kTileRows - 1) / kTileRows * n_chunks(n_in) * static_cast<int64_t>(sizeof(TileChunk));
}

// How many rows, whole blocks of 32, to expand at a time so that `n_matrices` matrices' tiles share the second-level
// cache.
int64_t rows_in_cache(int64_t n_in, int64_t n_matrices);

// Fills blocks of 32 [first, first + n_blocks) of one token of a panel: with the same blocks of a quantized
// record, by quantizing 32 * n_blocks floats, or with zeros (lanes that no token takes).
void pack_record(const uint8_t* record, int64_t n_in, int64_t lane, PanelChunk* panel);
void pack_floats(const float* x, int64_t first, int64_t n_blocks, int64_t lane, PanelChunk* panel);
void pack_zeros(int64_t first, int64_t n_blocks, int64_t lane, PanelChunk* panel);

void expand_rows(int type_id, const uint8_t* rows, int64_t row_stride, int64_t n_rows, int64_t n_in,
                 TileChunk* tiles);

// Distance of product rows for up to n_tokens tokens; one line more than needed, lest rows share cache sets.
constexpr int64_t product_stride(int64_t n_tokens) { return round_up(n_tokens, kLanes) + kLanes; }

// products[r * stride + t] for all rows of the tiles (a multiple of 16) and all lanes of the panels.
void multiply_panels(int type_id, const TileChunk* tiles, int64_t n_rows, const PanelChunk* panels,
                     int64_t n_panels, int64_t n_in, float* products, int64_t stride);

}  // namespace moe
