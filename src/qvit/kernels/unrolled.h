// Loops whose counts and indices are constants of the compiler's.
#pragma once

#include <type_traits>
#include <utility>

namespace {

template <class Function, int... I>
[[gnu::always_inline]] inline void unrolled(Function f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}

// f(0), ..., f(Count - 1) with constants. A loop over an array of sums would be unrolled too, but GCC then stores all
// sums to memory at every step beside keeping them in registers.
template <int Count, class Function>
[[gnu::always_inline]] inline void unrolled(Function f) {
    unrolled(f, std::make_integer_sequence<int, Count>());
}

// f(row, column) of a tile's sums, with constants.
template <int Rows, int Columns, class Function>
[[gnu::always_inline]] inline void each_sum(Function f) {
    unrolled<Rows>([&](auto r) { unrolled<Columns>([&](auto c) { f(r, c); }); });
}

}  // namespace
