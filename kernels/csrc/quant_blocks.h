// What the kernels know about the tensor types, and the working formats they share. This header is
// compiled with different instruction sets, so it holds plain data and nothing that the linker could merge.

#pragma once

#include <cstdint>

namespace moe {

// Ids of the file format.
enum TypeId : int {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    kTypes = 41,
};

struct TypeInfo {
    int block_size;  // elements; 0 marks an unused id
    int block_bytes;
    bool is_float;
};
constexpr TypeInfo kTypeInfo[kTypes] = {
    /* 0 F32 */ {1, 4, true},
    /* 1 F16 */ {1, 2, true},
    /* 2 Q4_0 */ {32, 18, false},
    /* 3 Q4_1 */ {32, 20, false},
    {},
    {},
    /* 6 Q5_0 */ {32, 22, false},
    /* 7 Q5_1 */ {32, 24, false},
    /* 8 Q8_0 */ {32, 34, false},
    {},
    /* 10 Q2_K */ {256, 84, false},
    /* 11 Q3_K */ {256, 110, false},
    /* 12 Q4_K */ {256, 144, false},
    /* 13 Q5_K */ {256, 176, false},
    /* 14 Q6_K */ {256, 210, false},
    {},
    /* 16 IQ2_XXS */ {256, 66, false},
    /* 17 IQ2_XS */ {256, 74, false},
    /* 18 IQ3_XXS */ {256, 98, false},
    /* 19 IQ1_S */ {256, 50, false},
    /* 20 IQ4_NL */ {32, 18, false},
    /* 21 IQ3_S */ {256, 110, false},
    /* 22 IQ2_S */ {256, 82, false},
    /* 23 IQ4_XS */ {256, 136, false},
    {},
    {},
    {},
    {},
    {},
    /* 29 IQ1_M */ {256, 56, false},
    /* 30 BF16 */ {1, 2, true},
    {},
    {},
    {},
    /* 34 TQ1_0 */ {256, 54, false},
    /* 35 TQ2_0 */ {256, 66, false},
    {},
    {},
    {},
    /* 39 MXFP4 */ {32, 17, false},
    /* 40 NVFP4 */ {64, 36, false},
};

// Whether the scales of all 32-element blocks of a chunk cover 32 elements (not 16).
constexpr bool has_scales_of_32(int type_id) {
    return kTypeInfo[type_id].block_size == 32 || type_id == Q4_K || type_id == Q5_K || type_id == IQ4_XS ||
           type_id == IQ2_XXS || type_id == IQ3_XXS || type_id == IQ3_S || type_id == IQ1_S ||
           type_id == TQ1_0 || type_id == TQ2_0;
}

// Whether the unsigned codes of a type (its values plus an offset) may be 128 and more.
constexpr bool has_wide_codes(int type_id) { return type_id == Q8_0 || type_id == IQ4_NL || type_id == IQ4_XS; }

// Every kernel works in chunks of 256 elements (the largest block); rows of 32-element blocks may end inside
// one.
constexpr int kChunk = 256;

// A quantized activation row, padded with zeros to n_pad, a multiple of kChunk. Eight planes in one record, of
// which turned, fours and eights are there only for kernels that read them (TypeKernels::planes):
//   int8  q[n_pad]
//   float d[n_pad / 32]   scale of 32 elements
//   float s[n_pad / 16]   d * sum of 16 q: turns a weight's offset or minimum into one small dot product
//   int8  turned[n_pad]   q again: q[32 j + 16 g + 8 i + 4 h + k] of a chunk at 128 g + 64 h + 8 j + 4 i + k
//   float pairs[n_pad / 16]   of each chunk the 8 d, then the 8 d * sum of 32 q
//   int8  fours[n_pad]    q again: q[4 i + p] of a chunk at 64 p + i
//   int8  eights[n_pad]   q again: q[8 i + p] of a chunk at 32 p + i
//   float twice[n_pad / 16]   every d two times
constexpr unsigned kTurned = 1, kFours = 2, kEights = 4;  // a bit for each of these planes
static constexpr int64_t activation_bytes(int64_t n_in) {
    return (n_in + kChunk - 1) / kChunk * (kChunk + 32 + 64 + kChunk + 64 + kChunk + kChunk + 64);
}
static constexpr int64_t turned_offset(int64_t n_pad) { return n_pad + n_pad / 8 + n_pad / 4; }
static constexpr int64_t pairs_offset(int64_t n_pad) { return turned_offset(n_pad) + n_pad; }
static constexpr int64_t fours_offset(int64_t n_pad) { return pairs_offset(n_pad) + n_pad / 4; }
static constexpr int64_t eights_offset(int64_t n_pad) { return fours_offset(n_pad) + n_pad; }
static constexpr int64_t twice_offset(int64_t n_pad) { return eights_offset(n_pad) + n_pad; }

// How far ahead kernels ask for weights. On a Zen 5 server 8 KiB gave 10 to 30 % more from memory than the
// hardware's own prefetching, and nothing was lost in the cache; on Sapphire Rapids it is a few percent better
// than 2 and 4 KiB.
constexpr int kPrefetchDistance = 8192;

// Weight rows that follow each other, and what the thread reads after them, which is asked for towards their
// end; null: nothing.
struct Rows {
    const uint8_t* data;
    int64_t stride, n_rows, n_in;
    const uint8_t* next;

