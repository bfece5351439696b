#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(MOE_WITH_AMX) && !defined(MOE_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe {

namespace {

const char* const kNames[] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512vbmi", "amx"};
constexpr int kTiers = 6;

// Whether the processor has AMX int8 and the system lets this process use it. Its registers are large, so
// Linux wants to be asked first; the answer holds for all threads.
bool has_amx() {
#if defined(MOE_EMULATE_AMX)
    return true;
#elif defined(MOE_WITH_AMX)
    constexpr unsigned kTileBit = 1u << 24, kInt8Bit = 1u << 25;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTileBit) || !(d & kInt8Bit)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

// Whether this processor can run a tier. Each needs what those below it do, but amx no avx512vbmi.
bool can_run(Tier tier) {
#if defined(__x86_64__)
    switch (tier) {
        case Tier::scalar:
            return true;
        case Tier::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        case Tier::avx512:
            return can_run(Tier::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("bmi2");
        case Tier::avx512vnni:
            return can_run(Tier::avx512) && __builtin_cpu_supports("avx512vnni");
        case Tier::avx512vbmi:
            return can_run(Tier::avx512vnni) && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
        case Tier::amx:
            static const bool has = can_run(Tier::avx512vnni) && has_amx();
            return has;
    }
#endif
    return tier == Tier::scalar;
}

// The highest that the processor can run, from `most` down.
Tier best_tier(Tier most = Tier::amx) {
    int tier = static_cast<int>(most);
    while (!can_run(static_cast<Tier>(tier))) --tier;
    return static_cast<Tier>(tier);
}

#if defined(__x86_64__)
// AVX-512 without VNNI, with AVX2's products of many tokens.
TierKernels make_avx512() {
    TierKernels k = kAvx512Kernels;
    for (int type = 0; type < kTypes; ++type) {
        k.types[type].expand = kAvx2Kernels.types[type].expand;
        k.types[type].multiply = kAvx2Kernels.types[type].multiply;
    }
    return k;
}
#endif

#if defined(MOE_WITH_AMX)
// AVX-512 with other products of many tokens.
TierKernels make_amx() {
    TierKernels k = can_run(Tier::avx512vbmi) ? kAvx512VbmiKernels : kAvx512VnniKernels;
    for (int type = 0; type < kTypes; ++type)
        if (has_scales_of_32(type) && k.types[type].multiply != nullptr)
            k.types[type].multiply = kAmxMultiply;
    return k;
}
#endif

const TierKernels& table(Tier tier) {
#if defined(MOE_WITH_AMX)
    if (tier == Tier::amx) {
        static const TierKernels amx = make_amx();
        return amx;
    }
#endif
#if defined(__x86_64__)
    static const TierKernels avx512 = make_avx512();
    if (tier == Tier::avx512vbmi) return kAvx512VbmiKernels;
    if (tier == Tier::avx512vnni) return kAvx512VnniKernels;
    if (tier == Tier::avx512) return avx512;
    if (tier == Tier::avx2) return kAvx2Kernels;
#endif
    (void)tier;
    return kScalarKernels;
}

Tier parse_tier(const std::string& name, const std::string& what) {
    for (int i = 0; i < kTiers; ++i)
        if (name == kNames[i]) return static_cast<Tier>(i);
    throw std::invalid_argument(what + " must be scalar, avx2, avx512, avx512vnni, avx512vbmi or amx, not '" + name +
                                "'");
}

Tier initial_tier() {
    const char* wanted = std::getenv("MOE_ENGINE_CPU_TIER");
    if (wanted == nullptr) return best_tier();
    return best_tier(parse_tier(wanted, "MOE_ENGINE_CPU_TIER"));
}

std::atomic<int> g_tier{-1};  // unset until first use

Tier tier_in_use() {
    int tier = g_tier.load(std::memory_order_relaxed);
    if (tier < 0) {
        tier = static_cast<int>(initial_tier());
        g_tier.store(tier, std::memory_order_relaxed);
    }
    return static_cast<Tier>(tier);
}

}  // namespace

std::vector<std::string> available_tiers() {
    std::vector<std::string> found;
    for (int i = 0; i < kTiers; ++i)
        if (can_run(static_cast<Tier>(i))) found.push_back(kNames[i]);
    return found;
}

std::string current_tier() { return kNames[static_cast<int>(tier_in_use())]; }

void set_tier(const std::string& name) {
    const Tier tier = parse_tier(name, "the tier");
    if (!can_run(tier)) throw std::invalid_argument("this processor cannot run the tier " + name);
    g_tier.store(static_cast<int>(tier), std::memory_order_relaxed);
}

const TierKernels& kernels() { return table(tier_in_use()); }

// Where the turned plane has elements 32 b + 4 k and the next three.
static uint8_t* turned_place(uint8_t* turned, int64_t b, int64_t k) {
    return turned + b / 8 * kChunk + 128 * (k / 4) + 64 * (k % 2) + 8 * (b % 8) + 4 * (k / 2 % 2);
}

// Where the plane of fours has elements 32 b + p, 32 b + 4 + p and so on.
static uint8_t* fours_place(uint8_t* fours, int64_t b, int64_t p) {
    return fours + b / 8 * kChunk + 64 * p + 8 * (b % 8);
}

// Where the plane of eights has elements 32 b + p, 32 b + 8 + p and so on.
static uint8_t* eights_place(uint8_t* eights, int64_t b, int64_t p) {
    return eights + b / 8 * kChunk + 32 * p + 4 * (b % 8);
}

// Elements p, 4 + p, and so on of a block.
static uint64_t fourths(const uint64_t (&q)[4], int64_t p) {
    uint64_t found = 0;
    for (int i = 0; i < 4; ++i) {
        const uint64_t two = q[i] >> 8 * p;
        found |= ((two & 0xff) | (two >> 24 & 0xff00)) << 16 * i;
    }
    return found;
}

// Elements p, 8 + p, and so on of a block.
static uint32_t eighths(const uint64_t (&q)[4], int64_t p) {
    uint64_t found = 0;
    for (int i = 0; i < 4; ++i) found |= (q[i] >> 8 * p & 0xff) << 8 * i;
    return static_cast<uint32_t>(found);
}

// The planes of block b whose elements are q.
static void put_planes(const uint8_t* q, int64_t b, int64_t n_pad, unsigned planes, uint8_t* record) {
    if (planes & kTurned)
        for (int64_t k = 0; k < 8; ++k) std::memcpy(turned_place(record + turned_offset(n_pad), b, k), q + 4 * k, 4);
    uint64_t words[4];
    std::memcpy(words, q, 32);
    for (int64_t p = 0; p < 4 && (planes & kFours); ++p) {
        const uint64_t found = fourths(words, p);
        std::memcpy(fours_place(record + fours_offset(n_pad), b, p), &found, 8);
    }
    for (int64_t p = 0; p < 8 && (planes & kEights); ++p) {
        const uint32_t found = eighths(words, p);
        std::memcpy(eights_place(record + eights_offset(n_pad), b, p), &found, 4);
    }
}

void quantize_range(const float* x, int64_t first, int64_t n_blocks, int64_t n_in, unsigned planes, uint8_t* record) {
    const int64_t n_pad = (n_in + kChunk - 1) / kChunk * kChunk;
    float* d = reinterpret_cast<float*>(record + n_pad);
    float* s = d + n_pad / 32;
    kernels().quantize_blocks(x, n_blocks, reinterpret_cast<int8_t*>(record) + 32 * first, d + first,
                              s + 2 * first);
    float* pairs = reinterpret_cast<float*>(record + pairs_offset(n_pad));
    float* twice = reinterpret_cast<float*>(record + twice_offset(n_pad));
    for (int64_t b = first; b < first + n_blocks; ++b) {
        put_planes(record + 32 * b, b, n_pad, planes, record);
        pairs[b / 8 * 16 + b % 8] = twice[2 * b] = twice[2 * b + 1] = d[b];
        pairs[b / 8 * 16 + 8 + b % 8] = s[2 * b] + s[2 * b + 1];
    }
}

void clear_padding(int64_t n_in, unsigned planes, uint8_t* record) {
    const int64_t n_pad = (n_in + kChunk - 1) / kChunk * kChunk;
    float* d = reinterpret_cast<float*>(record + n_pad);
    float* s = d + n_pad / 32;
    std::fill(record + n_in, record + n_pad, uint8_t{0});
    std::fill(d + n_in / 32, d + n_pad / 32, 0.0f);
    std::fill(s + n_in / 16, s + n_pad / 16, 0.0f);
    float* pairs = reinterpret_cast<float*>(record + pairs_offset(n_pad));
    float* twice = reinterpret_cast<float*>(record + twice_offset(n_pad));
    for (int64_t b = n_in / 32; b < n_pad / 32; ++b) {
        put_planes(record + 32 * b, b, n_pad, planes, record);
        pairs[b / 8 * 16 + b % 8] = pairs[b / 8 * 16 + 8 + b % 8] = twice[2 * b] = twice[2 * b + 1] = 0.0f;
    }
}

void quantize_activations(const float* x, int64_t n_in, unsigned planes, uint8_t* record) {
    quantize_range(x, 0, n_in / 32, n_in, planes, record);
    clear_padding(n_in, planes, record);
}

void row_products(int type_id, const Rows& rows, const Activations& acts, const int32_t* tokens, int64_t n,
                  bool float_activations, uint8_t* scratch, float* products) {
    const TierKernels& tier = kernels();
    const TypeKernels& kernel = tier.types[type_id];
    const int64_t n_in = rows.n_in;
    if (uses_integers(type_id, float_activations)) {
        for (int64_t start = 0; start < n; start += kTokenGroup) {
            const int64_t count = std::min(n - start, kTokenGroup);
            const uint8_t* group[kTokenGroup];
            for (int64_t t = 0; t < count; ++t)
                group[t] = acts.quantized + (tokens ? tokens[start + t] : start + t) * activation_bytes(n_in);
            kernel.dot(rows, group, count, products + start, n);
        }
        return;
    }
    // Rows of floats serve as they are; many tokens take them decoded, like the others.
    const bool as_they_are = kernel.dot_floats != nullptr && n <= kFloatRows;
    const DotFloatsFn dot_floats = (as_they_are ? kernel : tier.types[F32]).dot_floats;
    const int64_t at_once = n >= kFloatRows ? kFloatRows : 1;
    for (int64_t r = 0; r < rows.n_rows; r += at_once) {
        const int64_t n_here = std::min(rows.n_rows - r, at_once);
        const uint8_t* weights[kFloatRows];
        for (int64_t i = 0; i < n_here; ++i) {
            weights[i] = rows.data + (r + i) * rows.stride;
            if (as_they_are || type_id == F32) continue;
            float* decoded = reinterpret_cast<float*>(scratch) + i * n_in;
            kernel.dequantize(weights[i], n_in, decoded);
            weights[i] = reinterpret_cast<const uint8_t*>(decoded);
        }
        for (int64_t start = 0; start < n; start += kTokenGroup) {
            const int64_t count = std::min(n - start, kTokenGroup);
            const float* group[kTokenGroup];
            for (int64_t t = 0; t < count; ++t)
                group[t] = acts.x + (tokens ? tokens[start + t] : start + t) * n_in;
            dot_floats(weights, n_here, n_in, group, count, products + r * n + start, n);
        }
    }
}

}  // namespace moe
