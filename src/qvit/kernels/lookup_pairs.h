// The lookup of channels of 2 bits that the vectors of 128 and 256 bits share: its tables and its layouts.
//
// Two codes of a channel are 4 bits, an index into a table of 16 bytes: one instruction looks up the pairs of as many
// channels as a vector has bytes. A row's pair chooses the table: one of 16 if its codes have 2 bits, one of 256 (4 KB,
// in the first cache) if they have 3 or 4.
//
// Layout: [n / Group groups][Group starts, k / 2 pairs][Group channels], a byte a pair w0 + 4 w1 of the codes modulo 4.
// Two pairs to a byte would be half the memory, but unpacking them takes longer than loading twice as much. Pair i is
// (i, i + k / 2), so that a row is packed by whole vectors. A row's pair is held times 16, the distance of its table.
#pragma once

#include "lookup.h"

namespace {

constexpr size_t kPair = 2;

template <int Bits>
constexpr size_t kBeforeWidening = 255 / (Terms<Bits>::kRange * kPair) / 2 * 2;  // pairs, two at a step
template <int Bits>
constexpr size_t kPairsAtOnce =
    65535 / (Terms<Bits>::kRange * kPair) / kBeforeWidening<Bits> * kBeforeWidening<Bits>;  // what a 16-bit sum holds

template <int Bits>
struct Tables {
    static constexpr int kCount = 1 << kPair * Bits;
    alignas(64) uint8_t bytes[kCount][16];
    constexpr Tables() : bytes() {
        for (int row = 0; row < kCount; ++row)
            for (int channel = 0; channel < 16; ++channel)
                bytes[row][channel] = lookup_entry<Bits, kPair>(row, channel);
    }
};
template <int Bits>
constexpr Tables<Bits> kTables;

// A row's pair: the distance of its table.
template <int Bits>
using Distance = std::conditional_t<Bits == 2, uint8_t, uint16_t>;

template <int Bits>
inline const uint8_t* table_at(const uint8_t* row, size_t pair) {
    Distance<Bits> distance;
    std::memcpy(&distance, row + pair * sizeof distance, sizeof distance);
    return &kTables<Bits>.bytes[0][0] + distance;
}

template <size_t Group>
size_t lookup_weight_bytes(size_t n, size_t k) {
    return n / Group * (kStarts<Group> + k / kPair * Group);
}

// Eight codes at once, as the bytes of a word.
template <int Bits, size_t Group>
void lookup_pack_channel(uint8_t* packed, size_t k, size_t channel, const uint8_t* codes, int low) {
    constexpr uint64_t kOnes = 0x0101010101010101, kTwoBits = 3 * kOnes;
    const size_t half = k / 2;
    uint8_t* group = packed + channel / Group * lookup_weight_bytes<Group>(Group, k);
    uint8_t* to = group + kStarts<Group> + lookup_lane<Group>(channel);
    int total = 0;
    const auto load = [&](size_t i) {
        uint64_t eight;
        std::memcpy(&eight, codes + i, sizeof eight);
        return ((eight & kTwoBits) + static_cast<uint64_t>(-low & 3) * kOnes) & kTwoBits;
    };
    for (size_t i = 0; i < k; ++i) total += codes[i] - low;
    for (size_t i = 0; i < half; i += 8) {
        const uint64_t pairs = load(i) | load(i + half) << 2;
        for (size_t j = 0; j < 8; ++j) to[(i + j) * Group] = static_cast<uint8_t>(pairs >> 8 * j);
    }
    store_start<Bits>(group, channel % Group, total, k);
}

// The bytes of a group's channels in their lanes, four at once.
template <size_t Group>
inline void store_lanes(const uint8_t (&channels)[Group], uint8_t* to) {
    constexpr size_t kQuarter = Group / 4;
    const uint8_t* quarters[] = {channels, channels + kQuarter, channels + 2 * kQuarter, channels + 3 * kQuarter};
    uint32_t words[kQuarter];
    for (size_t i = 0; i < kQuarter; ++i)
        words[i] = quarters[0][i] | uint32_t{quarters[2][i]} << 8 | uint32_t{quarters[1][i]} << 16 |
                   uint32_t{quarters[3][i]} << 24;
    std::memcpy(to, words, sizeof words);
}

template <int Bits, size_t Group>
void lookup_pack_columns(const uint8_t* codes, size_t stride, size_t k, size_t width, int low, uint8_t* packed) {
    const size_t half = k / 2;
    for (size_t channel = 0; channel < width; channel += Group) {
        uint8_t* group = packed + channel / Group * lookup_weight_bytes<Group>(Group, k);
        const size_t some = std::min(Group, width - channel);
        int32_t starts[Group];
        std::fill_n(starts, Group, -(Terms<Bits>::kLowest + Terms<Bits>::kCentre * low) * static_cast<int32_t>(k));
        for (size_t i = 0; i < half; ++i) {
            const uint8_t* rows = codes + i * stride + channel;
            uint8_t bytes[Group] = {};
            for (size_t first = 0; first < some; first += kChannels)
                for (size_t c = first; c < first + kChannels; ++c) {
                    const uint8_t a = rows[c], b = rows[half * stride + c];
                    bytes[c] = static_cast<uint8_t>(((a - low) & 3) | ((b - low) & 3) << 2);
                    starts[c] += Terms<Bits>::kCentre * static_cast<uint8_t>(a + b);
                }
            store_lanes(bytes, group + kStarts<Group> + i * Group);
        }
        std::memcpy(group, starts, sizeof starts);
    }
}

template <int Bits>
size_t lookup_row_bytes(size_t k) {
    return k / kPair * sizeof(Distance<Bits>);
}

template <int Bits>
void lookup_pack_rows(const uint8_t* codes, size_t stride, size_t rows, size_t k, uint8_t* out, size_t out_stride) {
    const size_t half = k / 2;
    for (size_t r = 0; r < rows; ++r) {
        const uint8_t* a = codes + r * stride;
        uint8_t* to = out + r * out_stride;
        for (size_t i = 0; i < half; ++i) {
            const auto distance = static_cast<Distance<Bits>>(a[i] << 4 | a[i + half] << (4 + Bits));
            std::memcpy(to + i * sizeof distance, &distance, sizeof distance);
        }
    }
}

template <int Bits, size_t Group, const auto& Tiles>
void run_pairs(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t, size_t k, size_t first,
               size_t last, int32_t* out, size_t out_stride) {
    run_lookup_tiles<Group, kPairsAtOnce<Bits>, sizeof(Distance<Bits>)>(Tiles, rows, stride, count, packed, k / kPair,
                                                                        first, last, out, out_stride);
}

// The product with these tiles of rows and groups.
template <int Bits, size_t Group, const auto& Tiles>
constexpr Product pairs_product(const char* name, size_t tile) {
    return {name,
            Bits,
            2,
            Group,
            tile,
            lookup_weight_bytes<Group>,
            lookup_pack_channel<Bits, Group>,
            lookup_row_bytes<Bits>,
            lookup_pack_rows<Bits>,
            run_pairs<Bits, Group, Tiles>,
            lookup_pack_columns<Bits, Group>};
}

}  // namespace
