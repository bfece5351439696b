#include "routing.h"

#include <algorithm>
#include <utility>

#include "gemm.h"

namespace moe {

Routing sort_by_expert(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job) {
    const int64_t words = 4 * layer.n_expert + 4 + 2 * job.n_pairs;
    int32_t* count = reinterpret_cast<int32_t*>(pool.shared(ThreadPool::kIndex, words * 4));
    Routing routing{};
    routing.active = count + layer.n_expert;
    routing.start = routing.active + layer.n_expert;
    routing.panel = routing.start + layer.n_expert + 2;
    routing.token = routing.panel + layer.n_expert + 2;
    routing.weight = reinterpret_cast<float*>(routing.token + job.n_pairs);

    std::fill(count, count + layer.n_expert, 0);
    for (int64_t p = 0; p < job.n_pairs; ++p)
        if (job.expert_ids[p] >= 0) ++count[job.expert_ids[p]];
    const int64_t many = std::min({many_threshold(layer.gate.type_id), many_threshold(layer.up.type_id),
                                   many_threshold(layer.down.type_id)});
    int32_t place = 0, panel = 0;
    for (int64_t e = 0; e < layer.n_expert; ++e) {
        if (count[e] == 0) continue;
        routing.active[routing.n_active] = static_cast<int32_t>(e);
        routing.panel[routing.n_active] = panel;
        routing.start[routing.n_active++] = place;
        if (count[e] >= many) panel += static_cast<int32_t>(n_panels(count[e]));
        place += std::exchange(count[e], place);  // the count becomes the next place
    }
    routing.start[routing.n_active] = place;
    routing.panel[routing.n_active] = panel;
    routing.n_pairs = place;
    for (int64_t p = 0; p < job.n_pairs; ++p) {
        if (job.expert_ids[p] < 0) continue;
        const int32_t sorted = count[job.expert_ids[p]]++;
        routing.token[sorted] = job.token_ids[p];
        routing.weight[sorted] = job.weights[p];
    }
    return routing;
}

}  // namespace moe
