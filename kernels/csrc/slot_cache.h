// Which expert is in which slot, and who leaves. No threads, no clocks, no memory of the device: what happens
// depends on nothing but the calls.
//
// Every layer belongs to a class of slots. A slot is free, in flight (reserved for an expert whose bytes are on
// their way) or resident. Only residents have a place in the replacement policy, so only they can be victims.
// Wrong calls throw std::logic_error. Nothing is allocated after construction.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace moe {

// An expert of a layer: layer * n_expert + expert.
using ExpertKey = int32_t;

// Orders the resident experts of a class; neither knows nor cares what a key stands for.
class ReplacementPolicy {
 public:
    virtual ~ReplacementPolicy() = default;
    virtual void insert(ExpertKey key) = 0;  // not known yet
    virtual void touch(ExpertKey key) = 0;   // a use of a known key
    virtual void remove(ExpertKey key) = 0;
    // Removes and returns the key to evict among those that may leave, -1 if there is none.
    virtual ExpertKey victim(const std::function<bool(ExpertKey)>& may_leave) = 0;
    virtual bool contains(ExpertKey key) const = 0;
    virtual int64_t size() const = 0;
};

// Evicts the key whose last use is longest ago.
class LeastRecentlyUsed final : public ReplacementPolicy {
 public:
    explicit LeastRecentlyUsed(int64_t n_key);
    void insert(ExpertKey key) override;
    void touch(ExpertKey key) override;
    void remove(ExpertKey key) override;
    ExpertKey victim(const std::function<bool(ExpertKey)>& may_leave) override;
    bool contains(ExpertKey key) const override { return at(key).next >= 0; }
    int64_t size() const override { return size_; }

 private:
    // A ring through the known keys, oldest first, that begins and ends at the one entry behind all keys.
    struct Links {
        ExpertKey previous = -1, next = -1;
    };
    Links& at(ExpertKey key) { return links_[static_cast<size_t>(key)]; }
    const Links& at(ExpertKey key) const { return links_[static_cast<size_t>(key)]; }

    std::vector<Links> links_;
    ExpertKey end_;
    int64_t size_ = 0;
};

class SlotCache {
 public:
    // slot_class[layer] is an index into n_slot.
    SlotCache(int n_expert, std::vector<int> slot_class, const std::vector<int>& n_slot);
    SlotCache(const SlotCache&) = delete;
    SlotCache& operator=(const SlotCache&) = delete;

    ExpertKey key(int layer, int expert) const;
    std::pair<int, int> layer_and_expert(ExpertKey key) const { return {key / n_expert_, key % n_expert_}; }

    bool absent(ExpertKey key) const { return slot(key) < 0; }
    bool resident(ExpertKey key) const { return state(key).resident; }
    int32_t slot(ExpertKey key) const { return state(key).slot; }  // of residents and those in flight, else -1

    // From here to end_layer_step() these experts are never evicted. Touches the resident ones in this order;
    // ids of -1 are skipped.
    void begin_layer_step(int layer, const int32_t* experts, int64_t n);
    void end_layer_step() { ++layer_step_; }

    void touch(ExpertKey key);
    // Until the end of the layer step this expert, of any layer, is not evicted.
    void keep(ExpertKey key) { state(key).layer_step = layer_step_; }

    struct Reservation {
        int32_t slot;       // -1: no room
        ExpertKey evicted;  // who was there, -1 for nobody
    };
    Reservation reserve(ExpertKey key, bool may_evict = true);  // absent -> in flight
    void complete(ExpertKey key);                               // in flight -> resident
    void cancel(ExpertKey key);                                 // in flight -> absent
    void release(ExpertKey key);                                // resident -> absent

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
        int64_t layer_step = 0;  // the last one that it was part of
    };
    struct SlotClass {
        std::vector<ExpertKey> holder;  // [n_slot], -1: free
        std::vector<int32_t> free;
        int64_t n_resident = 0;
        std::unique_ptr<ReplacementPolicy> policy;
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
    std::vector<SlotClass> classes_;
    int64_t layer_step_ = 1;
    std::function<bool(ExpertKey)> may_leave_;
};

}  // namespace moe
