// The thread that answers a decode step's cache misses through the mailbox while its CUDA graph runs.
//
// Of a layer's missed experts some are fetched into slots for this very step (the GPU computes them late), the
// CPU computes the others from the host's memory; a few of those are fetched behind the answer for later steps.
//
// Who may touch what  While steps are pending, cache, copies and answer belong to the thread alone; else the
//                     host may change the cache, under the lock. Steps begin to be pending in expect() and end
//                     with their tokens, both under the lock.
// Evictions           are decided only while the GPU waits for an answer, which carries them: then no kernel
//                     reads a slot but those of this layer's experts, which are never victims.
// Insertions          The slot table's entry is copied behind the expert's bytes. So the GPU may report a hit
//                     that the thread does not know of yet, and, having routed before, a miss of an expert that
//                     has arrived meanwhile.
// Lookahead           A message also says what the next layer will probably choose. Of these the experts in no slot
//                     are pulled into the CPU's caches until the next message comes (lookahead.h).
// Prefetch            What the next layer will probably choose, is in no slot and can arrive in time is fetched beside
//                     the CPU's work. What the layer after that will probably choose comes before the experts just
//                     computed when something is fetched behind an answer: two layers take longer than a copy.
//                     Predicted experts are not evicted.
// Filling             What slots are to begin with is copied into free ones: between generations several at a time, in
//                     a step one behind a message, if nothing else is on its way. Until it arrives it is a miss.
// Reads               Where not all experts fit the RAM, expert_ffn() holds those it computes, and the thread those
//                     whose copy is in flight.
// Failures            Any exception of the thread, and a standstill found by wait_tokens(), sets the mailbox's
//                     abort, on which every wait of the GPU returns; all later calls throw the reason.

#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "copy_engine.h"
#include "expert_memory.h"
#include "lookahead.h"
#include "mailbox.h"
#include "miss_cost.h"
#include "moe_cpu.h"
#include "slot_cache.h"
#include "use_counts.h"

namespace moe {

// A piece of every expert of a layer: where it lies in the host's memory, and where in a slot.
struct ExpertPart {
    const uint8_t* host;
    int64_t expert_stride, slot_offset, n_bytes;
};

struct WorkerLayer {
    ExpertLayer experts;
    std::vector<ExpertPart> parts;
    int slot_class;
    uint8_t* slots;  // of the class, on the device
    int64_t slot_bytes;
    uint8_t* table;  // int32 [n_expert] on the device
};

// Which misses are fetched for the step itself, where its graph can compute them late. `most`: those that find
// a slot. `balanced`: so many that CPU and copies are finished together. `all`: no slot is an error.
enum class Fetch { none, most, balanced, all };

struct WorkerSpec {
    Mailbox mailbox;
    int n_expert;
    std::vector<WorkerLayer> layers;
    std::vector<int> n_slot;      // by class
    const int32_t* slot_numbers;  // 0, 1, ..., for the slot table's copies
    Fetch fetch;
    // Fetches in flight up to which another may start behind an answer; of one more it is enough that it should be over.
    int64_t max_background;
    bool float_activations;
    Rates rates;
    double stall_seconds;
    int64_t lookahead_bytes;  // by thread (lookahead.h)
    int64_t fill_bytes;       // while no step is pending: on their way, up to which more is begun to fill slots
    PolicySettings policy{};
};

struct WorkerStats {
    int64_t steps = 0;
    std::vector<int64_t> hits, misses;  // pairs by layer, as the GPU reported them
    int64_t cpu_experts = 0, cpu_bytes = 0;
    int64_t fetched_now = 0, fetched_background = 0, copied_bytes = 0;
    // Fetched experts that were used, and that were evicted before.
    int64_t fetched_used = 0, fetched_unused = 0;
    int64_t cpu_ns = 0;        // in expert_ffn
    int64_t copy_wait_ns = 0;  // answers waited for copies after the CPU was done
    // Experts by layer, where there were predictions: expected to be missed, missed, and both.
    std::vector<int64_t> expected, missed_experts, foreseen;
    int64_t pulled_bytes = 0;  // into the CPU's caches
    // By layer: experts prefetched into slots; those chosen when their layer came, in time and too late; the rest
    // was wasted.
    std::vector<int64_t> prefetched, prefetched_in_time, prefetched_late;
    // Steps that followed another without delay, and their nanoseconds, at most twice the usual: without and with
    // prefetch; without and with misses that the GPU may compute late; without and with pulling.
    std::array<std::pair<int64_t, int64_t>, 2> timed{}, timed_late{}, timed_pulled{};
    Rates rates{};
};

struct TimelineEntry {
    int64_t seq, seen, answered;  // nanoseconds of the steady clock; answered 0: nothing was missed
    int64_t begun, computed;      // the same, of the CPU's part; 0: it has none
    int64_t n_hit, n_cpu, n_now;  // pairs, and experts
};

// An expert's way into its slot, in nanoseconds of the steady clock.
struct CopyEntry {
    int64_t layer, expert, begun, ended;
};

struct StepTokens {
    int64_t step = 0;
    bool bad = false;
    std::vector<int32_t> tokens;
};

class DecodeWorker {
 public:
    DecodeWorker(WorkerSpec spec, ThreadPool& pool, CopyEngine& copies);
    ~DecodeWorker();
    DecodeWorker(const DecodeWorker&) = delete;
    DecodeWorker& operator=(const DecodeWorker&) = delete;
    void stop();

