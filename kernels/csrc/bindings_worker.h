#pragma once

#include <nanobind/nanobind.h>

// Slot cache, copy engines and decode worker: what kernels/worker.py uses.
void bind_worker(nanobind::module_& m);
