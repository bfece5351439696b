// What the worker's thread does with one message: see decode_worker.h.

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "decode_worker.h"

namespace moe {

void DecodeWorker::handle(const Step& step, int layer) {
    const Mailbox::Message message = spec_.mailbox.message(step.number, layer);
    entry_ = {spec_.mailbox.seq(step.number, layer), seen_, 0, 0, 0, 0, 0, 0};
    const double since_answer = static_cast<double>(seen_ - answered_) * 1e-9;
    if (layer > 0 && answered_ > 0)
        gpu_seconds_ += kNewest * (std::min(since_answer, kLongLayer) - gpu_seconds_);
    read_message(step, layer, message);
    if (n_missed_ > 0)
        answer(step, layer, message);
    else
        note_choices(step, layer, message);
    answered_ = entry_.answered;
    cache_.end_layer_step();
    ++progress_;
    note_message(layer);
    score_prefetches(layer);
    look_ahead(step, layer, message);  // by other threads, which need not wait for the driver
    start_background(now() + kDriverTime);
    // Who fetches for the running step needs the link, and the disk would be waited for.
    if (entry_.n_now == 0) fill_some(1, true);
}

// The policy learns of the layer's choices, after what has arrived. Before that no slot may be reserved.
void DecodeWorker::note_choices(const Step& step, int layer, const Mailbox::Message& message) {
    poll_copies();
    cache_.begin_layer_step(layer, message.ids, step.n_token * spec_.mailbox.top_k, step.number);
}

void DecodeWorker::note_message(int layer) {
    const size_t i = static_cast<size_t>(layer);
    std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_.hits[i] += entry_.n_hit;
    stats_.misses[i] += n_missed_;
    if (predicted_) {
        stats_.missed_experts[i] += static_cast<int64_t>(missed_.size());
        stats_.expected[i] += static_cast<int64_t>(expected_.size());
        stats_.foreseen[i] += std::count_if(expected_.begin(), expected_.end(), [&](int32_t expert) {
            return fate_[static_cast<size_t>(expert)] != Fate::none;
        });
    }
    timeline_[static_cast<size_t>(n_message_++ % kTimeline)] = entry_;
}

// Counts the pairs and lists the missed experts. A wrong message would mean wrong results: it ends the worker.
void DecodeWorker::read_message(const Step& step, int layer, const Mailbox::Message& message) {
    if (message.header[Mailbox::kTokens] != step.n_token)
        throw std::runtime_error("a message of " + std::to_string(message.header[Mailbox::kTokens]) +
                                 " tokens in a step of " + std::to_string(step.n_token));
    const int64_t n_ahead = message.header[Mailbox::kAhead];
    if (n_ahead < 0 || n_ahead > Mailbox::kMaxAhead || layer + n_ahead >= spec_.mailbox.n_layer)
        throw std::runtime_error("a message of layer " + std::to_string(layer) + " predicts " +
                                 std::to_string(n_ahead) + " layers");
    step_prefetches_ = step_prefetches_ || n_ahead == Mailbox::kMaxAhead;
    missed_.clear();
    n_missed_ = 0;
    std::fill(fate_.begin(), fate_.end(), Fate::none);
    std::fill(chosen_.begin(), chosen_.end(), false);
    for (int64_t pair = 0; pair < step.n_token * spec_.mailbox.top_k; ++pair) {
        const int32_t expert = message.ids[pair], slot = message.slots[pair];
        if (expert < 0) continue;
        const ExpertKey key = cache_.key(layer, expert);
        chosen_[static_cast<size_t>(expert)] = true;
        uses_.note(key, step.number);
        if (slot >= 0) {
            if (slot != cache_.slot(key))
                throw std::runtime_error("the GPU found expert " + std::to_string(expert) + " of layer " +
                                         std::to_string(layer) + " in slot " + std::to_string(slot) +
                                         ", but its slot is " + std::to_string(cache_.slot(key)));
            ++entry_.n_hit;
            note_use(key);
            continue;
        }
        ++n_missed_;
        Fate& fate = fate_[static_cast<size_t>(expert)];
        if (fate == Fate::none) missed_.push_back(key);
        fate = Fate::cpu;
    }
    std::sort(missed_.begin(), missed_.end(), [&](ExpertKey a, ExpertKey b) {
        const float uses_a = uses_.at(a, step.number), uses_b = uses_.at(b, step.number);
        return uses_a != uses_b ? uses_a > uses_b : a < b;
    });
    if (n_missed_ != message.header[Mailbox::kMissed])
        throw std::runtime_error("a message with " + std::to_string(n_missed_) + " missed pairs says " +
                                 std::to_string(message.header[Mailbox::kMissed]));
}

void DecodeWorker::note_use(ExpertKey key) {
    if (!unused_[static_cast<size_t>(key)]) return;
    unused_[static_cast<size_t>(key)] = false;
    std::lock_guard<std::mutex> lock(stats_mutex_);
    ++stats_.fetched_used;
}

void DecodeWorker::answer(const Step& step, int layer, const Mailbox::Message& message) {
    const Mailbox& mailbox = spec_.mailbox;
    n_evicted_ = 0;
    if (step.allow_late) {  // otherwise nobody asks yet where an expert is
        note_choices(step, layer, message);
        if (spec_.fetch != Fetch::all) keep_foreseen(step, layer, message);  // where slots are few, it needs them all
    }
    read_ahead(layer);
    if (step.allow_late) start_background();  // this step may wait for one of these
    divide(step, layer);
    compute(step, layer, message);
    if (entry_.n_now > 0) {
        await_late();
        admit(step, layer, message, 0);
    }

    if (n_evicted_ > mailbox.max_evicted(step.n_token))
        throw std::runtime_error("an answer evicts " + std::to_string(n_evicted_) + " experts");
    int64_t* header = mailbox.answer_header();
    header[Mailbox::kEvicted] = n_evicted_;
    for (int64_t pair = 0; pair < step.n_token * mailbox.top_k; ++pair) {
        const int32_t expert = message.ids[pair];
        const bool late = expert >= 0 && message.slots[pair] < 0 &&
                          fate_[static_cast<size_t>(expert)] == Fate::late;
        mailbox.late()[pair] = late ? cache_.slot(cache_.key(layer, expert)) : -1;
    }
    entry_.answered = now();
    const int64_t flags = (entry_.n_cpu > 0 ? Mailbox::kAddY : 0) | (entry_.n_now > 0 ? Mailbox::kLate : 0);
    for (int64_t first = 0; first < step.n_token * mailbox.hidden; first += Mailbox::kYBlock)
        store_release(mailbox.answer_numbers + first / Mailbox::kYBlock * 8, entry_.seq * Mailbox::kFlags + flags);
}

// Where not all experts are in RAM: all reads of the layer begin together, whoever waits for them.
void DecodeWorker::read_ahead(int layer) {
    const ExpertLayer& experts = spec_.layers[static_cast<size_t>(layer)].experts;
    if (experts.memory == nullptr) return;
    activity_ = "reads experts of layer";
    expert_.clear();
    for (ExpertKey key : missed_)
        if (cache_.absent(key)) expert_.push_back(key % spec_.n_expert);
    experts.memory->prefetch(experts.memory_layer, expert_.data(), static_cast<int64_t>(expert_.size()));
}

// Decides which missed experts are late. Those that are not on their way have slots, and are left in `fetches_`.
void DecodeWorker::divide(const Step& step, int layer) {
    fetches_.clear();
    for (ExpertKey key : missed_) {
        const bool wait = spec_.fetch != Fetch::none && !cache_.absent(key);
        if (step.allow_late && (cache_.resident(key) || wait)) {
            fate_[static_cast<size_t>(key % spec_.n_expert)] = Fate::late;
            ++entry_.n_now;
            note_use(key);
        } else if (cache_.absent(key)) {
            fetches_.push_back(key);
        }
    }
    int64_t n_fetch = static_cast<int64_t>(fetches_.size());
    if (!step.allow_late || spec_.fetch == Fetch::none) {
        n_fetch = 0;
    } else if (spec_.fetch == Fetch::balanced) {
        n_fetch = cost_of(step).best_fetches(n_fetch, expert_bytes_[static_cast<size_t>(layer)], bytes_in_flight());
    }
    // Where all must be fetched and slots are few, what is on its way for later steps may be evicted once it is there.
    const auto find_slot = [&](ExpertKey key) {
        while (!reserve(key, SlotCache::Evict::any)) {
            if (spec_.fetch != Fetch::all || in_flight_.empty()) return false;
            look_around();
        }
        return true;
    };
    int64_t n_started = 0;
    while (n_started < n_fetch && find_slot(fetches_[static_cast<size_t>(n_started)])) ++n_started;
    for (int64_t i = 0; i < n_started; ++i) {
        const ExpertKey key = fetches_[static_cast<size_t>(i)];
        fate_[static_cast<size_t>(key % spec_.n_expert)] = Fate::late;
    }
    fetches_.resize(static_cast<size_t>(n_started));
    entry_.n_now += n_started;
    entry_.n_cpu = static_cast<int64_t>(missed_.size()) - entry_.n_now;
    if (spec_.fetch == Fetch::all && entry_.n_cpu > 0)
        throw std::runtime_error(step.allow_late
                                     ? "layer " + std::to_string(layer) + ": " + std::to_string(entry_.n_cpu) +
                                           " missed experts find no slot"
                                     : "missed experts must be fetched, but the step cannot compute them late");
    std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_.fetched_now += n_started;
}

void DecodeWorker::compute(const Step& step, int layer, const Mailbox::Message& message) {
    // Driver and policy take microseconds: meanwhile the other threads compute.
    const std::function<void()> look_after_slots = [&] {
        for (ExpertKey key : fetches_) {
            start_fetch(key);
            note_use(key);
        }
        start_background();
        if (!step.allow_late) note_choices(step, layer, message);
        prefetch_next(step, layer, message);
        if (entry_.n_now > 0) return;
        const int64_t n_bytes = entry_.n_cpu * expert_bytes_[static_cast<size_t>(layer)];
        admit(step, layer, message, cost_of(step).cpu_seconds(n_bytes, !in_flight_.empty()));
    };
    if (entry_.n_cpu == 0) return look_after_slots();
    const Mailbox& mailbox = spec_.mailbox;
    activity_ = "computes experts of layer";
    token_.clear();
    expert_.clear();
    weight_.clear();
    for (int64_t pair = 0; pair < step.n_token * mailbox.top_k; ++pair) {
        const int32_t expert = message.ids[pair];
        if (expert < 0 || message.slots[pair] >= 0 || fate_[static_cast<size_t>(expert)] != Fate::cpu) continue;
        token_.push_back(static_cast<int32_t>(pair / mailbox.top_k));
        expert_.push_back(expert);
        weight_.push_back(message.weights[pair]);
    }
    entry_.begun = now();
    expert_ffn(pool_, spec_.layers[static_cast<size_t>(layer)].experts,
               {mailbox.x, step.n_token, token_.data(), expert_.data(), weight_.data(),
                static_cast<int64_t>(token_.size()), mailbox.y, spec_.float_activations, &look_after_slots});
    const bool beside_copies = !in_flight_.empty();
    for (Flight& flight : in_flight_) flight.beside_cpu = true;
    entry_.computed = now();
    const int64_t ns = entry_.computed - entry_.begun, n_bytes = entry_.n_cpu * expert_bytes_[static_cast<size_t>(layer)];
    std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_.cpu_experts += entry_.n_cpu;
    stats_.cpu_bytes += n_bytes;
    stats_.cpu_ns += ns;
    if (reads_disk(layer)) return;  // which it may have waited for
    cost_of(step).note_cpu(n_bytes, static_cast<double>(ns) * 1e-9, beside_copies);
}

void DecodeWorker::await_late() {
    activity_ = "waits for copies to layer";
    const int64_t start = now();
    for (ExpertKey key : missed_)
        while (fate_[static_cast<size_t>(key % spec_.n_expert)] == Fate::late && !cache_.resident(key))
            look_around();
    std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_.copy_wait_ns += now() - start;
}

}  // namespace moe
