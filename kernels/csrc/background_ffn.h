// expert_ffn() on a thread of its own, so that the caller goes on meanwhile: one call at a time.

#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "moe_cpu.h"

namespace moe {

class BackgroundFfn {
 public:
    explicit BackgroundFfn(ThreadPool& pool) : pool_(pool), thread_([this] { run(); }) {}

    ~BackgroundFfn() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        thread_.join();
    }

    // Waits for the call before. layer and what `job` points to must stay as they are until finish(), the pairs'
    // tokens and experts excepted: they are in `pairs`, one after the other.
    void begin(const ExpertLayer& layer, const ExpertFfn& job, std::vector<int32_t> pairs) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return layer_ == nullptr; });
        begun_ = Clock::now();
        error_ = nullptr;
        pairs_ = std::move(pairs);
        job_ = job;
        job_.token_ids = pairs_.data();
        job_.expert_ids = pairs_.data() + job.n_pairs;
        layer_ = &layer;
        wake_.notify_all();
    }

    // Waits for the call's end: seconds since it was begun. Throws what it threw.
    double finish() {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return layer_ == nullptr; });
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
        return seconds_;
    }

 private:
    using Clock = std::chrono::steady_clock;

    void run() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return stop_ || layer_ != nullptr; });
            if (layer_ == nullptr) return;
            lock.unlock();
            std::exception_ptr error;
            try {
                expert_ffn(pool_, *layer_, job_);
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            error_ = error;
            seconds_ = std::chrono::duration<double>(Clock::now() - begun_).count();
            layer_ = nullptr;
            wake_.notify_all();
        }
    }

    ThreadPool& pool_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const ExpertLayer* layer_ = nullptr;  // of the call that runs or is to run
    ExpertFfn job_{};
    std::vector<int32_t> pairs_;
    Clock::time_point begun_;
    double seconds_ = 0;
    std::exception_ptr error_;
    bool stop_ = false;
    std::thread thread_;
};

}  // namespace moe
