#include "thread_pool.h"

#include <climits>
#include <cstdlib>
#include <new>

#include "cpu_order.h"
#include "system_threads.h"

namespace moe {

namespace {

using Clock = std::chrono::steady_clock;

// A worker's presence; kAwaited: inside, and the caller sleeps until it has left.
constexpr uint32_t kOutside = 0, kInside = 1, kAwaited = 2;

// Giving way takes less than a microsecond, unless another thread was waiting for this processor.
constexpr auto kTakenAway = std::chrono::microseconds(50);
// Then the thread does not spin for so long.
constexpr auto kQuiet = std::chrono::milliseconds(2);
// How long a thread that waits for others inside a chain spins before it sleeps.
constexpr auto kWaitSpin = std::chrono::microseconds(100);

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

ThreadPool::ThreadPool(int n_threads, PoolOptions options)
    : local_(static_cast<size_t>(n_threads)),
      spin_(options.spin_microseconds),
      allowed_(allowed_cpus()),
      runs_(static_cast<size_t>(n_threads)),
      presence_(static_cast<size_t>(n_threads)) {
    std::vector<int> order;
    if (options.pin && n_threads > 1 && static_cast<size_t>(n_threads) <= allowed_.size()) {
        order = cpu_order(allowed_, "/sys/devices/system");
        // The caller's processor comes last, so that nobody is pinned to it.
        const auto own = std::find(order.begin(), order.end(), current_cpu());
        if (own != order.end()) std::rotate(own, own + 1, order.end());
    }
    workers_.reserve(static_cast<size_t>(n_threads) - 1);
    try {
        for (int thread = 1; thread < n_threads; ++thread) {
            workers_.emplace_back([this, thread] { worker(thread); });
            pins_.push_back(order.empty() ? -1 : order[static_cast<size_t>(thread) - 1]);
            if (pins_.back() >= 0) keep_on(workers_.back(), {pins_.back()});
        }
    } catch (...) {
        stop();
        throw;
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    stop_.store(true);
    epoch_.fetch_add(2);
    wake(epoch_, INT_MAX);
    for (auto& thread : workers_) thread.join();
}

void ThreadPool::run(std::initializer_list<Loop> loops, const std::function<void()>* beside) {
    n_loops_ = 0;
    bool is_shared = false;
    for (const Loop& loop : loops) {
        if (loop.n_units <= 0) continue;
        n_done_[n_loops_].value.store(0, std::memory_order_relaxed);
        loops_[n_loops_++] = loop;
        is_shared = is_shared || loop.n_units > 1;
    }
    is_shared = is_shared && !workers_.empty();
    // Tickets only grow, and start again before they could overflow.
    if (ticket_ > 1u << 30) {
        ticket_ = 0;
        for (Line& run : runs_) run.value.store(0, std::memory_order_relaxed);
    }
    ticket_ += kLoops;
    loops_done_.store(0, std::memory_order_relaxed);
    if (is_shared) open();
    if (beside != nullptr) {
        try {
            (*beside)();
        } catch (...) {
            std::lock_guard<std::mutex> lock(error_mutex_);
            error_ = std::current_exception();
        }
    }
    work(0);
    if (is_shared) close();
    if (error_) {
        std::exception_ptr error = error_;
        error_ = nullptr;
        std::rethrow_exception(error);
    }
}

void ThreadPool::begin_aside(const Loop& loop) {
    loops_[0] = loop;
    aside_ = true;
    open();
}

void ThreadPool::end_aside() {
    close();
    aside_ = false;
}

void ThreadPool::open() {
    make_way();
    epoch_.fetch_add(1);
    // Waking takes the caller microseconds for each thread: the first two wake the next ones.
    if (sleepers_.load() > 0) wake(epoch_, 2);
}

void ThreadPool::close() {
    epoch_.fetch_add(1);
    wait_for_workers();
}

// A worker that may only run where the caller does would not run at all.
void ThreadPool::make_way() {
    const int cpu = current_cpu();
    if (cpu == caller_cpu_) return;
    caller_cpu_ = cpu;
    for (size_t i = 0; i < pins_.size(); ++i) {
        if (pins_[i] != cpu || cpu < 0) continue;
        pins_[i] = -1;
        keep_on(workers_[i], allowed_);
    }
}

// A worker shows itself before it looks whether the chain is open, the caller closes the chain before it looks
// for workers: one of the two sees the other.
void ThreadPool::wait_for_workers() {
    for (Presence& presence : presence_) {
        std::atomic<uint32_t>& state = presence.state;
        if (state.load() == kOutside) continue;
        const auto start = Clock::now();
        while (state.load() != kOutside && Clock::now() - start < kWaitSpin)
            for (int i = 0; i < 32 && state.load(std::memory_order_relaxed) != kOutside; ++i) pause();
        uint32_t inside = kInside;
        if (state.compare_exchange_strong(inside, kAwaited))
            while (state.load() == kAwaited) sleep_on(state, kAwaited);
    }
}

void ThreadPool::work(int thread) {
    if (aside_) return loops_[0].body(thread, thread + 1, thread);
    for (int i = 0; i < n_loops_; ++i) {
        const auto done = static_cast<uint64_t>(do_units(i, thread));
        if (i + 1 == n_loops_) break;  // the caller waits until all have left
        if (done > 0 && n_done_[i].value.fetch_add(done, std::memory_order_acq_rel) + done ==
                            static_cast<uint64_t>(loops_[i].n_units)) {
            loops_done_.store(static_cast<uint32_t>(i) + 1);
            if (loop_sleepers_.load() > 0) wake(loops_done_, INT_MAX);
        } else {
            warm_up(i + 1, thread);
            wait_for_loop(i);
        }
    }
}

// Does units until none is left to take; returns how many.
int64_t ThreadPool::do_units(int loop, int thread) {
    const int64_t n = n_threads(), n_units = loops_[loop].n_units;
    const uint32_t ticket = ticket_ + static_cast<uint32_t>(loop);
    int64_t n_done = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t owner = (thread + i) % n, stop = run_begin(owner + 1, n_units);
        std::atomic<uint64_t>& run = runs_[static_cast<size_t>(owner)].value;
        uint64_t place = run.load(std::memory_order_relaxed);
        for (;;) {
            // The first to come begins the run; a later ticket means that the loop is long over.
            const auto behind = static_cast<int32_t>(static_cast<uint32_t>(place >> 32) - ticket);
            const int64_t unit = behind < 0 ? run_begin(owner, n_units) : static_cast<int64_t>(place & 0xffffffff);
            if (behind > 0 || unit >= stop) break;
            const int64_t n_here = loops_[loop].in_ranges && i == 0 ? (stop - unit + 2) / 3 : 1;
            const uint64_t next = uint64_t{ticket} << 32 | static_cast<uint64_t>(unit + n_here);
            if (!run.compare_exchange_weak(place, next, std::memory_order_relaxed)) continue;
            place = next;
            try {
                loops_[loop].body(unit, unit + n_here, thread);
            } catch (...) {
                std::lock_guard<std::mutex> lock(error_mutex_);
                if (!error_) error_ = std::current_exception();
            }
            n_done += n_here;
        }
    }
    return n_done;
}

bool ThreadPool::is_over(int loop) const {
    return loops_done_.load(std::memory_order_acquire) > static_cast<uint32_t>(loop);
}

void ThreadPool::warm_up(int loop, int thread) {
    const int64_t n_units = loops_[loop].n_units;
    const int64_t first = run_begin(thread, n_units), stop = run_begin(thread + 1, n_units);
    if (first == stop) return;
    for (int part = 0; !is_over(loop - 1) && loops_[loop].warm(first, stop, part); ++part) continue;
}

// Waits until all units of a loop are done. Whoever holds one may wait for this processor.
void ThreadPool::wait_for_loop(int loop) {
    for (int i = 0; i < 64; ++i) {
        if (is_over(loop)) return;
        pause();
    }
    const auto start = Clock::now();
    while (Clock::now() - start < kWaitSpin) {
        for (int i = 0; i < 32; ++i) {
            if (is_over(loop)) return;
            pause();
        }
        std::this_thread::yield();
    }
    loop_sleepers_.fetch_add(1);
    for (uint32_t done; (done = loops_done_.load()) <= static_cast<uint32_t>(loop);)
        sleep_on(loops_done_, done);
    loop_sleepers_.fetch_sub(1);
}

// Whether a chain is open that the thread has not been in.
static bool is_new(uint32_t epoch, uint32_t seen) { return epoch % 2 == 1 && epoch != seen; }

// Waits for a new chain; false if somebody else got the processor meanwhile.
bool ThreadPool::spin(uint32_t seen) {
    auto now = Clock::now();
    const auto deadline = now + spin_;
    while (now < deadline || awake_.load(std::memory_order_relaxed)) {
        for (int i = 0; i < 128; ++i) {
            if (is_new(epoch_.load(std::memory_order_acquire), seen) || stop_.load(std::memory_order_relaxed))
                return true;
            pause();
        }
        const auto before = Clock::now();
        std::this_thread::yield();
        now = Clock::now();
        if (now - before > kTakenAway) return false;
    }
    return true;
}

void ThreadPool::worker(int thread) {
    std::atomic<uint32_t>& presence = presence_[static_cast<size_t>(thread)].state;
    auto quiet_until = Clock::now();
    for (uint32_t seen = 0;;) {
        uint32_t epoch = epoch_.load();
        if (!is_new(epoch, seen) && Clock::now() >= quiet_until && !spin(seen))
            quiet_until = Clock::now() + kQuiet;
        bool slept = false;
        while (!is_new(epoch = epoch_.load(), seen)) {
            if (stop_) return;
            slept = true;
            sleepers_.fetch_add(1);
            sleep_on(epoch_, epoch);
            sleepers_.fetch_sub(1);
        }
        seen = epoch;
        presence.store(kInside);
        if (epoch_.load() == epoch) {
            if (slept && sleepers_.load() > 0) wake(epoch_, 2);
            work(thread);
        }
        if (presence.exchange(kOutside) == kAwaited) wake(presence, 1);
    }
}

}  // namespace moe
