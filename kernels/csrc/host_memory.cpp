#include "host_memory.h"

#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu_order.h"

namespace moe {

std::vector<int> memory_nodes(const std::string& system) { return read_cpu_list(system + "/node/online"); }

#if defined(__linux__)

HostMemory::HostMemory(int64_t n_bytes, const std::string& system, bool sparse) : size_(n_bytes) {
    void* data = mmap(nullptr, static_cast<size_t>(size_), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | (sparse ? MAP_NORESERVE : 0), -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(data);
    // Both are wishes: without them the memory is slower, not wrong.
    madvise(data, static_cast<size_t>(size_), sparse ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
    unsigned long mask[16] = {};
    constexpr int kBits = 8 * sizeof(unsigned long), kMaxNode = kBits * 16;
    int n_nodes = 0;
    for (int node : memory_nodes(system)) {
        if (node >= kMaxNode) continue;
        mask[node / kBits] |= 1ul << node % kBits;
        ++n_nodes;
    }
    constexpr int kInterleave = 3;
    if (n_nodes > 1) syscall(SYS_mbind, data, size_, kInterleave, mask, kMaxNode + 1, 0);
}

HostMemory::~HostMemory() { munmap(data_, static_cast<size_t>(size_)); }

#else

HostMemory::HostMemory(int64_t n_bytes, const std::string&, bool) : size_((n_bytes + 4095) / 4096 * 4096) {
    data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>(size_)));
    if (data_ == nullptr) throw std::bad_alloc();
}

HostMemory::~HostMemory() { std::free(data_); }

#endif

}  // namespace moe
