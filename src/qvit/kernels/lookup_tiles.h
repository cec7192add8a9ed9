// Tiles of lookups of weights of 2 bits, written once over the vectors of the bytes_*.h that is included before this.
#pragma once

#include "kept.h"
#include "lookup_pairs.h"

namespace {

using bytes::Vector;

template <int Bits>
inline Vector table_of(const uint8_t* row, size_t pair) {
    return kept(bytes::repeat(table_at<Bits>(row, pair)));
}

// Sums of a vector's channels, from those of 16-bit words of two bytes and those of the words' high bytes, which make
// the low bytes' sum by their difference. To what is in `starts`, or if that is null in `out`.
template <size_t Group>
[[gnu::always_inline]] inline void add_words(Vector words, Vector highs, const uint8_t* starts, int32_t* out) {
    const Vector lows = bytes::sub16(words, bytes::raise8(highs));
    const Vector quarters[] = {bytes::low16(lows), bytes::high16(lows), bytes::low16(highs), bytes::high16(highs)};
    const void* from = starts == nullptr ? static_cast<const void*>(out) : starts;
    unrolled<4>([&](auto q) {
        constexpr size_t kChannel = q * Group / 4;
        const Vector start = bytes::load(static_cast<const int32_t*>(from) + kChannel);
        bytes::store(out + kChannel, bytes::add32(start, quarters[q]));
    });
}

// Rows of 2 bits, whose bytes are seldom widened: some rows share what is loaded of some groups, a vector each.
template <int Rows, int Groups>
void lookup_tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t group_bytes, size_t count,
                 const uint8_t* starts, int32_t* out, size_t out_stride) {
    constexpr size_t kGroup = sizeof(Vector);
    Vector words[Rows][Groups], highs[Rows][Groups];
    each_sum<Rows, Groups>([&](auto r, auto g) { words[r][g] = highs[r][g] = bytes::zero(); });
    for (size_t at = 0; at < count;) {
        Vector sums[Rows][Groups];
        each_sum<Rows, Groups>([&](auto r, auto g) { sums[r][g] = kept(bytes::zero()); });
        const size_t until = std::min(at + kBeforeWidening<2>, count);
        for (; at < until; at += 2)
            unrolled<2>([&](auto i) {
                Vector channels[Groups];
                unrolled<Groups>(
                    [&](auto g) { channels[g] = kept(bytes::load(w + g * group_bytes + (at + i) * kGroup)); });
                unrolled<Rows>([&](auto r) {
                    const Vector table = table_of<2>(a + r * stride, at + i);
                    unrolled<Groups>([&](auto g) {
                        sums[r][g] = kept(bytes::add8(sums[r][g], bytes::look_up(table, channels[g])));
                    });
                });
            });
        each_sum<Rows, Groups>([&](auto r, auto g) {
            words[r][g] = bytes::add16(words[r][g], sums[r][g]);
            highs[r][g] = bytes::add16(highs[r][g], bytes::high8(sums[r][g]));
        });
    }
    each_sum<Rows, Groups>([&](auto r, auto g) {
        add_words<kGroup>(words[r][g], highs[r][g], starts == nullptr ? nullptr : starts + g * group_bytes,
                          out + r * out_stride + g * kGroup);
    });
}

// Rows of 3 and 4 bits. Few entries fit into a byte, so sums of words take the registers: one row at a time.
template <size_t Group, int Groups>
void mixed_tile(const uint8_t* a, size_t, const uint8_t* w, size_t group_bytes, size_t count, const uint8_t* starts,
                int32_t* out, size_t) {
    constexpr size_t kPairs = kBeforeWidening<4>;
    constexpr int kVectors = Group / sizeof(Vector);
    constexpr size_t kLanes = sizeof(Vector) / sizeof(int32_t);
    Vector words[Groups][kVectors], highs[Groups][kVectors];
    each_sum<Groups, kVectors>([&](auto g, auto v) { words[g][v] = highs[g][v] = kept(bytes::zero()); });
    for (size_t at = 0; at < count; at += kPairs) {
        Vector sums[Groups][kVectors];
        each_sum<Groups, kVectors>([&](auto g, auto v) { sums[g][v] = bytes::zero(); });
        unrolled<kPairs>([&](auto i) {
            const Vector table = table_of<4>(a, at + i);
            each_sum<Groups, kVectors>([&](auto g, auto v) {
                const Vector channels = bytes::load(w + g * group_bytes + (at + i) * Group + v * sizeof(Vector));
                sums[g][v] = kept(bytes::add8(sums[g][v], bytes::look_up(table, channels)));
            });
        });
        each_sum<Groups, kVectors>([&](auto g, auto v) {
            words[g][v] = kept(bytes::add16(words[g][v], sums[g][v]));
            highs[g][v] = kept(bytes::add16(highs[g][v], bytes::high8(sums[g][v])));
        });
    }
    each_sum<Groups, kVectors>([&](auto g, auto v) {
        const uint8_t* from = starts == nullptr ? nullptr : starts + g * group_bytes + v * sizeof(Vector);
        add_words<Group>(words[g][v], highs[g][v], from, out + g * Group + v * kLanes);
    });
}

}  // namespace
