// Products by lookup of channels of 2 bits with rows of up to 4, for vectors of 256 bits.
//
// Two codes w of a channel, 4 bits, are looked up in a table of 16 bytes that is made for two codes a of a row, by one
// addition: an entry is the sum of a w + kLowest of both, which is not negative. Two tables' entries fit into a byte.
//
// Layout: that of lookup_pairs.h, but for its pairs, which are (2 i, 2 i + 1): rows are read as they are.
#pragma once

#include "products_256.h"

namespace {

constexpr int kLowest = 2 * 15, kHighest = 15;                               // of -a w and of a w
constexpr size_t kMixedAtOnce = 65535 / (2 * (kLowest + kHighest)) / 2 * 2;  // steps that a 16-bit sum holds

// What either code a of a row contributes to the entries.
struct Terms {
    alignas(64) uint8_t bytes[16][2][16];
    constexpr Terms() : bytes() {
        for (int a = 0; a < 16; ++a)
            for (int entry = 0; entry < 16; ++entry)
                for (int place = 0; place < 2; ++place) {
                    const int code = entry >> 2 * place & 3;
                    bytes[a][place][entry] = static_cast<uint8_t>(a * (code < 2 ? code : code - 4) + kLowest);
                }
    }
};
constexpr Terms kTerms;

void mixed_pack_channel(uint8_t* packed, size_t k, size_t channel, const uint8_t* codes, int low) {
    uint8_t* group = packed + channel / kGroup * lookup_weight_bytes<kGroup>(kGroup, k);
    uint8_t* to = group + kStarts<kGroup> + lookup_lane<kGroup>(channel);
    for (size_t i = 0; i < k; i += 2)
        to[i / 2 * kGroup] = static_cast<uint8_t>(((codes[i] - low) & 3) | ((codes[i + 1] - low) & 3) << 2);
    store_start(group, channel % kGroup, -kLowest * static_cast<int>(k), 0);
}

inline __m256i made_table(const uint8_t* a) {
    return kept(_mm256_add_epi8(load_table(kTerms.bytes[a[0]][0]), load_table(kTerms.bytes[a[1]][1])));
}

// One row: more rows would leave too few registers for tables and groups.
template <int Groups>
void mixed_tile(const uint8_t* a, size_t, const uint8_t* w, size_t group_bytes, size_t count, const uint8_t* starts,
                int32_t* out, size_t) {
    __m256i words[Groups], highs[Groups];
    unrolled<Groups>([&](auto g) { words[g] = highs[g] = kept(_mm256_setzero_si256()); });
    for (size_t at = 0; at < count; at += 2) {
        const __m256i tables[] = {made_table(a + 2 * at), made_table(a + 2 * at + 2)};
        unrolled<Groups>([&](auto g) {
            const uint8_t* channels = w + g * group_bytes + at * kGroup;
            const __m256i bytes = _mm256_add_epi8(_mm256_shuffle_epi8(tables[0], load_vector(channels)),
                                                  _mm256_shuffle_epi8(tables[1], load_vector(channels + kGroup)));
            words[g] = kept(_mm256_add_epi16(words[g], bytes));
            highs[g] = kept(_mm256_add_epi16(highs[g], _mm256_srli_epi16(bytes, 8)));
        });
    }
    unrolled<Groups>([&](auto g) {
        add_words(words[g], highs[g], starts == nullptr ? nullptr : starts + g * group_bytes, out + g * kGroup);
    });
}

template <int Groups>
constexpr LookupTile kOneRow[] = {mixed_tile<Groups>};
constexpr LookupTiles kMixedTiles[] = {kOneRow<1>, kOneRow<2>, kOneRow<3>, kOneRow<4>, kOneRow<5>, kOneRow<6>};

void run_mixed(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t, size_t k, size_t first,
               size_t last, int32_t* out, size_t out_stride) {
    run_lookup_tiles<kGroup, kMixedAtOnce, 2>(kMixedTiles, rows, stride, count, packed, k / 2, first, last, out,
                                              out_stride);
}

constexpr Product kMixed = {"lookup-4",         4,        2,       kGroup,   192, lookup_weight_bytes<kGroup>,
                            mixed_pack_channel, byte_row, nullptr, run_mixed};

}  // namespace
