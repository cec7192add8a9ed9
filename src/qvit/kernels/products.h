// What the products of all instruction sets share: the dense layout, and the choice of a tile by its size.
#pragma once

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "unrolled.h"

namespace {

using namespace qvit;

size_t dense_weight_bytes(size_t n, size_t k) { return n * k; }

void dense_pack_channel(uint8_t* packed, size_t k, size_t channel, const uint8_t* codes, int low) {
    for (size_t at = 0; at < k; at += kDepth) {
        uint8_t* to = packed + dense_index(channel, at, k);
        for (size_t i = 0; i < kDepth; ++i) to[i] = static_cast<uint8_t>(codes[at + i] - low);
    }
}

size_t byte_row(size_t k) { return k; }

// Four codes as one 32-bit word, to be broadcast.
inline int32_t load_word(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

}  // namespace
