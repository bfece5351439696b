// Reads or copies memory with all threads of a pool, and does nothing else.

#pragma once

#include <algorithm>
#include <cstring>

#include "thread_pool.h"

namespace moe {

// The exclusive or of all whole cache lines' 64-bit words; prefetch: bytes to ask for in advance, 0 for none.
inline uint64_t read_memory(ThreadPool& pool, const uint8_t* data, int64_t n_bytes, int prefetch) {
    typedef uint64_t Vector __attribute__((vector_size(16), aligned(8), may_alias));
    constexpr int64_t kUnit = 128 << 10;
    std::lock_guard<std::mutex> lock(pool.mutex());
    std::atomic<uint64_t> total{0};
    pool.run((n_bytes + kUnit - 1) / kUnit, [&](int64_t unit, int) {
        const uint8_t* stop = data + std::min(n_bytes, (unit + 1) * kUnit) - 63;
        Vector sum[4] = {};
        for (const uint8_t* line = data + unit * kUnit; line < stop; line += 64) {
            // As an integer: the address may lie behind the memory.
            const uintptr_t ahead = reinterpret_cast<uintptr_t>(line) + static_cast<uintptr_t>(prefetch);
            if (prefetch > 0) __builtin_prefetch(reinterpret_cast<const void*>(ahead));
            const Vector* words = reinterpret_cast<const Vector*>(line);
            sum[0] ^= words[0];
            sum[1] ^= words[1];
            sum[2] ^= words[2];
            sum[3] ^= words[3];
        }
        const Vector all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
        total.fetch_xor(all[0] ^ all[1], std::memory_order_relaxed);
    });
    return total.load();
}

inline void copy_memory(ThreadPool& pool, uint8_t* to, const uint8_t* from, int64_t n_bytes) {
    constexpr int64_t kUnit = 256 << 10;
    std::lock_guard<std::mutex> lock(pool.mutex());
    pool.run((n_bytes + kUnit - 1) / kUnit, [&](int64_t unit, int) {
        const int64_t first = unit * kUnit;
        std::memcpy(to + first, from + first, static_cast<size_t>(std::min(kUnit, n_bytes - first)));
    });
}

}  // namespace moe
