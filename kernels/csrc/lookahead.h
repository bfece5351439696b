// Pulls experts that the next layer will probably miss from RAM into the caches of the threads that would read
// them, while RAM and threads are idle: the GPU is in attention then. Results do not depend on it.
//
// One thread calls. In between it watches for its own work, and calls end() when that arrives: it pulls nothing itself,
// and has its own data in its cache then.

#pragma once

#include <atomic>
#include <vector>

#include "moe_cpu.h"

namespace moe {

class Lookahead {
 public:
    // thread_bytes: how much each thread but the caller's may pull at a time; 0: nothing, -1: most of a second-level cache.
    Lookahead(ThreadPool& pool, int64_t thread_bytes);
    ~Lookahead() { end(); }
    Lookahead(const Lookahead&) = delete;
    Lookahead& operator=(const Lookahead&) = delete;

    // Distinct experts, the likeliest first. Does nothing while somebody else uses the pool.
    void begin(const ExpertLayer& layer, const std::vector<int32_t>& experts);
    bool running() const { return running_; }
    // Whether everybody has pulled all there is to pull.
    bool finished() const { return n_pulling_.load(std::memory_order_relaxed) == 0; }
    // Stops the threads, within a microsecond. Returns the bytes pulled.
    int64_t end();

 private:
    struct alignas(64) Place {  // how far a thread is
        Bytes rest{};
        size_t next = 0;  // part: gate, up and down of the first expert, of the second, and so on
        int64_t n_pulled = 0;
    };
    struct Body {
        Lookahead* lookahead;
        void operator()(int64_t, int thread) const { lookahead->pull(thread); }
    };
    void pull(int thread);
    bool pull_some(int thread);

    ThreadPool& pool_;
    const int64_t thread_bytes_;
    const Body body_{this};
    bool running_ = false;
    const ExpertLayer* layer_ = nullptr;
    std::vector<int32_t> experts_;
    std::vector<Place> places_;             // by thread
    std::atomic<int> n_pulling_{0};         // threads that have not pulled everything
    std::atomic<bool> stop_{false};
};

}  // namespace moe
