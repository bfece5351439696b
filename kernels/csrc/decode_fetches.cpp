// How experts get into slots, and into the CPU's caches, before they are needed: see decode_worker.h.

#include <algorithm>

#include "decode_worker.h"

namespace moe {

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
    double room = link_room(step, layer);
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

// Reserves slots for experts to be fetched behind the answer, whose victims are part of it: those that the next layer
// but one will probably miss, then those that the CPU has computed. Only for the latter the policy's admission
// rule is asked, and whether they save more misses than the copy costs: the others were not used yet, and what is
// fetched for the step itself needs a slot anyway.
// seconds: until the answer, as far as is known. One copy that will be over by then may be on its way now.
void DecodeWorker::admit(const Step& step, int layer, const Mailbox::Message& message, double seconds) {
    keep_foreseen(step, layer, message);
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
    // Tokens that miss the same expert are uses of their own, which share what a miss costs.
    const double sharing = static_cast<double>(n_missed_) / static_cast<double>(std::max<size_t>(1, missed_.size()));
    const double price = sharing * cost_of(step).rates().price_of_copy();
    const double least_more_uses = price > 0 ? price : SlotCache::kAnyUses;
    for (ExpertKey key : missed_) {
        if (!is_room()) break;
        if (cache_.absent(key) && reserve(key, SlotCache::Evict::worse, least_more_uses)) background_.push_back(key);
    }
}

// Starts to copy what was given slots for the last answer, which has told the GPU the victims; of it as much as the driver
// can probably take until then, for the GPU's next message must not wait. The rest starts beside the CPU's next work.
void DecodeWorker::start_background(int64_t until) {
    while (!background_.empty() && now() + driver_ns_ < until) {
        const int64_t start = now();
        start_fetch(background_.front());
        background_.pop_front();
        driver_ns_ += (now() - start - driver_ns_) / 16;
        std::lock_guard<std::mutex> lock(stats_mutex_);
        ++stats_.fetched_background;
    }
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

// What the next layers will probably choose is not evicted now.
void DecodeWorker::keep_foreseen(const Step& step, int layer, const Mailbox::Message& message) {
    for (int64_t i = 0; i < message.header[Mailbox::kAhead]; ++i)
        for (int64_t pair = 0; pair < step.n_token * spec_.mailbox.top_k; ++pair)
            if (message.ahead[i][pair] >= 0)
                cache_.keep(cache_.key(layer + 1 + static_cast<int>(i), message.ahead[i][pair]));
}

// Whether the step prefetches, and for that layer, of which it predicts: a read of the disk would be waited for.
bool DecodeWorker::may_prefetch(int layer, const Mailbox::Message& message) const {
    return message.header[Mailbox::kAhead] == Mailbox::kMaxAhead && !reads_disk(layer);
}

// Whether not all of a layer's experts are in RAM.
bool DecodeWorker::reads_disk(int layer) const {
    return spec_.layers[static_cast<size_t>(layer)].experts.memory != nullptr;
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

// Whether an expert may be fetched: the table entry of one that this answer evicts could come before the GPU takes the
// old one out.
bool DecodeWorker::can_come(ExpertKey key) const {
    const int32_t* evicted = spec_.mailbox.evicted();
    return cache_.absent(key) && std::find(evicted, evicted + n_evicted_, key) == evicted + n_evicted_;
}

bool DecodeWorker::reserve(ExpertKey key, SlotCache::Evict evict, double least_more_uses) {
    const SlotCache::Reservation reservation = cache_.reserve(key, evict, least_more_uses);
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

// Bytes that copies which begin now can bring before the GPU looks up the next layer's slots.
double DecodeWorker::link_room(const Step& step, int layer) const {
    const MissCost& cost = cost_of(step);
    const Rates& rates = cost.rates();
    const double cpu = cost.cpu_seconds(entry_.n_cpu * expert_bytes_[static_cast<size_t>(layer)], true);
    double room = cpu * rates.copy_beside_cpu + std::max(0.0, gpu_seconds_ - kLookUp) * rates.copy;
    room -= static_cast<double>(bytes_in_flight());
    if (in_flight_.empty()) return room;
    const int64_t begun = std::max(in_flight_.front().submitted, copied_until_);
    const double copied = static_cast<double>(now() - begun) * 1e-9 * rates.copy;
    return room + std::clamp(copied, 0.0, static_cast<double>(in_flight_.front().n_bytes));
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

}  // namespace moe
