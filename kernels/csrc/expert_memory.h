// Routed experts in host memory, read from the model's files: all of them, or as many as a limit allows.
//
// Every layer has a region of address space, [n_expert, slot_bytes], an expert's parts side by side as in a slot.
// Addresses never change. Without a limit everything is read at once. With one, an expert is absent (its pages are
// given back to the system), being read, or resident; what is needed is read then, and the resident experts used
// longest ago leave for it. Absent ones read as anything: who looks at an expert holds it.
//
// Threads     All calls from any thread. hold() waits only for reads, never for others to release: what cannot be
//             made room for is an error.
// Bytes       are counted in whole pages, from when a read begins. The limit is given, or follows the process: a
//             budget for all that is resident of it, less what it has besides experts.
// Failures    of a read are thrown by every later call, as a ReadError with the file's path.

#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "file_reader.h"
#include "host_memory.h"
#include "least_recently_used.h"
#include "moe_cpu.h"
#include "slot_cache.h"

namespace moe {

// One of an expert's matrices: expert e lies `stride * e` bytes behind `offset`.
struct PartInFile {
    int file;
    int64_t offset, stride, n_bytes, slot_offset;
};

struct MemoryLimit {
    int64_t experts = -1;  // bytes of experts at most; -1: all are to be resident
    int64_t process = 0;   // if not 0: resident bytes of the whole process, to which `experts` is adjusted
    int64_t least = 0;     // what experts may have whatever the process takes
};

struct NoRoomError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class ExpertMemory {
 public:
    ExpertMemory(int n_expert, MemoryLimit limit, int n_thread, int64_t chunk_bytes, bool direct);
    ~ExpertMemory() { stop(); }

    int add_file(const std::string& path) { return reader_.add_file(path); }
    // Returns the layer's number. Without a limit its experts begin to be read.
    int add_layer(int64_t slot_bytes, const std::vector<PartInFile>& parts);
    void add_cached(int file, int64_t offset, int64_t n_bytes);  // to be read into the system's cache
    void preload();  // with a limit: the first experts of every layer, as many as fit; without it they come when needed
    bool wait(double seconds);  // whether all of the above has been read by then

    std::shared_ptr<HostMemory> region(int layer) const { return layers_[static_cast<size_t>(layer)].memory; }
    bool is_read(int layer);
    int64_t bytes_done();
    int64_t bytes_total();

    // Reads what is absent and waits. Held experts stay until they are released as often as they were held.
    void hold(int layer, const int32_t* experts, int64_t n);
    void release(int layer, const int32_t* experts, int64_t n);
    int64_t at_once(int layer);  // experts that one caller may hold: half of what fits, at least one
    // Begins to read what is absent, as far as a part of the limit allows.
    void prefetch(int layer, const int32_t* experts, int64_t n);

    struct Counts {
        int64_t limit, resident_bytes, most_resident_bytes, n_resident, n_reading, n_held, n_read, n_dropped;
    };
    Counts counts();
    void check_integrity();  // std::logic_error unless states, pages, holds and bytes agree
    void stop();             // reading ends; what waits throws

 private:
    enum class State : uint8_t { absent, reading, resident };
    struct Expert {
        State state = State::absent;
        int holds = 0;
        int64_t unread = 0;
    };
    struct Layer {
        std::shared_ptr<HostMemory> memory;
        int64_t slot_bytes, unread;
        std::vector<PartInFile> parts;
        std::vector<uint16_t> users;  // by page: experts that have a part of it and are not absent
    };

    ExpertKey key(int layer, int32_t expert) const;
    Expert& at(ExpertKey key) { return experts_[static_cast<size_t>(key)]; }
    Layer& layer_of(ExpertKey key) { return layers_[static_cast<size_t>(key / n_expert_)]; }
    int64_t page_bytes(const Layer& layer) const;
    std::pair<int64_t, int64_t> pages(ExpertKey key) const;
    void begin(ExpertKey key, std::vector<Piece>* pieces);
    void drop(ExpertKey key);
    bool make_room(ExpertKey key);
    bool wait_for_reads(std::unique_lock<std::mutex>& lock, std::vector<Piece>* pieces);
    void arrived(int64_t tag, int64_t n_bytes);
    void adjust();
    void require_alive();

    const int n_expert_;
    const MemoryLimit limit_;
    int64_t allowed_;  // the limit now
    std::chrono::steady_clock::time_point adjusted_{};

    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<Layer> layers_;
    std::vector<Expert> experts_;  // by key
    std::unique_ptr<LeastRecentlyUsed> order_;  // of the resident ones
    std::function<bool(ExpertKey)> may_leave_;
    int64_t resident_bytes_ = 0, most_ = 0, n_read_ = 0, n_dropped_ = 0;
    int64_t total_ = 0, done_ = 0;  // bytes to be read at load
    bool loaded_ = false;
    bool stopped_ = false;
    std::string failure_;

    FileReader reader_;  // last: its threads use the above
};

// Holds experts while it lives.
class HeldExperts {
 public:
    HeldExperts(ExpertMemory& memory, int layer, const int32_t* experts, int64_t n)
        : memory_(memory), layer_(layer), experts_(experts), n_(n) {
        memory_.hold(layer_, experts_, n_);
    }
    ~HeldExperts() { memory_.release(layer_, experts_, n_); }
    HeldExperts(const HeldExperts&) = delete;
    HeldExperts& operator=(const HeldExperts&) = delete;

 private:
    ExpertMemory& memory_;
    const int layer_;
    const int32_t* experts_;
    const int64_t n_;
};

// expert_ffn() for a layer with `memory`: group by group where its experts do not fit at once, while the next group
// is read. Partial sums of groups are added, so results differ by rounding from those of one call.
void expert_ffn_in_groups(ThreadPool& pool, const ExpertLayer& layer, const ExpertFfn& job);

}  // namespace moe
