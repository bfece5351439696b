// Drives pools, matrix products and expert networks from several threads with random shapes, types and
// instruction sets, and compares every result with one thread's, bit for bit. Built with sanitizers
// (tests/sanitize.sh): what it looks for is data races, wrong addresses and leaks.
//
//     stress SECONDS SEED

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../background_ffn.h"
#include "../moe_cpu.h"
#include "../quant_blocks.h"
#include "../read_memory.h"

namespace {

void fail(const char* what) {
    std::fprintf(stderr, "stress: %s\n", what);
    std::exit(1);
}

using Random = std::mt19937;
using Bytes = std::unique_ptr<uint8_t[]>;  // of the exact size: a read behind the end is an error

int64_t draw(Random& random, int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
}

int draw_type(Random& random) {
    int type;
    do {
        type = static_cast<int>(draw(random, 0, moe::kTypes - 1));
    } while (moe::kTypeInfo[type].block_size == 0);
    return type;
}

int64_t row_bytes(int type, int64_t n_in) {
    return n_in / moe::kTypeInfo[type].block_size * moe::kTypeInfo[type].block_bytes;
}

// Bytes that are small numbers in every type: neither infinite nor NaN, so that results can be compared.
Bytes weights(Random& random, int type, int64_t n_rows, int64_t n_in) {
    const int64_t n = n_rows * row_bytes(type, n_in);
    Bytes bytes(new uint8_t[static_cast<size_t>(n)]);
    for (int64_t i = 0; i < n; ++i) bytes[static_cast<size_t>(i)] = static_cast<uint8_t>(40 + random() % 20);
    return bytes;
}

std::vector<float> floats(Random& random, int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = normal(random);
    return values;
}

struct Job {
    virtual ~Job() = default;
    virtual std::vector<float> run(moe::ThreadPool& pool) const = 0;
};

struct MatmulJob final : Job {
    int type;
    int64_t n_batch, n_out, n_in, n_tokens;
    bool exact;
    Bytes weight;
    std::vector<float> x;

    explicit MatmulJob(Random& random)
        : type(draw_type(random)),
          n_batch(draw(random, 1, 3)),
          n_out(draw(random, 1, 90)),
          n_in(moe::kTypeInfo[type].block_size *
               draw(random, 1, moe::kTypeInfo[type].block_size > 64 ? 3 : 9)),
          n_tokens(draw(random, 0, 3) ? draw(random, 1, 5) : draw(random, 1, 70)),
          exact(draw(random, 0, 3) == 0),
          weight(weights(random, type, n_batch * n_out, n_in)),
          x(floats(random, n_batch * n_tokens * n_in)) {}

    std::vector<float> run(moe::ThreadPool& pool) const override {
        const int64_t row = row_bytes(type, n_in);
        std::vector<float> y(static_cast<size_t>(n_batch * n_tokens * n_out));
        moe::matmul(pool, {type, weight.get(), n_out * row, row, n_batch, n_out, n_in, x.data(), n_tokens,
                           y.data(), exact});
        return y;
    }
};

struct ExpertJob final : Job {
    moe::ExpertLayer layer;
    int64_t n_tokens, top_k;
    bool exact;
    Bytes gate, up, down;
    std::vector<float> x, scale;
    std::vector<int32_t> token, expert;

    explicit ExpertJob(Random& random) {
        const int types[3] = {draw_type(random), draw_type(random), draw_type(random)};
        const int64_t block = moe::kTypeInfo[types[2]].block_size > 32 ? 256 : 32;
        const int64_t hidden = 256 * draw(random, 1, 3), n_ff = block * draw(random, 1, 512 / block);
        const int64_t n_expert = draw(random, 1, 6);
        gate = weights(random, types[0], n_expert * n_ff, hidden);
        up = weights(random, types[1], n_expert * n_ff, hidden);
        down = weights(random, types[2], n_expert * hidden, n_ff);
        layer = {{gate.get(), types[0], n_ff * row_bytes(types[0], hidden)},
                 {up.get(), types[1], n_ff * row_bytes(types[1], hidden)},
                 {down.get(), types[2], hidden * row_bytes(types[2], n_ff)},
                 n_expert, hidden, n_ff};
        n_tokens = draw(random, 0, 3) ? draw(random, 1, 5) : draw(random, 1, 80);
        top_k = draw(random, 1, n_expert);
        exact = draw(random, 0, 3) == 0;
        x = floats(random, n_tokens * hidden);
        scale = floats(random, n_tokens * top_k);
        for (int64_t pair = 0; pair < n_tokens * top_k; ++pair) {
            token.push_back(static_cast<int32_t>(pair / top_k));
            expert.push_back(static_cast<int32_t>(draw(random, -1, n_expert - 1)));
        }
    }

