// Reads pieces of files into memory with a team of threads that Python does not see.
//
// How     What the system holds in its cache is copied from there. Everything else is read past the cache
//         (O_DIRECT), so that it is not kept twice: into a buffer of the thread, and from there into place,
//         because tensors do not lie in a file as such reads need it. Where the file system refuses, all is
//         read through the cache.
// Order   Urgent pieces first, otherwise as submitted. Neighbours in the file are read together.
// Errors  go to `failed`, with the file's path, and end nothing: the owner decides.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace moe {

struct ReadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Piece {
    int file;
    int64_t offset, n_bytes;
    uint8_t* to;   // nullptr: only into the system's cache
    int64_t tag;  // of the owner, for `done`
};

class FileReader {
 public:
    // Called on the readers' threads: done(tag, n_bytes) after every piece, or part of a large one.
    using Done = std::function<void(int64_t, int64_t)>;
    using Failed = std::function<void(const std::string&)>;

    // chunk_bytes: what one read takes at most. direct: whether the cache may be passed by.
    FileReader(int n_thread, int64_t chunk_bytes, bool direct, Done done, Failed failed);
    ~FileReader();
    FileReader(const FileReader&) = delete;
    FileReader& operator=(const FileReader&) = delete;

    int add_file(const std::string& path);  // ReadError if it cannot be opened
    void submit(std::vector<Piece> pieces, bool urgent);
    void hurry(const std::function<bool(int64_t)>& is_urgent);  // what waits and has such a tag
    void stop();  // gives up what has not begun; returns when no thread touches memory any more

 private:
    struct File {
        std::string path;
        int cached = -1, direct = -1;  // descriptors
        int64_t n_bytes = 0;
        uint8_t* map = nullptr;  // only asked what of it is cached
        std::atomic<bool> refused{false};
    };
    struct Buffer;
    using Chunk = std::vector<Piece>;

    void run();
    void read(const Chunk& chunk, Buffer& buffer);
    bool read_direct(File& file, const Chunk& chunk, int64_t offset, int64_t n_bytes, Buffer& buffer);
    void read_cached(const File& file, int64_t offset, int64_t n_bytes, uint8_t* to);
    bool is_cached(const File& file, int64_t offset, int64_t n_bytes) const;

    const int64_t chunk_bytes_;
    const bool direct_;
    const Done done_;
    const Failed failed_;
    std::deque<File> files_;  // their addresses stay

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Chunk> urgent_, later_;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace moe
