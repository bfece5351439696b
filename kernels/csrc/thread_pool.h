// A fixed team of threads for chains of short parallel loops, with reusable scratch memory.
//
// The calling thread works as thread 0, so a pool of n holds n - 1 threads of its own. Every thread has a
// run of neighbouring units, which it takes one by one, or in a loop of ranges a third of what is left of it at a
// time, and then takes single ones of the others' runs: neighbours in memory stay with one thread, whose prefetches
// then reach its own next unit, and a thread that the system takes off its processor delays a loop by no more than
// what it holds.
//
// The loops of a chain follow each other without the caller: the threads go on as soon as all units of a
// loop are done, and may fetch what they need next while they wait. Between chains the threads spin for a
// while (the next layer follows soon), then sleep. They offer their processor to others while they spin, and
// stop spinning where somebody takes it: other threads of the process (PyTorch's) and other processes go
// first. A thread that wakes too late for a chain misses it: the caller never waits for a sleeper.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <mutex>
#include <thread>
#include <type_traits>
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

// body(unit, thread) for every unit in [0, n_units), in no fixed order; in a loop of ranges body(first, stop, thread),
// for units of one run. warm(first, stop, part) is called on
// threads that have to wait before the loop, with the run of units that will be theirs, to fetch a part of
// it into their cache: with part = 0, 1 and so on, until it returns false or the loop begins. Both are
// referred to, not copied.
class Loop {
 public:
    template <typename Body>
    Loop(int64_t n_units, const Body& body)
        : n_units(n_units), in_ranges(std::is_invocable_v<Body, int64_t, int64_t, int>), body_(&body) {
        call_body_ = [](const void* body, int64_t first, int64_t stop, int thread) {
            if constexpr (std::is_invocable_v<Body, int64_t, int64_t, int>)
                (*static_cast<const Body*>(body))(first, stop, thread);
            else
                for (; first < stop; ++first) (*static_cast<const Body*>(body))(first, thread);
        };
    }
    template <typename Body, typename Warm>
    Loop(int64_t n_units, const Body& body, const Warm& warm) : Loop(n_units, body) {
        warm_ = &warm;
        call_warm_ = [](const void* warm, int64_t first, int64_t stop, int part) {
            return (*static_cast<const Warm*>(warm))(first, stop, part);
        };
    }
    Loop() = default;

    void body(int64_t first, int64_t stop, int thread) const { call_body_(body_, first, stop, thread); }
    bool warm(int64_t first, int64_t stop, int part) const {
        return warm_ != nullptr && call_warm_(warm_, first, stop, part);
    }
    int64_t n_units = 0;
    bool in_ranges = false;

 private:
    const void *body_ = nullptr, *warm_ = nullptr;
    void (*call_body_)(const void*, int64_t, int64_t, int) = nullptr;
    bool (*call_warm_)(const void*, int64_t, int64_t, int) = nullptr;
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

    // Runs the loops, at most kLoops, one after the other: a loop begins when all units of the last one are
    // done, and sees what they wrote. Returns when all are done. The first exception thrown by a body is
    // thrown again here, after all other units have run. beside: the caller does this first, while the others begin.
    void run(std::initializer_list<Loop> loops, const std::function<void()>* beside = nullptr);
    template <typename Body>
    void run(int64_t n_units, const Body& body) {
        run({Loop(n_units, body)});
    }
    static constexpr int kLoops = 4;

    // While true, idle threads spin on, however long: whoever knows that there will be work says so, because waking
    // a thread takes as long as some of that work.
    void stay_awake(bool awake) { awake_.store(awake, std::memory_order_relaxed); }

    // Thread i takes units run_begin(i) to run_begin(i + 1) of a loop first, then others' that are left.
    int64_t run_begin(int64_t thread, int64_t n_units) const { return thread * n_units / n_threads(); }
    // To whose run a unit belongs.
    int64_t run_of(int64_t unit, int64_t n_units) const { return ((unit + 1) * n_threads() - 1) / n_units; }

    // While the caller does something else, every other thread runs the loop's body(thread, thread) once; a
    // thread that wakes too late does not. end_aside() waits for those inside, so a body has to find out soon
    // that the caller wants to go on, and must not throw. No run() in between.
    void begin_aside(const Loop& loop);
    void end_aside();

    enum Slot { kActivations, kHidden, kHiddenQuantized, kIndex, kSlots };
    uint8_t* shared(Slot slot, int64_t n_bytes) { return shared_[slot].reserve(n_bytes); }
    uint8_t* local(int thread, int64_t n_bytes) {
        return local_[static_cast<size_t>(thread)].reserve(n_bytes);
    }

 private:
    void open();
    void close();
    void work(int thread);
    int64_t do_units(int loop, int thread);
    bool is_over(int loop) const;
    void warm_up(int loop, int thread);
    void wait_for_loop(int loop);
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
    int caller_cpu_ = -1;       // where the last chain was started

    // The open chain. Written by the caller only while no worker is inside.
    Loop loops_[kLoops];
    int n_loops_ = 0;
    bool aside_ = false;  // loops_[0] is one aside
    uint32_t ticket_ = 0;  // of the first loop; the next ones follow
    std::exception_ptr error_;
    std::mutex error_mutex_;

    // What several threads write lies in cache lines of its own.
    struct alignas(64) Line {
        std::atomic<uint64_t> value{0};
    };
    struct alignas(64) Presence {
        std::atomic<uint32_t> state{0};
    };
    std::vector<Line> runs_;          // by thread: ticket of the loop << 32 | the next unit of its run
    std::vector<Presence> presence_;  // by thread: whether it is inside the chain (thread_pool.cpp)
    Line n_done_[kLoops];             // units of each loop

    alignas(64) std::atomic<uint32_t> epoch_{0};  // odd while a chain is open
    alignas(64) std::atomic<uint32_t> loops_done_{0};
    alignas(64) std::atomic<int> sleepers_{0};  // on epoch_
    std::atomic<int> loop_sleepers_{0};         // on loops_done_
    std::atomic<bool> stop_{false}, awake_{false};
};

}  // namespace moe
