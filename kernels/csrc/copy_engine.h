// Copies from host memory into slots, beside everything else. Batches run and finish in the order of their
// submission. One thread at a time may call an engine; a CUDA engine works from any.

#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace moe {

struct Copy {
    uint8_t* to;
    const uint8_t* from;
    int64_t n_bytes;
};

class CopyEngine {
 public:
    virtual ~CopyEngine() = default;
    // The copies of a batch run one after the other. Returns its ticket: 1 for the first batch, and so on.
    virtual int64_t submit(const std::vector<Copy>& copies) = 0;
    // Whether the oldest batch not yet reported has finished: if so, the seconds it took once it had begun.
    virtual std::optional<double> poll() = 0;
    // Gives up what has not begun where that is possible, and returns once no memory is touched any more.
    virtual void stop() = 0;
};

// memcpy on a thread of its own. `held`: nothing begins until release() lets it, for tests.
class HostCopyEngine final : public CopyEngine {
 public:
    explicit HostCopyEngine(bool held);
    ~HostCopyEngine() override;
    int64_t submit(const std::vector<Copy>& copies) override;
    std::optional<double> poll() override;
    void stop() override;
    void release(int64_t n_batch);  // lets that many more batches run

 private:
    void run();

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::vector<Copy>> waiting_;
    std::deque<double> finished_;
    const bool held_;
    int64_t allowed_ = 0, submitted_ = 0;
    bool stop_ = false;
    std::thread thread_;
};

// Copies rows, ascending, to where they lie one behind the other, in as few copies as neighbours allow. A copy does not
// cross from one piece of `rows_at_once` rows into the next. Returns the number of copies.
// on_device: in the order of `stream`, a CUDA stream of the current context; otherwise at once.
int64_t copy_rows(uint8_t* to, const uint8_t* from, int64_t row_bytes, const std::vector<int64_t>& rows,
                  int64_t rows_at_once, bool on_device, void* stream);

// Makes another engine's copies take as long as over a slower link, to imitate one: a batch's last copy, which tells
// others of the rest, waits for that. Nobody else may use the other engine.
class ThrottledCopyEngine final : public CopyEngine {
 public:
    ThrottledCopyEngine(CopyEngine& engine, double bytes_per_second);
    int64_t submit(const std::vector<Copy>& copies) override;
    std::optional<double> poll() override;
    void stop() override;

 private:
    using Clock = std::chrono::steady_clock;
    struct Batch {
        std::vector<Copy> copies;
        Clock::time_point submitted;
    };
    void begin();

    CopyEngine& engine_;
    const double bytes_per_second_;
    std::deque<Batch> batches_;  // the first one runs
    bool copied_ = false, telling_ = false;  // of the first one: all but the last copy; the last one runs
    Clock::time_point begun_{}, due_{};      // likewise
    int64_t submitted_ = 0;
};

class CudaDriver;

// Asynchronous copies on a stream of its own in a device's primary context. The driver is loaded at run time.
// From page-locked memory; from other memory the driver copies in pieces, and submit() takes that long.
class CudaCopyEngine final : public CopyEngine {
 public:
    explicit CudaCopyEngine(int device);  // std::runtime_error without a driver or the device
    ~CudaCopyEngine() override;
    int64_t submit(const std::vector<Copy>& copies) override;
    std::optional<double> poll() override;
    void stop() override;

 private:
    struct Batch {
        void *begun, *ended;  // events
    };
    Batch events();
    void destroy();

    const CudaDriver& cuda_;
    int device_ = 0;
    void *context_ = nullptr, *stream_ = nullptr;
    std::deque<Batch> running_;
    std::vector<Batch> spare_;
    int64_t submitted_ = 0;
};

}  // namespace moe
