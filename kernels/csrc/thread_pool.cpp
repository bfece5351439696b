#include "thread_pool.h"

#include <climits>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu_order.h"

namespace moe {

namespace {

using Clock = std::chrono::steady_clock;

// Flags of joined_: there is no open loop; the caller sleeps until the last worker has left.
constexpr uint32_t kClosed = 1u << 31, kCallerSleeps = 1u << 30, kCount = kCallerSleeps - 1;

// Giving way takes less than a microsecond, unless another thread was waiting for this processor.
constexpr auto kTakenAway = std::chrono::microseconds(50);
// Then the thread does not spin for so long.
constexpr auto kQuiet = std::chrono::milliseconds(2);
constexpr auto kCallerSpin = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

#if defined(__linux__)
long futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
    static_assert(sizeof(word) == 4, "the system looks at the bare word");
    return syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

// Sleeps while word == value; may return early.
void sleep_on(std::atomic<uint32_t>& word, uint32_t value) { futex(word, FUTEX_WAIT, value); }
void wake(std::atomic<uint32_t>& word, int n) { futex(word, FUTEX_WAKE, static_cast<uint32_t>(n)); }

std::vector<int> allowed_cpus() {
    cpu_set_t set;
    std::vector<int> cpus;
    if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    return cpus;
}

// Not allowed everywhere, and not needed: failures do not matter.
void keep_on(std::thread& thread, const std::vector<int>& cpus) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu : cpus) CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
}

int current_cpu() { return sched_getcpu(); }
#else
void sleep_on(std::atomic<uint32_t>&, uint32_t) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
}
void wake(std::atomic<uint32_t>&, int) {}
std::vector<int> allowed_cpus() { return {}; }
void keep_on(std::thread&, const std::vector<int>&) {}
int current_cpu() { return -1; }
#endif

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
      joined_(kClosed) {
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
    epoch_.fetch_add(1);
    wake(epoch_, INT_MAX);
    for (auto& thread : workers_) thread.join();
}

void ThreadPool::run_erased(int64_t n_units, Function fn, void* ctx) {
    if (n_units <= 0) return;
    fn_ = fn;
    ctx_ = ctx;
    const int64_t n_runs = n_threads();
    for (int64_t i = 0; i < n_runs; ++i) {
        Run& run = runs_[static_cast<size_t>(i)];
        run.next.store(i * n_units / n_runs, std::memory_order_relaxed);
        run.stop = (i + 1) * n_units / n_runs;
    }
    const bool shared = n_units > 1 && !workers_.empty();
    if (shared) {
        make_way();
        joined_.store(0, std::memory_order_release);
        epoch_.fetch_add(1);
        // Waking takes the caller microseconds for each thread: the first two wake the next ones.
        if (sleepers_.load() > 0) wake(epoch_, 2);
    }
    work(0);
    if (shared) wait_for_workers();
    if (error_) {
        std::exception_ptr error = error_;
        error_ = nullptr;
        std::rethrow_exception(error);
    }
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

void ThreadPool::wait_for_workers() {
    uint32_t joined = joined_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed;
    const auto all_left = [&] {
        joined = joined_.load(std::memory_order_acquire);
        return (joined & kCount) == 0;
    };
    const auto start = Clock::now();
    while ((joined & kCount) != 0 && Clock::now() - start < kCallerSpin)
        for (int i = 0; i < 32 && !all_left(); ++i) pause();
    while (!all_left()) {
        joined = joined_.fetch_or(kCallerSleeps, std::memory_order_acq_rel) | kCallerSleeps;
        if ((joined & kCount) != 0) sleep_on(joined_, joined);
    }
}

void ThreadPool::work(int thread) {
    const size_t n_runs = runs_.size();
    for (size_t i = 0; i < n_runs; ++i) {
        Run& run = runs_[(static_cast<size_t>(thread) + i) % n_runs];
        for (;;) {
            // Looking first keeps the line shared among those who only find the run finished.
            if (run.next.load(std::memory_order_relaxed) >= run.stop) break;
            const int64_t unit = run.next.fetch_add(1, std::memory_order_relaxed);
            if (unit >= run.stop) break;
            try {
                fn_(ctx_, unit, thread);
            } catch (...) {
                std::lock_guard<std::mutex> lock(error_mutex_);
                if (!error_) error_ = std::current_exception();
            }
        }
    }
}

// Waits for another epoch than `seen`; false if somebody else got the processor meanwhile.
bool ThreadPool::spin(uint32_t seen) {
    auto now = Clock::now();
    const auto deadline = now + spin_;
    while (now < deadline) {
        for (int i = 0; i < 32; ++i) {
            if (epoch_.load() != seen) return true;
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
    auto quiet_until = Clock::now();
    for (uint32_t seen = 0; !stop_;) {
        if (Clock::now() >= quiet_until && !spin(seen)) quiet_until = Clock::now() + kQuiet;
        bool slept = false;
        while (epoch_.load() == seen) {
            slept = true;
            sleepers_.fetch_add(1);
            sleep_on(epoch_, seen);
            sleepers_.fetch_sub(1);
        }
        seen = epoch_.load();
        uint32_t joined = joined_.load(std::memory_order_acquire);
        while ((joined & kClosed) == 0) {
            if (!joined_.compare_exchange_weak(joined, joined + 1, std::memory_order_acq_rel)) continue;
            if (slept && sleepers_.load() > 0) wake(epoch_, 2);
            work(thread);
            joined = joined_.fetch_sub(1, std::memory_order_acq_rel) - 1;
            if (joined == (kClosed | kCallerSleeps)) wake(joined_, 1);
            break;
        }
    }
}

}  // namespace moe