    const uint8_t* end() const { return data + stride * n_rows; }
};

// A block whose largest magnitude is below kTiny counts as zero (127 / max would overflow); one that holds a
// NaN gets the scale NaN.
constexpr float kTiny = 1e-36f;

// The many-token form (gemm.h) multiplies tiles of kTileRows weight rows with panels of kLanes tokens. Both
// are cut into chunks of 256 elements, so that every offset inside a chunk is a constant.
constexpr int kTileRows = 16, kLanes = 16;

// One chunk of a tile: 16 rows expanded to bytes, 32 elements of every row side by side.
struct TileChunk {
    uint8_t code[kChunk / 32][kTileRows][32];
    float scale[kTileRows][16];  // of 16 elements
    float low[kTileRows][16];    // what one unit of activation sum takes away: minimum, codes' offset
};

// One chunk of a panel: 16 quantized activation rows, four elements of every row side by side.
struct PanelChunk {
    int8_t q[kChunk / 4][kLanes][4];
    float d[kChunk / 32][kLanes];
    float s[kChunk / 16][kLanes];
};

// n_tiles * 16 weight rows times n_panels * 16 tokens: out[row * out_stride + token]. Tiles and panels lie
// one after the other, each of ceil(n_in / 256) chunks.
struct Product {
    const TileChunk* tiles;
    int64_t n_tiles;
    const PanelChunk* panels;
    int64_t n_panels;
    int64_t n_in;
    float* out;
    int64_t out_stride;
};

// How many activation rows are multiplied with a weight row at a time: they fit the cache beside it.
constexpr int64_t kTokenGroup = 32;

// The kernels of one type in one tier. `n_acts` activation rows, at most kTokenGroup, share one pass over a weight
// row; out[r * out_stride + t].
using DequantizeFn = void (*)(const uint8_t* row, int64_t n_in, float* out);
using DotFn = void (*)(const Rows& rows, const uint8_t* const* acts, int64_t n_acts, float* out,
                       int64_t out_stride);
// Fills a tile with n_rows rows; the last one is repeated up to 16.
using ExpandFn = void (*)(const uint8_t* rows, int64_t row_stride, int64_t n_rows, int64_t n_in,
                          TileChunk* tile);
using MultiplyFn = void (*)(const Product& product);
// Float rows times float activations, n_rows <= kFloatRows. A product is the same bits in any company.
using DotFloatsFn = void (*)(const uint8_t* const* rows, int64_t n_rows, int64_t n_in,
                             const float* const* acts, int64_t n_acts, float* out, int64_t out_stride);
struct TypeKernels {
    DequantizeFn dequantize;
    DotFn dot;               // null for float types
    DotFloatsFn dot_floats;  // null for the others
    ExpandFn expand;         // null for float types and in tiers without the many-token form
    MultiplyFn multiply;     // of the tiles that expand fills
    unsigned planes;         // of the activations, which dot reads: kTurned and so on
};
constexpr int64_t kFloatRows = 4;
struct TierKernels {
    TypeKernels types[kTypes];
    // The first n_blocks blocks of 32 of the three planes.
    void (*quantize_blocks)(const float* x, int64_t n_blocks, int8_t* q, float* d, float* s);
    // h[i] = silu(gate[i]) * up[i]
    void (*silu_mul)(const float* gate, const float* up, int64_t n, float* h);
    // out[c * out_stride + r] = in[r * in_stride + c]; n_rows and n_cols are multiples of 16.
    void (*transpose)(const float* in, int64_t in_stride, int64_t n_rows, int64_t n_cols, float* out,
                      int64_t out_stride);
};
extern const TierKernels kScalarKernels;
extern const TierKernels kAvx2Kernels;
extern const TierKernels kAvx512Kernels;
extern const TierKernels kAvx512VnniKernels;
extern const TierKernels kAvx512VbmiKernels;  // with VNNI and GFNI too

// The many-token products of AVX-512 again, by AMX: for types with scales of 32 elements.
extern const MultiplyFn kAmxMultiply;

// A grid of up to 1024 groups, each packed to 16 bits: ranks of 8 values of 2 bits, or of 4 values of 4 bits.
struct PackedGrid {
    alignas(64) uint16_t groups[1024];
    alignas(64) uint8_t first[1024], second[1024];  // the two bytes of each
    uint8_t levels[16], next_levels[16];  // by 4 bits: the value of the first rank in them, and of the next
    // By ranks of two values and, above them, their signs: 64 plus the first one, and the second one.
    alignas(64) uint8_t signed_levels[2][64];
};

// A grid of up to 512 groups of four magnitudes, of 8 values: two planes of bytes that hold the ranks of two of the four,
// with room for their signs in the middle.
struct PairGrid {
    alignas(64) uint8_t first[512], second[512];
    // 64 plus the first value, by its rank and sign and two bits of no meaning; plus the second one, by two bits of none,
    // its sign and rank.
    alignas(64) uint8_t signed_levels[2][64];
};

// The grid of IQ2_S for gathers: byte p has the ranks of elements p (bits 1 and 2) and p + 4 (bits 3 and 5), with room for
// their signs (bits 0 and 4), which so are four bits apart as in a byte of signs.
struct SpacedGrid {
    uint32_t groups[1024];
    alignas(64) uint8_t signed_levels[2][64];  // by 6 bits: 64 plus element p, and plus element p + 4
};

// The grid of IQ1: 2048 groups of eight values of three. It ascends, the last element counting most, so that groups of 16
// neighbours have, of elements 4 to 7, all the same or two kinds. Two bits a value, plus one.
struct TernaryGrid {
    alignas(64) uint8_t first[2048];  // elements 0 to 3
    alignas(64) uint8_t second[128], next_second[128], next_from[128];  // by 16 neighbours: the others, and where which
    alignas(64) uint8_t shifted_levels[2][64];  // as signed_levels: 8 * value + 10, or, where the sign's bit is set, + 8
};

// Codebooks, filled by set_codebook(). Constants of the formats are in blocks.inc.
struct Codebooks {
    uint64_t iq2_xxs[256], iq2_xs[512], iq2_s[1024];  // eight magnitudes
    uint32_t iq3_xxs[256], iq3_s[512];                // four magnitudes
    uint64_t iq1[4096];  // eight bytes 8 * g + 10, g in -1, 0, 1; then all once more, shifted down: 8 * g + 8
    // Each group of 8 once more, as ranks of its values: byte k holds that of k, and above it that of k + 4.
    uint32_t iq2_xxs_ranks[256], iq2_xs_ranks[512], iq2_s_ranks[1024];
    uint32_t iq1_ranks[4096];  // all once more with 4 added, where IQ1_M shifts a group down
    uint8_t iq2_levels[16];                           // magnitude by rank
    PairGrid iq3_xxs_pairs, iq3_s_pairs;
    TernaryGrid iq1_ternary;
    SpacedGrid iq2_s_spaced;
    PackedGrid iq2_xxs_packed, iq2_xs_packed, iq2_s_packed, iq3_xxs_packed, iq3_s_packed;
    uint64_t sign_bytes[256];  // 0xff where the bit is set
    uint64_t even_sign_bytes[128];  // of a 7-bit sign code: an eighth bit on top makes their number even
};
extern Codebooks g_codebooks;

}  // namespace moe