    // posted: the layers send messages; false if all experts are in slots and nothing is to be learnt.
    // pull: into the CPU's caches what is predicted. idle: none of the tokens is real, so that nothing is counted.
    void expect(int64_t step, int64_t n_token, bool allow_late, bool posted = true, bool pull = true,
                bool idle = false);
    // Nothing if the tokens do not come within the time. Standstills are counted in the time spent here.
    std::optional<StepTokens> wait_tokens(int64_t step, double seconds);

    // Calls body(cache) while no step is pending; throws std::runtime_error if one is.
    template <typename Body>
    auto while_idle(Body&& body) {
        std::unique_lock<std::mutex> lock(mutex_);
        require_idle();
        return body(cache_);
    }
    // Experts that are in flight or yet to be filled; waits up to that time until there are none.
    int64_t settle(double seconds);

    // Begins to copy (layer, expert) into free slots, the first ones first; those that find none are left out.
    void fill(const std::vector<std::pair<int, int>>& best_first);

    // How often each expert was used lately, by key; and to begin with the counts of an earlier run.
    std::vector<float> use_counts();
    void seed(const std::vector<float>& counts);

    WorkerStats stats();
    void reset_stats();
    std::vector<TimelineEntry> timeline();
    std::vector<CopyEntry> copies();

 private:
    struct Step {
        int64_t number, n_token;
        bool allow_late, posted, pull, idle;
    };
    struct Flight {
        ExpertKey key;
        int64_t n_bytes;
        bool beside_cpu, filled;
        int64_t submitted;
    };

    static int64_t now();  // nanoseconds of the steady clock
    void run();
    bool next_step(Step* step);
    void publish(const Step& step);
    void await(const int64_t* header, int64_t seq);
    void look_around();
    void poll_copies();

    void await_whole(const Step& step, int layer);
    bool whole(const Step& step, int layer) const;
    void handle(const Step& step, int layer);
    void read_message(const Step& step, int layer, const Mailbox::Message& message);
    void answer(const Step& step, int layer, const Mailbox::Message& message);
    void keep_foreseen(const Step& step, int layer, const Mailbox::Message& message);
    bool can_come(ExpertKey key) const;
    bool may_prefetch(int layer, const Mailbox::Message& message) const;
    bool reads_disk(int layer) const;
    void prefetch_next(const Step& step, int layer, const Mailbox::Message& message);
    void start_background(int64_t until = std::numeric_limits<int64_t>::max());
    void read_ahead(int layer);
    void divide(const Step& step, int layer);
    void compute(const Step& step, int layer, const Mailbox::Message& message);
    void note_choices(const Step& step, int layer, const Mailbox::Message& message);
    void await_late();
    void admit(const Step& step, int layer, const Mailbox::Message& message, double seconds);
    bool worth_prefetching(int layer);
    void score_prefetches(int layer);
    bool reserve(ExpertKey key, SlotCache::Evict evict, double least_more_uses = SlotCache::kAnyUses);
    void start_fetch(ExpertKey key, bool filled = false);
    int64_t bytes_in_flight() const;
    double link_room(const Step& step, int layer) const;
    int64_t in_flight_after(double seconds, double bytes_per_second) const;
    void fill_some(int64_t n_bytes, bool in_step);
    int64_t unsettled() const { return static_cast<int64_t>(in_flight_.size() + fill_.size()); }
    void look_ahead(const Step& step, int layer, const Mailbox::Message& message);
    void end_lookahead();
    void note_message(int layer);
    void note_use(ExpertKey key);

