#include "expert_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>

namespace moe {

namespace {

using Clock = std::chrono::steady_clock;

const int64_t kPage = sysconf(_SC_PAGESIZE);
constexpr auto kAdjustEvery = std::chrono::milliseconds(20);

// Resident bytes of this process; 0 where the system does not say.
int64_t process_bytes() {
    long long size = 0, resident = 0;
    if (FILE* file = std::fopen("/proc/self/statm", "r")) {
        if (std::fscanf(file, "%lld %lld", &size, &resident) != 2) resident = 0;
        std::fclose(file);
    }
    return resident * kPage;
}

}  // namespace

ExpertMemory::ExpertMemory(int n_expert, MemoryLimit limit, int n_thread, int64_t chunk_bytes, bool direct)
    : n_expert_(n_expert),
      limit_(limit),
      allowed_(limit.experts),
      may_leave_([this](ExpertKey key) { return at(key).holds == 0; }),
      reader_(
          n_thread, chunk_bytes, direct, [this](int64_t tag, int64_t n_bytes) { arrived(tag, n_bytes); },
          [this](const std::string& reason) {
              std::lock_guard<std::mutex> lock(mutex_);
              if (failure_.empty()) failure_ = reason;
              changed_.notify_all();
          }) {}

int ExpertMemory::add_layer(int64_t slot_bytes, const std::vector<PartInFile>& parts) {
    const bool sparse = limit_.experts >= 0;
    const int64_t n_bytes = n_expert_ * slot_bytes;
    Layer layer{std::make_shared<HostMemory>(n_bytes, "/sys/devices/system", sparse), slot_bytes, 0, parts, {}};
    layer.users.resize(static_cast<size_t>((n_bytes + kPage - 1) / kPage));
    std::vector<Piece> pieces;
    std::unique_lock<std::mutex> lock(mutex_);
    if (sparse && n_read_ > 0) throw std::logic_error("a layer is added after experts were asked for");
    layers_.push_back(std::move(layer));
    experts_.resize(layers_.size() * static_cast<size_t>(n_expert_));
    if (sparse) order_ = std::make_unique<LeastRecentlyUsed>(static_cast<int64_t>(experts_.size()));
    const int index = static_cast<int>(layers_.size()) - 1;
    if (!sparse)
        for (int32_t expert = 0; expert < n_expert_; ++expert) begin(key(index, expert), &pieces);
    lock.unlock();
    reader_.submit(std::move(pieces), false);
    return index;
}

void ExpertMemory::add_cached(int file, int64_t offset, int64_t n_bytes) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        total_ += n_bytes;
    }
    reader_.submit({{file, offset, n_bytes, nullptr, -1}}, false);
}

void ExpertMemory::preload() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (limit_.experts < 0) return;
    adjust();
    std::vector<Piece> pieces;
    for (int32_t expert = 0; expert < n_expert_; ++expert)
        for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer)
            if (resident_bytes_ + page_bytes(layers_[static_cast<size_t>(layer)]) <= allowed_)
                begin(key(layer, expert), &pieces);
    lock.unlock();
    reader_.submit(std::move(pieces), false);
}

bool ExpertMemory::wait(double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                      [this] { return done_ == total_ || stopped_ || !failure_.empty(); });
    if (failure_.empty() && !stopped_ && done_ < total_) return false;
    require_alive();
    loaded_ = loaded_ || done_ == total_;
    return loaded_;
}

bool ExpertMemory::is_read(int layer) {
    std::lock_guard<std::mutex> lock(mutex_);
    return layers_[static_cast<size_t>(layer)].unread == 0;
}

int64_t ExpertMemory::bytes_done() {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_;
}

int64_t ExpertMemory::bytes_total() {
    std::lock_guard<std::mutex> lock(mutex_);
    return total_;
}

ExpertKey ExpertMemory::key(int layer, int32_t expert) const {
    if (layer < 0 || layer >= static_cast<int>(layers_.size()) || expert < 0 || expert >= n_expert_)
        throw std::logic_error("there is no expert " + std::to_string(expert) + " of layer " + std::to_string(layer));
    return layer * n_expert_ + expert;
}

// What an expert takes at most.
int64_t ExpertMemory::page_bytes(const Layer& layer) const {
    return ((layer.slot_bytes + kPage - 1) / kPage + 1) * kPage;
}

// First and behind the last, in the layer's region.
std::pair<int64_t, int64_t> ExpertMemory::pages(ExpertKey key) const {
    const int64_t slot_bytes = layers_[static_cast<size_t>(key / n_expert_)].slot_bytes;
    const int64_t expert = key % n_expert_;
    return {expert * slot_bytes / kPage, ((expert + 1) * slot_bytes + kPage - 1) / kPage};
}

