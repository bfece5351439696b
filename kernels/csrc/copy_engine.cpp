#include "copy_engine.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

namespace moe {

namespace {

// A number may be an entry of the slot table: others read it at any time, and then what was copied before.
void perform(const Copy& copy) {
    if (copy.n_bytes == sizeof(int32_t))
        __atomic_store_n(reinterpret_cast<int32_t*>(copy.to), *reinterpret_cast<const int32_t*>(copy.from),
                         __ATOMIC_RELEASE);
    else
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.n_bytes));
}

}  // namespace

HostCopyEngine::HostCopyEngine(bool held) : held_(held), thread_([this] { run(); }) {}

HostCopyEngine::~HostCopyEngine() { stop(); }

int64_t HostCopyEngine::submit(const std::vector<Copy>& copies) {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(copies);
    wake_.notify_all();
    return ++submitted_;
}

std::optional<double> HostCopyEngine::poll() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (finished_.empty()) return std::nullopt;
    const double seconds = finished_.front();
    finished_.pop_front();
    return seconds;
}

void HostCopyEngine::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        wake_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
}

void HostCopyEngine::release(int64_t n_batch) {
    std::lock_guard<std::mutex> lock(mutex_);
    allowed_ += n_batch;
    wake_.notify_all();
}

void HostCopyEngine::run() {
    using Clock = std::chrono::steady_clock;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return stop_ || (!waiting_.empty() && (!held_ || allowed_ > 0)); });
        if (stop_) return;
        const std::vector<Copy> copies = std::move(waiting_.front());
        waiting_.pop_front();
        if (held_) --allowed_;
        lock.unlock();
        const auto start = Clock::now();
        for (const Copy& copy : copies) perform(copy);
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        lock.lock();
        finished_.push_back(seconds);
    }
}

ThrottledCopyEngine::ThrottledCopyEngine(CopyEngine& engine, double bytes_per_second)
    : engine_(engine), bytes_per_second_(bytes_per_second) {
    if (!(bytes_per_second > 0)) throw std::invalid_argument("a link's bytes per second are more than 0");
}

int64_t ThrottledCopyEngine::submit(const std::vector<Copy>& copies) {
    batches_.push_back({copies, Clock::now()});
    if (batches_.size() == 1) begin();
    return ++submitted_;
}

void ThrottledCopyEngine::begin() {
    const std::vector<Copy>& copies = batches_.front().copies;
    int64_t n_bytes = 0;
    for (const Copy& copy : copies) n_bytes += copy.n_bytes;
    // The link is busy without a pause, however late poll() is called.
    begun_ = std::max(batches_.front().submitted, due_);
    due_ = begun_ + std::chrono::duration_cast<Clock::duration>(
                        std::chrono::duration<double>(static_cast<double>(n_bytes) / bytes_per_second_));
    engine_.submit({copies.begin(), copies.end() - 1});
    copied_ = telling_ = false;
}

std::optional<double> ThrottledCopyEngine::poll() {
    if (batches_.empty()) return std::nullopt;
    const bool ended = engine_.poll().has_value();
    if (telling_) {
        if (!ended) return std::nullopt;
        const double seconds = std::chrono::duration<double>(due_ - begun_).count();
        batches_.pop_front();
        if (!batches_.empty()) begin();
        return seconds;
    }
    copied_ = copied_ || ended;
    if (copied_ && Clock::now() >= due_) {
        engine_.submit({batches_.front().copies.back()});
        telling_ = true;
    }
    return std::nullopt;
}

void ThrottledCopyEngine::stop() {
    batches_.clear();
    engine_.stop();
}

// The functions of libcuda.so.1 that are needed, with the types of cuda.h: handles are pointers, results int.
class CudaDriver {
 public:
    static const CudaDriver& get() {
        static const CudaDriver driver;
        return driver;
    }

    void check(int result, const char* call) const {
        if (result == kSuccess) return;
        const char* text = nullptr;
        get_error_string(result, &text);
        throw std::runtime_error(std::string(call) + ": " + (text ? text : "unknown error") + " (" +
                                 std::to_string(result) + ")");
    }

    static constexpr int kSuccess = 0, kNotReady = 600;
    static constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING

    int (*init)(unsigned);
    int (*get_error_string)(int, const char**);
    int (*device_get)(int*, int);
    int (*primary_context_retain)(void**, int);
    int (*primary_context_release)(int);
    int (*context_set_current)(void*);
    int (*stream_create)(void**, unsigned);
    int (*stream_synchronize)(void*);
    int (*stream_destroy)(void*);
    int (*event_create)(void**, unsigned);
    int (*event_record)(void*, void*);
    int (*event_query)(void*);
    int (*event_elapsed)(float*, void*, void*);
    int (*event_destroy)(void*);
    int (*copy_to_device)(unsigned long long, const void*, size_t, void*);