    void require_idle();
    void require_alive();
    void fail(const std::string& reason);
    void watch(int64_t step, double seconds);

    WorkerSpec spec_;
    ThreadPool& pool_;
    CopyEngine& copies_;
    std::vector<int64_t> expert_bytes_;  // by layer

    std::mutex mutex_;
    std::condition_variable wake_, arrived_;  // for the thread, for the host
    std::deque<Step> pending_;
    int64_t last_expected_ = 0;
    std::array<StepTokens, Mailbox::kRing> tokens_;
    std::string failure_;
    std::atomic<bool> stop_{false};

    // What wait_tokens() sees of the thread.
    std::atomic<int64_t> progress_{0};
    std::atomic<const char*> activity_{"sleeps"};
    std::atomic<int> layer_{0};
    int64_t watched_step_ = 0, watched_progress_ = 0;
    double still_ = 0;

    SlotCache cache_;
    std::deque<Flight> in_flight_;
    std::deque<ExpertKey> fill_;  // what slots are to begin with, the best first
    std::vector<bool> unused_;    // by key: fetched and not used yet
    UseCounts uses_;
    Lookahead lookahead_;
    std::vector<int32_t> expected_;  // experts that the next layer will probably miss, the likeliest first
    bool predicted_ = false;         // whether there was a prediction
    std::vector<ExpertKey> prefetches_;  // of this step, whose layer has not come
    std::vector<double> in_time_;        // by layer: the share of prefetches that were chosen in time, lately
    std::vector<int64_t> passed_over_;   // by layer: chances not taken since the last prefetch
    bool step_prefetches_ = false, follows_ = false;  // the step at hand: prefetches; began as the last one ended
    int64_t published_ = 0, usual_ns_ = 0;            // when the last step was, and what one takes lately, nanoseconds

    // The layer step at hand.
    enum class Fate : uint8_t { none, cpu, late };
    std::vector<Fate> fate_;         // by expert
    std::vector<bool> chosen_;       // by expert
    std::vector<ExpertKey> missed_;  // distinct, those used most lately first
    std::vector<ExpertKey> fetches_;
    std::deque<ExpertKey> background_;  // have slots, and are not on their way yet
    int64_t driver_ns_ = 0;             // that starting one takes, lately
    std::vector<int32_t> token_, expert_;  // what the CPU computes
    std::vector<float> weight_;
    int64_t n_missed_ = 0, n_evicted_ = 0;
    int64_t seen_ = 0, answered_ = 0;  // when its message was, and the one before if anything was missed, nanoseconds
    double gpu_seconds_ = 0;           // from an answer to the step's next message, lately
    TimelineEntry entry_{};
    std::vector<Copy> batch_;

    std::mutex stats_mutex_;  // taken last
    WorkerStats stats_;
    // Many tokens that share experts are bound by arithmetic: other rates.
    MissCost& cost_of(const Step& step) { return step.n_token > kFewTokens ? prompt_cost_ : cost_; }
    const MissCost& cost_of(const Step& step) const { return step.n_token > kFewTokens ? prompt_cost_ : cost_; }
    static constexpr int64_t kFewTokens = 8;
    MissCost cost_, prompt_cost_;
    // A layer is prefetched for while this share of its prefetches is of use, averaged over about 16; then at every
    // so many chances.
    static constexpr double kInTime = 0.3, kScoreStep = 1.0 / 16;
    static constexpr int64_t kPassOver = 64;
    // The GPU needs more from an answer to the next message: 22 us on an H200 for the layers of small models.
    static constexpr int64_t kDriverTime = 15'000;
    static constexpr double kLookUp = 10e-6;  // seconds before its message, at most, that the GPU looks up slots
    static constexpr double kNewest = 1.0 / 16, kLongLayer = 2e-3;  // seconds; more is an interruption
    static constexpr int64_t kTimeline = 4096;
    std::vector<TimelineEntry> timeline_;  // a ring
    int64_t n_message_ = 0;
    std::vector<CopyEntry> copied_;  // a ring
    int64_t n_copied_ = 0, copied_until_ = 0;

    std::mutex stop_mutex_;
    std::thread thread_;
};

}  // namespace moe
