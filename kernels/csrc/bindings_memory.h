#pragma once

#include <nanobind/nanobind.h>

void bind_memory(nanobind::module_& m);
