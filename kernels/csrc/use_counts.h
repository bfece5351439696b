// How often experts have been used lately: counts that halve every kHalfLife steps.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "policy.h"

namespace moe {

class UseCounts {
 public:
    explicit UseCounts(size_t n_key) : entries_(n_key) {}

    void note(ExpertKey key, int64_t step) {
        Entry& entry = entries_[static_cast<size_t>(key)];
        entry.count = at(key, step) + 1;
        entry.step = step;
    }
    void set(ExpertKey key, float count) { entries_[static_cast<size_t>(key)] = {count, 0}; }
    float at(ExpertKey key, int64_t step) const {
        const Entry& entry = entries_[static_cast<size_t>(key)];
        return entry.count * std::exp2(static_cast<float>(entry.step - step) / kHalfLife);
    }

 private:
    static constexpr float kHalfLife = 64;
    struct Entry {
        float count = 0;
        int64_t step = 0;
    };
    std::vector<Entry> entries_;
};

}  // namespace moe
