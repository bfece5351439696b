// Who leaves a class of slots, and who may come in: the native twin of the classes in policies/, which define what
// is right. All of them are one thing here: a key has a rank, the lowest goes, and among equals the one whose last
// use or insertion is longest ago.
//
// A rank changes only when the key's layer is served. So the lowest of every layer is remembered, and a victim is
// found by looking at these and, again, at the experts of layers that were served since. Nothing is allocated after
// construction.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace moe {

// An expert of a layer: layer * n_expert + expert.
using ExpertKey = int32_t;

// Names and values as in policies/registry.py. Throws std::invalid_argument for a policy or rule without a twin.
struct PolicySettings {
    PolicySettings() = default;  // lru
    PolicySettings(const std::string& name, const std::string& admit, const std::map<std::string, double>& values);

    enum class Rank { lru, lfu, lfu_decay, class_lru, least_stale, blend, belady } rank = Rank::lru;
    enum class Admit { always, second_touch, better_than_victim, outranks } admit = Admit::always;
    double half_life = 1, fast = 1, share = 0, margin = 1;  // of the rank
    double window = 0, admit_half_life = 1;     // of the admission
    double floor = 0;  // residents of a layer that others do not evict while they find anything else
};

// Sums whose terms lose half their value every half_life steps: terms grow instead, until all are scaled down.
class DecayedSums {
 public:
    DecayedSums(int64_t n_key, double half_life) : half_life_(half_life), sums_(static_cast<size_t>(n_key)) {}
    bool add(ExpertKey key, int64_t step, double amount);  // whether all were scaled down; steps never fall
    double operator[](ExpertKey key) const { return sums_[static_cast<size_t>(key)]; }  // larger for a larger sum
    double unit(int64_t step) const;  // what to multiply that with for the sum in a step

 private:
    double half_life_;
    int64_t step_ = -1;
    double base_ = 0, grown_ = 1;
    std::vector<double> sums_;
};

class Policy {
 public:
    Policy(const PolicySettings& settings, int n_layer, int n_expert);

    // Until unpin() the key is no candidate.
    void pin(ExpertKey key);
    void unpin();
    void note(ExpertKey key, int64_t step, double amount = 1);  // a use in a token (step), of any key
    void foresee(ExpertKey key, int64_t next_use);              // for belady, after each use
    // Not resident before. filled: as if before everything else that has happened, and of such the first one last.
    void insert(ExpertKey key, bool filled = false);
    void remove(ExpertKey key);                                 // resident
    void refresh(ExpertKey key);                                // as remove() and insert() in one
    bool contains(ExpertKey key) const { return resident_[static_cast<size_t>(key)] != 0; }
    int64_t size() const { return size_; }

    // The resident key to evict next, -1 if there is none: of the layer served last and those with more residents than
    // the floor, or if that is none of any layer.
    ExpertKey candidate();

    // Whether a key that was just used is worth evicting the victim for.
    bool admits(ExpertKey key, ExpertKey victim) const;

    // How many more uses a key has had lately than the victim, a use counting half after the policy's half-life: about
    // as many more as it will have in the next so many tokens. Infinite where the policy has no half-life.
    double more_uses(ExpertKey key, ExpertKey victim) const;

    // Whether what is remembered of each layer is right.
    bool consistent() const;

 private:
    struct Place {
        ExpertKey key = -1;
        double rank = 0;
        int64_t last = 0;
        bool operator<(const Place& other) const {
            return rank != other.rank ? rank < other.rank : last < other.last;
        }
    };
    // What turns the sums into ranks of a layer, as of its last turn.
    struct Factors {
        double fast, slow;
    };
    Factors factors(int layer) const;
    double rank(ExpertKey key, const Factors& factors) const;
    double offset(int layer) const;  // between layers

    ExpertKey candidate(double floor);
    Place lowest_of(int layer) const;
    template <typename RankOf>
    Place lowest_by(ExpertKey first, const RankOf& rank_of) const;
    void forget_lowest(ExpertKey key) { lowest_[static_cast<size_t>(key / n_expert_)].key = -1; }

    PolicySettings settings_;
    int n_layer_, n_expert_;
    double fast_scale_, slow_scale_;
    DecayedSums uses_, fast_uses_, admission_uses_;
    std::vector<double> count_;
    std::vector<int64_t> next_use_;
    std::vector<int64_t> last_;  // when it was used or inserted, on a clock of our own
    int64_t clock_ = 0, before_ = 0;
    std::vector<int64_t> pinned_;  // the layer step for which it is
    int64_t layer_step_ = 1;
    std::vector<int> pinned_layers_;
    std::vector<int64_t> step_, step_before_;  // the last two uses, -1: none
    std::vector<int64_t> turn_;                // by layer: the step that it was served in last
    int layer_ = 0;                            // that was served last
    std::vector<uint8_t> resident_;
    std::vector<int32_t> n_resident_;  // by layer
    int64_t size_ = 0;
    std::vector<Place> lowest_;  // by layer, without offset; key -1: not known
};

}  // namespace moe
