// The lookup for 2 bits x 2 bits that the vectors of 128 and 256 bits share: its tables and its layouts.
//
// Two codes of a channel are 4 bits, and so are two codes of a row. So a row's pair chooses one of 16 constant tables
// of 16 bytes, in which one instruction looks up the pairs of as many channels as a vector has bytes. A table holds a .
// w + 12 (0..18), so that fourteen of them fit into an unsigned byte.
//
// Layout: [n / Group groups][k / 4][Group channels], a byte two pairs, each w0 + 4 w1 of the codes modulo 4. Pair i is
// (i, i + k / 2), so that a row is packed by whole vectors; byte j of a channel holds pairs 2 j and 2 j + 1. Byte 2 i
// of a group is channel i, byte 2 i + 1 channel Group / 2 + i: even and odd bytes then widen into vectors in order. A
// row's pair is held times 16, the distance of its table.
#pragma once

#include "products.h"

namespace {

constexpr int kShift = 12;
constexpr size_t kBeforeWidening = 7;            // bytes of two pairs
constexpr size_t kBytesAtOnce = 65535 / 18 / 2;  // what a 16-bit sum holds

struct Tables {
    alignas(64) uint8_t bytes[16][16];
    constexpr Tables() : bytes() {
        for (int a = 0; a < 16; ++a)
            for (int w = 0; w < 16; ++w) {
                int sum = kShift;
                for (int i = 0; i < 4; i += 2) {
                    const int code = (w >> i) & 3;
                    sum += ((a >> i) & 3) * (code < 2 ? code : code - 4);
                }
                bytes[a][w] = static_cast<uint8_t>(sum);
            }
    }
};
constexpr Tables kTables;

size_t lookup_weight_bytes(size_t n, size_t k) { return n * k / 4; }

template <size_t Group>
void lookup_pack_channel(uint8_t* packed, size_t k, size_t channel, const int8_t* codes) {
    const size_t lane = channel % Group, half = k / 2;
    uint8_t* at = packed + channel / Group * Group * (k / 4) + 2 * (lane % (Group / 2)) + lane / (Group / 2);
    const auto pair = [&](size_t i) { return (codes[i] & 3) | (codes[i + half] & 3) << 2; };
    for (size_t i = 0; i < half; i += 2) at[i / 2 * Group] = static_cast<uint8_t>(pair(i) | pair(i + 1) << 4);
}

template <size_t Group>
void lookup_pack_columns(const uint8_t* codes, size_t stride, size_t k, size_t width, int low, uint8_t* packed) {
    const size_t half = k / 2;
    for (size_t channel = 0; channel < width; channel += Group)
        for (size_t i = 0; i < half; i += 2) {
            const uint8_t* rows = codes + i * stride + channel;
            uint8_t bytes[Group] = {};
            for (size_t c = 0; c < std::min(Group, width - channel); ++c) {
                const auto code = [&](size_t row) { return (rows[row * stride + c] - low) & 3; };
                bytes[c] = static_cast<uint8_t>(code(0) | code(half) << 2 | code(1) << 4 | code(half + 1) << 6);
            }
            uint8_t* to = packed + channel * (k / 4) + i / 2 * Group;
            for (size_t c = 0; c < Group / 2; ++c) {
                to[2 * c] = bytes[c];
                to[2 * c + 1] = bytes[c + Group / 2];
            }
        }
}

size_t lookup_row_bytes(size_t k) { return k / 2; }

void lookup_pack_rows(const uint8_t* codes, size_t stride, size_t rows, size_t k, uint8_t* out, size_t out_stride) {
    const size_t half = k / 2;
    for (size_t r = 0; r < rows; ++r) {
        const uint8_t* a = codes + r * stride;
        uint8_t* to = out + r * out_stride;
        for (size_t i = 0; i < half; ++i) to[i] = static_cast<uint8_t>(a[i] << 4 | a[i + half] << 6);
    }
}

}  // namespace
