#include "policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace moe {

namespace {

// Sums are scaled down before their terms reach 2^kLargest.
constexpr double kLargest = 512;

template <typename Choice>
Choice choice_of(const std::map<std::string, Choice>& choices, const std::string& name) {
    const auto found = choices.find(name);
    if (found == choices.end()) throw std::invalid_argument("there is no native '" + name + "'");
    return found->second;
}

// With which a sum of uses becomes a mean: uses per step.
double mean_of_sum(double half_life) { return 1 - std::exp2(-1 / half_life); }

}  // namespace

PolicySettings::PolicySettings(const std::string& name, const std::string& admit_name,
                               const std::map<std::string, double>& values) {
    rank = choice_of<Rank>({{"lru", Rank::lru},
                            {"lfu", Rank::lfu},
                            {"lfu-decay", Rank::lfu_decay},
                            {"class-lru", Rank::class_lru},
                            {"least-stale", Rank::least_stale},
                            {"blend", Rank::blend},
                            {"belady", Rank::belady}},
                           name);
    admit = choice_of<Admit>({{"always", Admit::always},
                              {"second-touch", Admit::second_touch},
                              {"better-than-victim", Admit::better_than_victim},
                              {"outranks", Admit::outranks}},
                             admit_name);
    const std::map<std::string, double*> places = {{"half_life", &half_life},
                                                   {"fast", &fast},
                                                   {"share", &share},
                                                   {"margin", &margin},
                                                   {"window", &window},
                                                   {"admit_half_life", &admit_half_life},
                                                   {"floor", &floor}};
    for (const auto& [key, value] : values) *choice_of<double*>(places, key) = value;
}

bool DecayedSums::add(ExpertKey key, int64_t step, double amount) {
    bool scaled = false;
    if (step != step_) {
        step_ = step;
        double exponent = static_cast<double>(step) / half_life_ - base_;
        if (exponent > kLargest) {
            const double shift = std::floor(exponent), factor = std::exp2(-shift);
            for (double& sum : sums_) sum *= factor;
            base_ += shift;
            exponent -= shift;
            scaled = true;
        }
        grown_ = std::exp2(exponent);
    }
    sums_[static_cast<size_t>(key)] += amount * grown_;
    return scaled;
}

double DecayedSums::unit(int64_t step) const {
    return std::exp2(std::min(base_ - static_cast<double>(step) / half_life_, 2 * kLargest - 1));
}

Policy::Policy(const PolicySettings& settings, int n_layer, int n_expert)
    : settings_(settings),
      n_layer_(n_layer),
      n_expert_(n_expert),
      fast_scale_(settings.share * mean_of_sum(settings.fast)),
      slow_scale_((1 - settings.share) * mean_of_sum(settings.half_life)),
      uses_(static_cast<int64_t>(n_layer) * n_expert, settings.half_life),
      fast_uses_(static_cast<int64_t>(n_layer) * n_expert, settings.fast),
      admission_uses_(static_cast<int64_t>(n_layer) * n_expert, settings.admit_half_life) {
    const size_t n_key = static_cast<size_t>(n_layer) * static_cast<size_t>(n_expert);
    count_.resize(n_key);
    next_use_.resize(n_key);
    last_.resize(n_key);
    pinned_.resize(n_key);
    step_.assign(n_key, -1);
    step_before_.assign(n_key, -1);
    resident_.resize(n_key);
    turn_.assign(static_cast<size_t>(n_layer), -1);
    n_resident_.resize(static_cast<size_t>(n_layer));
    lowest_.resize(static_cast<size_t>(n_layer));
}

void Policy::note(ExpertKey key, int64_t step, double amount) {
    const size_t i = static_cast<size_t>(key);
    layer_ = key / n_expert_;
    turn_[static_cast<size_t>(layer_)] = step;
    step_before_[i] = step_[i];
    step_[i] = step;
    last_[i] = ++clock_;
    count_[i] += amount;
    bool scaled = uses_.add(key, step, amount);
    if (settings_.rank == PolicySettings::Rank::blend) scaled |= fast_uses_.add(key, step, amount);
    if (settings_.admit == PolicySettings::Admit::better_than_victim) admission_uses_.add(key, step, amount);
    forget_lowest(key);
    if (scaled)
        for (Place& lowest : lowest_) lowest.key = -1;
}

void Policy::pin(ExpertKey key) {
    pinned_[static_cast<size_t>(key)] = layer_step_;
    const int layer = key / n_expert_;
    if (pinned_layers_.empty() || pinned_layers_.back() != layer) pinned_layers_.push_back(layer);
    forget_lowest(key);
}

void Policy::unpin() {
    ++layer_step_;
    for (int layer : pinned_layers_) lowest_[static_cast<size_t>(layer)].key = -1;
    pinned_layers_.clear();
}

void Policy::foresee(ExpertKey key, int64_t next_use) {
    next_use_[static_cast<size_t>(key)] = next_use;
    forget_lowest(key);
}

void Policy::insert(ExpertKey key, bool filled) {
    resident_[static_cast<size_t>(key)] = 1;
    if (!filled)
        last_[static_cast<size_t>(key)] = ++clock_;
    else if (step_[static_cast<size_t>(key)] <= 0)  // otherwise a step (the first is 1) has used it meanwhile
        last_[static_cast<size_t>(key)] = --before_;
    ++n_resident_[static_cast<size_t>(key / n_expert_)];
    ++size_;
    forget_lowest(key);
}

void Policy::remove(ExpertKey key) {
    resident_[static_cast<size_t>(key)] = 0;
    --n_resident_[static_cast<size_t>(key / n_expert_)];
    --size_;
    forget_lowest(key);
}

