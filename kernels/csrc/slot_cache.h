// Which expert is in which slot, and who leaves. No threads, no clocks, no memory of the device: what happens
// depends on nothing but the calls.
//
// Every layer belongs to a class of slots. A slot is free, in flight (reserved for an expert whose bytes are on
// their way) or resident. Only residents have a place in the replacement policy, so only they can be victims.
// Wrong calls throw std::logic_error. Nothing is allocated after construction.

#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "policy.h"

namespace moe {

class SlotCache {
 public:
    // slot_class[layer] is an index into n_slot.
    SlotCache(int n_expert, std::vector<int> slot_class, const std::vector<int>& n_slot,
              const PolicySettings& policy);
    SlotCache(const SlotCache&) = delete;
    SlotCache& operator=(const SlotCache&) = delete;

    ExpertKey key(int layer, int expert) const;
    std::pair<int, int> layer_and_expert(ExpertKey key) const { return {key / n_expert_, key % n_expert_}; }

    bool absent(ExpertKey key) const { return slot(key) < 0; }
    bool resident(ExpertKey key) const { return state(key).resident; }
    int32_t slot(ExpertKey key) const { return state(key).slot; }  // of residents and those in flight, else -1

    // From here to end_layer_step() these experts are never evicted. The policy notes their use in this order, in a
    // step (numbers never fall); ids of -1 are skipped. In the end those that are resident stand in this order too,
    // whether they were there before or have come meanwhile.
    void begin_layer_step(int layer, const int32_t* experts, int64_t n, int64_t step);
    void end_layer_step();

    // Until the end of the layer step this expert, of any layer, is not evicted.
    void keep(ExpertKey key) { class_of(key).policy.pin(key); }

    // Notes uses of an earlier run, before step 1.
    void seed(ExpertKey key, double uses);

    struct Reservation {
        int32_t slot;       // -1: no room
        ExpertKey evicted;  // who was there, -1 for nobody
    };
    // Whom a reservation may evict. `worse`: whom the policy's admission rule gives up for this expert, just used, and
    // who had fewer uses by at least so many (Policy::more_uses).
    enum class Evict { nobody, worse, any };
    static constexpr double kAnyUses = -std::numeric_limits<double>::infinity();
    Reservation reserve(ExpertKey key, Evict evict = Evict::any, double least_more_uses = kAnyUses);  // absent -> in flight
    void complete(ExpertKey key, bool filled = false);  // in flight -> resident; filled: see Policy::insert
    void cancel(ExpertKey key);                                    // in flight -> absent
    void release(ExpertKey key);                                   // resident -> absent

    struct Counts {
        int64_t n_slot, free, in_flight, resident;
    };
    int n_class() const { return static_cast<int>(classes_.size()); }
    Counts counts(int slot_class) const;
    std::vector<std::pair<int, int32_t>> residents(int layer) const;  // (expert, slot), ascending

    // Throws std::logic_error unless free + in flight + resident are all slots of every class, each slot and
    // its expert know each other, and the policies know exactly the residents.
    void check_integrity() const;

 private:
    struct State {
        int32_t slot = -1;
        bool resident = false;
    };
    struct SlotClass {
        std::vector<ExpertKey> holder;  // [n_slot], -1: free
        std::vector<int32_t> free;
        Policy policy;
    };
    State& state(ExpertKey key) { return states_[static_cast<size_t>(key)]; }
    const State& state(ExpertKey key) const { return states_[static_cast<size_t>(key)]; }
    SlotClass& class_of(ExpertKey key) { return classes_[index_of_class(key)]; }
    size_t index_of_class(ExpertKey key) const {
        return static_cast<size_t>(slot_class_[static_cast<size_t>(key / n_expert_)]);
    }
    void free_slot(ExpertKey key);
    void require(bool condition, ExpertKey key, const char* what) const;

    int n_expert_;
    std::vector<int> slot_class_;
    std::vector<State> states_;  // by key
    std::vector<ExpertKey> used_;  // in the layer step at hand
    std::vector<SlotClass> classes_;
};

}  // namespace moe
