#include "slot_cache.h"

#include <stdexcept>
#include <string>

namespace moe {

SlotCache::SlotCache(int n_expert, std::vector<int> slot_class, const std::vector<int>& n_slot,
                     const PolicySettings& policy)
    : n_expert_(n_expert), slot_class_(std::move(slot_class)) {
    states_.resize(slot_class_.size() * static_cast<size_t>(n_expert));
    used_.reserve(states_.size());
    for (int index : slot_class_)
        if (index < 0 || index >= static_cast<int>(n_slot.size()))
            throw std::logic_error("a layer of no class of slots");
    for (int n : n_slot) {
        classes_.push_back({{}, {}, Policy(policy, static_cast<int>(slot_class_.size()), n_expert)});
        classes_.back().holder.assign(static_cast<size_t>(n), -1);
        for (int32_t slot = n; slot-- > 0;) classes_.back().free.push_back(slot);
    }
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

void SlotCache::begin_layer_step(int layer, const int32_t* experts, int64_t n, int64_t step) {
    end_layer_step();
    for (int64_t i = 0; i < n; ++i) {
        if (experts[i] == -1) continue;
        const ExpertKey chosen = key(layer, experts[i]);
        class_of(chosen).policy.pin(chosen);
        class_of(chosen).policy.note(chosen, step);
        used_.push_back(chosen);
    }
}

void SlotCache::end_layer_step() {
    for (ExpertKey key : used_)
        if (resident(key)) class_of(key).policy.refresh(key);
    used_.clear();
    for (SlotClass& slots : classes_) slots.policy.unpin();
}

void SlotCache::seed(ExpertKey key, double uses) { class_of(key).policy.note(key, 0, uses); }

SlotCache::Reservation SlotCache::reserve(ExpertKey key, Evict evict, double least_more_uses) {
    require(absent(key), key, "is reserved twice");
    SlotClass& slots = class_of(key);
    ExpertKey evicted = -1;
    if (slots.free.empty()) {
        if (evict != Evict::nobody) evicted = slots.policy.candidate();
        if (evicted < 0) return {-1, -1};
        const bool pays = evict != Evict::worse || (slots.policy.admits(key, evicted) &&
                                                    slots.policy.more_uses(key, evicted) >= least_more_uses);
        if (!pays) return {-1, -1};
        release(evicted);
    }
    const int32_t slot = slots.free.back();
    slots.free.pop_back();
    slots.holder[static_cast<size_t>(slot)] = key;
    state(key).slot = slot;
    return {slot, evicted};
}

void SlotCache::complete(ExpertKey key, bool filled) {
    require(!absent(key) && !resident(key), key, "is completed but not in flight");
    state(key).resident = true;
    class_of(key).policy.insert(key, filled);
}

void SlotCache::cancel(ExpertKey key) {
    require(!absent(key) && !resident(key), key, "is cancelled but not in flight");
    free_slot(key);
}

void SlotCache::release(ExpertKey key) {
    require(resident(key), key, "is released but not resident");
    class_of(key).policy.remove(key);
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
    return {n_slot, free, n_slot - free - slots.policy.size(), slots.policy.size()};
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
        require(slots.policy.contains(key) == resident(key), key,
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
        if (n_free + seen[i].resident + seen[i].in_flight != n_slot || slots.policy.size() != seen[i].resident)
            throw std::logic_error(
                "class " + std::to_string(i) + ": " + std::to_string(n_free) + " free + " +
                std::to_string(seen[i].resident) + " resident + " + std::to_string(seen[i].in_flight) +
                " in flight of " + std::to_string(n_slot) + " slots; the policy counts " +
                std::to_string(slots.policy.size()) + " resident");
        if (!slots.policy.consistent())
            throw std::logic_error("class " + std::to_string(i) + ": the policy remembers a wrong victim");
    }
}

}  // namespace moe