void ExpertMemory::begin(ExpertKey key, std::vector<Piece>* pieces) {
    Layer& layer = layer_of(key);
    Expert& expert = at(key);
    expert.state = State::reading;
    const auto [first, last] = pages(key);
    for (int64_t page = first; page < last; ++page)
        if (layer.users[static_cast<size_t>(page)]++ == 0) resident_bytes_ += kPage;
    most_ = std::max(most_, resident_bytes_);
    ++n_read_;
    const int64_t number = key % n_expert_;
    for (const PartInFile& part : layer.parts) {
        uint8_t* to = layer.memory->data() + number * layer.slot_bytes + part.slot_offset;
        pieces->push_back({part.file, part.offset + number * part.stride, part.n_bytes, to, key});
        expert.unread += part.n_bytes;
        layer.unread += part.n_bytes;
        if (!loaded_) total_ += part.n_bytes;
    }
}

// Of a resident one that the order does not know any more. Pages that a neighbour uses stay.
void ExpertMemory::drop(ExpertKey key) {
    Layer& layer = layer_of(key);
    at(key).state = State::absent;
    const auto [first, last] = pages(key);
    int64_t begin = first;
    for (int64_t page = first; page <= last; ++page) {
        if (page < last && --layer.users[static_cast<size_t>(page)] == 0) continue;
        if (page > begin) {
            madvise(layer.memory->data() + begin * kPage, static_cast<size_t>((page - begin) * kPage), MADV_DONTNEED);
            resident_bytes_ -= (page - begin) * kPage;
        }
        begin = page + 1;
    }
    ++n_dropped_;
}

bool ExpertMemory::make_room(ExpertKey key) {
    const auto need = [&] {  // a victim may have left pages of which it was the last user
        const auto [first, last] = pages(key);
        const std::vector<uint16_t>& users = layer_of(key).users;
        return kPage * std::count(users.begin() + first, users.begin() + last, 0);
    };
    while (resident_bytes_ + need() > allowed_) {
        const ExpertKey victim = order_->victim(may_leave_);
        if (victim < 0) return false;
        drop(victim);
    }
    return true;
}

void ExpertMemory::arrived(int64_t tag, int64_t n_bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!loaded_) done_ += n_bytes;
    if (tag >= 0) {
        const ExpertKey key = static_cast<ExpertKey>(tag);
        layer_of(key).unread -= n_bytes;
        if ((at(key).unread -= n_bytes) > 0) return;
        at(key).state = State::resident;
        if (order_ != nullptr) order_->insert(key);
    }
    changed_.notify_all();
}

// The process grows and shrinks besides experts: what is left for them follows.
void ExpertMemory::adjust() {
    if (limit_.process == 0 || Clock::now() - adjusted_ < kAdjustEvery) return;
    adjusted_ = Clock::now();
    int64_t present = 0, held = 0;
    for (size_t i = 0; i < experts_.size(); ++i) {
        if (experts_[i].state != State::resident) continue;
        const Layer& layer = layer_of(static_cast<ExpertKey>(i));
        present += layer.slot_bytes;
        if (experts_[i].holds > 0) held += page_bytes(layer);
    }
    // What is held cannot leave, and another caller must still find room beside it.
    const int64_t least = std::max(limit_.least, held + limit_.least / 2);
    allowed_ = std::max(least, limit_.process - (process_bytes() - present));
    while (resident_bytes_ > allowed_) {
        const ExpertKey victim = order_->victim(may_leave_);
        if (victim < 0) return;
        drop(victim);
    }
}

void ExpertMemory::require_alive() {
    if (!failure_.empty()) throw ReadError(failure_);
    if (stopped_) throw std::runtime_error("the experts' memory is closed");
}

