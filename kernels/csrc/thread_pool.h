// A fixed team of threads for short parallel loops, with reusable scratch memory.
//
// The calling thread works as thread 0, so a pool of n holds n - 1 threads of its own. Every thread has a
// run of neighbouring units, which it takes one by one, and then takes single ones of the others' runs:
// neighbours in memory stay with one thread, whose prefetches then reach its own next unit, and a thread
// that the system takes off its processor delays a loop by no more than the unit it holds.
//
// Between loops the threads spin for a while (the next loop of a layer follows at once), then sleep. They
// offer their processor to others while they spin, and stop spinning where somebody takes it: other threads
// of the process (PyTorch's) and other processes go first. A thread that wakes too late for a loop misses
// it: the caller never waits for a sleeper.

#pragma once

#include <atomic>
#include <chrono>
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

struct PoolOptions {
    // How long an idle thread waits for the next loop before it sleeps.
    int spin_microseconds = 100;
    // Whether every thread but the caller stays on one processor, each on its own, in the order of
    // cpu_order.h. Not done where the pool has more threads than the process has processors, and given up for
    // a thread on whose processor the caller, which the system may move, is found.
    bool pin = true;
};

class ThreadPool {
 public:
    explicit ThreadPool(int n_threads, PoolOptions options = {});
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
    bool spin(uint32_t seen);
    void wait_for_workers();
    void make_way();
    void stop();

    std::mutex call_mutex_;
    std::vector<std::thread> workers_;
    Buffer shared_[kSlots];
    std::vector<Buffer> local_;
    std::chrono::microseconds spin_;
    std::vector<int> allowed_;  // processors of the process
    std::vector<int> pins_;     // the processor of each worker, -1 for any
    int caller_cpu_ = -1;       // where the last loop was started

    // The open loop. Written by the caller only while no worker has joined.
    Function fn_ = nullptr;
    void* ctx_ = nullptr;
    struct alignas(64) Run {
        std::atomic<int64_t> next{0};
        int64_t stop = 0;
    };
    std::vector<Run> runs_;  // one for each thread
    std::exception_ptr error_;
    std::mutex error_mutex_;

    alignas(64) std::atomic<uint32_t> joined_;  // workers inside the loop, and two flags (thread_pool.cpp)
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace moe
