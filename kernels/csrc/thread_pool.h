// A fixed team of threads for short parallel loops, with reusable scratch memory.
//
// The calling thread works as thread 0, so a pool of n holds n - 1 threads of its own. Between loops they
// spin for a few tens of microseconds (the next loop of a layer follows at once), then sleep. A thread that
// wakes too late for a loop just misses it: the caller never waits for a sleeper.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace moe {

// Grow-only memory, 64-byte aligned; contents are lost when it grows.
class Buffer {
 public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer();
    uint8_t* reserve(int64_t n_bytes);

 private:
    uint8_t* data_ = nullptr;
    int64_t size_ = 0;
};

class ThreadPool {
 public:
    explicit ThreadPool(int n_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int n_threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Hold this during a whole computation: it guards run() and both kinds of scratch memory.
    std::mutex& mutex() { return call_mutex_; }

    // Calls body(unit, thread) for every unit in [0, n_units), in no fixed order; returns when all are done.
    // The first exception thrown by a body is thrown again here, after the other units have run.
    template <typename Body>
    void run(int64_t n_units, Body&& body) {
        run_erased(
            n_units, [](void* ctx, int64_t unit, int thread) { (*static_cast<Body*>(ctx))(unit, thread); },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

    enum Slot { kActivations, kHidden, kHiddenQuantized, kIndex, kSlots };
    uint8_t* shared(Slot slot, int64_t n_bytes) { return shared_[slot].reserve(n_bytes); }
    uint8_t* local(int thread, int64_t n_bytes) { return local_[thread].reserve(n_bytes); }

 private:
    using Function = void (*)(void* ctx, int64_t unit, int thread);
    void run_erased(int64_t n_units, Function fn, void* ctx);
    void work(int thread);
    void worker(int thread);

    std::mutex call_mutex_;
    std::vector<std::thread> workers_;
    Buffer shared_[kSlots];
    std::vector<Buffer> local_;

    // The open loop. Written by the caller only while no worker has joined.
    Function fn_ = nullptr;
    void* ctx_ = nullptr;
    int64_t n_units_ = 0;
    std::exception_ptr error_;
    std::mutex error_mutex_;

    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint32_t> joined_;  // workers inside the loop, plus kClosed while there is none
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
};

}  // namespace moe