    // Every other one on a thread of its own.
    std::vector<float> run(moe::ThreadPool& pool) const override {
        std::vector<float> out(x.size());
        if (n_tokens % 2 == 1) {
            std::vector<int32_t> pairs(token);
            pairs.insert(pairs.end(), expert.begin(), expert.end());
            moe::BackgroundFfn background(pool);
            background.begin(layer,
                             {x.data(), n_tokens, nullptr, nullptr, scale.data(), n_tokens * top_k, out.data(), exact},
                             pairs);
            background.finish();
            return out;
        }
        int n_beside = 0;
        const std::function<void()> beside = [&] { ++n_beside; };
        moe::expert_ffn(pool, layer, {x.data(), n_tokens, token.data(), expert.data(), scale.data(),
                                      n_tokens * top_k, out.data(), exact, &beside});
        if (n_beside != 1) fail("what is to be done beside a call was not done once");
        return out;
    }
};

// A loop whose units throw must give the error to the caller and leave the pool usable.
void throw_from_units(moe::ThreadPool& pool) {
    std::lock_guard<std::mutex> lock(pool.mutex());
    std::atomic<int> done{0};
    try {
        pool.run(50, [&](int64_t unit, int) {
            done.fetch_add(1);
            if (unit % 7 == 3) throw std::runtime_error("expected");
        });
        fail("an exception was lost");
    } catch (const std::runtime_error&) {
    }
    if (done != 50) fail("units were lost");
    const auto count = [&](int64_t, int) { done.fetch_add(1); };
    const std::function<void()> beside = [] { throw std::runtime_error("expected"); };
    try {
        pool.run({moe::Loop(50, count)}, &beside);
        fail("an exception beside the loops was lost");
    } catch (const std::runtime_error&) {
    }
    if (done != 100) fail("units beside an exception were lost");
}

// Every unit of a loop reads what other units of the last one wrote.
void run_chain(moe::ThreadPool& pool, int64_t n) {
    std::vector<int64_t> first(static_cast<size_t>(n)), second(static_cast<size_t>(n));
    std::lock_guard<std::mutex> lock(pool.mutex());
    std::atomic<int64_t> sum{0}, warmed{0};
    const auto write = [&](int64_t unit, int) { first[static_cast<size_t>(unit)] = unit; };
    const auto turn = [&](int64_t unit, int) {
        second[static_cast<size_t>(unit)] = first[static_cast<size_t>(n - 1 - unit)];
    };
    const auto add = [&](int64_t unit, int) { sum += second[static_cast<size_t>(n - 1 - unit)]; };
    const auto warm = [&](int64_t begin, int64_t stop, int part) {
        if (begin < 0 || begin >= stop || stop > n) fail("a run is none");
        ++warmed;
        return part < 3;
    };
    pool.run({moe::Loop(n, write), moe::Loop(0, turn), moe::Loop(n, turn, warm), moe::Loop(n, add, warm)});
    if (sum != n * (n - 1) / 2) fail("a loop began too early");
}

void one_round(unsigned seed) {
    Random random(seed);
    const std::vector<std::string> tiers = moe::available_tiers();
    moe::set_tier(tiers[static_cast<size_t>(draw(random, 0, static_cast<int64_t>(tiers.size()) - 1))]);
    std::vector<std::unique_ptr<Job>> jobs;
    for (int i = 0; i < 4; ++i)
        if (draw(random, 0, 1))
            jobs.push_back(std::make_unique<MatmulJob>(random));
        else
            jobs.push_back(std::make_unique<ExpertJob>(random));
    std::vector<std::vector<float>> expected;
    moe::ThreadPool alone(1);
    for (const auto& job : jobs) expected.push_back(job->run(alone));

    // One pool for all callers, and one that nobody ever uses.
    moe::ThreadPool pool(static_cast<int>(draw(random, 1, 8)),
                         {static_cast<int>(draw(random, 0, 2) * 100), draw(random, 0, 1) == 1});
    moe::ThreadPool idle(3);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller)
        callers.emplace_back([&, caller] {
            for (size_t i = 0; i < 2 * jobs.size(); ++i) {
                const size_t job = (i + static_cast<size_t>(caller)) % jobs.size();
                const std::vector<float> result = jobs[job]->run(pool);
                if (std::memcmp(result.data(), expected[job].data(), result.size() * 4) != 0)
                    fail("a result depends on the threads");
                run_chain(pool, 1 + static_cast<int64_t>(i) * 7);
                if (caller == 1 && i % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
            }
            throw_from_units(pool);
        });
    for (auto& caller : callers) caller.join();
    const std::vector<float> memory = floats(random, 100000);
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(memory.data());
    if (moe::read_memory(pool, bytes, 400000, 0) != moe::read_memory(alone, bytes, 400000, 4096))
        fail("the reader depends on the threads");
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
    const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
    const std::pair<int, int> grids[] = {{moe::IQ2_XXS, 256 * 8}, {moe::IQ2_XS, 512 * 8},
                                         {moe::IQ2_S, 1024 * 8},  {moe::IQ3_XXS, 256 * 4},
                                         {moe::IQ3_S, 512 * 4},   {moe::IQ1_S, 2048 * 8}};
    for (const auto& [type, n_bytes] : grids) {
        std::vector<int8_t> grid(static_cast<size_t>(n_bytes));
        for (size_t i = 0; i < grid.size(); ++i) grid[i] = static_cast<int8_t>(i * 7 % 3 + 1);
        for (int i = 0; type == moe::IQ1_S && i < 2048; ++i)  // the number's digits: it has to ascend
            for (int k = 0, rest = i; k < 8; ++k, rest /= 3) grid[static_cast<size_t>(8 * i + k)] = static_cast<int8_t>(rest % 3 - 1);
        moe::set_codebook(type, grid.data(), n_bytes);
    }
    const auto start = std::chrono::steady_clock::now();
    unsigned rounds = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds)
        one_round(seed + rounds++);
    std::printf("stress: %u rounds\n", rounds);
}
