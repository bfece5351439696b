#include "lookahead.h"

#include <unistd.h>

#include <algorithm>

namespace moe {

namespace {

// Between two looks at whether to stop. At the 10 GB/s that a thread may get, a fifth of a microsecond.
constexpr int64_t kPull = 2048;

int64_t most_of_the_cache() {
    int64_t n_bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    n_bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (n_bytes <= 0) n_bytes = int64_t{1} << 20;  // the system does not say
    return n_bytes * 3 / 4;
}

}  // namespace

Lookahead::Lookahead(ThreadPool& pool, int64_t thread_bytes)
    : pool_(pool),
      thread_bytes_(thread_bytes < 0 ? most_of_the_cache() : thread_bytes),
      places_(static_cast<size_t>(pool.n_threads())) {}

void Lookahead::begin(const ExpertLayer& layer, const std::vector<int32_t>& experts) {
    if (experts.empty() || thread_bytes_ == 0 || !pool_.mutex().try_lock()) return;
    layer_ = &layer;
    experts_ = experts;
    std::fill(places_.begin(), places_.end(), Place{});
    n_pulling_.store(pool_.n_threads() - 1, std::memory_order_relaxed);
    stop_.store(false, std::memory_order_relaxed);
    running_ = true;
    pool_.begin_aside(Loop(pool_.n_threads(), body_));
}

int64_t Lookahead::end() {
    if (!running_) return 0;
    stop_.store(true, std::memory_order_relaxed);
    pool_.end_aside();
    pool_.mutex().unlock();
    running_ = false;
    int64_t n_pulled = 0;
    for (const Place& place : places_) n_pulled += place.n_pulled;
    return n_pulled;
}

void Lookahead::pull(int thread) {
    while (!stop_.load(std::memory_order_relaxed)) {
        if (pull_some(thread)) continue;
        n_pulling_.fetch_sub(1, std::memory_order_relaxed);
        return;
    }
}

// False if nothing is left, or the thread has had what it may.
bool Lookahead::pull_some(int thread) {
    Place& place = places_[static_cast<size_t>(thread)];
    if (place.rest.n_bytes == 0) {
        if (place.next == 3 * experts_.size()) return false;
        const size_t i = place.next / 3, part = place.next % 3;
        place.rest = expert_share(*layer_, experts_[i], thread, pool_.n_threads())[part];
        ++place.next;
    }
    const int64_t n_bytes = std::min({kPull, place.rest.n_bytes, thread_bytes_ - place.n_pulled});
    for (int64_t line = 0; line < n_bytes; line += 64)
        __builtin_prefetch(place.rest.data + line, 0, 2);  // 2: into the second-level cache
    place.rest = {place.rest.data + n_bytes, place.rest.n_bytes - n_bytes};
    place.n_pulled += n_bytes;
    return place.n_pulled < thread_bytes_;
}

}  // namespace moe