void ExpertMemory::hold(int layer, const int32_t* experts, int64_t n) {
    std::unique_lock<std::mutex> lock(mutex_);
    require_alive();
    for (int64_t i = 0; i < n; ++i) key(layer, experts[i]);  // all of them, before anything changes
    for (int64_t i = 0; i < n; ++i) ++at(key(layer, experts[i])).holds;
    adjust();
    bool fits = true, in_flight = false;
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < n; ++i) {
        const ExpertKey wanted = key(layer, experts[i]);
        while (fits && at(wanted).state == State::absent && !make_room(wanted)) {
            fits = wait_for_reads(lock, &pieces);
        }
        if (!fits) break;
        if (at(wanted).state == State::absent) {
            begin(wanted, &pieces);
        } else if (at(wanted).state == State::reading) {
            in_flight = true;
        } else if (order_ != nullptr) {
            order_->touch(wanted);
        }
    }
    if (!pieces.empty() || in_flight) {
        lock.unlock();
        reader_.submit(std::move(pieces), true);
        if (in_flight)
            reader_.hurry([&](int64_t tag) {
                return tag / n_expert_ == layer && std::find(experts, experts + n, tag % n_expert_) != experts + n;
            });
        lock.lock();
    }
    const auto is_here = [&] {
        return std::all_of(experts, experts + n,
                           [&](int32_t expert) { return at(key(layer, expert)).state == State::resident; });
    };
    if (fits) changed_.wait(lock, [&] { return stopped_ || !failure_.empty() || is_here(); });
    if (fits && is_here() && !stopped_) return;
    for (int64_t i = 0; i < n; ++i) --at(key(layer, experts[i])).holds;
    require_alive();
    throw NoRoomError(std::to_string(n) + " experts are needed at once, but RAM for experts is limited to " +
                             std::to_string(allowed_) + " bytes");
}

// What is read ahead can leave once it has arrived. False if nothing of that kind is on its way.
bool ExpertMemory::wait_for_reads(std::unique_lock<std::mutex>& lock, std::vector<Piece>* pieces) {
    const auto ahead = [](const Expert& expert) { return expert.state == State::reading && expert.holds == 0; };
    if (std::none_of(experts_.begin(), experts_.end(), ahead) || stopped_ || !failure_.empty()) return false;
    if (pieces->empty()) {
        changed_.wait(lock);
        return true;
    }
    lock.unlock();
    reader_.submit(std::move(*pieces), true);
    pieces->clear();
    lock.lock();
    return true;
}

void ExpertMemory::release(int layer, const int32_t* experts, int64_t n) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = 0; i < n; ++i) --at(key(layer, experts[i])).holds;
}

int64_t ExpertMemory::at_once(int layer) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (limit_.experts < 0) return n_expert_;
    return std::max<int64_t>(1, allowed_ / 2 / page_bytes(layers_[static_cast<size_t>(layer)]));
}

void ExpertMemory::prefetch(int layer, const int32_t* experts, int64_t n) {
    std::vector<Piece> pieces;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (order_ == nullptr || stopped_ || !failure_.empty()) return;
        int64_t left = allowed_ / 4;
        for (int64_t i = 0; i < n; ++i) {
            const ExpertKey wanted = key(layer, experts[i]);
            if ((left -= page_bytes(layer_of(wanted))) < 0) break;
            if (at(wanted).state == State::resident) order_->touch(wanted);
            if (at(wanted).state != State::absent) continue;
            if (!make_room(wanted)) break;
            begin(wanted, &pieces);
        }
    }
    reader_.submit(std::move(pieces), false);
}

ExpertMemory::Counts ExpertMemory::counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    Counts counts{allowed_, resident_bytes_, most_, 0, 0, 0, n_read_, n_dropped_};
    for (const Expert& expert : experts_) {
        counts.n_resident += expert.state == State::resident;
        counts.n_reading += expert.state == State::reading;
        counts.n_held += expert.holds > 0;
    }
    return counts;
}

void ExpertMemory::check_integrity() {
    std::lock_guard<std::mutex> lock(mutex_);
    int64_t n_bytes = 0, n_resident = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
        std::vector<uint16_t> users(layers_[i].users.size());
        for (int32_t expert = 0; expert < n_expert_; ++expert) {
            const ExpertKey wanted = key(static_cast<int>(i), expert);
            const State state = at(wanted).state;
            if (at(wanted).holds < 0) throw std::logic_error("released more often than held");
            if (order_ != nullptr && order_->contains(wanted) != (state == State::resident))
                throw std::logic_error("the order of use and the resident experts differ");
            n_resident += state == State::resident;
            if (state == State::absent) continue;
            const auto [first, last] = pages(wanted);
            for (int64_t page = first; page < last; ++page) ++users[static_cast<size_t>(page)];
        }
        if (users != layers_[i].users) throw std::logic_error("pages are not counted right");
        n_bytes += kPage * (static_cast<int64_t>(users.size()) - std::count(users.begin(), users.end(), 0));
    }
    if (n_bytes != resident_bytes_) throw std::logic_error("bytes are not counted right");
    if (order_ != nullptr && order_->size() != n_resident) throw std::logic_error("experts are not counted right");
}

void ExpertMemory::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
        changed_.notify_all();
    }
    reader_.stop();
}

}  // namespace moe
