// A layer's experts where not all of them are in RAM.

#include <algorithm>
#include <optional>

#include "expert_memory.h"

namespace moe {

void expert_ffn_in_groups(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job) {
    ExpertLayer resident = layer;
    resident.memory = nullptr;
    std::vector<int32_t> used(job.expert_ids, job.expert_ids + job.n_pairs);
    used.push_back(-1);
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
    used.erase(used.begin());
    const int64_t n_used = static_cast<int64_t>(used.size());
    if (n_used == 0) return expert_ffn(pool, resident, job);

    std::vector<int32_t> tokens, experts;  // of a group's pairs
    std::vector<float> weights, sums;
    for (int64_t first = 0, n = 0; first < n_used; first += n) {
        const int32_t* group = used.data() + first;
        n = std::min(layer.memory->at_once(layer.memory_layer), n_used - first);
        std::optional<HeldExperts> held;
        while (!held) {
            try {
                held.emplace(*layer.memory, layer.memory_layer, group, n);
            } catch (const NoRoomError&) {  // the limit follows the process, and has become less meanwhile
                if (n == 1) throw;
                n /= 2;
            }
        }
        layer.memory->prefetch(layer.memory_layer, group + n, n_used - first - n);
        if (n == n_used) return expert_ffn(pool, resident, job);
        ExpertFfn part = job;
        if (first > 0) part.beside = nullptr;
        tokens.clear();
        experts.clear();
        weights.clear();
        for (int64_t i = 0; i < job.n_pairs; ++i) {
            if (job.expert_ids[i] < group[0] || job.expert_ids[i] > group[n - 1]) continue;
            tokens.push_back(job.token_ids[i]);
            experts.push_back(job.expert_ids[i]);
            weights.push_back(job.weights[i]);
        }
        part.n_pairs = static_cast<int64_t>(weights.size());
        part.token_ids = tokens.data();
        part.expert_ids = experts.data();
        part.weights = weights.data();
        if (first > 0) {
            sums.resize(static_cast<size_t>(job.n_tokens * layer.hidden));
            part.out = sums.data();
        }
        expert_ffn(pool, resident, part);
        if (first > 0)
            for (size_t i = 0; i < sums.size(); ++i) job.out[i] += sums[i];
    }
}

}  // namespace moe
