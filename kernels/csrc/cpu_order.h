// In which order a team of threads should take the processors: one hardware thread of every core first, and
// memory nodes in turn, so that a team smaller than the machine uses as many caches and memory channels as it
// can. Read from Linux's /sys; where that says nothing, the processors stay in ascending order.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace moe {

// "0-3,8" to 0 1 2 3 8; nothing from a file that is missing or holds something else.
inline std::vector<int> read_cpu_list(const std::string& path) {
    std::vector<int> cpus;
    std::ifstream file(path);
    for (std::string range; std::getline(file, range, ',');) {
        char* end = nullptr;
        const long first = std::strtol(range.c_str(), &end, 10);
        if (end == range.c_str()) break;
        const long last = *end == '-' ? std::strtol(end + 1, nullptr, 10) : first;
        for (long cpu = first; cpu <= last && cpu < first + 4096; ++cpu)
            cpus.push_back(static_cast<int>(cpu));
    }
    return cpus;
}

// `allowed` in the order described above. system: "/sys/devices/system", or a copy of it in a test.
inline std::vector<int> cpu_order(const std::vector<int>& allowed, const std::string& system) {
    std::vector<int> node_of(allowed.size(), 0);
    const std::vector<int> nodes = read_cpu_list(system + "/node/online");
    for (int node : nodes)
        for (int cpu : read_cpu_list(system + "/node/node" + std::to_string(node) + "/cpulist")) {
            const auto place = std::find(allowed.begin(), allowed.end(), cpu);
            if (place != allowed.end()) node_of[static_cast<size_t>(place - allowed.begin())] = node;
        }

    // Sort key: how many siblings of the core come before, how many such processors of the node come before.
    std::vector<std::tuple<int, int, int, int>> keyed;
    for (size_t i = 0; i < allowed.size(); ++i) {
        const int cpu = allowed[i];
        int sibling = 0, turn = 0;
        for (int other :
             read_cpu_list(system + "/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list"))
            sibling += other < cpu && std::find(allowed.begin(), allowed.end(), other) != allowed.end();
        for (const auto& [other_sibling, other_turn, other_node, other] : keyed)
            turn += other_sibling == sibling && other_node == node_of[i];
        keyed.emplace_back(sibling, turn, node_of[i], cpu);
    }
    std::sort(keyed.begin(), keyed.end());
    std::vector<int> order;
    for (const auto& key : keyed) order.push_back(std::get<3>(key));
    return order;
}

}  // namespace moe
