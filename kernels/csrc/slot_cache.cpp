#include "slot_cache.h"

#include <stdexcept>
#include <string>

namespace moe {

LeastRecentlyUsed::LeastRecentlyUsed(int64_t n_key)
    : links_(static_cast<size_t>(n_key) + 1), end_(static_cast<ExpertKey>(n_key)) {
    at(end_) = {end_, end_};
}

void LeastRecentlyUsed::insert(ExpertKey key) {
    const ExpertKey newest = at(end_).previous;
    at(key) = {newest, end_};
    at(newest).next = key;
    at(end_).previous = key;
    ++size_;
}

void LeastRecentlyUsed::remove(ExpertKey key) {
    Links& links = at(key);
    at(links.previous).next = links.next;
    at(links.next).previous = links.previous;
    links = {};
    --size_;
}

void LeastRecentlyUsed::touch(ExpertKey key) {
    remove(key);
    insert(key);
}

ExpertKey LeastRecentlyUsed::victim(const std::function<bool(ExpertKey)>& may_leave) {
    ExpertKey key = at(end_).next;
    while (key != end_ && !may_leave(key)) key = at(key).next;
    if (key == end_) return -1;
    remove(key);
    return key;
}

SlotCache::SlotCache(int n_expert, std::vector<int> slot_class, const std::vector<int>& n_slot)
    : n_expert_(n_expert), slot_class_(std::move(slot_class)), classes_(n_slot.size()) {
    const size_t n_key = slot_class_.size() * static_cast<size_t>(n_expert);
    states_.resize(n_key);
    for (int index : slot_class_)
        if (index < 0 || index >= n_class()) throw std::logic_error("a layer of no class of slots");
    for (size_t i = 0; i < n_slot.size(); ++i) {
        SlotClass& slots = classes_[i];
        slots.holder.assign(static_cast<size_t>(n_slot[i]), -1);
        for (int32_t slot = n_slot[i]; slot-- > 0;) slots.free.push_back(slot);
        slots.policy = std::make_unique<LeastRecentlyUsed>(static_cast<int64_t>(n_key));
    }
    may_leave_ = [this](ExpertKey key) { return state(key).layer_step != layer_step_; };
}

ExpertKey SlotCache::key(int layer, int expert) const {
    if (layer < 0 || layer >= static_cast<int>(slot_class_.size()) || expert < 0 || expert >= n_expert_)
        throw std::logic_error("there is no expert " + std::to_string(expert) + " of layer " +
                               std::to_string(layer));
    return layer * n_expert_ + expert;
}

void SlotCache::require(bool condition, ExpertKey key, const char* what) const {
    if (condition) return;
    const auto [layer, expert] = layer_and_expert(key);
    throw std::logic_error("expert " + std::to_string(expert) + " of layer " + std::to_string(layer) + " " +
                           what);
}

void SlotCache::begin_layer_step(int layer, const int32_t* experts, int64_t n) {
    ++layer_step_;
    for (int64_t i = 0; i < n; ++i) {
        if (experts[i] == -1) continue;
        const ExpertKey chosen = key(layer, experts[i]);
        state(chosen).layer_step = layer_step_;
        if (resident(chosen)) touch(chosen);
    }
}

void SlotCache::touch(ExpertKey key) {
    require(resident(key), key, "is touched but not resident");
    class_of(key).policy->touch(key);
}

SlotCache::Reservation SlotCache::reserve(ExpertKey key, bool may_evict) {
    require(absent(key), key, "is reserved twice");
    SlotClass& slots = class_of(key);
    ExpertKey evicted = -1;
    if (slots.free.empty()) {
        if (may_evict) evicted = slots.policy->victim(may_leave_);
        if (evicted < 0) return {-1, -1};
        --slots.n_resident;
        free_slot(evicted);
    }
    const int32_t slot = slots.free.back();
    slots.free.pop_back();
    slots.holder[static_cast<size_t>(slot)] = key;
    state(key).slot = slot;
    return {slot, evicted};
}

void SlotCache::complete(ExpertKey key) {
    require(!absent(key) && !resident(key), key, "is completed but not in flight");
    SlotClass& slots = class_of(key);
    state(key).resident = true;
    ++slots.n_resident;
    slots.policy->insert(key);
}

void SlotCache::cancel(ExpertKey key) {
    require(!absent(key) && !resident(key), key, "is cancelled but not in flight");
    free_slot(key);
}

void SlotCache::release(ExpertKey key) {
    require(resident(key), key, "is released but not resident");
    SlotClass& slots = class_of(key);
    slots.policy->remove(key);
    --slots.n_resident;
    free_slot(key);
}

void SlotCache::free_slot(ExpertKey key) {
    SlotClass& slots = class_of(key);
    slots.holder[static_cast<size_t>(slot(key))] = -1;
    slots.free.push_back(slot(key));
    state(key).slot = -1;
    state(key).resident = false;
}

SlotCache::Counts SlotCache::counts(int slot_class) const {
    const SlotClass& slots = classes_.at(static_cast<size_t>(slot_class));
    const int64_t n_slot = static_cast<int64_t>(slots.holder.size());
    const int64_t free = static_cast<int64_t>(slots.free.size());
    return {n_slot, free, n_slot - free - slots.n_resident, slots.n_resident};
}

std::vector<std::pair<int, int32_t>> SlotCache::residents(int layer) const {
    std::vector<std::pair<int, int32_t>> found;
    const ExpertKey first = key(layer, 0);
    for (int expert = 0; expert < n_expert_; ++expert)
        if (resident(first + expert)) found.emplace_back(expert, slot(first + expert));
    return found;
}

void SlotCache::check_integrity() const {
    struct Seen {
        int64_t resident = 0, in_flight = 0;
    };
    std::vector<Seen> seen(classes_.size());
    for (ExpertKey key = 0; key < static_cast<ExpertKey>(states_.size()); ++key) {
        const size_t index = index_of_class(key);
        const SlotClass& slots = classes_[index];
        require(slots.policy->contains(key) == resident(key), key,
                resident(key) ? "is resident, but the policy does not know it"
                              : "is known to the policy, but not resident");
        if (absent(key)) continue;
        require(slots.holder.at(static_cast<size_t>(slot(key))) == key, key, "is not in its slot");
        ++(resident(key) ? seen[index].resident : seen[index].in_flight);
    }
    for (size_t i = 0; i < classes_.size(); ++i) {
        const SlotClass& slots = classes_[i];
        for (int32_t slot : slots.free)
            if (slots.holder.at(static_cast<size_t>(slot)) != -1)
                throw std::logic_error("slot " + std::to_string(slot) + " of class " + std::to_string(i) +
                                       " is free and held");
        const int64_t n_free = static_cast<int64_t>(slots.free.size());
        const int64_t n_slot = static_cast<int64_t>(slots.holder.size());
        if (n_free + seen[i].resident + seen[i].in_flight != n_slot || slots.n_resident != seen[i].resident ||
            slots.policy->size() != seen[i].resident)
            throw std::logic_error(
                "class " + std::to_string(i) + ": " + std::to_string(n_free) + " free + " +
                std::to_string(seen[i].resident) + " resident + " + std::to_string(seen[i].in_flight) +
                " in flight of " + std::to_string(n_slot) + " slots; counted " +
                std::to_string(slots.n_resident) + " resident, the policy " +
                std::to_string(slots.policy->size()));
    }
}

}  // namespace moe