void Policy::refresh(ExpertKey key) {
    last_[static_cast<size_t>(key)] = ++clock_;
    forget_lowest(key);
}

ExpertKey Policy::candidate() {
    const ExpertKey found = candidate(settings_.floor);
    return found < 0 && settings_.floor > 0 ? candidate(0) : found;
}

ExpertKey Policy::candidate(double floor) {
    Place best;
    for (int layer = 0; layer < n_layer_; ++layer) {
        const int32_t n = n_resident_[static_cast<size_t>(layer)];
        if (n == 0 || (layer != layer_ && n <= floor)) continue;
        Place& lowest = lowest_[static_cast<size_t>(layer)];
        if (lowest.key < 0) lowest = lowest_of(layer);
        if (lowest.key < 0) continue;
        const Place place = {lowest.key, lowest.rank + offset(layer), lowest.last};
        if (best.key < 0 || place < best) best = place;
    }
    return best.key;
}

template <typename RankOf>
Policy::Place Policy::lowest_by(ExpertKey first, const RankOf& rank_of) const {
    constexpr double kNone = std::numeric_limits<double>::infinity();
    Place lowest = {-1, kNone, 0};
    for (ExpertKey key = first; key < first + n_expert_; ++key) {
        const size_t i = static_cast<size_t>(key);
        const double rank = (resident_[i] != 0) & (pinned_[i] != layer_step_) ? rank_of(key) : kNone;
        const Place place = {key, rank, last_[i]};
        if (rank != kNone && (lowest.key < 0 || place < lowest)) lowest = place;
    }
    return lowest;
}

Policy::Place Policy::lowest_of(int layer) const {
    const Factors with = factors(layer);
    const ExpertKey first = layer * n_expert_;
    // The most used ones have loops of their own.
    if (settings_.rank == PolicySettings::Rank::lru) return lowest_by(first, [](ExpertKey) { return 0.0; });
    if (settings_.rank == PolicySettings::Rank::lfu_decay)
        return lowest_by(first, [this](ExpertKey key) { return uses_[key]; });
    if (settings_.rank == PolicySettings::Rank::blend)
        return lowest_by(first, [&](ExpertKey key) {
            return with.fast * fast_uses_[key] + with.slow * uses_[key];
        });
    return lowest_by(first, [&](ExpertKey key) { return rank(key, with); });
}

Policy::Factors Policy::factors(int layer) const {
    if (settings_.rank != PolicySettings::Rank::blend) return {};
    const int64_t turn = turn_[static_cast<size_t>(layer)];
    return {fast_scale_ * fast_uses_.unit(turn), slow_scale_ * uses_.unit(turn)};
}

double Policy::rank(ExpertKey key, const Factors& factors) const {
    const size_t i = static_cast<size_t>(key);
    switch (settings_.rank) {
        case PolicySettings::Rank::lru:
            break;
        case PolicySettings::Rank::lfu:
            return count_[i];
        case PolicySettings::Rank::lfu_decay:
            return uses_[key];
        case PolicySettings::Rank::class_lru:
            return uses_[key] > 0 ? std::ilogb(uses_[key]) : -std::numeric_limits<double>::infinity();
        case PolicySettings::Rank::least_stale:
            return static_cast<double>(step_[i]);
        case PolicySettings::Rank::blend:
            return factors.fast * fast_uses_[key] + factors.slow * uses_[key];
        case PolicySettings::Rank::belady:
            return -static_cast<double>(next_use_[i]);
    }
    return 0;
}

double Policy::offset(int layer) const {
    if (settings_.rank != PolicySettings::Rank::least_stale) return 0;
    const int turns_until = (layer - layer_ - 1 + n_layer_) % n_layer_;
    return -static_cast<double>(turn_[static_cast<size_t>(layer)]) - static_cast<double>(turns_until) / n_layer_;
}

bool Policy::admits(ExpertKey key, ExpertKey victim) const {
    const size_t i = static_cast<size_t>(key);
    switch (settings_.admit) {
        case PolicySettings::Admit::always:
            break;
        case PolicySettings::Admit::second_touch:
            return step_before_[i] >= 0 && static_cast<double>(step_[i] - step_before_[i]) <= settings_.window;
        case PolicySettings::Admit::better_than_victim:
            return admission_uses_[key] > admission_uses_[victim];
        case PolicySettings::Admit::outranks: {
            if (settings_.rank == PolicySettings::Rank::lru) break;
            const int layer = key / n_expert_, of_victim = victim / n_expert_;
            const double least = settings_.margin * rank(victim, factors(of_victim));
            return rank(key, factors(layer)) + offset(layer) > least + offset(of_victim);
        }
    }
    return true;
}

double Policy::more_uses(ExpertKey key, ExpertKey victim) const {
    using Rank = PolicySettings::Rank;
    if (settings_.rank != Rank::blend && settings_.rank != Rank::lfu_decay && settings_.rank != Rank::class_lru)
        return std::numeric_limits<double>::infinity();
    const auto uses = [this](ExpertKey of) {
        return uses_[of] * uses_.unit(turn_[static_cast<size_t>(of / n_expert_)]);
    };
    return uses(key) - uses(victim);
}

bool Policy::consistent() const {
    for (int layer = 0; layer < n_layer_; ++layer) {
        int32_t n = 0;
        for (ExpertKey key = layer * n_expert_; key < (layer + 1) * n_expert_; ++key) n += contains(key);
        if (n != n_resident_[static_cast<size_t>(layer)]) return false;
        const ExpertKey lowest = lowest_[static_cast<size_t>(layer)].key;
        if (lowest >= 0 && lowest != lowest_of(layer).key) return false;
    }
    return true;
}

}  // namespace moe
