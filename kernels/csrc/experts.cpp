// The feed-forward network of a layer's experts: pairs sorted by expert, then a chain of parallel loops.
//
// 0. The inputs are quantized, those of experts with many tokens packed.
// 1. For every expert and range of its n_ff rows: gate and up products of the expert's tokens, h = silu(gate)
//    * up, where the down projection takes integers quantized by whoever completes a block of 32.
// 2. For every range of output rows: down products of one expert after the other, added in ascending order.
//
// A thread's run of units holds the same rows of every expert, whichever experts a call of few tokens has: all threads
// have the same to do, and what they read may be in their caches already (lookahead.h).
//
// Each product has two forms: row by row, or in tiles and panels for an expert with many tokens (gemm.h).

#include <algorithm>
#include <atomic>
#include <new>

#include "expert_memory.h"
#include "gemm.h"
#include "routing.h"

namespace moe {

namespace {

constexpr int64_t kPairsAtOnce = 64;  // bounds the products buffers of a unit
constexpr int64_t kManyStride = product_stride(kPairsAtOnce);

// Rows of gate and up in a unit of a call of many tokens: whole blocks of h.
int64_t up_rows_of_blocks(const ExpertLayer& layer, int64_t n_active, int n_threads) {
    return std::clamp<int64_t>(round_up(n_active * layer.n_ff / (12 * n_threads), 32), 32, 128);
}
// In a call of few tokens an expert's rows of gate and up are cut into n pieces of about the same size, a multiple of
// 4; piece i begins here.
int64_t piece_begin(const ExpertLayer& layer, int64_t i, int64_t n) {
    return i == n ? layer.n_ff : i * (layer.n_ff / 4) / n * 4;
}
// As many of them are a thread's share: 16 for all experts together, or one of each. Others take what it is late with.
int64_t pieces_of_share(const ExpertLayer& layer, int64_t n_active, int n_threads) {
    const int64_t share = layer.n_ff / n_threads;
    return std::clamp<int64_t>(16 / n_active, (share + 127) / 128 + (share == 0), std::max<int64_t>(1, share / 16));
}
// Rows of down in a unit of such a call.
int64_t down_rows(const ExpertLayer& layer, int n_threads) {
    return std::clamp<int64_t>(round_up(layer.hidden / (16 * n_threads), 8), 8, 128);
}

constexpr int64_t kStreams = 16;  // of waiting threads: what they fetch must stay in the second-level cache

// One call. What the loops share: the sorted pairs, and the activations in every form that a product reads.
class Call {
 public:
    Call(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job)
        : pool_(pool),
          layer_(layer),
          job_(job),
          hidden_(layer.hidden),
          n_ff_(layer.n_ff),
          routing_(sort_by_expert(pool, layer, job)) {}
    void run();

 private:
    void find_memory(bool splits_blocks);
    void pack_unit(int64_t index);

    struct Piece {  // of gate and up: the place among the active experts, and a range of rows
        int64_t index, first, n_rows;
    };

    // Each takes the place among the active experts and a range of the product's rows; next: what the thread will
    // probably read after them.
    void gate_up_unit(int64_t index, int64_t first, int64_t n_rows, int thread, const uint8_t* next);
    void gate_up_few(int64_t index, int64_t first, int64_t n_rows, uint8_t* scratch, const uint8_t* next);
    void gate_up_many(int64_t index, int64_t first, int64_t n_rows, uint8_t* scratch);
    void put_hidden(int64_t index, int64_t t, int64_t first, int64_t n_rows, const float* values);
    void quantize_hidden(int64_t index, int64_t first, int64_t n_rows);
    void down_unit(int64_t first, int64_t n_rows, int thread, const uint8_t* next);
    void down_few(int64_t index, int64_t first, int64_t n_rows, uint8_t* scratch, const uint8_t* next);
    void down_many(int64_t index, int64_t first, int64_t n_rows, uint8_t* scratch);

