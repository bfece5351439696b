// The tables of the IQ types, filled from Python.

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "dispatch.h"

namespace moe {

Codebooks g_codebooks;

namespace {

std::vector<int8_t> values_of(const int8_t* grid, int64_t n_bytes, size_t at_most) {
    std::vector<int8_t> values(grid, grid + n_bytes);
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    if (values.size() > at_most) throw std::invalid_argument("the codebook has too many magnitudes");
    return values;
}

uint32_t rank_in(const std::vector<int8_t>& values, int8_t value) {
    return static_cast<uint32_t>(std::lower_bound(values.begin(), values.end(), value) - values.begin());
}

// Packs groups of eight values to 4-bit ranks among all values of the grid, which must be few.
void pack_ranks(const int8_t* grid, int64_t n_bytes, uint32_t* packed, uint8_t* levels) {
    const std::vector<int8_t> values = values_of(grid, n_bytes, 4);
    std::copy(values.begin(), values.end(), levels);
    std::fill_n(packed, n_bytes / 8, 0);
    for (int64_t i = 0; i < n_bytes; ++i)
        packed[i / 8] |= rank_in(values, grid[i]) << (8 * (i % 4) + i % 8 / 4 * 4);
}

// 64 plus or minus the value, by 6 bits that rank and minus read.
template <class Rank, class Minus>
void fill_signed_levels(const std::vector<int8_t>& values, uint8_t (&levels)[64], const Rank& rank, const Minus& minus) {
    for (size_t i = 0; i < 64; ++i) {
        const int value = rank(i) < values.size() ? values[rank(i)] : 0;
        levels[i] = static_cast<uint8_t>(minus(i) ? 64 - value : 64 + value);
    }
}

void pack_grid(const int8_t* grid, int64_t n_bytes, int group, PackedGrid* packed) {
    const int bits = 16 / group;
    const uint32_t mask = (1u << bits) - 1;
    std::vector<int8_t> values = values_of(grid, n_bytes, mask + 1);
    std::fill_n(packed->groups, n_bytes / group, 0);
    for (int64_t i = 0; i < n_bytes; ++i)
        packed->groups[i / group] |= static_cast<uint16_t>(rank_in(values, grid[i]) << (bits * (i % group)));
    for (int64_t i = 0; i < n_bytes / group; ++i) {
        packed->first[i] = static_cast<uint8_t>(packed->groups[i]);
        packed->second[i] = static_cast<uint8_t>(packed->groups[i] >> 8);
    }
    values.resize(mask + 1);
    for (uint32_t i = 0; i < 16; ++i) {
        packed->levels[i] = static_cast<uint8_t>(values[i & mask]);
        packed->next_levels[i] = static_cast<uint8_t>(values[i >> bits & mask]);
    }
    for (int k = 0; k < 2; ++k)
        fill_signed_levels(
            values, packed->signed_levels[k], [k](size_t i) { return i >> 2 * k & 3; },
            [k](size_t i) { return i >> (4 + k) & 1; });
}

// Groups of four values, as pairs of ranks.
void pack_pairs(const int8_t* grid, int64_t n_bytes, PairGrid* packed) {
    const std::vector<int8_t> values = values_of(grid, n_bytes, 8);
    for (int64_t i = 0; i < n_bytes / 4; ++i) {
        const auto pair = [&](int64_t k) {
            return static_cast<uint8_t>(rank_in(values, grid[k]) | rank_in(values, grid[k + 1]) << 5);
        };
        packed->first[i] = pair(4 * i), packed->second[i] = pair(4 * i + 2);
    }
    fill_signed_levels(
        values, packed->signed_levels[0], [](size_t i) { return i & 7; }, [](size_t i) { return i >> 3 & 1; });
    fill_signed_levels(
        values, packed->signed_levels[1], [](size_t i) { return i >> 3; }, [](size_t i) { return i >> 2 & 1; });
}

void pack_spaced(const int8_t* grid, int64_t n_bytes, SpacedGrid* packed) {
    const std::vector<int8_t> values = values_of(grid, n_bytes, 4);
    std::fill_n(packed->groups, n_bytes / 8, 0);
    for (int64_t i = 0; i < n_bytes; ++i) {
        const uint32_t rank = rank_in(values, grid[i]);
        const uint32_t bits = i % 8 < 4 ? rank << 1 : (rank & 1) << 3 | (rank >> 1) << 5;
        packed->groups[i / 8] |= bits << (8 * (i % 4));
    }
    fill_signed_levels(
        values, packed->signed_levels[0], [](size_t i) { return i >> 1 & 3; }, [](size_t i) { return i & 1; });
    fill_signed_levels(
        values, packed->signed_levels[1], [](size_t i) { return (i >> 3 & 1) | (i >> 5) << 1; },
        [](size_t i) { return i >> 4 & 1; });
}

void pack_ternary(const int8_t* grid, TernaryGrid* packed) {
    for (int i = 0; i < 2048; ++i) {
        const auto bits = [&](int from) {
            int four = 0;
            for (int k = 0; k < 4; ++k) four |= (grid[8 * i + from + k] + 1) << 2 * k;
            return static_cast<uint8_t>(four);
        };
        packed->first[i] = bits(0);
        const uint8_t second = bits(4);
        const int n = i / 16;
        if (i % 16 == 0) packed->second[n] = second, packed->next_second[n] = second, packed->next_from[n] = 16;
        if (second == packed->next_second[n]) continue;
        if (packed->next_from[n] < 16) throw std::invalid_argument("the codebook does not ascend");
        packed->next_second[n] = second, packed->next_from[n] = static_cast<uint8_t>(i % 16);
    }
    for (int k = 0; k < 2; ++k)
        for (int i = 0; i < 64; ++i)
            packed->shifted_levels[k][i] = static_cast<uint8_t>(8 * (i >> 2 * k & 3) + (i >> (4 + k) & 1 ? 0 : 2));
}

void fill_sign_tables() {
    for (int bits = 0; bits < 256; ++bits) {
        uint64_t bytes = 0;
        for (int k = 0; k < 8; ++k)
            if (bits >> k & 1) bytes |= uint64_t{0xff} << (8 * k);
        g_codebooks.sign_bytes[bits] = bytes;
    }
    for (int code = 0; code < 128; ++code)
        g_codebooks.even_sign_bytes[code] = g_codebooks.sign_bytes[code | (__builtin_popcount(code) & 1) << 7];
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
            pack_grid(grid, n_bytes, 8, &books.iq2_xxs_packed);
            return pack_ranks(grid, n_bytes, books.iq2_xxs_ranks, books.iq2_levels);
        case IQ2_XS:
            fill(books.iq2_xs, grid, n_bytes);
            pack_grid(grid, n_bytes, 8, &books.iq2_xs_packed);
            return pack_ranks(grid, n_bytes, books.iq2_xs_ranks, books.iq2_levels);
        case IQ2_S:
            fill(books.iq2_s, grid, n_bytes);
            pack_grid(grid, n_bytes, 8, &books.iq2_s_packed);
            pack_spaced(grid, n_bytes, &books.iq2_s_spaced);
            return pack_ranks(grid, n_bytes, books.iq2_s_ranks, books.iq2_levels);
        case IQ3_XXS:
            fill(books.iq3_xxs, grid, n_bytes);
            pack_pairs(grid, n_bytes, &books.iq3_xxs_pairs);
            return pack_grid(grid, n_bytes, 4, &books.iq3_xxs_packed);
        case IQ3_S:
            fill(books.iq3_s, grid, n_bytes);
            pack_pairs(grid, n_bytes, &books.iq3_s_pairs);
            return pack_grid(grid, n_bytes, 4, &books.iq3_s_packed);
        case IQ1_S: {
            pack_ranks(grid, n_bytes, books.iq1_ranks, unused);
            pack_ternary(grid, &books.iq1_ternary);
            uint8_t* bytes = reinterpret_cast<uint8_t*>(books.iq1);
            for (int64_t i = 0; i < n_bytes; ++i) {
                bytes[i] = static_cast<uint8_t>(8 * grid[i] + 10);
                bytes[n_bytes + i] = static_cast<uint8_t>(8 * grid[i] + 8);
            }
            for (int i = 0; i < 2048; ++i) books.iq1_ranks[2048 + i] = books.iq1_ranks[i] | 0x44444444u;
            return;
        }
        default:
            throw std::invalid_argument("type " + std::to_string(type_id) + " has no codebook");
    }
}

}  // namespace moe
