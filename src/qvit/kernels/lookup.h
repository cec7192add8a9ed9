// Products by lookup of channels' codes of 2 bits: what all vector widths share.
//
// Some codes a of a row choose one of some constant tables, and a byte of a channel, made of as many of its codes w, an
// entry of that table. An entry is the sum of (a - kCentre) w, which takes fewer values than the sum of a w, so that
// more of them can be added up in bytes, and kLowest more for each, so that it is not negative. What is constant for a
// channel in all this is what its sums start from, and stands before the codes of its group: kCentre times the sum of
// w, less kLowest for each.
#pragma once

#include "products.h"

namespace {

// The summands (a - kCentre) w of codes a of `Bits`, an even number: no other centre makes their range smaller.
template <int Bits>
struct Terms {
    static constexpr int kTop = (1 << Bits) - 1, kCentre = kTop / 3;
    static constexpr int kLowest = 2 * (kTop - kCentre), kRange = 3 * (kTop - kCentre);
};

// An entry of a table for `Codes` codes on both sides, of `Bits` and 2 bits each.
template <int Bits, int Codes>
constexpr uint8_t lookup_entry(int row, int channel) {
    int sum = Terms<Bits>::kLowest * Codes;
    for (int i = 0; i < Codes; ++i) {
        const int code = channel >> 2 * i & 3, a = row >> Bits * i & Terms<Bits>::kTop;
        sum += (a - Terms<Bits>::kCentre) * (code < 2 ? code : code - 4);
    }
    return static_cast<uint8_t>(sum);
}

// What the codes of some groups of channels lie behind: the starts, an int32 each.
template <size_t Group>
constexpr size_t kStarts = Group * sizeof(int32_t);

// Where in its group's bytes a channel is. Byte 4 i + p is channel i of a quarter of the group, the even bytes of the
// first two quarters: they then widen into vectors of 32-bit sums in order.
template <size_t Group>
constexpr size_t lookup_lane(size_t channel) {
    const size_t quarter = channel % Group / (Group / 4);
    return 4 * (channel % (Group / 4)) + 2 * (quarter % 2) + quarter / 2;
}

// The start of one channel of a group, whose codes have that total and are packed into `terms` of them, zeros beyond.
template <int Bits>
inline void store_start(uint8_t* group, size_t channel, int total, size_t terms) {
    const int32_t start = Terms<Bits>::kCentre * total - Terms<Bits>::kLowest * static_cast<int32_t>(terms);
    std::memcpy(group + channel * sizeof start, &start, sizeof start);
}

// Sums of some rows with some groups of channels and some steps of k; of the first ones from `starts`, of the others
// from what is there. Groups lie `group_bytes` apart.
using LookupTile = void (*)(const uint8_t* rows, size_t stride, const uint8_t* packed, size_t group_bytes, size_t steps,
                            const uint8_t* starts, int32_t* out, size_t out_stride);

// Tiles of 1, 2, ... rows with some number of groups.
struct LookupTiles {
    template <size_t Rows>
    constexpr LookupTiles(const LookupTile (&tiles_)[Rows]) : tiles(tiles_), rows(Rows) {}
    const LookupTile* tiles;
    size_t rows;
};

// All rows with channels first to last, in tiles of 1, 2, ... groups: AtOnce steps of k after one another, as many as
// their narrow sums hold. A step is StepBytes of a row and a byte of each channel.
template <size_t Group, size_t AtOnce, size_t StepBytes, size_t Groups>
void run_lookup_tiles(const LookupTiles (&tiles)[Groups], const uint8_t* rows, size_t stride, size_t count,
                      const uint8_t* packed, size_t steps, size_t first, size_t last, int32_t* out, size_t out_stride) {
    const size_t group_bytes = kStarts<Group> + steps * Group;
    for (size_t start = 0; start < steps; start += AtOnce) {
        const size_t some = std::min(AtOnce, steps - start);
        for (size_t channel = first, groups; channel < last; channel += groups * Group) {
            const size_t left = (last - channel) / Group;
            groups = left == Groups + 1 ? (left + 1) / 2 : std::min(Groups, left);  // not one that is left alone
            const auto [of, height] = tiles[groups - 1];
            const uint8_t* from = packed + channel / Group * group_bytes;
            for (size_t r = 0; r < count; r += height)
                of[std::min(height, count - r) - 1](
                    rows + r * stride + StepBytes * start, stride, from + kStarts<Group> + start * Group, group_bytes,
                    some, start == 0 ? from : nullptr, out + r * out_stride + channel - first, out_stride);
        }
    }
}

}  // namespace
