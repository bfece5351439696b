#include "replay.h"

#include <algorithm>
#include <limits>

namespace moe {

namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// When each access's key is used next, in layer steps; and the first use of each key.
struct Future {
    std::vector<int64_t> next, first;

    explicit Future(const Accesses& a)
        : next(static_cast<size_t>(a.n_token * a.n_layer * a.top_k)),
          first(static_cast<size_t>(a.n_model_layer) * static_cast<size_t>(a.n_expert), kNever) {
        for (int64_t i = static_cast<int64_t>(next.size()); i-- > 0;) {
            const int64_t step = i / a.top_k;
            const int64_t key = (a.first_layer + step % a.n_layer) * a.n_expert + a.ids[i];
            next[static_cast<size_t>(i)] = first[static_cast<size_t>(key)];
            first[static_cast<size_t>(key)] = step;
        }
    }
};

}  // namespace

void replay(const PolicySettings& settings, const Accesses& accesses, int64_t n_slot,
            const std::vector<ExpertKey>& residents, bool unbound, int32_t* hits, int32_t* fetched) {
    Policy policy(settings, accesses.n_model_layer, accesses.n_expert);
    std::vector<int64_t> next;
    if (settings.rank == PolicySettings::Rank::belady) {
        Future future(accesses);
        next = std::move(future.next);
        for (size_t key = 0; key < future.first.size(); ++key)
            policy.foresee(static_cast<ExpertKey>(key), future.first[key]);
    }
    for (ExpertKey key : residents) policy.insert(key);

    std::vector<int> order(static_cast<size_t>(accesses.top_k));
    for (int64_t step = 0; step < accesses.n_token * accesses.n_layer; ++step) {
        const int64_t layer = step % accesses.n_layer, at = step * accesses.top_k;
        const int32_t* ids = accesses.ids + at;
        const ExpertKey first = static_cast<ExpertKey>((accesses.first_layer + layer) * accesses.n_expert);
        hits[step] = fetched[step] = 0;
        for (int i = 0; i < accesses.top_k; ++i) order[static_cast<size_t>(i)] = i;
        if (unbound)
            std::stable_partition(order.begin(), order.end(), [&](int i) { return policy.contains(first + ids[i]); });
        for (int i = 0; i < accesses.top_k && !unbound; ++i) policy.pin(first + ids[i]);
        for (int i : order) {
            const ExpertKey key = first + ids[i];
            policy.note(key, step / accesses.n_layer);
            if (!next.empty()) policy.foresee(key, next[static_cast<size_t>(at + i)]);
            if (policy.contains(key)) {
                ++hits[step];
                continue;
            }
            if (policy.size() >= n_slot) {
                const ExpertKey victim = policy.candidate();
                if (victim < 0 || !policy.admits(key, victim)) continue;
                policy.remove(victim);
            }
            policy.insert(key);
            ++fetched[step];
        }
        policy.unpin();
    }
}

}  // namespace moe
