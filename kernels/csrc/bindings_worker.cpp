// The Python face of the decode worker: addresses as integers, put together by kernels/worker.py. Waiting calls
// release the GIL; the worker's thread never takes it.

#include "bindings_worker.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "decode_worker.h"
#include "replay.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using moe::SlotCache;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

moe::Fetch fetch_of(const std::string& mode) {
    if (mode == "cpu") return moe::Fetch::none;
    if (mode == "fetch") return moe::Fetch::most;
    if (mode == "auto") return moe::Fetch::balanced;
    if (mode == "exact") return moe::Fetch::all;
    throw nb::value_error("a mode is cpu, fetch, auto or exact");
}

SlotCache::Evict evict_of(const std::string& whom) {
    if (whom == "nobody") return SlotCache::Evict::nobody;
    if (whom == "worse") return SlotCache::Evict::worse;
    if (whom == "any") return SlotCache::Evict::any;
    throw nb::value_error("evict is nobody, worse or any");
}

void bind_policy(nb::module_& m) {
    using moe::PolicySettings;
    nb::class_<PolicySettings>(m, "PolicySettings")
        .def(nb::init<const std::string&, const std::string&, const std::map<std::string, double>&>(), "name"_a,
             "admit"_a, "values"_a);
    m.def(
        "replay",
        [](const PolicySettings& settings, uintptr_t ids, int64_t n_token, int n_layer, int top_k, int first_layer,
           int n_model_layer, int n_expert, int64_t n_slot, const std::vector<moe::ExpertKey>& residents,
           bool unbound, uintptr_t hits, uintptr_t fetched) {
            moe::replay(settings,
                        {at<const int32_t>(ids), n_token, n_layer, top_k, first_layer, n_model_layer, n_expert},
                        n_slot, residents, unbound, at<int32_t>(hits), at<int32_t>(fetched));
        },
        "policy"_a, "ids"_a, "n_token"_a, "n_layer"_a, "top_k"_a, "first_layer"_a, "n_model_layer"_a,
        "n_expert"_a, "n_slot"_a, "residents"_a, "unbound"_a, "hits"_a, "fetched"_a,
        nb::call_guard<nb::gil_scoped_release>());
}

void bind_slot_cache(nb::module_& m) {
    nb::class_<SlotCache>(m, "SlotCache")
        .def(nb::init<int, std::vector<int>, const std::vector<int>&, const moe::PolicySettings&>(), "n_expert"_a,
             "slot_class"_a, "n_slot"_a, "policy"_a)
        .def("key", &SlotCache::key, "layer"_a, "expert"_a)
        .def("resident", &SlotCache::resident, "key"_a)
        .def("slot", &SlotCache::slot, "key"_a)
        .def(
            "begin_layer_step",
            [](SlotCache& cache, int layer, const std::vector<int32_t>& experts, int64_t step) {
                cache.begin_layer_step(layer, experts.data(), static_cast<int64_t>(experts.size()), step);
            },
            "layer"_a, "experts"_a, "step"_a)
        .def("end_layer_step", &SlotCache::end_layer_step)
        .def("seed", &SlotCache::seed, "key"_a, "uses"_a)
        .def("keep", &SlotCache::keep, "key"_a)
        .def(
            "reserve",
            [](SlotCache& cache, int key, const std::string& evict, double least_more_uses) {
                const SlotCache::Reservation reservation = cache.reserve(key, evict_of(evict), least_more_uses);
                return std::pair(reservation.slot, reservation.evicted);
            },
            "key"_a, "evict"_a = "any", "least_more_uses"_a = SlotCache::kAnyUses)
        .def("complete", &SlotCache::complete, "key"_a, "filled"_a = false)
        .def("cancel", &SlotCache::cancel, "key"_a)
        .def("release", &SlotCache::release, "key"_a)
        .def("residents", &SlotCache::residents, "layer"_a)
        .def(
            "counts",
            [](const SlotCache& cache, int slot_class) {
                const SlotCache::Counts counts = cache.counts(slot_class);
                return std::tuple(counts.free, counts.in_flight, counts.resident);
            },
            "slot_class"_a)
        .def("check_integrity", &SlotCache::check_integrity);
}

void bind_copy_engines(nb::module_& m) {
    const nb::call_guard<nb::gil_scoped_release> no_gil;
    nb::class_<moe::CopyEngine>(m, "CopyEngine")
        .def(
            "submit",
            [](moe::CopyEngine& engine, const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t>>& copies) {
                std::vector<moe::Copy> batch;
                for (const auto& [to, from, n_bytes] : copies)
                    batch.push_back({at<uint8_t>(to), at<const uint8_t>(from), n_bytes});
                return engine.submit(batch);
            },
            "copies"_a)
        .def("poll", &moe::CopyEngine::poll)
        .def("stop", &moe::CopyEngine::stop, no_gil);
    nb::class_<moe::HostCopyEngine, moe::CopyEngine>(m, "HostCopyEngine")
        .def(nb::init<bool>(), "held"_a = false)
        .def("release", &moe::HostCopyEngine::release, "n_batch"_a);
    nb::class_<moe::ThrottledCopyEngine, moe::CopyEngine>(m, "ThrottledCopyEngine")
        .def(nb::init<moe::CopyEngine&, double>(), "engine"_a, "bytes_per_second"_a, nb::keep_alive<1, 2>());
    nb::class_<moe::CudaCopyEngine, moe::CopyEngine>(m, "CudaCopyEngine").def(nb::init<int>(), "device"_a);
}

