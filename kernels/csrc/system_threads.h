// What the thread pool asks of the system: sleeping on a word of memory, and placing threads on processors.

#pragma once

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

#if defined(__linux__)
inline long futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
    static_assert(sizeof(word) == 4, "the system looks at the bare word");
    return syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

// Sleeps while word == value; may return early.
inline void sleep_on(std::atomic<uint32_t>& word, uint32_t value) { futex(word, FUTEX_WAIT, value); }
inline void wake(std::atomic<uint32_t>& word, int n) { futex(word, FUTEX_WAKE, static_cast<uint32_t>(n)); }

inline std::vector<int> allowed_cpus() {
    cpu_set_t set;
    std::vector<int> cpus;
    if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    return cpus;
}

// Not allowed everywhere, and not needed: failures do not matter.
inline void keep_on(std::thread& thread, const std::vector<int>& cpus) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu : cpus) CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
}

inline int current_cpu() { return sched_getcpu(); }
#else
inline void sleep_on(std::atomic<uint32_t>&, uint32_t) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
}
inline void wake(std::atomic<uint32_t>&, int) {}
inline std::vector<int> allowed_cpus() { return {}; }
inline void keep_on(std::thread&, const std::vector<int>&) {}
inline int current_cpu() { return -1; }
#endif

}  // namespace moe
