#include "decode_worker.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <stdexcept>

namespace moe {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr int kSpins = 1000;  // between looks at anything but the awaited number
// A GPU is far quicker. Who waits for longer has a slow device or a busy machine, and need not burn a processor.
constexpr auto kPatience = std::chrono::milliseconds(5);
constexpr auto kNap = std::chrono::microseconds(50);
constexpr auto kIdlePoll = std::chrono::microseconds(200);  // of copies, while no step is pending

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Leaves the thread's work when the host wants it to stop.
struct Stopped {};

std::vector<int> classes_of(const std::vector<WorkerLayer>& layers) {
    std::vector<int> classes;
    for (const WorkerLayer& layer : layers) classes.push_back(layer.slot_class);
    return classes;
}

}  // namespace

DecodeWorker::DecodeWorker(WorkerSpec spec, ThreadPool& pool, CopyEngine& copies)
    : spec_(std::move(spec)),
      pool_(pool),
      copies_(copies),
      cache_(spec_.n_expert, classes_of(spec_.layers), spec_.n_slot, spec_.policy),
      unused_(spec_.layers.size() * static_cast<size_t>(spec_.n_expert)),
      uses_(unused_.size()),
      lookahead_(pool, spec_.lookahead_bytes),
      in_time_(spec_.layers.size(), 1),
      passed_over_(spec_.layers.size()),
      fate_(static_cast<size_t>(spec_.n_expert)),
      chosen_(fate_.size()),
      cost_(spec_.rates),
      prompt_cost_(spec_.rates),
      timeline_(kTimeline),
      copied_(kTimeline) {
    for (const WorkerLayer& layer : spec_.layers) {
        expert_bytes_.push_back(0);
        for (const ExpertPart& part : layer.parts) expert_bytes_.back() += part.n_bytes;
    }
    reset_stats();
    thread_ = std::thread([this] { run(); });
}

DecodeWorker::~DecodeWorker() {
    try {
        stop();
    } catch (...) {  // copies that cannot be ended: the device is broken, and said so before
    }
}

void DecodeWorker::stop() {
    std::lock_guard<std::mutex> one_at_a_time(stop_mutex_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const bool again = stop_.exchange(true);  // then the mailbox may be gone
        if (!again && !pending_.empty()) store_release(spec_.mailbox.control + Mailbox::kAbort, 1);
        wake_.notify_all();
        arrived_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
    copies_.stop();
}

int64_t DecodeWorker::now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

void DecodeWorker::run() {
    Step step;
    struct AtTheEnd {
        DecodeWorker* worker;
        ~AtTheEnd() {
            worker->lookahead_.end();
            worker->pool_.stay_awake(false);
        }
    };
    try {
        const AtTheEnd at_the_end{this};
        while (next_step(&step)) {
            const int n_layer = step.posted ? static_cast<int>(spec_.layers.size()) : 0;
            for (int layer = 0; layer < n_layer; ++layer) {
                layer_ = layer;
                activity_ = "waits for the GPU's message of layer";
                await(spec_.mailbox.message(step.number, layer).header, spec_.mailbox.seq(step.number, layer));
                await_whole(step, layer);
                handle(step, layer);
            }
            start_background();
            activity_ = "waits for the GPU's tokens after layer";
            await(spec_.mailbox.step_tokens(step.number).header,
                  spec_.mailbox.seq(step.number, spec_.mailbox.n_layer));
            publish(step);
        }
    } catch (const Stopped&) {
    } catch (const std::exception& error) {
        std::lock_guard<std::mutex> lock(mutex_);
        // What comes after a wait that was given up makes no sense.
        const bool gave_up = load_acquire(spec_.mailbox.control + Mailbox::kGpuError) != 0;
        fail((gave_up ? "the GPU got no answer in time; then: " : "") + std::string(error.what()));
    }
}

bool DecodeWorker::next_step(Step* step) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (pending_.empty()) {
        if (stop_) return false;
        pool_.stay_awake(false);
        activity_ = "sleeps after layer";
        poll_copies();
        fill_some(spec_.fill_bytes, false);
        if (in_flight_.empty()) {
            arrived_.notify_all();
            wake_.wait(lock);
        } else {
            wake_.wait_for(lock, kIdlePoll);
        }
    }
    *step = pending_.front();
    pool_.stay_awake(step->posted);
    return true;
}