void bind_parts(nb::module_& m) {
    nb::class_<moe::Rates>(m, "Rates")
        .def(nb::init<double, double, double, double, double, double>(), "cpu"_a, "cpu_beside_copies"_a, "copy"_a,
             "copy_beside_cpu"_a, "cpu_fixed"_a, "copy_fixed"_a)
        .def_ro("cpu", &moe::Rates::cpu)
        .def_ro("cpu_beside_copies", &moe::Rates::cpu_beside_copies)
        .def_ro("copy", &moe::Rates::copy)
        .def_ro("copy_beside_cpu", &moe::Rates::copy_beside_cpu)
        .def_prop_ro("price_of_copy", &moe::Rates::price_of_copy);
    nb::class_<moe::Mailbox>(m, "Mailbox")
        .def(
            "__init__",
            [](moe::Mailbox* self, int64_t n_layer, int64_t top_k, int64_t hidden, int64_t max_batch,
               uintptr_t messages, uintptr_t tokens, uintptr_t x, uintptr_t x_checks, uintptr_t answer_numbers,
               uintptr_t answer, uintptr_t y, uintptr_t control) {
                new (self) moe::Mailbox{n_layer, top_k, hidden, max_batch, at<uint8_t>(messages),
                                        at<uint8_t>(tokens), at<const float>(x), at<const int64_t>(x_checks),
                                        at<int64_t>(answer_numbers), at<uint8_t>(answer), at<float>(y), at<int64_t>(control)};
            },
            "n_layer"_a, "top_k"_a, "hidden"_a, "max_batch"_a, "messages"_a, "tokens"_a, "x"_a, "x_checks"_a,
            "answer_numbers"_a, "answer"_a, "y"_a, "control"_a)
        .def_prop_ro("message_bytes", &moe::Mailbox::message_bytes)
        .def_prop_ro("token_bytes", &moe::Mailbox::token_bytes)
        .def_prop_ro("answer_bytes", &moe::Mailbox::answer_bytes)
        .def_ro_static("x_block", &moe::Mailbox::kXBlock)
        .def_ro_static("y_block", &moe::Mailbox::kYBlock);
    nb::class_<moe::WorkerLayer>(m, "WorkerLayer")
        .def(
            "__init__",
            [](moe::WorkerLayer* self, const moe::ExpertLayer& experts,
               const std::vector<std::tuple<uintptr_t, int64_t, int64_t, int64_t>>& parts, int slot_class,
               uintptr_t slots, int64_t slot_bytes, uintptr_t table) {
                std::vector<moe::ExpertPart> pieces;
                for (const auto& [host, stride, offset, n_bytes] : parts)
                    pieces.push_back({at<const uint8_t>(host), stride, offset, n_bytes});
                new (self) moe::WorkerLayer{experts, std::move(pieces), slot_class, at<uint8_t>(slots),
                                            slot_bytes, at<uint8_t>(table)};
            },
            "experts"_a, "parts"_a, "slot_class"_a, "slots"_a, "slot_bytes"_a, "table"_a);
    nb::class_<moe::StepTokens>(m, "StepTokens")
        .def_ro("tokens", &moe::StepTokens::tokens)
        .def_ro("bad", &moe::StepTokens::bad);
    using moe::WorkerStats;
    nb::class_<WorkerStats>(m, "WorkerStats")
        .def_ro("steps", &WorkerStats::steps)
        .def_ro("hits", &WorkerStats::hits)
        .def_ro("misses", &WorkerStats::misses)
        .def_ro("cpu_experts", &WorkerStats::cpu_experts)
        .def_ro("cpu_bytes", &WorkerStats::cpu_bytes)
        .def_ro("fetched_now", &WorkerStats::fetched_now)
        .def_ro("fetched_background", &WorkerStats::fetched_background)
        .def_ro("copied_bytes", &WorkerStats::copied_bytes)
        .def_ro("fetched_used", &WorkerStats::fetched_used)
        .def_ro("fetched_unused", &WorkerStats::fetched_unused)
        .def_ro("cpu_ns", &WorkerStats::cpu_ns)
        .def_ro("copy_wait_ns", &WorkerStats::copy_wait_ns)
        .def_ro("expected", &WorkerStats::expected)
        .def_ro("missed_experts", &WorkerStats::missed_experts)
        .def_ro("foreseen", &WorkerStats::foreseen)
        .def_ro("pulled_bytes", &WorkerStats::pulled_bytes)
        .def_ro("prefetched", &WorkerStats::prefetched)
        .def_ro("prefetched_in_time", &WorkerStats::prefetched_in_time)
        .def_ro("prefetched_late", &WorkerStats::prefetched_late)
        .def_prop_ro("timed", [](const WorkerStats& stats) { return std::pair(stats.timed[0], stats.timed[1]); })
        .def_prop_ro("timed_late",
                     [](const WorkerStats& stats) { return std::pair(stats.timed_late[0], stats.timed_late[1]); })
        .def_prop_ro("timed_pulled",
                     [](const WorkerStats& stats) { return std::pair(stats.timed_pulled[0], stats.timed_pulled[1]); })
        .def_ro("rates", &WorkerStats::rates);
}

}  // namespace

