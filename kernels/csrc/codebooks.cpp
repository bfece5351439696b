// The tables of the IQ types, filled from Python.

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "dispatch.h"

namespace moe {

Codebooks g_codebooks;

namespace {

// Packs groups of eight values to 4-bit ranks among all values of the grid, which must be few.
void pack_ranks(const int8_t* grid, int64_t n_bytes, uint32_t* packed, uint8_t* levels) {
    std::vector<int8_t> values(grid, grid + n_bytes);
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    if (values.size() > 4) throw std::invalid_argument("the codebook has too many magnitudes");
    std::copy(values.begin(), values.end(), levels);
    for (int64_t i = 0; i < n_bytes / 8; ++i) {
        packed[i] = 0;
        for (int k = 0; k < 8; ++k) {
            const auto place = std::lower_bound(values.begin(), values.end(), grid[8 * i + k]);
            packed[i] |= static_cast<uint32_t>(place - values.begin()) << (8 * (k % 4) + k / 4 * 4);
        }
    }
}

void fill_sign_tables() {
    for (int bits = 0; bits < 256; ++bits) {
        uint64_t bytes = 0;
        for (int k = 0; k < 8; ++k)
            if (bits >> k & 1) bytes |= uint64_t{0xff} << (8 * k);
        g_codebooks.sign_bytes[bits] = bytes;
    }
    for (int code = 0; code < 128; ++code)
        g_codebooks.even_signs[code] = static_cast<uint8_t>(code | (__builtin_popcount(code) & 1) << 7);
}

template <typename Entry, size_t n>
void fill(Entry (&table)[n], const int8_t* grid, int64_t n_bytes) {
    if (n_bytes != static_cast<int64_t>(sizeof(table)))
        throw std::invalid_argument("the codebook has the wrong size");
    std::memcpy(table, grid, sizeof(table));
}

}  // namespace

void set_codebook(int type_id, const int8_t* grid, int64_t n_bytes) {
    Codebooks& books = g_codebooks;
    fill_sign_tables();
    uint8_t unused[4];
    switch (type_id) {
        case IQ2_XXS:
            fill(books.iq2_xxs, grid, n_bytes);
            return pack_ranks(grid, n_bytes, books.iq2_xxs_ranks, books.iq2_levels);
        case IQ2_XS:
            fill(books.iq2_xs, grid, n_bytes);
            return pack_ranks(grid, n_bytes, books.iq2_xs_ranks, books.iq2_levels);
        case IQ2_S:
            fill(books.iq2_s, grid, n_bytes);
            return pack_ranks(grid, n_bytes, books.iq2_s_ranks, books.iq2_levels);
        case IQ3_XXS:
            return fill(books.iq3_xxs, grid, n_bytes);
        case IQ3_S:
            return fill(books.iq3_s, grid, n_bytes);
        case IQ1_S: {
            fill(books.iq1, grid, n_bytes);
            uint8_t* bytes = reinterpret_cast<uint8_t*>(books.iq1);
            for (int64_t i = 0; i < n_bytes; ++i) bytes[i] = static_cast<uint8_t>(8 * grid[i] + 9);
            return pack_ranks(grid, n_bytes, books.iq1_ranks, unused);
        }
        default:
            throw std::invalid_argument("type " + std::to_string(type_id) + " has no codebook");
    }
}

}  // namespace moe