    bool integers(const ExpertStack& stack) const {
        return uses_integers(stack.type_id, job_.float_activations);
    }
    int64_t n_tokens(int64_t index) const { return routing_.start[index + 1] - routing_.start[index]; }
    bool many_up(int64_t index) const {
        return takes_many(layer_.gate.type_id, n_tokens(index), job_.float_activations) &&
               takes_many(layer_.up.type_id, n_tokens(index), job_.float_activations);
    }
    bool any_many() const { return routing_.panel[routing_.n_active] > 0; }
    bool many_down(int64_t index) const {
        return takes_many(layer_.down.type_id, n_tokens(index), job_.float_activations);
    }
    // The planes that products read.
    unsigned x_planes() const {
        return kernels().types[layer_.gate.type_id].planes | kernels().types[layer_.up.type_id].planes;
    }
    unsigned h_planes() const { return kernels().types[layer_.down.type_id].planes; }
    const uint8_t* rows(const ExpertStack& stack, int64_t index, int64_t first, int64_t n_in) const {
        return stack.data + routing_.active[index] * stack.expert_stride +
               first * row_bytes(stack.type_id, n_in);
    }
    PanelChunk* x_panels(int64_t index) const {
        return x_panels_ + routing_.panel[index] * n_chunks(hidden_);
    }
    PanelChunk* h_panels(int64_t index) const {
        return h_panels_ + routing_.panel[index] * n_chunks(n_ff_);
    }

    ThreadPool& pool_;
    const ExpertLayer& layer_;
    const ExpertFfn& job_;
    const int64_t hidden_, n_ff_;
    const Routing routing_;

