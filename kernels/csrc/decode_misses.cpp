// What the worker's thread does with one message: see decode_worker.h.

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "decode_worker.h"

namespace moe {

void DecodeWorker::handle(const Step& step, int layer) {
    const Mailbox::Message message = spec_.mailbox.message(step.number, layer);
    entry_ = {spec_.mailbox.seq(step.number, layer), seen_, 0, 0, 0, 0, 0, 0};
    const double since_last = static_cast<double>(seen_ - last_seen_) * 1e-9;
    if (layer > 0) layer_seconds_ += kNewest * (std::min(since_last, kLongLayer) - layer_seconds_);
    last_seen_ = seen_;
    read_message(step, layer, message);
    if (n_missed_ > 0)
        answer(step, layer, message);
    else
        note_choices(step, layer, message);
    cache_.end_layer_step();
    ++progress_;
    note_message(layer);
    score_prefetches(layer);
    look_ahead(step, layer, message);  // by other threads, which need not wait for the driver
    start_background();
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

// Starts to pull what the next layer will probably miss into the CPU's caches.
void DecodeWorker::look_ahead(const Step& step, int layer, const Mailbox::Message& message) {
    const int64_t top_k = spec_.mailbox.top_k;
    expected_.clear();
    predicted_ = message.header[Mailbox::kAhead] > 0;
    if (!predicted_) return;
    for (int64_t choice = 0; choice < top_k; ++choice)
        for (int64_t token = 0; token < step.n_token; ++token) {
            const int32_t expert = message.ahead[0][token * top_k + choice];
            if (expert < 0 || !cache_.absent(cache_.key(layer + 1, expert))) continue;
            if (std::find(expected_.begin(), expected_.end(), expert) == expected_.end())
                expected_.push_back(expert);
        }
    if (step.pull && (spec_.fetch == Fetch::none || spec_.fetch == Fetch::balanced))
        lookahead_.begin(spec_.layers[static_cast<size_t>(layer) + 1].experts, expected_);
}

void DecodeWorker::end_lookahead() {
    if (!lookahead_.running()) return;
    const int64_t n_bytes = lookahead_.end();
    std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_.pulled_bytes += n_bytes;
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
    divide(step, layer);
    compute(step, layer, message);
    if (entry_.n_now > 0) {
        await_late();
        admit(step, layer, message, 0);
    }

    if (n_evicted_ > mailbox.max_evicted(step.n_token))
        throw std::runtime_error("an answer evicts " + std::to_string(n_evicted_) + " experts");
    int64_t* header = mailbox.answer_header();
    header[Mailbox::kFlags] = 0;
    if (entry_.n_cpu > 0) header[Mailbox::kFlags] |= Mailbox::kAddY;
    if (entry_.n_now > 0) header[Mailbox::kFlags] |= Mailbox::kLate;
    header[Mailbox::kEvicted] = n_evicted_;
    for (int64_t pair = 0; pair < step.n_token * mailbox.top_k; ++pair) {
        const int32_t expert = message.ids[pair];
        const bool late = expert >= 0 && message.slots[pair] < 0 &&
                          fate_[static_cast<size_t>(expert)] == Fate::late;
        mailbox.late()[pair] = late ? cache_.slot(cache_.key(layer, expert)) : -1;
    }
    entry_.answered = now();
    store_release(header, entry_.seq);
}

// The GPU runs again. Victims of these were part of the answer.
void DecodeWorker::start_background() {
    for (ExpertKey key : background_) start_fetch(key);
    std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_.fetched_background += static_cast<int64_t>(background_.size());
    background_.clear();
}

// What the next layers will probably choose is not evicted now.
void DecodeWorker::keep_foreseen(const Step& step, int layer, const Mailbox::Message& message) {
    for (int64_t i = 0; i < message.header[Mailbox::kAhead]; ++i)
        for (int64_t pair = 0; pair < step.n_token * spec_.mailbox.top_k; ++pair)
            if (message.ahead[i][pair] >= 0)
                cache_.keep(cache_.key(layer + 1 + static_cast<int>(i), message.ahead[i][pair]));
}

// Whether an expert may be fetched: the table entry of one that this answer evicts could come before the GPU takes the
// old one out.
bool DecodeWorker::can_come(ExpertKey key) const {
    const int32_t* evicted = spec_.mailbox.evicted();
    return cache_.absent(key) && std::find(evicted, evicted + n_evicted_, key) == evicted + n_evicted_;
}

// Whether the step prefetches, and for that layer, of which it predicts: a read of the disk would be waited for.
bool DecodeWorker::may_prefetch(int layer, const Mailbox::Message& message) const {
    return message.header[Mailbox::kAhead] == Mailbox::kMaxAhead && !reads_disk(layer);
}

// Whether not all of a layer's experts are in RAM.
bool DecodeWorker::reads_disk(int layer) const {
    return spec_.layers[static_cast<size_t>(layer)].experts.memory != nullptr;
}

// Reserves slots for what the next layer will probably miss and what can be there when it comes, and begins to copy
// beside the CPU's work on this layer. The GPU looks nothing up before it has the answer and with it the victims, and
// what it reads meanwhile is not among them.
void DecodeWorker::prefetch_next(const Step& step, int layer, const Mailbox::Message& message) {
    const bool divides = spec_.fetch == Fetch::none || spec_.fetch == Fetch::balanced;
    if (!divides || !may_prefetch(layer + 1, message)) return;
    const int64_t n_bytes = expert_bytes_[static_cast<size_t>(layer) + 1];
    const int64_t most_evicted = spec_.mailbox.max_evicted(step.n_token);
    int64_t n_started = 0;
    keep_foreseen(step, layer, message);
    double room = layer_seconds_ * cost_of(step).rates().copy_beside_cpu;
    room -= static_cast<double>(bytes_in_flight());
    if (room < static_cast<double>(n_bytes) || !worth_prefetching(layer + 1)) return;
    for (int64_t choice = 0; choice < spec_.mailbox.top_k; ++choice)
        for (int64_t token = 0; token < step.n_token; ++token) {
            const int32_t expert = message.ahead[0][token * spec_.mailbox.top_k + choice];
            if (expert < 0 || room < static_cast<double>(n_bytes) || n_evicted_ >= most_evicted) continue;
            const ExpertKey key = cache_.key(layer + 1, expert);
            if (!can_come(key) || !reserve(key, SlotCache::Evict::any)) continue;
            start_fetch(key);
            ++n_started;
            prefetches_.push_back(key);
            room -= static_cast<double>(n_bytes);
        }
    passed_over_[static_cast<size_t>(layer) + 1] = 0;
    std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_.fetched_background += n_started;
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

// Decides which missed experts are late, and starts to fetch those that are not on their way.
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
        start_fetch(key);
        note_use(key);
    }
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

// Reserves slots for experts to be fetched behind the answer, whose victims are part of it: those that the next layer
// but one will probably miss, then those that the CPU has computed. Only for the latter the policy's admission
// rule is asked: the others were not used yet, and what is fetched for the step itself needs a slot anyway.
// seconds: until the answer, as far as is known. One copy that will be over by then may be on its way now.
void DecodeWorker::admit(const Step& step, int layer, const Mailbox::Message& message, double seconds) {
    keep_foreseen(step, layer, message);
    background_.clear();
    const int64_t n_then = in_flight_after(seconds, cost_of(step).rates().copy_beside_cpu);
    const auto is_room = [&] {
        const auto n_now = static_cast<int64_t>(in_flight_.size()), n = static_cast<int64_t>(background_.size());
        return n_then + n < spec_.max_background && n_now + n <= spec_.max_background &&
               n_evicted_ < spec_.mailbox.max_evicted(step.n_token);
    };
    if (may_prefetch(layer + 2, message) && is_room() && worth_prefetching(layer + 2)) {
        // The better half of the choices: the others are wrong too often to evict an expert for.
        for (int64_t choice = 0; choice < (spec_.mailbox.top_k + 1) / 2; ++choice)
            for (int64_t token = 0; token < step.n_token; ++token) {
                const int32_t expert = message.ahead[1][token * spec_.mailbox.top_k + choice];
                if (expert < 0 || !is_room()) continue;
                const ExpertKey key = cache_.key(layer + 2, expert);
                if (!can_come(key) || !reserve(key, SlotCache::Evict::any)) continue;
                background_.push_back(key);
                prefetches_.push_back(key);
            }
        passed_over_[static_cast<size_t>(layer) + 2] = 0;
    }
    for (ExpertKey key : missed_) {
        if (!is_room()) break;
        if (cache_.absent(key) && reserve(key, SlotCache::Evict::worse)) background_.push_back(key);
    }
}

// A layer whose prefetches are of no use gets one now and then, to see whether that has changed.
bool DecodeWorker::worth_prefetching(int layer) {
    const size_t i = static_cast<size_t>(layer);
    return in_time_[i] >= kInTime || ++passed_over_[i] >= kPassOver;
}

void DecodeWorker::score_prefetches(int layer) {
    const size_t i = static_cast<size_t>(layer);
    for (ExpertKey key : prefetches_) {
        if (cache_.layer_and_expert(key).first != layer) continue;
        const bool chosen = chosen_[static_cast<size_t>(key % spec_.n_expert)];
        const bool late = fate_[static_cast<size_t>(key % spec_.n_expert)] != Fate::none;
        in_time_[i] += kScoreStep * ((chosen && !late) - in_time_[i]);
        std::lock_guard<std::mutex> lock(stats_mutex_);
        ++stats_.prefetched[i];
        stats_.prefetched_in_time[i] += chosen && !late;
        stats_.prefetched_late[i] += chosen && late;
    }
    prefetches_.erase(std::remove_if(prefetches_.begin(), prefetches_.end(),
                                     [&](ExpertKey key) { return key / spec_.n_expert == layer; }),
                      prefetches_.end());
}

bool DecodeWorker::reserve(ExpertKey key, SlotCache::Evict evict) {
    const SlotCache::Reservation reservation = cache_.reserve(key, evict);
    if (reservation.slot < 0) return false;
    if (reservation.evicted < 0) return true;
    spec_.mailbox.evicted()[n_evicted_++] = reservation.evicted;
    if (unused_[static_cast<size_t>(reservation.evicted)]) {
        unused_[static_cast<size_t>(reservation.evicted)] = false;
        std::lock_guard<std::mutex> lock(stats_mutex_);
        ++stats_.fetched_unused;
    }
    return true;
}

int64_t DecodeWorker::bytes_in_flight() const {
    int64_t n_bytes = 0;
    for (const Flight& flight : in_flight_) n_bytes += flight.n_bytes;
    return n_bytes;
}

// Copies that will not be over in so many seconds.
int64_t DecodeWorker::in_flight_after(double seconds, double bytes_per_second) const {
    const int64_t then = now() + static_cast<int64_t>(seconds * 1e9);
    int64_t end = copied_until_, n = 0;
    for (const Flight& flight : in_flight_) {
        const double copying = static_cast<double>(flight.n_bytes) / bytes_per_second;
        end = std::max(end, flight.submitted) + static_cast<int64_t>(copying * 1e9);
        n += end > then;
    }
    return n;
}

// Starts to copy what is to be filled while fewer bytes are on their way. Nobody leaves for it: an expert that an
// answer has just evicted finds no free slot, so its table entry cannot come before the GPU takes the old one out.
// What has to be read from disk is waited for and held: one at a time, and not in a step.
void DecodeWorker::fill_some(int64_t n_bytes, bool in_step) {
    while (!fill_.empty()) {
        const ExpertKey key = fill_.front();
        const bool from_disk = reads_disk(cache_.layer_and_expert(key).first);
        if ((from_disk && in_step) || bytes_in_flight() >= (from_disk ? 1 : n_bytes)) return;
        fill_.pop_front();
        if (cache_.absent(key) && cache_.reserve(key, SlotCache::Evict::nobody).slot >= 0) start_fetch(key, true);
    }
}

void DecodeWorker::start_fetch(ExpertKey key, bool filled) {
    const auto [layer_index, expert] = cache_.layer_and_expert(key);
    const WorkerLayer& layer = spec_.layers[static_cast<size_t>(layer_index)];
    const int32_t slot = cache_.slot(key);
    if (layer.experts.memory != nullptr) layer.experts.memory->hold(layer.experts.memory_layer, &expert, 1);
    batch_.clear();
    for (const ExpertPart& part : layer.parts)
        batch_.push_back({layer.slots + slot * layer.slot_bytes + part.slot_offset,
                          part.host + expert * part.expert_stride, part.n_bytes});
    batch_.push_back({layer.table + expert * int64_t{4},
                      reinterpret_cast<const uint8_t*>(spec_.slot_numbers + slot), 4});
    copies_.submit(batch_);
    in_flight_.push_back({key, expert_bytes_[static_cast<size_t>(layer_index)], false, filled, now()});
    unused_[static_cast<size_t>(key)] = !filled;
}

}  // namespace moe
