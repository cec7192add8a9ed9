// The operations of a program as Python hands them over: dicts of plain values and arrays.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "plan.h"

namespace qvit {

template <class T, int Dimensions>
using Array = nanobind::ndarray<const T, nanobind::ndim<Dimensions>, nanobind::c_contig, nanobind::device::cpu>;

inline void need(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

// Add the operation that `part` is (qvit.runtime.parts) to a plan.
void add_operation(Plan& plan, const nanobind::dict& part);

}  // namespace qvit
