// What the products of all instruction sets share: the dense layout, and the choice of a tile by its size.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "isa.h"

namespace {

using namespace qvit;

size_t dense_weight_bytes(size_t n, size_t k) { return n * k; }

void dense_pack_channel(uint8_t* packed, size_t k, size_t channel, const int8_t* codes) {
    for (size_t at = 0; at < k; at += kDepth) std::memcpy(packed + dense_index(channel, at, k), codes + at, kDepth);
}

size_t byte_row(size_t k) { return k; }

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

// Sums of up to kLookupRows rows with some groups of channels and some steps of k, by lookup; `first` says whether they
// are the first ones, or are added to what is there.
using LookupTile = void (*)(const uint8_t* rows, size_t stride, const uint8_t* packed, size_t group_stride,
                            size_t steps, bool first, int32_t* out, size_t out_stride);
constexpr int kLookupRows = 3;

// All rows with channels first to last, in tiles[groups - 1][rows - 1]: AtOnce steps of k after one another, as many as
// their narrow sums hold. A step is StepBytes of a row and a byte of each channel.
template <size_t Group, size_t AtOnce, size_t StepBytes, size_t Groups>
void run_lookup_tiles(const LookupTile* const (&tiles)[Groups], const uint8_t* rows, size_t stride, size_t count,
                      const uint8_t* packed, size_t steps, size_t first, size_t last, int32_t* out, size_t out_stride) {
    for (size_t start = 0; start < steps; start += AtOnce) {
        const size_t some = std::min(AtOnce, steps - start);
        for (size_t channel = first; channel < last; channel += Groups * Group) {
            const size_t groups = std::min(Groups, (last - channel) / Group);
            for (size_t r = 0; r < count; r += kLookupRows) {
                const size_t height = std::min<size_t>(kLookupRows, count - r);
                tiles[groups - 1][height - 1](rows + r * stride + StepBytes * start, stride,
                                              packed + channel * steps + start * Group, steps * Group, some, start == 0,
                                              out + r * out_stride + channel - first, out_stride);
            }
        }
    }
}

// Four codes as one 32-bit word, to be broadcast.
inline int32_t load_word(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

}  // namespace
