// The Python face of the experts' memory. Calls that may wait, or take the lock that readers hold, release the GIL.

#include "bindings_memory.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "copy_engine.h"
#include "expert_memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// As what the package's users know: see moe_engine/errors.py.
void raise(const char* name, const char* message) {
    PyObject* module = PyImport_ImportModule("moe_engine.errors");
    PyObject* error = module != nullptr ? PyObject_GetAttrString(module, name) : nullptr;
    if (error != nullptr) PyErr_SetString(error, message);
    Py_XDECREF(error);
    Py_XDECREF(module);
}

void translate(const std::exception_ptr& exception, void*) {
    try {
        std::rethrow_exception(exception);
    } catch (const moe::ReadError& error) {
        raise("ModelFormatError", error.what());
    } catch (const moe::NoRoomError& error) {
        raise("CapacityError", error.what());
    }
}

}  // namespace

void bind_memory(nb::module_& m) {
    nb::register_exception_translator(translate);
    using moe::ExpertMemory;
    using Ids = std::vector<int32_t>;
    const nb::call_guard<nb::gil_scoped_release> no_gil;
    m.def(
        "copy_rows",
        [](uintptr_t to, uintptr_t from, int64_t row_bytes, const std::vector<int64_t>& rows, int64_t rows_at_once,
           std::optional<uintptr_t> stream) {
            return moe::copy_rows(reinterpret_cast<uint8_t*>(to), reinterpret_cast<const uint8_t*>(from), row_bytes,
                                  rows, rows_at_once, stream.has_value(), reinterpret_cast<void*>(stream.value_or(0)));
        },
        "to"_a, "from_"_a, "row_bytes"_a, "rows"_a, "rows_at_once"_a, "stream"_a.none(), no_gil);
    using Counts = ExpertMemory::Counts;
    nb::class_<Counts>(m, "MemoryCounts")
        .def_ro("limit", &Counts::limit)
        .def_ro("resident_bytes", &Counts::resident_bytes)
        .def_ro("most_resident_bytes", &Counts::most_resident_bytes)
        .def_ro("n_resident", &Counts::n_resident)
        .def_ro("n_reading", &Counts::n_reading)
        .def_ro("n_held", &Counts::n_held)
        .def_ro("n_read", &Counts::n_read)
        .def_ro("n_dropped", &Counts::n_dropped);
    nb::class_<ExpertMemory>(m, "ExpertMemory")
        .def(
            "__init__",
            [](ExpertMemory* self, int n_expert, int64_t limit, int64_t process, int64_t least, int n_thread,
               int64_t chunk_bytes, bool direct) {
                if (n_expert < 1 || n_thread < 1 || chunk_bytes < 1)
                    throw nb::value_error("experts, threads and bytes of a chunk must be positive");
                new (self) ExpertMemory(n_expert, {limit, process, least}, n_thread, chunk_bytes, direct);
            },
            "n_expert"_a, "limit"_a, "process"_a, "least"_a, "n_thread"_a, "chunk_bytes"_a = 4 << 20,
            "direct"_a = true)
        .def("add_file", &ExpertMemory::add_file, "path"_a, no_gil)
        .def(
            "add_layer",
            [](ExpertMemory& self, int64_t slot_bytes,
               const std::vector<std::tuple<int, int64_t, int64_t, int64_t, int64_t>>& parts) {
                std::vector<moe::PartInFile> in_file;
                for (const auto& [file, offset, stride, n_bytes, slot_offset] : parts)
                    in_file.push_back({file, offset, stride, n_bytes, slot_offset});
                return self.add_layer(slot_bytes, in_file);
            },
            "slot_bytes"_a, "parts"_a, no_gil)
        .def("add_cached", &ExpertMemory::add_cached, "file"_a, "offset"_a, "n_bytes"_a, no_gil)
        .def("preload", &ExpertMemory::preload, no_gil)
        .def("wait", &ExpertMemory::wait, "seconds"_a, no_gil)
        .def(
            "region",
            [](const ExpertMemory& self, int layer, int64_t n_bytes) {
                auto* owner = new std::shared_ptr<moe::HostMemory>(self.region(layer));
                const nb::capsule capsule(
                    owner, [](void* p) noexcept { delete static_cast<std::shared_ptr<moe::HostMemory>*>(p); });
                const size_t size = static_cast<size_t>(n_bytes);
                return nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>>((*owner)->data(), {size}, capsule);
            },
            "layer"_a, "n_bytes"_a)
        .def("is_read", &ExpertMemory::is_read, "layer"_a, no_gil)
        .def("bytes_done", &ExpertMemory::bytes_done, no_gil)
        .def("bytes_total", &ExpertMemory::bytes_total, no_gil)
        .def(
            "hold",
            [](ExpertMemory& self, int layer, const Ids& experts) {
                self.hold(layer, experts.data(), static_cast<int64_t>(experts.size()));
            },
            "layer"_a, "experts"_a, no_gil)
        .def(
            "release",
            [](ExpertMemory& self, int layer, const Ids& experts) {
                self.release(layer, experts.data(), static_cast<int64_t>(experts.size()));
            },
            "layer"_a, "experts"_a, no_gil)
        .def(
            "prefetch",
            [](ExpertMemory& self, int layer, const Ids& experts) {
                self.prefetch(layer, experts.data(), static_cast<int64_t>(experts.size()));
            },
            "layer"_a, "experts"_a, no_gil)
        .def("at_once", &ExpertMemory::at_once, "layer"_a, no_gil)
        .def("counts", &ExpertMemory::counts, no_gil)
        .def("check_integrity", &ExpertMemory::check_integrity, no_gil)
        .def("stop", &ExpertMemory::stop, no_gil);
}
