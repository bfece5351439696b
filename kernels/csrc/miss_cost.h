// How long the CPU and the copies take for the experts of a layer step, learnt while they run, and the division
// of misses by it.

#pragma once

#include <algorithm>
#include <cstdint>

namespace moe {

// Bytes per second of the CPU and of the copies, each alone and while the other works too.
struct Rates {
    double cpu, cpu_beside_copies, copy, copy_beside_cpu;
    double cpu_fixed;   // seconds that any work of the CPU takes on top
    double copy_fixed;  // seconds until the first copy begins and the last one's end is noticed

    // Misses that the CPU could compute in the time that it loses to one copy beside it. Below one: an expert that was
    // just used, in place of one that never was, is worth it.
    double price_of_copy() const { return std::clamp((cpu - cpu_beside_copies) / copy_beside_cpu, 0.0, 0.99); }
};

class MissCost {
 public:
    explicit MissCost(const Rates& start) : rates_(start) {}

    void note_cpu(int64_t n_bytes, double seconds, bool beside_copies) {
        note(beside_copies ? rates_.cpu_beside_copies : rates_.cpu, n_bytes,
             std::max(seconds - rates_.cpu_fixed, seconds / 2));
    }
    void note_copy(int64_t n_bytes, double seconds, bool beside_cpu) {
        note(beside_cpu ? rates_.copy_beside_cpu : rates_.copy, n_bytes, seconds);
    }

    // How many of n missed experts to fetch so that CPU and copies are finished together, as soon as possible.
    // backlog: bytes in flight already, which are copied first.
    int64_t best_fetches(int64_t n, int64_t expert_bytes, int64_t backlog) const {
        int64_t best = 0;
        double least = 0;
        for (int64_t k = 0; k <= n; ++k) {
            const double seconds = std::max(cpu_seconds((n - k) * expert_bytes, k > 0 || backlog > 0),
                                            copy_seconds(k * expert_bytes, backlog, k < n));
            if (k == 0 || seconds < least) {
                best = k;
                least = seconds;
            }
        }
        return best;
    }

    double cpu_seconds(int64_t n_bytes, bool beside_copies) const {
        if (n_bytes == 0) return 0;
        return rates_.cpu_fixed +
               static_cast<double>(n_bytes) / (beside_copies ? rates_.cpu_beside_copies : rates_.cpu);
    }

    const Rates& rates() const { return rates_; }

 private:
    double copy_seconds(int64_t n_bytes, int64_t backlog, bool beside_cpu) const {
        if (n_bytes == 0) return 0;
        return rates_.copy_fixed + static_cast<double>(backlog + n_bytes) /
                                       (beside_cpu ? rates_.copy_beside_cpu : rates_.copy);
    }
    // One sample counts little: some are of work that the system interrupted.
    static void note(double& rate, int64_t n_bytes, double seconds) {
        if (n_bytes == 0 || seconds <= 0) return;
        rate += 0.1 * (static_cast<double>(n_bytes) / seconds - rate);
    }

    Rates rates_;
};

}  // namespace moe