void DecodeWorker::publish(const Step& step) {
    const Mailbox::Tokens record = spec_.mailbox.step_tokens(step.number);
    if (record.header[Mailbox::kTokens] != step.n_token)
        throw std::runtime_error("step " + std::to_string(step.number) + " ended with " +
                                 std::to_string(record.header[Mailbox::kTokens]) + " tokens instead of " +
                                 std::to_string(step.n_token));
    {
        std::lock_guard<std::mutex> lock(stats_mutex_);
        stats_.steps += !step.idle;
        const int64_t before = published_;
        published_ = now();
        if (follows_ && !step.idle) {
            // The system may take a processor away, for longer than steps differ.
            const int64_t took = published_ - before, ns = usual_ns_ > 0 ? std::min(took, 2 * usual_ns_) : took;
            usual_ns_ = usual_ns_ > 0 ? usual_ns_ + (ns - usual_ns_) / 16 : ns;
            for (auto* timed : {&stats_.timed[step_prefetches_], &stats_.timed_late[step.allow_late],
                                &stats_.timed_pulled[step.pull]}) {
                ++timed->first;
                timed->second += ns;
            }
        }
        step_prefetches_ = false;
        if (!step.posted && !step.idle)
            for (int64_t& hits : stats_.hits) hits += step.n_token * spec_.mailbox.top_k;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    StepTokens& result = tokens_[static_cast<size_t>(step.number % Mailbox::kRing)];
    result.step = step.number;
    result.bad = record.header[Mailbox::kBad] != 0;
    result.tokens.assign(record.tokens, record.tokens + step.n_token);
    pending_.pop_front();
    follows_ = !pending_.empty();
    ++progress_;
    arrived_.notify_all();
}

void DecodeWorker::await(const int64_t* header, int64_t seq) {
    for (const auto start = Clock::now();;) {
        for (int spin = 0; spin < kSpins; ++spin) {
            const int64_t seen = load_acquire(header);
            if (seen == seq) {
                seen_ = now();
                end_lookahead();
                ++progress_;
                return;
            }
            if (seen > seq)
                throw std::runtime_error("the GPU posted number " + std::to_string(seen) + " where " +
                                         std::to_string(seq) + " was due");
            pause();
        }
        look_around();
        if (lookahead_.finished()) end_lookahead();  // others may want the pool
        if (Clock::now() - start > kPatience) std::this_thread::sleep_for(kNap);
    }
}

void DecodeWorker::await_whole(const Step& step, int layer) {
    for (;; look_around())
        for (int spin = 0; spin < kSpins; ++spin) {
            if (whole(step, layer)) return;
            pause();
        }
}

// Whether all of a message is there whose number has been seen.
bool DecodeWorker::whole(const Step& step, int layer) const {
    std::atomic_signal_fence(std::memory_order_seq_cst);  // what was read before is read again
    const Mailbox& mailbox = spec_.mailbox;
    const Mailbox::Message message = mailbox.message(step.number, layer);
    const int64_t seq = mailbox.seq(step.number, layer), n_token = message.header[Mailbox::kTokens];
    const int64_t n_missed = message.header[Mailbox::kMissed], n_ahead = message.header[Mailbox::kAhead];
    if (n_token < 1 || n_token > mailbox.max_batch) return false;
    const uint32_t sum = mailbox.sum(message, n_token, std::min(n_ahead, Mailbox::kMaxAhead));
    if (message.header[Mailbox::kCheck] != Mailbox::check(seq, sum)) return false;
    const int64_t n_x = n_missed > 0 ? n_token * mailbox.hidden : 0;
    for (int64_t first = 0; first < n_x; first += Mailbox::kXBlock) {
        const uint32_t block = sum_of_words(mailbox.x + first, std::min(Mailbox::kXBlock, n_x - first));
        if (mailbox.x_checks[first / Mailbox::kXBlock * 8] != Mailbox::check(seq, block)) return false;
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    return true;
}

// While waiting for anything: at what else may have happened. Others may have the processor, if they want it.
void DecodeWorker::look_around() {
    if (stop_) throw Stopped();
    if (load_acquire(spec_.mailbox.control + Mailbox::kAbort) != 0)
        throw std::runtime_error("the decode step was aborted");
    poll_copies();
    std::this_thread::yield();
}

void DecodeWorker::poll_copies() {
    while (const std::optional<double> seconds = copies_.poll()) {
        const Flight flight = in_flight_.front();
        in_flight_.pop_front();
        cache_.complete(flight.key, flight.filled);
        const auto [layer, expert] = cache_.layer_and_expert(flight.key);
        const ExpertLayer& experts = spec_.layers[static_cast<size_t>(layer)].experts;
        if (experts.memory != nullptr) experts.memory->release(experts.memory_layer, &expert, 1);
        ++progress_;
        std::lock_guard<std::mutex> lock(stats_mutex_);
        stats_.copied_bytes += flight.n_bytes;
        // Copies run one after the other: this began when it was submitted, or when the one before had ended.
        const int64_t begun = std::max(flight.submitted, copied_until_);
        copied_until_ = begun + static_cast<int64_t>(*seconds * 1e9);
        copied_[static_cast<size_t>(n_copied_++ % kTimeline)] = {layer, expert, begun, copied_until_};
        for (MissCost* cost : {&cost_, &prompt_cost_}) cost->note_copy(flight.n_bytes, *seconds, flight.beside_cpu);
    }
}

void DecodeWorker::expect(int64_t step, int64_t n_token, bool allow_late, bool posted, bool pull, bool idle) {
    std::lock_guard<std::mutex> lock(mutex_);
    require_alive();
    if (step != last_expected_ + 1)
        throw std::logic_error("step " + std::to_string(step) + " is expected after step " +
                               std::to_string(last_expected_));
    // Two steps ahead, the GPU could overwrite what has not been read.
    if (pending_.size() >= 2)
        throw std::logic_error("step " + std::to_string(step) + " is expected before step " +
                               std::to_string(step - 2) + " is complete");
    if (n_token < 1 || n_token > spec_.mailbox.max_batch)
        throw std::logic_error("a step of " + std::to_string(n_token) + " tokens, at most " +
                               std::to_string(spec_.mailbox.max_batch) + " are possible");
    pending_.push_back({step, n_token, allow_late, posted, pull, idle});
    last_expected_ = step;
    wake_.notify_all();
}

std::optional<StepTokens> DecodeWorker::wait_tokens(int64_t step, double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    const StepTokens& result = tokens_[static_cast<size_t>(std::max<int64_t>(step, 0) % Mailbox::kRing)];
    if (step < 1 || step > last_expected_ || result.step > step)
        throw std::logic_error("step " + std::to_string(step) + " is not among the last steps expected, up to " +
                               std::to_string(last_expected_));
    const auto start = Clock::now();
    arrived_.wait_for(lock, Seconds(seconds),
                      [&] { return result.step >= step || stop_ || !failure_.empty(); });
    if (result.step == step) return result;
    require_alive();
    watch(step, Seconds(Clock::now() - start).count());
    return std::nullopt;
}

void DecodeWorker::watch(int64_t step, double seconds) {
    std::string reason;
    if (load_acquire(spec_.mailbox.control + Mailbox::kGpuError) != 0) reason = "the GPU got no answer in time";
    still_ = step == watched_step_ && progress_ == watched_progress_ ? still_ + seconds : 0;
    watched_step_ = step;
    watched_progress_ = progress_;
    if (reason.empty() && still_ < spec_.stall_seconds) return;
    if (reason.empty()) {
        char text[64];
        std::snprintf(text, sizeof(text), "nothing has moved for %.2g seconds", still_);
        reason = text;
    }
    fail("decode step " + std::to_string(step) + ": " + reason + "; the worker " + activity_.load() + " " +
         std::to_string(layer_));
    require_alive();
}

void DecodeWorker::fail(const std::string& reason) {
    if (failure_.empty()) failure_ = reason;
    store_release(spec_.mailbox.control + Mailbox::kAbort, 1);
    arrived_.notify_all();
}

void DecodeWorker::require_alive() {
    if (!failure_.empty()) throw std::runtime_error(failure_);
    if (stop_) throw std::runtime_error("the decode worker was stopped");
}

void DecodeWorker::require_idle() {
    require_alive();
    if (!pending_.empty())
        throw std::runtime_error("step " + std::to_string(pending_.front().number) +
                                 " is pending: until its tokens have come the slots are the decode worker's");
}

int64_t DecodeWorker::settle(double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    require_idle();
    arrived_.wait_for(lock, Seconds(seconds), [this] { return unsettled() == 0 || stop_ || !failure_.empty(); });
    require_alive();
    return unsettled();
}

void DecodeWorker::fill(const std::vector<std::pair<int, int>>& best_first) {
    std::lock_guard<std::mutex> lock(mutex_);
    require_idle();
    std::deque<ExpertKey> keys;
    for (const auto& [layer, expert] : best_first) keys.push_back(cache_.key(layer, expert));
    fill_ = std::move(keys);
    wake_.notify_all();
}

std::vector<float> DecodeWorker::use_counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    require_idle();
    std::vector<float> counts;
    for (size_t key = 0; key < unused_.size(); ++key)
        counts.push_back(uses_.at(static_cast<ExpertKey>(key), last_expected_));
    return counts;
}

void DecodeWorker::seed(const std::vector<float>& counts) {
    std::lock_guard<std::mutex> lock(mutex_);
    require_idle();
    if (counts.size() != unused_.size()) throw std::logic_error("one count for each expert is needed");
    for (size_t key = 0; key < counts.size(); ++key) {
        if (!(counts[key] > 0)) continue;
        uses_.set(static_cast<ExpertKey>(key), counts[key]);
        cache_.seed(static_cast<ExpertKey>(key), counts[key]);
    }
}

WorkerStats DecodeWorker::stats() {
    std::lock_guard<std::mutex> lock(stats_mutex_);
    WorkerStats copy = stats_;
    copy.rates = cost_.rates();
    return copy;
}

void DecodeWorker::reset_stats() {
    std::lock_guard<std::mutex> lock(stats_mutex_);
    stats_ = WorkerStats{};
    stats_.hits.assign(spec_.layers.size(), 0);
    for (auto* counts : {&stats_.misses, &stats_.expected, &stats_.missed_experts, &stats_.foreseen,
                         &stats_.prefetched, &stats_.prefetched_in_time, &stats_.prefetched_late})
        counts->assign(spec_.layers.size(), 0);
    n_message_ = n_copied_ = 0;
}

std::vector<TimelineEntry> DecodeWorker::timeline() {
    std::lock_guard<std::mutex> lock(stats_mutex_);
    std::vector<TimelineEntry> entries;
    for (int64_t i = std::max<int64_t>(0, n_message_ - kTimeline); i < n_message_; ++i)
        entries.push_back(timeline_[static_cast<size_t>(i % kTimeline)]);
    return entries;
}

std::vector<CopyEntry> DecodeWorker::copies() {
    std::lock_guard<std::mutex> lock(stats_mutex_);
    std::vector<CopyEntry> entries;
    for (int64_t i = std::max<int64_t>(0, n_copied_ - kTimeline); i < n_copied_; ++i)
        entries.push_back(copied_[static_cast<size_t>(i % kTimeline)]);
    return entries;
}

}  // namespace moe
