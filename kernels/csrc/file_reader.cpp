#include "file_reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>

namespace moe {

namespace {

constexpr int64_t kAlign = 4096;  // of direct reads: no block device asks for more

int64_t round_down(int64_t n) { return n / kAlign * kAlign; }
int64_t round_up(int64_t n) { return round_down(n + kAlign - 1); }

std::string about(const std::string& path, int64_t offset, const std::string& what) {
    return path + ": cannot be read at offset " + std::to_string(offset) + ": " + what;
}

}  // namespace

struct FileReader::Buffer {
    std::unique_ptr<uint8_t, decltype(&std::free)> data{nullptr, &std::free};
    uint8_t* get(int64_t n_bytes) {
        if (data == nullptr) data.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlign, static_cast<size_t>(n_bytes))));
        if (data == nullptr) throw std::bad_alloc();
        return data.get();
    }
};

FileReader::FileReader(int n_thread, int64_t chunk_bytes, bool direct, Done done, Failed failed)
    : chunk_bytes_(round_up(chunk_bytes)), direct_(direct), done_(std::move(done)), failed_(std::move(failed)) {
    for (int i = 0; i < n_thread; ++i) threads_.emplace_back([this] { run(); });
}

FileReader::~FileReader() {
    stop();
    for (File& file : files_) {
        if (file.map != nullptr) munmap(file.map, static_cast<size_t>(file.n_bytes));
        if (file.cached >= 0) close(file.cached);
        if (file.direct >= 0) close(file.direct);
    }
}

int FileReader::add_file(const std::string& path) {
    const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    if (descriptor < 0 || fstat(descriptor, &status) != 0) {
        const int error = errno;
        if (descriptor >= 0) close(descriptor);
        throw ReadError(path + ": cannot be opened: " + std::strerror(error));
    }
    std::lock_guard<std::mutex> lock(mutex_);
    File& file = files_.emplace_back();
    file.path = path;
    file.cached = descriptor;
    file.n_bytes = status.st_size;
#ifdef O_DIRECT
    if (direct_) file.direct = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
    void* map = file.n_bytes > 0 ? mmap(nullptr, static_cast<size_t>(file.n_bytes), PROT_READ, MAP_SHARED, descriptor, 0)
                                 : MAP_FAILED;
    if (map != MAP_FAILED) file.map = static_cast<uint8_t*>(map);
    return static_cast<int>(files_.size()) - 1;
}

void FileReader::submit(std::vector<Piece> pieces, bool urgent) {
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
        return std::tie(a.file, a.offset) < std::tie(b.file, b.offset);
    });
    std::deque<Chunk> chunks;
    int64_t n_bytes = 0;  // of the last chunk
    for (Piece piece : pieces) {
        while (piece.n_bytes > 0) {
            Piece part = piece;
            part.n_bytes = std::min(piece.n_bytes, chunk_bytes_);
            const Piece* last = chunks.empty() ? nullptr : &chunks.back().back();
            const bool joins = last != nullptr && last->file == part.file && n_bytes + part.n_bytes <= chunk_bytes_ &&
                               last->offset + last->n_bytes == part.offset &&
                               (last->to == nullptr) == (part.to == nullptr);
            if (!joins) {
                chunks.emplace_back();
                n_bytes = 0;
            }
            chunks.back().push_back(part);
            n_bytes += part.n_bytes;
            piece.offset += part.n_bytes;
            piece.n_bytes -= part.n_bytes;
            if (piece.to != nullptr) piece.to += part.n_bytes;
        }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    std::deque<Chunk>& queue = urgent ? urgent_ : later_;
    for (Chunk& chunk : chunks) queue.push_back(std::move(chunk));
    wake_.notify_all();
}

void FileReader::hurry(const std::function<bool(int64_t)>& is_urgent) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto first = std::stable_partition(later_.begin(), later_.end(), [&](const Chunk& chunk) {
        return std::none_of(chunk.begin(), chunk.end(), [&](const Piece& piece) { return is_urgent(piece.tag); });
    });
    std::move(first, later_.end(), std::back_inserter(urgent_));
    later_.erase(first, later_.end());
}

