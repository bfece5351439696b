// Drives decode workers with a GPU's side in a thread of its own: random layers, batches, slots and ways to answer,
// two steps in flight, a second host thread that reads statistics, stops and failures at any time. Every answer is
// compared with one thread's result, every slot that the table names with its expert's bytes.
//
//     stress_worker SECONDS SEED

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>

#include "../decode_worker.h"
#include "../quant_blocks.h"
#include "../read_memory.h"

namespace {

using Random = std::mt19937;

int draw(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

void fail(const char* what) {
    std::fprintf(stderr, "stress_worker: %s\n", what);
    std::exit(1);
}

constexpr int kHidden = 64, kFf = 32, kRowsBytes = kHidden * kFf / 32 * 34;  // Q8_0

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Lines = std::unique_ptr<T[], Free>;  // zeroed, on a 64-byte boundary

template <typename T>
Lines<T> lines(int64_t n) {
    const size_t n_bytes = static_cast<size_t>(moe::Mailbox::whole_lines(n * static_cast<int64_t>(sizeof(T))));
    void* memory = std::aligned_alloc(64, n_bytes + 64);
    std::memset(memory, 0, n_bytes + 64);
    return Lines<T>(static_cast<T*>(memory));
}

struct Setting {
    int n_layer, n_expert, top_k, max_batch;
    moe::Mailbox mailbox;
    Lines<uint8_t> messages, tokens, answer;
    Lines<float> x, y;
    Lines<int64_t> x_checks, answer_numbers, control;
    Lines<int32_t> table;
    std::vector<std::vector<uint8_t>> host;   // by layer: [n_expert, gate | up | down]
    std::vector<std::vector<uint8_t>> slots;  // by class
    std::vector<int32_t> numbers;
    moe::WorkerSpec spec;

    explicit Setting(Random& random)
        : n_layer(draw(random, 1, 4)),
          n_expert(draw(random, 2, 8)),
          top_k(draw(random, 1, std::min(3, n_expert))),
          max_batch(draw(random, 1, 4)) {
        mailbox = {n_layer, top_k,   kHidden, max_batch, nullptr, nullptr,
                   nullptr, nullptr, nullptr, nullptr,   nullptr,   nullptr};
        messages = lines<uint8_t>(moe::Mailbox::kRing * n_layer * mailbox.message_bytes());
        tokens = lines<uint8_t>(moe::Mailbox::kRing * mailbox.token_bytes());
        answer = lines<uint8_t>(mailbox.answer_bytes());
        x = lines<float>(max_batch * kHidden);
        x_checks = lines<int64_t>(8);
        answer_numbers = lines<int64_t>(8 * max_batch);
        y = lines<float>(max_batch * kHidden);
        control = lines<int64_t>(8);
        table = lines<int32_t>(n_layer * n_expert);
        std::fill_n(table.get(), n_layer * n_expert, -1);
        mailbox.messages = messages.get();
        mailbox.tokens = tokens.get();
        mailbox.x = x.get();
        mailbox.x_checks = x_checks.get();
        mailbox.answer_numbers = answer_numbers.get();
        mailbox.answer = answer.get();
        mailbox.y = y.get();
        mailbox.control = control.get();

        const auto fetch = static_cast<moe::Fetch>(draw(random, 0, 3));
        const int least = fetch == moe::Fetch::all ? n_expert : 0, n_class = draw(random, 1, 2);
        spec = {mailbox, n_expert, {}, {}, nullptr, fetch, draw(random, 0, 4), draw(random, 0, 3) == 0,
                {1e9, 1e9, 1e9, 1e9, 0, 0}, 100, draw(random, -1, 1) * 1000, draw(random, 0, 1) ? 1 : 1 << 20};
        const char* names[] = {"lru", "lfu", "lfu-decay", "class-lru", "least-stale", "blend"};
        const char* rules[] = {"always", "second-touch", "better-than-victim", "outranks"};
        spec.policy = moe::PolicySettings(names[draw(random, 0, 5)], rules[draw(random, 0, 3)], {});
        for (int i = 0; i < n_class; ++i) {
            spec.n_slot.push_back(least + draw(random, 0, 8));
            slots.emplace_back(static_cast<size_t>(spec.n_slot.back() * 3 * kRowsBytes));
        }
        for (int32_t i = 0; i < 16; ++i) numbers.push_back(i);
        spec.slot_numbers = numbers.data();
        for (int layer = 0; layer < n_layer; ++layer) {
            host.emplace_back();
            for (int i = 0; i < n_expert * 3 * kRowsBytes; ++i)
                host.back().push_back(static_cast<uint8_t>(40 + random() % 20));
            const uint8_t* data = host.back().data();
            const auto stack = [&](int part) {
                return moe::ExpertStack{data + part * kRowsBytes, moe::Q8_0, 3 * kRowsBytes};
            };
            const int slot_class = draw(random, 0, n_class - 1);
            spec.layers.push_back({{stack(0), stack(1), stack(2), n_expert, kHidden, kFf},
                                   {{data, 3 * kRowsBytes, 0, 3 * kRowsBytes}},
                                   slot_class,
                                   slots[static_cast<size_t>(slot_class)].data(),
                                   3 * kRowsBytes,
                                   reinterpret_cast<uint8_t*>(table.get() + layer * n_expert)});
        }
    }
};

// What CUDA graph and kernels do. Ends with the last step, or where the worker has set abort.
class Gpu {
 public:
    Gpu(Setting& setting, unsigned seed, int n_token, bool allow_late)
        : s_(setting), random_(seed), n_token_(n_token), allow_late_(allow_late) {}

    void run(int64_t n_step, const std::atomic<int64_t>& launched) {
        for (int64_t step = 1; step <= n_step; ++step) {
            while (launched.load() < step) {
                if (aborted()) return;
                std::this_thread::yield();
            }
            for (int layer = 0; layer < s_.n_layer; ++layer)
                if (!layer_step(step, layer)) return;
            const moe::Mailbox::Tokens record = s_.mailbox.step_tokens(step);
            for (int t = 0; t < n_token_; ++t) record.tokens[t] = static_cast<int32_t>(step + t);
            record.header[moe::Mailbox::kTokens] = n_token_;
            record.header[moe::Mailbox::kBad] = 0;
            moe::store_release(record.header, s_.mailbox.seq(step, s_.n_layer));
        }
    }

    int64_t wrong_step = -1;  // whose first message is nonsense

 private:
    bool aborted() const { return moe::load_acquire(s_.control.get()) != 0; }

    const uint8_t* bytes(int layer, int expert) const {
        return s_.host[static_cast<size_t>(layer)].data() + expert * 3 * kRowsBytes;
    }
    void check_slot(int layer, int expert, int32_t slot) const {
        const moe::WorkerLayer& of = s_.spec.layers[static_cast<size_t>(layer)];
        if (std::memcmp(of.slots + slot * of.slot_bytes, bytes(layer, expert), 3 * kRowsBytes) != 0)
            fail("a slot does not hold its expert");
    }

    bool layer_step(int64_t step, int layer) {
        const moe::Mailbox::Message message = s_.mailbox.message(step, layer);
        const int n_pair = n_token_ * s_.top_k;
        int64_t n_missed = 0;
        for (int pair = 0; pair < n_pair; ++pair) {
            int32_t& expert = message.ids[pair];
            expert = draw(random_, -1, s_.n_expert - 1);
            for (int other = pair / s_.top_k * s_.top_k; other < pair; ++other)
                if (message.ids[other] == expert) expert = -1;
            message.weights[pair] = static_cast<float>(draw(random_, 1, 100)) / 100;
            // As a router reads it, while copies may change it.
            message.slots[pair] = expert < 0 ? -1
                                             : __atomic_load_n(s_.table.get() + layer * s_.n_expert + expert,
                                                               __ATOMIC_ACQUIRE);
            if (message.slots[pair] >= 0) check_slot(layer, expert, message.slots[pair]);
            n_missed += expert >= 0 && message.slots[pair] < 0;
        }
        if (n_missed > 0)
            for (int i = 0; i < n_token_ * kHidden; ++i)
                s_.x[i] = static_cast<float>(draw(random_, -100, 100)) / 100;
        const int n_ahead = draw(random_, 0, std::min<int>(moe::Mailbox::kMaxAhead, s_.n_layer - 1 - layer));
        for (int i = 0; i < n_ahead; ++i)
            for (int pair = 0; pair < n_pair; ++pair) message.ahead[i][pair] = draw(random_, -1, s_.n_expert - 1);
        message.header[moe::Mailbox::kAhead] = n_ahead;
        message.header[moe::Mailbox::kTokens] = n_token_;
        message.header[moe::Mailbox::kMissed] = n_missed + (step == wrong_step);
        const int64_t seq = s_.mailbox.seq(step, layer);
        message.header[moe::Mailbox::kCheck] =
            moe::Mailbox::check(seq, s_.mailbox.sum(message, n_token_, n_ahead));
        s_.x_checks[0] = moe::Mailbox::check(seq, moe::sum_of_words(s_.x.get(), n_token_ * kHidden));
        moe::store_release(message.header, seq);
        if (message.header[moe::Mailbox::kMissed] == 0) return true;
        // Whoever of the GPU sees its own line reads y: the last one is written last.
        const int64_t* answer = s_.answer_numbers.get() + (n_token_ * kHidden - 1) / moe::Mailbox::kYBlock * 8;
        while (moe::load_acquire(answer) / moe::Mailbox::kFlags != s_.mailbox.seq(step, layer)) {
            if (aborted()) return false;
            std::this_thread::yield();
        }
        check_answer(layer, message);
        return true;
    }

    void check_answer(int layer, const moe::Mailbox::Message& message) {
        const int64_t* answer = s_.mailbox.answer_header();
        for (int64_t i = 0; i < answer[moe::Mailbox::kEvicted]; ++i)
            __atomic_store_n(s_.table.get() + s_.mailbox.evicted()[i], -1, __ATOMIC_RELEASE);
        std::vector<int32_t> token, expert;
        std::vector<float> weight;
        for (int pair = 0; pair < n_token_ * s_.top_k; ++pair) {
            if (message.ids[pair] < 0 || message.slots[pair] >= 0) continue;
            const int32_t late = (*s_.answer_numbers.get() & moe::Mailbox::kLate) != 0 ? s_.mailbox.late()[pair] : -1;
            if (late >= 0) {
                if (!allow_late_) fail("a late expert that nobody computes");
                check_slot(layer, message.ids[pair], late);
                continue;
            }
            token.push_back(pair / s_.top_k);
            expert.push_back(message.ids[pair]);
            weight.push_back(message.weights[pair]);
        }
        if (((*s_.answer_numbers.get() & moe::Mailbox::kAddY) != 0) == token.empty())
            fail("the answer's flags are wrong");
        if (token.empty()) return;
        std::vector<float> expected(static_cast<size_t>(n_token_ * kHidden));
        moe::expert_ffn(alone_, s_.spec.layers[static_cast<size_t>(layer)].experts,
                        {s_.x.get(), n_token_, token.data(), expert.data(), weight.data(),
                         static_cast<int64_t>(token.size()), expected.data(), s_.spec.float_activations});
        if (std::memcmp(expected.data(), s_.y.get(), expected.size() * 4) != 0) fail("a wrong result");
    }

    Setting& s_;
    Random random_;
    const int n_token_;
    const bool allow_late_;
    moe::ThreadPool alone_{1};
};

void one_round(unsigned seed) {
    Random random(seed);
    Setting setting(random);
    moe::ThreadPool pool(draw(random, 1, 3), {draw(random, 0, 1) * 100, false});
    moe::HostCopyEngine copies(false);
    moe::DecodeWorker worker(setting.spec, pool, copies);

    const int64_t n_step = draw(random, 1, 40), end = draw(random, 0, 3) ? n_step : draw(random, 0, 40);
    const int n_token = draw(random, 1, setting.max_batch);
    const bool allow_late = setting.spec.fetch == moe::Fetch::all || draw(random, 0, 2) > 0;
    Gpu gpu(setting, random(), n_token, allow_late);
    const bool fails = draw(random, 0, 7) == 0;
    if (fails) gpu.wrong_step = draw(random, 1, static_cast<int>(n_step));
    std::atomic<int64_t> launched{0};
    std::atomic<bool> over{false};
    std::thread device([&] { gpu.run(n_step, launched); });
    std::thread reader([&] {
        while (!over) {
            worker.stats();
            worker.timeline();
            moe::read_memory(pool, setting.host[0].data(), 3 * kRowsBytes, 0);  // needs the pool now and then
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    });
    try {
        std::vector<std::pair<int, int>> first;
        for (int i = draw(random, 0, 40); i > 0; --i)
            first.emplace_back(draw(random, 0, setting.n_layer - 1), draw(random, 0, setting.n_expert - 1));
        worker.fill(first);
        for (int64_t step = 1; step <= n_step && step <= end; ++step) {
            worker.expect(step, n_token, allow_late);
            launched = step;
            if (step == 1) continue;
            std::optional<moe::StepTokens> found;
            while (!(found = worker.wait_tokens(step - 1, 0.05))) {
            }
            if (found->tokens.size() != static_cast<size_t>(n_token) || found->tokens[0] != step - 1)
                fail("wrong tokens");
        }
        if (end == n_step) {
            while (!worker.wait_tokens(n_step, 0.05)) {
            }
            while (worker.settle(0.05) > 0) {
            }
            worker.while_idle([&](moe::SlotCache& cache) {
                cache.check_integrity();
                for (int layer = 0; layer < setting.n_layer; ++layer)
                    for (const auto& [expert, slot] : cache.residents(layer))
                        if (setting.table[layer * setting.n_expert + expert] != slot) fail("a wrong table");
            });
        }
    } catch (const std::runtime_error& error) {
        if (!fails) fail(error.what());
    }
    over = true;
    reader.join();
    worker.stop();
    moe::store_release(setting.control.get(), 1);  // ends the GPU, if steps are left
    device.join();
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
    const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
    const auto start = std::chrono::steady_clock::now();
    unsigned rounds = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds)
        one_round(seed + rounds++);
    std::printf("stress_worker: %u rounds\n", rounds);
}
