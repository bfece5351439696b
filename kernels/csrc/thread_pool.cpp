#include "thread_pool.h"

#include <chrono>
#include <cstdlib>
#include <new>

namespace moe {

namespace {

constexpr uint32_t kClosed = 1u << 31;
// Longer than the gap between the loops of one layer, shorter than what a busy machine would miss.
constexpr auto kSpin = std::chrono::microseconds(40);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

Buffer::~Buffer() { std::free(data_); }

uint8_t* Buffer::reserve(int64_t n_bytes) {
    if (n_bytes > size_) {
        std::free(data_);
        data_ = nullptr;
        size_ = 0;
        const int64_t size = (n_bytes + n_bytes / 4 + 4095) / 4096 * 4096;
        data_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(size)));
        if (data_ == nullptr) throw std::bad_alloc();
        size_ = size;
    }
    return data_;
}

ThreadPool::ThreadPool(int n_threads) : local_(static_cast<size_t>(n_threads)), joined_(kClosed) {
    workers_.reserve(static_cast<size_t>(n_threads) - 1);
    try {
        for (int thread = 1; thread < n_threads; ++thread)
            workers_.emplace_back([this, thread] { worker(thread); });
    } catch (...) {
        {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& thread : workers_) thread.join();
        throw;
    }
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : workers_) thread.join();
}

void ThreadPool::run_erased(int64_t n_units, Function fn, void* ctx) {
    if (n_units <= 0) return;
    fn_ = fn;
    ctx_ = ctx;
    n_units_ = n_units;
    next_.store(0, std::memory_order_relaxed);
    if (n_units > 1 && !workers_.empty()) {
        joined_.store(0, std::memory_order_release);
        epoch_.fetch_add(1);
        if (sleepers_.load() > 0) {
            // Taking the mutex closes the gap between a worker's last look at the epoch and its sleep.
            {
                std::lock_guard<std::mutex> lock(sleep_mutex_);
            }
            wake_.notify_all();
        }
    }
    work(0);
    joined_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; joined_.load(std::memory_order_acquire) != kClosed; ++spins) {
        if (spins < 20000)
            pause();
        else
            std::this_thread::yield();
    }
    if (error_) {
        std::exception_ptr error = error_;
        error_ = nullptr;
        std::rethrow_exception(error);
    }
}

void ThreadPool::work(int thread) {
    for (;;) {
        const int64_t unit = next_.fetch_add(1, std::memory_order_relaxed);
        if (unit >= n_units_) return;
        try {
            fn_(ctx_, unit, thread);
        } catch (...) {
            std::lock_guard<std::mutex> lock(error_mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }
}

void ThreadPool::worker(int thread) {
    uint32_t seen = 0;
    for (;;) {
        const auto deadline = std::chrono::steady_clock::now() + kSpin;
        bool idle = epoch_.load() == seen;
        while (idle && !stop_ && std::chrono::steady_clock::now() < deadline) {
            for (int i = 0; i < 16 && idle; ++i) {
                pause();
                idle = epoch_.load() == seen;
            }
        }
        if (idle) {
            std::unique_lock<std::mutex> lock(sleep_mutex_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, [&] { return stop_ || epoch_.load() != seen; });
            sleepers_.fetch_sub(1);
        }
        if (stop_) return;
        seen = epoch_.load();
        uint32_t joined = joined_.load(std::memory_order_acquire);
        while ((joined & kClosed) == 0) {
            if (joined_.compare_exchange_weak(joined, joined + 1, std::memory_order_acq_rel)) {
                work(thread);
                joined_.fetch_sub(1, std::memory_order_acq_rel);
                break;
            }
        }
    }
}

}  // namespace moe
