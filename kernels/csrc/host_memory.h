// Memory for expert weights that are not read from a mapped file: anonymous, in huge pages where the system
// has them, and, where it has several memory nodes, dealt out to them in turn.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moe {

// Memory nodes that are online. system: "/sys/devices/system", or a copy of it in a test.
std::vector<int> memory_nodes(const std::string& system);

class HostMemory {
 public:
    // sparse: only some of it will be in use at a time, and pages are given back: small ones, which the system
    // promises without having them. std::bad_alloc if the system refuses.
    HostMemory(int64_t n_bytes, const std::string& system, bool sparse = false);
    ~HostMemory();
    HostMemory(const HostMemory&) = delete;
    HostMemory& operator=(const HostMemory&) = delete;
    uint8_t* data() const { return data_; }

 private:
    uint8_t* data_ = nullptr;
    int64_t size_;
};

}  // namespace moe
