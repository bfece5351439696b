// What a policy would have hit: simulator.py's loop over native policies.

#pragma once

#include <vector>

#include "policy.h"

namespace moe {

// The accesses of one pool of slots: layers first_layer .. first_layer + n_layer of a model with n_model_layer.
struct Accesses {
    const int32_t* ids;  // [n_token, n_layer, top_k], best first, distinct in a layer
    int64_t n_token;
    int n_layer, top_k, first_layer, n_model_layer, n_expert;
};

// hits and what was fetched into slots, [n_token, n_layer] each, of n_slot slots that begin with these residents, inserted
// in this order. unbound: what the step uses may be evicted, and its hits come first, as it takes to make Belady's rule the
// bound of everything.
void replay(const PolicySettings& settings, const Accesses& accesses, int64_t n_slot,
            const std::vector<ExpertKey>& residents, bool unbound, int32_t* hits, int32_t* fetched);

}  // namespace moe