void bind_worker(nb::module_& m) {
    using moe::DecodeWorker;
    const nb::call_guard<nb::gil_scoped_release> no_gil;
    bind_policy(m);
    bind_slot_cache(m);
    bind_copy_engines(m);
    bind_parts(m);

    nb::class_<DecodeWorker>(m, "DecodeWorker")
        .def(
            "__init__",
            [](DecodeWorker* self, moe::ThreadPool& pool, moe::CopyEngine& copies, const moe::Mailbox& mailbox,
               int n_expert, const std::vector<moe::WorkerLayer>& layers, const std::vector<int>& n_slot,
               uintptr_t slot_numbers, const moe::PolicySettings& policy, const std::string& mode,
               int64_t max_background, bool float_activations, const moe::Rates& rates, double stall_seconds,
               int64_t lookahead_bytes, int64_t fill_bytes) {
                new (self) DecodeWorker({mailbox, n_expert, layers, n_slot, at<const int32_t>(slot_numbers),
                                         fetch_of(mode), max_background, float_activations, rates,
                                         stall_seconds, lookahead_bytes, fill_bytes, policy},
                                        pool, copies);
            },
            "pool"_a, "copies"_a, "mailbox"_a, "n_expert"_a, "layers"_a, "n_slot"_a, "slot_numbers"_a, "policy"_a,
            "mode"_a, "max_background"_a, "float_activations"_a, "rates"_a, "stall_seconds"_a, "lookahead_bytes"_a,
            "fill_bytes"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("stop", &DecodeWorker::stop, no_gil)
        .def("expect", &DecodeWorker::expect, "step"_a, "n_token"_a, "allow_late"_a, "posted"_a,
             "pull"_a, "idle"_a, no_gil)
        .def("wait_tokens", &DecodeWorker::wait_tokens, "step"_a, "seconds"_a, no_gil)
        .def("settle", &DecodeWorker::settle, "seconds"_a, no_gil)
        .def(
            "reserve",
            [](DecodeWorker& worker, int layer, int expert, const std::string& evict) {
                const SlotCache::Evict whom = evict_of(evict);
                const SlotCache::Reservation reservation = worker.while_idle(
                    [&](SlotCache& cache) { return cache.reserve(cache.key(layer, expert), whom); });
                return std::pair(reservation.slot, reservation.evicted);
            },
            "layer"_a, "expert"_a, "evict"_a)
        .def(
            "complete",
            [](DecodeWorker& worker, int layer, int expert) {
                worker.while_idle([&](SlotCache& cache) { cache.complete(cache.key(layer, expert)); });
            },
            "layer"_a, "expert"_a, no_gil)
        .def(
            "cancel",
            [](DecodeWorker& worker, int layer, int expert) {
                worker.while_idle([&](SlotCache& cache) { cache.cancel(cache.key(layer, expert)); });
            },
            "layer"_a, "expert"_a, no_gil)
        .def(
            "release",
            [](DecodeWorker& worker, int layer, int expert) {
                worker.while_idle([&](SlotCache& cache) { cache.release(cache.key(layer, expert)); });
            },
            "layer"_a, "expert"_a, no_gil)
        .def("fill", &DecodeWorker::fill, "best_first"_a, no_gil)
        .def("use_counts", &DecodeWorker::use_counts, no_gil)
        .def("seed", &DecodeWorker::seed, "counts"_a, no_gil)
        .def(
            "residents",
            [](DecodeWorker& worker, int layer) {
                return worker.while_idle([&](SlotCache& cache) { return cache.residents(layer); });
            },
            "layer"_a, no_gil)
        .def(
            "check_integrity",
            [](DecodeWorker& worker) {
                worker.while_idle([](SlotCache& cache) { cache.check_integrity(); });
            },
            no_gil)
        .def("stats", &DecodeWorker::stats)
        .def("reset_stats", &DecodeWorker::reset_stats)
        .def("timeline", [](DecodeWorker& worker) {
            const std::vector<moe::TimelineEntry> entries = worker.timeline();
            return nb::bytes(entries.data(), entries.size() * sizeof(entries[0]));
        })
        .def("copies", [](DecodeWorker& worker) {
            const std::vector<moe::CopyEntry> entries = worker.copies();
            return nb::bytes(entries.data(), entries.size() * sizeof(entries[0]));
        });
}