void FileReader::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        urgent_.clear();
        later_.clear();
        wake_.notify_all();
    }
    for (std::thread& thread : threads_)
        if (thread.joinable()) thread.join();
}

void FileReader::run() {
    Buffer buffer;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return stop_ || !urgent_.empty() || !later_.empty(); });
        if (stop_) return;
        std::deque<Chunk>& queue = urgent_.empty() ? later_ : urgent_;
        const Chunk chunk = std::move(queue.front());
        queue.pop_front();
        lock.unlock();
        try {
            read(chunk, buffer);
            for (const Piece& piece : chunk) done_(piece.tag, piece.n_bytes);
        } catch (const std::exception& error) {
            failed_(error.what());
        }
        lock.lock();
    }
}

void FileReader::read(const Chunk& chunk, Buffer& buffer) {
    File& file = [&]() -> File& {
        std::lock_guard<std::mutex> lock(mutex_);  // of the list, which may grow
        return files_[static_cast<size_t>(chunk.front().file)];
    }();
    const int64_t offset = chunk.front().offset;
    const int64_t n_bytes = chunk.back().offset + chunk.back().n_bytes - offset;
    const bool cached = is_cached(file, offset, n_bytes);
    if (chunk.front().to == nullptr) {
        if (!cached) read_cached(file, offset, n_bytes, buffer.get(chunk_bytes_ + 2 * kAlign));
        return;
    }
    if (!cached && file.direct >= 0 && !file.refused && read_direct(file, chunk, offset, n_bytes, buffer)) return;
    for (const Piece& piece : chunk) read_cached(file, piece.offset, piece.n_bytes, piece.to);
}

bool FileReader::read_direct(File& file, const Chunk& chunk, int64_t offset, int64_t n_bytes, Buffer& buffer) {
    uint8_t* data = buffer.get(chunk_bytes_ + 2 * kAlign);
    const int64_t start = round_down(offset), wanted = offset + n_bytes - start, whole = round_up(wanted);
    for (int64_t got = 0; got < wanted;) {
        const ssize_t n = pread(file.direct, data + got, static_cast<size_t>(whole - got), start + got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EINVAL) {  // the file system opens files so, and then does not read them
            file.refused = true;
            return false;
        }
        if (n < 0) throw ReadError(about(file.path, start + got, std::strerror(errno)));
        if (n == 0) throw ReadError(about(file.path, start + got, "the file has become shorter"));
        if (n % kAlign != 0 && got + n < wanted)
            throw ReadError(about(file.path, start + got + n, "the file has become shorter"));
        got += n;
    }
    for (const Piece& piece : chunk)
        std::memcpy(piece.to, data + (piece.offset - start), static_cast<size_t>(piece.n_bytes));
    return true;
}

void FileReader::read_cached(const File& file, int64_t offset, int64_t n_bytes, uint8_t* to) {
    for (int64_t got = 0; got < n_bytes;) {
        const ssize_t n = pread(file.cached, to + got, static_cast<size_t>(n_bytes - got), offset + got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw ReadError(about(file.path, offset + got, std::strerror(errno)));
        if (n == 0) throw ReadError(about(file.path, offset + got, "the file has become shorter"));
        got += n;
    }
}

// Most of it: then reading the rest through the cache is the quicker way too.
bool FileReader::is_cached(const File& file, int64_t offset, int64_t n_bytes) const {
    if (file.map == nullptr) return false;
    static const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t start = offset / page * page, end = std::min(offset + n_bytes, file.n_bytes);
    if (end <= start) return false;
    std::vector<unsigned char> in_cache(static_cast<size_t>((end - start + page - 1) / page));
    if (mincore(file.map + start, static_cast<size_t>(end - start), in_cache.data()) != 0) return false;
    const auto n = std::count_if(in_cache.begin(), in_cache.end(), [](unsigned char byte) { return byte & 1; });
    return 2 * static_cast<size_t>(n) > in_cache.size();
}

}  // namespace moe
