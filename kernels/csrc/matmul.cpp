// Matrix products and row decoding on a pool.

#include <algorithm>

#include "gemm.h"

namespace moe {

namespace {

constexpr int64_t kTokensAtOnce = 256;  // bounds the products buffer of a unit

// Units small enough that the threads finish together, rows enough to make a unit worth fetching.
int64_t rows_per_unit(int64_t n_rows, int n_threads) {
    return std::clamp<int64_t>(n_rows / (int64_t{8} * n_threads), 4, 64);
}

void few_tokens(ThreadPool& pool, const Matmul& job) {
    const int64_t n_rows = job.n_batch * job.n_tokens, record = activation_bytes(job.n_in);
    uint8_t* quantized = nullptr;
    if (uses_integers(job.type_id, job.float_activations)) {
        quantized = pool.shared(ThreadPool::kActivations, n_rows * record);
        const int64_t per_unit = std::max<int64_t>(1, 16384 / job.n_in);
        const unsigned planes = kernels().types[job.type_id].planes;
        pool.run((n_rows + per_unit - 1) / per_unit, [&](int64_t unit, int) {
            const int64_t stop = std::min(n_rows, (unit + 1) * per_unit);
            for (int64_t r = unit * per_unit; r < stop; ++r)
                quantize_activations(job.x + r * job.n_in, job.n_in, planes, quantized + r * record);
        });
    }

    const int64_t tile = rows_per_unit(job.n_batch * job.n_out, pool.n_threads());
    const int64_t tiles = (job.n_out + tile - 1) / tile;
    const int64_t scratch_bytes = row_scratch_bytes(job.n_in);
    const int64_t products_bytes = tile * std::min(job.n_tokens, kTokensAtOnce) * 4;
    pool.run(job.n_batch * tiles, [&](int64_t unit, int thread) {
        const int64_t batch = unit / tiles, first = unit % tiles * tile;
        const int64_t n_rows_here = std::min(tile, job.n_out - first);
        uint8_t* scratch = pool.local(thread, scratch_bytes + products_bytes);
        float* products = reinterpret_cast<float*>(scratch + scratch_bytes);
        const uint8_t* weights = job.weight + batch * job.batch_stride + first * job.row_stride;
        const Rows rows = {weights, job.row_stride, n_rows_here, job.n_in, weights + n_rows_here * job.row_stride};
        for (int64_t start = 0; start < job.n_tokens; start += kTokensAtOnce) {
            const int64_t n = std::min(kTokensAtOnce, job.n_tokens - start),
                          token = batch * job.n_tokens + start;
            const Activations acts = {job.x + token * job.n_in,
                                      quantized ? quantized + token * record : nullptr};
            row_products(job.type_id, rows, acts, nullptr, n, job.float_activations, scratch, products);
            for (int64_t t = 0; t < n; ++t)
                for (int64_t r = 0; r < n_rows_here; ++r)
                    job.y[(token + t) * job.n_out + first + r] = products[r * n + t];
        }
    });
}

void many_tokens(ThreadPool& pool, const Matmul& job) {
    const int64_t per_batch = n_panels(job.n_tokens), chunks = n_chunks(job.n_in);
    PanelChunk* panels = reinterpret_cast<PanelChunk*>(
        pool.shared(ThreadPool::kActivations, job.n_batch * per_batch * panel_bytes(job.n_in)));
    pool.run(job.n_batch * per_batch, [&](int64_t unit, int) {
        const int64_t batch = unit / per_batch, first = unit % per_batch * kLanes;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const int64_t token = first + lane;
            if (token < job.n_tokens)
                pack_floats(job.x + (batch * job.n_tokens + token) * job.n_in, 0, job.n_in / 32, lane,
                            panels + unit * chunks);
            else
                pack_zeros(0, job.n_in / 32, lane, panels + unit * chunks);
        }
    });

    const int64_t wanted = round_up(job.n_batch * job.n_out / (6 * pool.n_threads()) + 1, kTileRows);
    const int64_t tile = std::min(wanted, rows_in_cache(job.n_in, 1));
    const int64_t tiles = (job.n_out + tile - 1) / tile;
    const int64_t tile_bytes = tiles_bytes(tile, job.n_in), stride = product_stride(kTokensAtOnce);
    pool.run(job.n_batch * tiles, [&](int64_t unit, int thread) {
        const int64_t batch = unit / tiles, first = unit % tiles * tile;
        const int64_t n_rows = std::min(tile, job.n_out - first);
        uint8_t* scratch = pool.local(thread, tile_bytes + (tile * stride + kTokensAtOnce * tile) * 4);
        TileChunk* expanded = reinterpret_cast<TileChunk*>(scratch);
        float* products = reinterpret_cast<float*>(scratch + tile_bytes);
        float* turned = products + tile * stride;
        expand_rows(job.type_id, job.weight + batch * job.batch_stride + first * job.row_stride,
                    job.row_stride, n_rows, job.n_in, expanded);
        for (int64_t start = 0; start < job.n_tokens; start += kTokensAtOnce) {
            const int64_t n = std::min(kTokensAtOnce, job.n_tokens - start);
            multiply_panels(job.type_id, expanded, n_rows,
                            panels + (batch * per_batch + start / kLanes) * chunks, n_panels(n), job.n_in,
                            products, stride);
            kernels().transpose(products, stride, round_up(n_rows, kTileRows), n_panels(n) * kLanes, turned,
                                tile);
            float* y = job.y + (batch * job.n_tokens + start) * job.n_out + first;
            for (int64_t t = 0; t < n; ++t)
                std::copy_n(turned + t * tile, n_rows, y + t * job.n_out);
        }
    });
}

}  // namespace

void dequantize(ThreadPool& pool, int type_id, const uint8_t* rows, int64_t n_rows, int64_t n_in,
                int64_t row_stride, float* out) {
    std::lock_guard<std::mutex> lock(pool.mutex());
    const int64_t tile = rows_per_unit(n_rows, pool.n_threads());
    pool.run((n_rows + tile - 1) / tile, [&](int64_t unit, int) {
        const int64_t stop = std::min(n_rows, (unit + 1) * tile);
        for (int64_t r = unit * tile; r < stop; ++r)
            kernels().types[type_id].dequantize(rows + r * row_stride, n_in, out + r * n_in);
    });
}

void matmul(ThreadPool& pool, const Matmul& job) {
    std::lock_guard<std::mutex> lock(pool.mutex());
    if (takes_many(job.type_id, job.n_tokens, job.float_activations))
        many_tokens(pool, job);
    else
        few_tokens(pool, job);
}

}  // namespace moe
