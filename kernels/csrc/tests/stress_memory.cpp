// Threads that hold, look at and release experts of a file for some seconds, for the sanitizers.
//
//     stress_memory [SECONDS] [SEED]

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>

#include "../expert_memory.h"

namespace {

constexpr int kLayers = 3, kExperts = 8;
constexpr int64_t kBytes[2] = {9000, 3000}, kSlot = 12000;

uint8_t byte_at(int64_t offset) { return static_cast<uint8_t>(offset * 31 + offset / 257); }

bool is_right(const moe::ExpertMemory& memory, int layer, int32_t expert) {
    const uint8_t* slot = memory.region(layer)->data() + expert * kSlot;
    const int64_t start = layer * kExperts * kSlot;
    for (int64_t i = 0; i < kBytes[0]; ++i)
        if (slot[i] != byte_at(start + expert * kBytes[0] + i)) return false;
    for (int64_t i = 0; i < kBytes[1]; ++i)
        if (slot[kBytes[0] + i] != byte_at(start + kExperts * kBytes[0] + expert * kBytes[1] + i)) return false;
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
    const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
    std::string path = "/tmp/stress_memory_XXXXXX";
    const int file = mkstemp(path.data());
    std::vector<uint8_t> bytes(kLayers * kExperts * kSlot);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = byte_at(static_cast<int64_t>(i));
    if (file < 0 || write(file, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) return 2;

    std::atomic<int64_t> n_held{0}, n_wrong{0};
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    for (unsigned round = 0; std::chrono::steady_clock::now() < end; ++round) {
        moe::ExpertMemory memory(kExperts, {24 * 4096, 0, 0}, 3, 8192, round % 2 == 0);
        memory.add_file(path);
        for (int layer = 0; layer < kLayers; ++layer) {
            const int64_t start = layer * kExperts * kSlot;
            memory.add_layer(kSlot, {{0, start, kBytes[0], kBytes[0], 0},
                                     {0, start + kExperts * kBytes[0], kBytes[1], kBytes[1], kBytes[0]}});
        }
        memory.preload();
        std::vector<std::thread> threads;
        for (unsigned t = 0; t < 3; ++t)
            threads.emplace_back([&, t] {
                std::mt19937 random(seed + 100 * round + t);
                for (int turn = 0; turn < 300; ++turn) {
                    const int layer = static_cast<int>(random() % kLayers);
                    const int32_t first = static_cast<int32_t>(random() % kExperts), next = (first + 1) % kExperts;
                    const int32_t experts[2] = {first, next};
                    if (turn % 3 == 0) memory.prefetch(layer, experts, 2);
                    try {
                        const moe::HeldExperts held(memory, layer, experts, 2);
                        ++n_held;
                        n_wrong += !is_right(memory, layer, first) || !is_right(memory, layer, next);
                    } catch (const moe::NoRoomError&) {  // the other threads hold the rest
                    } catch (const std::runtime_error&) {  // stopped
                        return;
                    }
                }
            });
        if (round % 4 == 3) memory.stop();
        for (std::thread& thread : threads) thread.join();
        memory.check_integrity();
    }
    close(file);
    unlink(path.c_str());
    std::printf("stress_memory: %lld holds, %lld wrong\n", static_cast<long long>(n_held),
                static_cast<long long>(n_wrong));
    return n_held == 0 || n_wrong != 0;
}
