// The feed-forward network of a layer's experts: pairs sorted by expert, then two parallel loops.
//
// 1. For every expert and range of its n_ff rows: gate and up products of the expert's tokens, h = silu(gate)
// * up,
//    quantized at once (a range is whole blocks of 32) where the down projection takes integers.
// 2. For every range of output rows: down products of one expert after the other, added in ascending expert
// order.

#include <algorithm>
#include <utility>

#include "dispatch.h"

namespace moe {

namespace {

constexpr int64_t kPairsAtOnce = 64;  // bounds the products buffers of a unit

// The pairs grouped by expert, in their given order within an expert.
struct Routing {
    int64_t n_pairs;   // without skipped ones
    int64_t n_active;  // experts with at least one pair
    int32_t* active;   // [n_active] ascending
    int32_t* start;    // [n_active + 1] first sorted pair of each
    int32_t* token;    // [n_pairs] in sorted order
    float* weight;     // [n_pairs]
};

Routing sort_by_expert(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job) {
    const int64_t words = 3 * layer.n_expert + 2 + 2 * job.n_pairs;
    int32_t* count =
        reinterpret_cast<int32_t*>(pool.shared(ThreadPool::kIndex, words * 4));  // then the next place
    Routing routing{};
    routing.active = count + layer.n_expert;
    routing.start = routing.active + layer.n_expert;
    routing.token = routing.start + layer.n_expert + 2;
    routing.weight = reinterpret_cast<float*>(routing.token + job.n_pairs);

    std::fill(count, count + layer.n_expert, 0);
    for (int64_t p = 0; p < job.n_pairs; ++p)
        if (job.expert_ids[p] >= 0) ++count[job.expert_ids[p]];
    int32_t place = 0;
    for (int64_t e = 0; e < layer.n_expert; ++e) {
        if (count[e] == 0) continue;
        routing.active[routing.n_active] = static_cast<int32_t>(e);
        routing.start[routing.n_active++] = place;
        place += std::exchange(count[e], place);
    }
    routing.start[routing.n_active] = place;
    routing.n_pairs = place;
    for (int64_t p = 0; p < job.n_pairs; ++p) {
        if (job.expert_ids[p] < 0) continue;
        const int32_t sorted = count[job.expert_ids[p]]++;
        routing.token[sorted] = job.token_ids[p];
        routing.weight[sorted] = job.weights[p];
    }
    return routing;
}

int64_t row_bytes(int type_id, int64_t n_in) {
    return n_in / kTypeInfo[type_id].block_size * kTypeInfo[type_id].block_bytes;
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

void expert_ffn(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job) {
    std::lock_guard<std::mutex> lock(pool.mutex());
    const int64_t hidden = layer.hidden, n_ff = layer.n_ff;
    const Routing routing = sort_by_expert(pool, layer, job);
    if (routing.n_pairs == 0) {
        std::fill(job.out, job.out + job.n_tokens * hidden, 0.0f);
        return;
    }

    Activations x = {job.x, nullptr, hidden};
    if (uses_integers(layer.gate.type_id, job.float_activations) ||
        uses_integers(layer.up.type_id, job.float_activations)) {
        uint8_t* records = pool.shared(ThreadPool::kActivations, job.n_tokens * activation_bytes(hidden));
        const int64_t per_unit = std::max<int64_t>(1, 16384 / hidden);
        pool.run((job.n_tokens + per_unit - 1) / per_unit, [&](int64_t unit, int) {
            const int64_t stop = std::min(job.n_tokens, (unit + 1) * per_unit);
            for (int64_t t = unit * per_unit; t < stop; ++t)
                quantize_activations(job.x + t * hidden, hidden, records + t * activation_bytes(hidden));
        });
        x.quantized = records;
    }

    // One of the two forms of h, by what the down projection reads: [n_pairs, ...] in sorted order.
    const bool quantize_h = uses_integers(layer.down.type_id, job.float_activations);
    const int64_t record = activation_bytes(n_ff);
    float* h = nullptr;
    uint8_t* h_records = nullptr;
    if (quantize_h)
        h_records = pool.shared(ThreadPool::kHiddenQuantized, routing.n_pairs * record);
    else
        h = reinterpret_cast<float*>(pool.shared(ThreadPool::kHidden, routing.n_pairs * n_ff * 4));

    const int n_threads = pool.n_threads();
    const int64_t tile =
        std::clamp<int64_t>(round_up(routing.n_active * n_ff / (6 * n_threads), 32), 32, 128);
    const int64_t tiles = (n_ff + tile - 1) / tile;
    const int64_t up_scratch = row_scratch_bytes(hidden);
    const int64_t gate_row = row_bytes(layer.gate.type_id, hidden),
                  up_row = row_bytes(layer.up.type_id, hidden);
    pool.run(routing.n_active * tiles, [&](int64_t unit, int thread) {
        const int64_t index = unit / tiles, first = unit % tiles * tile,
                      n_rows = std::min(tile, n_ff - first);
        const int64_t expert = routing.active[index];
        uint8_t* scratch = pool.local(thread, up_scratch + (2 * kPairsAtOnce + 3) * tile * 4);
        float* gate = reinterpret_cast<float*>(scratch + up_scratch);
        float* up = gate + kPairsAtOnce * tile;
        float *gate_column = up + kPairsAtOnce * tile, *up_column = gate_column + tile,
              *h_tile = up_column + tile;
        for (int64_t pair = routing.start[index]; pair < routing.start[index + 1]; pair += kPairsAtOnce) {
            const int64_t n = std::min<int64_t>(kPairsAtOnce, routing.start[index + 1] - pair);
            row_products(layer.gate.type_id,
                         layer.gate.data + expert * layer.gate.expert_stride + first * gate_row, gate_row,
                         n_rows, x, routing.token + pair, n, job.float_activations, scratch, gate);
            row_products(layer.up.type_id, layer.up.data + expert * layer.up.expert_stride + first * up_row,
                         up_row, n_rows, x, routing.token + pair, n, job.float_activations, scratch, up);
            for (int64_t t = 0; t < n; ++t) {
                for (int64_t r = 0; r < n_rows; ++r) {
                    gate_column[r] = gate[r * n + t];
                    up_column[r] = up[r * n + t];
                }
                float* target = quantize_h ? h_tile : h + (pair + t) * n_ff + first;
                kernels().silu_mul(gate_column, up_column, n_rows, target);
                if (!quantize_h) continue;
                uint8_t* h_record = h_records + (pair + t) * record;
                quantize_range(h_tile, first / 32, n_rows / 32, n_ff, h_record);
                if (first == 0) clear_padding(n_ff, h_record);
            }
        }
    });

    const int64_t out_tile = std::clamp<int64_t>(round_up(hidden / (6 * n_threads), 16), 16, 128);
    const int64_t down_scratch = row_scratch_bytes(n_ff);
    const int64_t down_row = row_bytes(layer.down.type_id, n_ff);
    pool.run((hidden + out_tile - 1) / out_tile, [&](int64_t unit, int thread) {
        const int64_t first = unit * out_tile, n_rows = std::min(out_tile, hidden - first);
        uint8_t* scratch = pool.local(thread, down_scratch + kPairsAtOnce * out_tile * 4);
        float* products = reinterpret_cast<float*>(scratch + down_scratch);
        for (int64_t t = 0; t < job.n_tokens; ++t) std::fill_n(job.out + t * hidden + first, n_rows, 0.0f);
        for (int64_t index = 0; index < routing.n_active; ++index) {
            const uint8_t* rows =
                layer.down.data + routing.active[index] * layer.down.expert_stride + first * down_row;
            for (int64_t pair = routing.start[index]; pair < routing.start[index + 1]; pair += kPairsAtOnce) {
                const int64_t n = std::min<int64_t>(kPairsAtOnce, routing.start[index + 1] - pair);
                const Activations h_rows = {h ? h + pair * n_ff : nullptr,
                                            h_records ? h_records + pair * record : nullptr, n_ff};
                row_products(layer.down.type_id, rows, down_row, n_rows, h_rows, nullptr, n,
                             job.float_activations, scratch, products);
                for (int64_t t = 0; t < n; ++t) {
                    float* out = job.out + routing.token[pair + t] * hidden + first;
                    for (int64_t r = 0; r < n_rows; ++r)
                        out[r] += routing.weight[pair + t] * products[r * n + t];
                }
            }
        }
    });
}

}  // namespace moe
