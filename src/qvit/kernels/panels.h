// Dense products by tiles of a few rows and one panel of channels: what a kind of tile (AVX2's, VNNI's, NEON's, ...)
// shares with the others. A kind has kRows and tile<Rows>, which computes 1 to kRows rows.
#pragma once

#include "products.h"

namespace {

// Sums of a few rows with one panel of channels, all of k.
using Tile = void (*)(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride);

// Tiles of 1, 2, ... rows, for all rows and channels first to last.
template <class Kind, int... Rows>
void run_panels(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t k, size_t first,
                size_t last, int32_t* out, size_t out_stride, std::integer_sequence<int, Rows...>) {
    static constexpr Tile tiles[] = {Kind::template tile<Rows + 1>...};
    for (size_t channel = first; channel < last; channel += kChannels)
        for (size_t r = 0; r < count; r += sizeof...(Rows)) {
            const size_t height = std::min(sizeof...(Rows), count - r);
            tiles[height - 1](rows + r * stride, stride, packed + channel * k, k,
                              out + r * out_stride + channel - first, out_stride);
        }
}

template <class Kind>
void run_dense(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t, size_t k, size_t first,
               size_t last, int32_t* out, size_t out_stride) {
    run_panels<Kind>(rows, stride, count, packed, k, first, last, out, out_stride,
                     std::make_integer_sequence<int, Kind::kRows>());
}

template <class Kind>
constexpr Product dense_product(const char* name, int left_bits, int right_bits) {
    return {name,     left_bits, right_bits,     kChannels, 64, dense_weight_bytes, dense_pack_channel,
            byte_row, nullptr,   run_dense<Kind>};
}

}  // namespace