    uint8_t* x_records_ = nullptr;    // [n_tokens]
    PanelChunk* x_panels_ = nullptr;  // [panel[n_active]]
    // The forms of h for an expert, by what its down projection reads. By pair in sorted order.
    float* h_ = nullptr;            // [n_pairs, n_ff]; on the way to records too, where units end within a block
    uint8_t* h_records_ = nullptr;  // [n_pairs]
    PanelChunk* h_panels_ = nullptr;
    std::atomic<int32_t>* rows_done_ = nullptr;  // [n_active, n_ff / 32] of each block of h_
};

// Finds memory for every form of the inputs and of h. splits_blocks: units end within blocks of it.
void Call::find_memory(bool splits_blocks) {
    const int64_t panels = routing_.panel[routing_.n_active];
    if (integers(layer_.gate) || integers(layer_.up)) {
        const int64_t records_bytes = round_up(job_.n_tokens * activation_bytes(hidden_), 64);
        x_records_ = pool_.shared(ThreadPool::kActivations, records_bytes + panels * panel_bytes(hidden_));
        x_panels_ = reinterpret_cast<PanelChunk*>(x_records_ + records_bytes);
    }
    if (integers(layer_.down)) {
        const int64_t records_bytes = round_up(routing_.n_pairs * activation_bytes(n_ff_), 64);
        h_records_ = pool_.shared(ThreadPool::kHiddenQuantized, records_bytes + panels * panel_bytes(n_ff_));
        h_panels_ = reinterpret_cast<PanelChunk*>(h_records_ + records_bytes);
    }
    if (!integers(layer_.down) || splits_blocks) {
        const int64_t n_float = routing_.n_pairs * n_ff_, n_block = routing_.n_active * n_ff_ / 32;
        h_ = reinterpret_cast<float*>(pool_.shared(ThreadPool::kHidden, (n_float + n_block) * 4));
        if (integers(layer_.down))
            rows_done_ = new (h_ + n_float) std::atomic<int32_t>[static_cast<size_t>(n_block)]();
    }
}

void Call::pack_unit(int64_t index) {
    if (!many_up(index)) return;
    for (int64_t t = 0; t < round_up(n_tokens(index), kLanes); ++t) {
        PanelChunk* panel = x_panels(index) + t / kLanes * n_chunks(hidden_);
        if (t < n_tokens(index))
            pack_record(x_records_ + routing_.token[routing_.start[index] + t] * activation_bytes(hidden_),
                        hidden_, t % kLanes, panel);
        else
            pack_zeros(0, hidden_ / 32, t % kLanes, panel);
    }
}

// Rows [first, first + n_rows) of h of an expert's token t, in the form that its down projection reads.
void Call::put_hidden(int64_t index, int64_t t, int64_t first, int64_t n_rows, const float* values) {
    const int64_t pair = routing_.start[index] + t;
    if (h_ != nullptr) {
        std::copy_n(values, n_rows, h_ + pair * n_ff_ + first);
    } else if (many_down(index)) {
        PanelChunk* panel = h_panels(index) + t / kLanes * n_chunks(n_ff_);
        pack_floats(values, first / 32, n_rows / 32, t % kLanes, panel);
        if (t + 1 == n_tokens(index))
            for (int64_t lane = t % kLanes + 1; lane < kLanes; ++lane)
                pack_zeros(first / 32, n_rows / 32, lane, panel);
    } else {
        uint8_t* record = h_records_ + pair * activation_bytes(n_ff_);
        quantize_range(values, first / 32, n_rows / 32, n_ff_, h_planes(), record);
        if (first == 0) clear_padding(n_ff_, h_planes(), record);
    }
}

// Rows [first, first + n_rows) of h_ of all tokens of an expert are there: quantizes the blocks that this completes.
void Call::quantize_hidden(int64_t index, int64_t first, int64_t n_rows) {
    for (int64_t block = first / 32; 32 * block < first + n_rows; ++block) {
        const auto n = static_cast<int32_t>(std::min(first + n_rows, 32 * block + 32) - std::max(first, 32 * block));
        if (rows_done_[index * n_ff_ / 32 + block].fetch_add(n, std::memory_order_acq_rel) + n < 32) continue;
        for (int64_t pair = routing_.start[index]; pair < routing_.start[index + 1]; ++pair) {
            uint8_t* record = h_records_ + pair * activation_bytes(n_ff_);
            quantize_range(h_ + pair * n_ff_ + 32 * block, block, 1, n_ff_, h_planes(), record);
            if (block == 0) clear_padding(n_ff_, h_planes(), record);
        }
    }
}

void Call::gate_up_few(int64_t index, int64_t first, int64_t n_rows, uint8_t* scratch, const uint8_t* next) {
    float* gate = reinterpret_cast<float*>(scratch + row_scratch_bytes(hidden_));
    float* up = gate + kPairsAtOnce * n_rows;
    float* gate_column = up + kPairsAtOnce * n_rows;
    float *up_column = gate_column + n_rows, *h = up_column + n_rows;
    const Activations x = {job_.x, x_records_};
    const auto part = [&](const ExpertStack& stack, const uint8_t* after) {
        return Rows{rows(stack, index, first, hidden_), row_bytes(stack.type_id, hidden_), n_rows, hidden_, after};
    };
    const Rows gate_part = part(layer_.gate, rows(layer_.up, index, first, hidden_));
    const Rows up_part = part(layer_.up, next);
    for (int64_t t0 = 0; t0 < n_tokens(index); t0 += kPairsAtOnce) {
        const int64_t n = std::min<int64_t>(kPairsAtOnce, n_tokens(index) - t0);
        const int32_t* tokens = routing_.token + routing_.start[index] + t0;
        row_products(layer_.gate.type_id, gate_part, x, tokens, n, job_.float_activations, scratch, gate);
        row_products(layer_.up.type_id, up_part, x, tokens, n, job_.float_activations, scratch, up);
        for (int64_t t = 0; t < n; ++t) {
            for (int64_t r = 0; r < n_rows; ++r) {
                gate_column[r] = gate[r * n + t];
                up_column[r] = up[r * n + t];
            }
            kernels().silu_mul(gate_column, up_column, n_rows, h);
            put_hidden(index, t0 + t, first, n_rows, h);
        }
    }
    if (rows_done_ != nullptr) quantize_hidden(index, first, n_rows);
}

void Call::gate_up_many(int64_t index, int64_t first, int64_t n_rows, uint8_t* scratch) {
    const int64_t tiles = tiles_bytes(n_rows, hidden_), whole_rows = round_up(n_rows, kTileRows);
    float* products = reinterpret_cast<float*>(scratch + 2 * tiles);  // of gate, of up
    float* turned = products + 2 * whole_rows * kManyStride;
    for (const bool is_up : {false, true}) {
        const ExpertStack& stack = is_up ? layer_.up : layer_.gate;
        expand_rows(stack.type_id, rows(stack, index, first, hidden_), row_bytes(stack.type_id, hidden_),
                    n_rows, hidden_, reinterpret_cast<TileChunk*>(scratch + is_up * tiles));
    }
    for (int64_t t0 = 0; t0 < n_tokens(index); t0 += kPairsAtOnce) {
        const int64_t n = std::min<int64_t>(kPairsAtOnce, n_tokens(index) - t0), lanes = round_up(n, kLanes);
        const PanelChunk* panels = x_panels(index) + t0 / kLanes * n_chunks(hidden_);
        for (const bool is_up : {false, true})
            multiply_panels((is_up ? layer_.up : layer_.gate).type_id,
                            reinterpret_cast<const TileChunk*>(scratch + is_up * tiles), n_rows, panels,
                            n_panels(n), hidden_, products + is_up * whole_rows * kManyStride, kManyStride);
        for (int64_t r = 0; r < whole_rows; ++r) {
            float* gate = products + r * kManyStride;
            kernels().silu_mul(gate, gate + whole_rows * kManyStride, lanes, gate);
        }
        kernels().transpose(products, kManyStride, whole_rows, lanes, turned, whole_rows);
        for (int64_t t = 0; t < n; ++t) put_hidden(index, t0 + t, first, n_rows, turned + t * whole_rows);
    }
}

void Call::down_few(int64_t index, int64_t first, int64_t n_rows, uint8_t* scratch, const uint8_t* next) {
    float* products = reinterpret_cast<float*>(scratch + row_scratch_bytes(n_ff_));
    const Rows weights = {rows(layer_.down, index, first, n_ff_), row_bytes(layer_.down.type_id, n_ff_), n_rows,
                          n_ff_, next};
    for (int64_t pair = routing_.start[index]; pair < routing_.start[index + 1]; pair += kPairsAtOnce) {
        const int64_t n = std::min<int64_t>(kPairsAtOnce, routing_.start[index + 1] - pair);
        const Activations h = {h_ ? h_ + pair * n_ff_ : nullptr,
                               h_records_ ? h_records_ + pair * activation_bytes(n_ff_) : nullptr};
        row_products(layer_.down.type_id, weights, h, nullptr, n, job_.float_activations, scratch, products);
        for (int64_t t = 0; t < n; ++t) {
            float* out = job_.out + routing_.token[pair + t] * hidden_ + first;
            for (int64_t r = 0; r < n_rows; ++r) out[r] += routing_.weight[pair + t] * products[r * n + t];
        }
    }
}

void Call::down_many(int64_t index, int64_t first, int64_t n_rows, uint8_t* scratch) {
    const int64_t whole_rows = round_up(n_rows, kTileRows);
    TileChunk* tiles = reinterpret_cast<TileChunk*>(scratch);
    float* products = reinterpret_cast<float*>(scratch + tiles_bytes(n_rows, n_ff_));
    float* turned = products + whole_rows * kManyStride;
    expand_rows(layer_.down.type_id, rows(layer_.down, index, first, n_ff_),
                row_bytes(layer_.down.type_id, n_ff_), n_rows, n_ff_, tiles);
    for (int64_t t0 = 0; t0 < n_tokens(index); t0 += kPairsAtOnce) {
        const int64_t pair = routing_.start[index] + t0,
                      n = std::min<int64_t>(kPairsAtOnce, n_tokens(index) - t0);
        multiply_panels(layer_.down.type_id, tiles, n_rows, h_panels(index) + t0 / kLanes * n_chunks(n_ff_),
                        n_panels(n), n_ff_, products, kManyStride);
        kernels().transpose(products, kManyStride, whole_rows, round_up(n, kLanes), turned, whole_rows);
        for (int64_t t = 0; t < n; ++t) {
            float* out = job_.out + routing_.token[pair + t] * hidden_ + first;
            for (int64_t r = 0; r < n_rows; ++r)
                out[r] += routing_.weight[pair + t] * turned[t * whole_rows + r];
        }
    }
}

void Call::gate_up_unit(int64_t index, int64_t first, int64_t n_rows, int thread, const uint8_t* next) {
    const bool many = many_up(index);
    const int64_t scratch_bytes = many ? 2 * tiles_bytes(n_rows, hidden_) : row_scratch_bytes(hidden_);
    const int64_t columns = many ? 2 * kManyStride + kPairsAtOnce : 2 * kPairsAtOnce + 3;
    uint8_t* scratch = pool_.local(thread, scratch_bytes + columns * round_up(n_rows, kTileRows) * 4);
    many ? gate_up_many(index, first, n_rows, scratch) : gate_up_few(index, first, n_rows, scratch, next);
}

void Call::down_unit(int64_t first, int64_t n_rows, int thread, const uint8_t* next) {
    for (int64_t t = 0; t < job_.n_tokens; ++t) std::fill_n(job_.out + t * hidden_ + first, n_rows, 0.0f);
    const int64_t few_bytes = row_scratch_bytes(n_ff_) + kPairsAtOnce * n_rows * 4;
    const int64_t many_bytes = tiles_bytes(n_rows, n_ff_) +
                               (kManyStride + kPairsAtOnce) * round_up(n_rows, kTileRows) * 4;
    uint8_t* scratch = pool_.local(thread, any_many() ? std::max(few_bytes, many_bytes) : few_bytes);
    for (int64_t index = 0; index < routing_.n_active; ++index) {
        const bool last = index + 1 == routing_.n_active;
        many_down(index) ? down_many(index, first, n_rows, scratch)
                         : down_few(index, first, n_rows, scratch,
                                    last ? next : rows(layer_.down, index + 1, first, n_ff_));
    }
}

void Call::run() {
    if (routing_.n_pairs == 0) {
        std::fill(job_.out, job_.out + job_.n_tokens * hidden_, 0.0f);
        if (job_.beside != nullptr) (*job_.beside)();
        return;
    }
    const int n_threads = pool_.n_threads();
    const int64_t n_active = routing_.n_active;
    const bool many = any_many();
    const int64_t tile = std::min(up_rows_of_blocks(layer_, n_active, n_threads), rows_in_cache(hidden_, 2));
    const int64_t tiles = (n_ff_ + tile - 1) / tile;
    const int64_t per_share = pieces_of_share(layer_, n_active, n_threads), n_pieces = n_threads * per_share;
    // With many tokens an expert's activations are worth keeping in the cache: one expert after the other.
    const auto piece = [&](int64_t unit) {
        if (many) return Piece{unit / tiles, unit % tiles * tile, std::min(tile, n_ff_ - unit % tiles * tile)};
        const int64_t i = unit / (per_share * n_active) * per_share + unit % per_share;
        const int64_t first = piece_begin(layer_, i, n_pieces), stop = piece_begin(layer_, i + 1, n_pieces);
        return Piece{unit / per_share % n_active, first, stop - first};
    };
    // Every unit reads all of h: with many tokens that is more than its weights, so there units are larger.
    const int64_t out_tile = many ? std::clamp<int64_t>(round_up(hidden_ / (2 * n_threads), 16), 16, 64)
                                  : down_rows(layer_, n_threads);
    const int64_t n_up = n_active * (many ? tiles : n_pieces), n_down = (hidden_ + out_tile - 1) / out_tile;
    find_memory(!many && n_ff_ % (32 * n_pieces) != 0);

    const int64_t blocks = hidden_ / 32, blocks_per_unit = std::clamp<int64_t>(round_up(blocks / n_threads, 8), 8, 512);
    const int64_t parts = (blocks + blocks_per_unit - 1) / blocks_per_unit;
    const auto quantize = [&](int64_t unit, int) {
        const int64_t token = unit / parts, first = unit % parts * blocks_per_unit;
        uint8_t* record = x_records_ + token * activation_bytes(hidden_);
        quantize_range(job_.x + token * hidden_ + 32 * first, first, std::min(blocks_per_unit, blocks - first),
                       hidden_, x_planes(), record);
        if (first == 0) clear_padding(hidden_, x_planes(), record);
    };
    const auto pack = [&](int64_t index, int) { pack_unit(index); };

    const auto gate_up = [&](int64_t first, int64_t stop, int thread) {
        const int64_t run = pool_.run_of(first, n_up);
        while (first < stop) {
            Piece here = piece(first++);
            for (; !many && first < stop && piece(first).index == here.index; ++first)
                here.n_rows += piece(first).n_rows;
            const uint8_t* next = nullptr;
            if (first < pool_.run_begin(run + 1, n_up))
                next = rows(layer_.gate, piece(first).index, piece(first).first, hidden_);
            else if (pool_.run_begin(run, n_down) < n_down)
                next = rows(layer_.down, 0, pool_.run_begin(run, n_down) * out_tile, n_ff_);
            if (here.n_rows > 0) gate_up_unit(here.index, here.first, here.n_rows, thread, next);
        }
    };
    const auto fetch_gate_up = [&](int64_t unit, int64_t stop, int part) {
        const int64_t step = many ? 1 : per_share;
        const Piece here = piece(unit + part / 2 * step);
        const ExpertStack& stack = part % 2 == 0 ? layer_.gate : layer_.up;
        fetch(rows(stack, here.index, here.first, hidden_), here.n_rows * row_bytes(stack.type_id, hidden_));
        return unit + (part + 1) / 2 * step < stop && part + 1 < std::min<int64_t>(2 * n_active, kStreams);
    };

    const auto down = [&](int64_t first, int64_t stop, int thread) {
        const int64_t first_row = first * out_tile, stop_row = std::min(stop * out_tile, hidden_);
        const bool more = stop < pool_.run_begin(pool_.run_of(first, n_down) + 1, n_down);
        down_unit(first_row, stop_row - first_row, thread, more ? rows(layer_.down, 0, stop_row, n_ff_) : nullptr);
    };
    const auto fetch_down = [&](int64_t unit, int64_t stop, int part) {
        const int64_t n_rows = std::min(hidden_, stop * out_tile) - unit * out_tile;
        fetch(rows(layer_.down, part, unit * out_tile, n_ff_),
              n_rows * row_bytes(layer_.down.type_id, n_ff_));
        return part + 1 < std::min<int64_t>(n_active, kStreams);
    };
    // With many tokens units are large: each is taken by itself.
    const auto one_of = [](const auto& body) {
        return [&body](int64_t unit, int thread) { body(unit, unit + 1, thread); };
    };
    const auto gate_up_one = one_of(gate_up);
    const auto down_one = one_of(down);
    pool_.run({Loop(x_records_ != nullptr ? job_.n_tokens * parts : 0, quantize), Loop(many ? n_active : 0, pack),
               many ? Loop(n_up, gate_up_one, fetch_gate_up) : Loop(n_up, gate_up, fetch_gate_up),
               many ? Loop(n_down, down_one, fetch_down) : Loop(n_down, down, fetch_down)},
              job_.beside);
}

}  // namespace

void expert_ffn(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job) {
    if (layer.memory != nullptr) return expert_ffn_in_groups(pool, layer, job);
    std::lock_guard<std::mutex> lock(pool.mutex());
    Call(pool, layer, job).run();
}

std::array<Bytes, 3> expert_share(const ExpertLayer& layer, int64_t expert, int thread, int n_threads) {
    const auto rows = [&](const ExpertStack& stack, int64_t n_in, int64_t first, int64_t stop) {
        const int64_t n_bytes = row_bytes(stack.type_id, n_in);
        return Bytes{stack.data + expert * stack.expert_stride + first * n_bytes, (stop - first) * n_bytes};
    };
    // Where the pieces of a share begin and end, however many they are.
    const int64_t first = piece_begin(layer, thread, n_threads), stop = piece_begin(layer, thread + 1, n_threads);
    const int64_t out_tile = down_rows(layer, n_threads), n_out = (layer.hidden + out_tile - 1) / out_tile;
    const auto down_row = [&](int64_t run) { return std::min(run * n_out / n_threads * out_tile, layer.hidden); };
    return {rows(layer.gate, layer.hidden, first, stop), rows(layer.up, layer.hidden, first, stop),
            rows(layer.down, layer.n_ff, down_row(thread), down_row(thread + 1))};
}

}  // namespace moe