 private:
    CudaDriver() {
        library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library_ == nullptr) throw std::runtime_error(std::string("the CUDA driver: ") + dlerror());
        load(init, "cuInit");
        load(get_error_string, "cuGetErrorString");
        load(device_get, "cuDeviceGet");
        load(primary_context_retain, "cuDevicePrimaryCtxRetain");
        load(primary_context_release, "cuDevicePrimaryCtxRelease_v2");
        load(context_set_current, "cuCtxSetCurrent");
        load(stream_create, "cuStreamCreate");
        load(stream_synchronize, "cuStreamSynchronize");
        load(stream_destroy, "cuStreamDestroy_v2");
        load(event_create, "cuEventCreate");
        load(event_record, "cuEventRecord");
        load(event_query, "cuEventQuery");
        load(event_elapsed, "cuEventElapsedTime");
        load(event_destroy, "cuEventDestroy_v2");
        load(copy_to_device, "cuMemcpyHtoDAsync_v2");
        check(init(0), "cuInit");
    }

    template <typename Function>
    void load(Function& function, const char* name) {
        function = reinterpret_cast<Function>(dlsym(library_, name));
        if (function == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
    }

    void* library_;
};

int64_t copy_rows(uint8_t* to, const uint8_t* from, int64_t row_bytes, const std::vector<int64_t>& rows,
                  int64_t rows_at_once, bool on_device, void* stream) {
    int64_t n_copy = 0;
    for (size_t first = 0, last = 0; first < rows.size(); first = last, ++n_copy) {
        do ++last;
        while (last < rows.size() && rows[last] == rows[last - 1] + 1 && rows[last] % rows_at_once != 0);
        const Copy copy = {to + static_cast<int64_t>(first) * row_bytes, from + rows[first] * row_bytes,
                           static_cast<int64_t>(last - first) * row_bytes};
        if (on_device) {
            const CudaDriver& cuda = CudaDriver::get();
            cuda.check(cuda.copy_to_device(reinterpret_cast<unsigned long long>(copy.to), copy.from,
                                           static_cast<size_t>(copy.n_bytes), stream),
                       "cuMemcpyHtoDAsync");
        } else {
            std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.n_bytes));
        }
    }
    return n_copy;
}

CudaCopyEngine::CudaCopyEngine(int device) : cuda_(CudaDriver::get()) {
    cuda_.check(cuda_.device_get(&device_, device), "cuDeviceGet");
    cuda_.check(cuda_.primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
    try {
        cuda_.check(cuda_.context_set_current(context_), "cuCtxSetCurrent");
        cuda_.check(cuda_.stream_create(&stream_, CudaDriver::kNonBlocking), "cuStreamCreate");
    } catch (...) {
        destroy();
        throw;
    }
}

CudaCopyEngine::~CudaCopyEngine() { destroy(); }

// Results do not matter any more: where the context is broken every call fails.
void CudaCopyEngine::destroy() {
    cuda_.context_set_current(context_);
    if (stream_ != nullptr) cuda_.stream_synchronize(stream_);
    spare_.insert(spare_.end(), running_.begin(), running_.end());
    for (const Batch& batch : spare_) {
        cuda_.event_destroy(batch.begun);
        cuda_.event_destroy(batch.ended);
    }
    if (stream_ != nullptr) cuda_.stream_destroy(stream_);
    cuda_.primary_context_release(device_);
}

CudaCopyEngine::Batch CudaCopyEngine::events() {
    if (spare_.empty()) {
        Batch batch{};
        cuda_.check(cuda_.event_create(&batch.begun, 0), "cuEventCreate");
        cuda_.check(cuda_.event_create(&batch.ended, 0), "cuEventCreate");
        return batch;
    }
    const Batch batch = spare_.back();
    spare_.pop_back();
    return batch;
}

int64_t CudaCopyEngine::submit(const std::vector<Copy>& copies) {
    cuda_.check(cuda_.context_set_current(context_), "cuCtxSetCurrent");
    running_.push_back(events());
    cuda_.check(cuda_.event_record(running_.back().begun, stream_), "cuEventRecord");
    for (const Copy& copy : copies)
        cuda_.check(cuda_.copy_to_device(reinterpret_cast<unsigned long long>(copy.to), copy.from,
                                         static_cast<size_t>(copy.n_bytes), stream_),
                    "cuMemcpyHtoDAsync");
    cuda_.check(cuda_.event_record(running_.back().ended, stream_), "cuEventRecord");
    return ++submitted_;
}

std::optional<double> CudaCopyEngine::poll() {
    if (running_.empty()) return std::nullopt;
    cuda_.check(cuda_.context_set_current(context_), "cuCtxSetCurrent");
    const Batch batch = running_.front();
    const int result = cuda_.event_query(batch.ended);
    if (result == CudaDriver::kNotReady) return std::nullopt;
    cuda_.check(result, "cuEventQuery");
    float milliseconds = 0;
    cuda_.check(cuda_.event_elapsed(&milliseconds, batch.begun, batch.ended), "cuEventElapsedTime");
    spare_.push_back(batch);
    running_.pop_front();
    return milliseconds / 1000.0;
}

void CudaCopyEngine::stop() {
    cuda_.check(cuda_.context_set_current(context_), "cuCtxSetCurrent");
    cuda_.check(cuda_.stream_synchronize(stream_), "cuStreamSynchronize");
}

}  // namespace moe
