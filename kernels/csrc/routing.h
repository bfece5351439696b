// Pairs of token and expert in the order in which the experts' products are made.

#pragma once

#include "moe_cpu.h"

namespace moe {

// The pairs grouped by expert, in their given order within an expert.
struct Routing {
    int64_t n_pairs;   // without skipped ones
    int64_t n_active;  // experts with at least one pair
    int32_t* active;   // [n_active] ascending
    int32_t* start;    // [n_active + 1] first sorted pair of each
    int32_t* panel;    // [n_active + 1] first panel of 16 tokens of each; experts with few tokens have none
    int32_t* token;    // [n_pairs] in sorted order
    float* weight;     // [n_pairs]
};

// In memory of the pool, valid until its next call.
Routing sort_by_expert(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job);

}  // namespace moe
