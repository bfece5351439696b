// The Python face of the kernels: addresses as integers, checked by kernels/cpu.py. Computing calls release
// the GIL.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "background_ffn.h"
#include "bindings_memory.h"
#include "bindings_worker.h"
#include "cpu_order.h"
#include "expert_memory.h"
#include "host_memory.h"
#include "moe_cpu.h"
#include "read_memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

NB_MODULE(_cpu, m) {
    using moe::ThreadPool;
    const nb::call_guard<nb::gil_scoped_release> no_gil;

    m.def("cpu_order", &moe::cpu_order, "allowed"_a, "system"_a = "/sys/devices/system");
    m.def("memory_nodes", &moe::memory_nodes, "system"_a = "/sys/devices/system");
    m.def(
        "host_buffer",
        [](int64_t n_bytes, const std::string& system) {
            if (n_bytes < 1) throw nb::value_error("memory needs at least one byte");
            auto* memory = new moe::HostMemory(n_bytes, system);
            const nb::capsule owner(memory,
                                    [](void* p) noexcept { delete static_cast<moe::HostMemory*>(p); });
            const size_t size = static_cast<size_t>(n_bytes);
            return nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>>(memory->data(), {size}, owner);
        },
        "n_bytes"_a, "system"_a = "/sys/devices/system");
    m.def(
        "read_memory",
        [](ThreadPool& pool, uintptr_t address, int64_t n_bytes, int prefetch) {
            return moe::read_memory(pool, at<const uint8_t>(address), n_bytes, prefetch);
        },
        "pool"_a, "address"_a, "n_bytes"_a, "prefetch_distance"_a, no_gil);
    m.def(
        "copy_memory",
        [](ThreadPool& pool, uintptr_t to, uintptr_t from, int64_t n_bytes) {
            moe::copy_memory(pool, at<uint8_t>(to), at<const uint8_t>(from), n_bytes);
        },
        "pool"_a, "to"_a, "source"_a, "n_bytes"_a, no_gil);
    m.def("available_tiers", &moe::available_tiers);
    m.def("tier", &moe::current_tier);
    m.def("set_tier", &moe::set_tier, "name"_a);
    m.def(
        "set_codebook",
        [](int type_id, uintptr_t grid, int64_t n_bytes) {
            moe::set_codebook(type_id, at<const int8_t>(grid), n_bytes);
        },
        "type_id"_a, "address"_a, "n_bytes"_a);

    nb::class_<ThreadPool>(m, "ThreadPool")
        .def(
            "__init__",
            [](ThreadPool* self, int n_threads, int spin_microseconds, bool pin) {
                if (n_threads < 1) throw nb::value_error("a pool needs at least one thread");
                if (spin_microseconds < 0) throw nb::value_error("a time to spin cannot be negative");
                new (self) ThreadPool(n_threads, {spin_microseconds, pin});
            },
            "n_threads"_a, "spin_microseconds"_a = moe::PoolOptions{}.spin_microseconds,
            "pin"_a = moe::PoolOptions{}.pin)
        .def_prop_ro("n_threads", &ThreadPool::n_threads);

    nb::class_<moe::ExpertLayer>(m, "ExpertLayer")
        .def(
            "__init__",
            [](moe::ExpertLayer* self, uintptr_t gate, int gate_type, int64_t gate_stride, uintptr_t up,
               int up_type, int64_t up_stride, uintptr_t down, int down_type, int64_t down_stride,
               int64_t n_expert, int64_t hidden, int64_t n_ff) {
                new (self) moe::ExpertLayer{{at<const uint8_t>(gate), gate_type, gate_stride},
                                            {at<const uint8_t>(up), up_type, up_stride},
                                            {at<const uint8_t>(down), down_type, down_stride},
                                            n_expert,
                                            hidden,
                                            n_ff};
            },
            "gate_ptr"_a, "gate_type"_a, "gate_expert_stride"_a, "up_ptr"_a, "up_type"_a,
            "up_expert_stride"_a, "down_ptr"_a, "down_type"_a, "down_expert_stride"_a, "n_expert"_a,
            "hidden"_a, "n_ff"_a)
        // Its experts are read when they are needed.
        .def(
            "read_from",
            [](moe::ExpertLayer& self, moe::ExpertMemory& memory, int layer) {
                self.memory = &memory;
                self.memory_layer = layer;
            },
            "memory"_a, "layer"_a, nb::keep_alive<1, 2>());

    m.def(
        "dequantize",
        [](ThreadPool& pool, int type_id, uintptr_t src, int64_t n_rows, int64_t n_in, int64_t row_stride,
           uintptr_t dst) {
            moe::dequantize(pool, type_id, at<const uint8_t>(src), n_rows, n_in, row_stride, at<float>(dst));
        },
        "pool"_a, "type_id"_a, "src"_a, "n_rows"_a, "n_in"_a, "row_stride_bytes"_a, "dst"_a, no_gil);

    m.def(
        "matmul",
        [](ThreadPool& pool, int type_id, uintptr_t weight, int64_t batch_stride, int64_t row_stride,
           int64_t n_batch, int64_t n_out, int64_t n_in, uintptr_t x, int64_t n_tokens, uintptr_t y,
           bool float_activations) {
            moe::matmul(pool, {type_id, at<const uint8_t>(weight), batch_stride, row_stride, n_batch, n_out,
                               n_in, at<const float>(x), n_tokens, at<float>(y), float_activations});
        },
        "pool"_a, "type_id"_a, "weight"_a, "batch_stride_bytes"_a, "row_stride_bytes"_a, "n_batch"_a,
        "n_out"_a, "n_in"_a, "x"_a, "n_tokens"_a, "y"_a, "float_activations"_a, no_gil);

    // Ids int64 [n_tokens, top_k]; false, with nothing computed, if one is neither an expert nor -1.
    m.def(
        "expert_ffn",
        [](ThreadPool& pool, const moe::ExpertLayer& layer, uintptr_t x, int64_t n_tokens,
           uintptr_t expert_ids, int64_t top_k, uintptr_t weights, uintptr_t out, bool float_activations) {
            const int64_t n_pairs = n_tokens * top_k, *ids = at<const int64_t>(expert_ids);
            thread_local std::vector<int32_t> pairs;  // kept, so that a call allocates nothing
            pairs.resize(static_cast<size_t>(2 * n_pairs));
            int32_t *token = pairs.data(), *expert = token + n_pairs;
            for (int64_t p = 0; p < n_pairs; ++p) {
                if (ids[p] < -1 || ids[p] >= layer.n_expert) return false;
                token[p] = static_cast<int32_t>(p / top_k);
                expert[p] = static_cast<int32_t>(ids[p]);
            }
            moe::expert_ffn(pool, layer,
                            {at<const float>(x), n_tokens, token, expert, at<const float>(weights), n_pairs,
                             at<float>(out), float_activations});
            return true;
        },
        "pool"_a, "layer"_a, "x"_a, "n_tokens"_a, "expert_ids"_a, "top_k"_a, "weights"_a, "out"_a,
        "float_activations"_a, no_gil);

    nb::class_<moe::BackgroundFfn>(m, "BackgroundFfn")
        .def(nb::init<ThreadPool&>(), "pool"_a, nb::keep_alive<1, 2>())
        // Of the pairs those with the experts in `only`. Ids int32 [n_tokens, top_k].
        .def(
            "begin",
            [](moe::BackgroundFfn& self, const moe::ExpertLayer& layer, uintptr_t x, int64_t n_tokens,
               uintptr_t expert_ids, int64_t top_k, uintptr_t weights, const std::vector<int32_t>& only, uintptr_t out,
               bool float_activations) {
                const int64_t n_pairs = n_tokens * top_k;
                const int32_t* ids = at<const int32_t>(expert_ids);
                std::vector<int32_t> pairs(static_cast<size_t>(2 * n_pairs), -1);
                for (int64_t p = 0; p < n_pairs; ++p) {
                    pairs[static_cast<size_t>(p)] = static_cast<int32_t>(p / top_k);
                    if (std::binary_search(only.begin(), only.end(), ids[p]))
                        pairs[static_cast<size_t>(n_pairs + p)] = ids[p];
                }
                self.begin(layer,
                           {at<const float>(x), n_tokens, nullptr, nullptr, at<const float>(weights), n_pairs,
                            at<float>(out), float_activations},
                           std::move(pairs));
            },
            "layer"_a, "x"_a, "n_tokens"_a, "expert_ids"_a, "top_k"_a, "weights"_a, "only"_a, "out"_a,
            "float_activations"_a, no_gil)
        .def("finish", &moe::BackgroundFfn::finish, no_gil);

    bind_memory(m);
    bind_worker(m);
}
