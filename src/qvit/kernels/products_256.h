// What the instruction sets with 256-bit vectors share: the lookups of weights of 2 bits.
#pragma once

#include <immintrin.h>

#include "kept.h"
#include "lookup_pairs.h"
#include "panels.h"

namespace {

inline __m256i load_vector(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_vector(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

constexpr size_t kLanes = 8;                  // sums in a vector
constexpr int kVectors = kChannels / kLanes;  // vectors in a panel

// The lookup for 2 bits: 64 multiply-adds by one vpshufb and one vpaddb.
constexpr size_t kGroup = 32;

// The table of a row's pair, in both halves of a vector.
template <int Bits>
inline __m256i table_of(const uint8_t* row, size_t pair) {
    const auto* table = reinterpret_cast<const __m128i*>(table_at<Bits>(row, pair));
    return kept(_mm256_broadcastsi128_si256(_mm_load_si128(table)));
}

// Sums of a group, from those of 16-bit words of two bytes and those of the words' high bytes, which make the low
// bytes' sum by their difference. To what is in `starts`, or if that is null in `out`.
[[gnu::always_inline]] inline void add_words(__m256i words, __m256i highs, const uint8_t* starts, int32_t* out) {
    const __m256i lows = _mm256_sub_epi16(words, _mm256_slli_epi16(highs, 8)), low_word = _mm256_set1_epi32(0xFFFF);
    const __m256i parts[4] = {_mm256_and_si256(lows, low_word), _mm256_srli_epi32(lows, 16),
                              _mm256_and_si256(highs, low_word), _mm256_srli_epi32(highs, 16)};
    const void* from = starts == nullptr ? static_cast<const void*>(out) : starts;
    unrolled<4>([&](auto p) {
        const __m256i start = load_vector(static_cast<const int32_t*>(from) + p * kLanes);
        store_vector(out + p * kLanes, _mm256_add_epi32(start, parts[p]));
    });
}

template <int Rows, int Groups>
void lookup_tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t group_bytes, size_t count,
                 const uint8_t* starts, int32_t* out, size_t out_stride) {
    __m256i words[Rows][Groups], highs[Rows][Groups];
    each_sum<Rows, Groups>([&](auto r, auto g) { words[r][g] = highs[r][g] = _mm256_setzero_si256(); });
    for (size_t at = 0; at < count;) {
        __m256i bytes[Rows][Groups];
        each_sum<Rows, Groups>([&](auto r, auto g) { bytes[r][g] = kept(_mm256_setzero_si256()); });
        const size_t until = std::min(at + kBeforeWidening<2>, count);
        for (; at < until; at += 2)
            unrolled<2>([&](auto i) {
                __m256i channels[Groups];
                unrolled<Groups>(
                    [&](auto g) { channels[g] = kept(load_vector(w + g * group_bytes + (at + i) * kGroup)); });
                unrolled<Rows>([&](auto r) {
                    const __m256i table = table_of<2>(a + r * stride, at + i);
                    unrolled<Groups>([&](auto g) {
                        bytes[r][g] = kept(_mm256_add_epi8(bytes[r][g], _mm256_shuffle_epi8(table, channels[g])));
                    });
                });
            });
        each_sum<Rows, Groups>([&](auto r, auto g) {
            words[r][g] = _mm256_add_epi16(words[r][g], bytes[r][g]);
            highs[r][g] = _mm256_add_epi16(highs[r][g], _mm256_srli_epi16(bytes[r][g], 8));
        });
    }
    each_sum<Rows, Groups>([&](auto r, auto g) {
        add_words(words[r][g], highs[r][g], starts == nullptr ? nullptr : starts + g * group_bytes,
                  out + r * out_stride + g * kGroup);
    });
}

constexpr LookupTile kOneGroup[] = {lookup_tile<1, 1>, lookup_tile<2, 1>, lookup_tile<3, 1>, lookup_tile<4, 1>};
constexpr LookupTile kTwoGroups[] = {lookup_tile<1, 2>, lookup_tile<2, 2>, lookup_tile<3, 2>, lookup_tile<4, 2>};
constexpr LookupTiles kLookupTiles[] = {kOneGroup, kTwoGroups};

constexpr Product kLookup = pairs_product<2, kGroup, kLookupTiles>("lookup", 64);

// Rows of 3 and 4 bits in lookups. Few entries fit into a byte, so sums of words take the registers: one row at a time.
template <int Groups>
void mixed_tile(const uint8_t* a, size_t, const uint8_t* w, size_t group_bytes, size_t count, const uint8_t* starts,
                int32_t* out, size_t) {
    constexpr size_t kPairs = kBeforeWidening<4>;
    __m256i words[Groups], highs[Groups];
    unrolled<Groups>([&](auto g) { words[g] = highs[g] = kept(_mm256_setzero_si256()); });
    for (size_t at = 0; at < count; at += kPairs) {
        __m256i bytes[Groups];
        unrolled<Groups>([&](auto g) { bytes[g] = _mm256_setzero_si256(); });
        unrolled<kPairs>([&](auto i) {
            const __m256i table = table_of<4>(a, at + i);
            unrolled<Groups>([&](auto g) {
                const __m256i channels = load_vector(w + g * group_bytes + (at + i) * kGroup);
                bytes[g] = kept(_mm256_add_epi8(bytes[g], _mm256_shuffle_epi8(table, channels)));
            });
        });
        unrolled<Groups>([&](auto g) {
            words[g] = kept(_mm256_add_epi16(words[g], bytes[g]));
            highs[g] = kept(_mm256_add_epi16(highs[g], _mm256_srli_epi16(bytes[g], 8)));
        });
    }
    unrolled<Groups>([&](auto g) {
        add_words(words[g], highs[g], starts == nullptr ? nullptr : starts + g * group_bytes, out + g * kGroup);
    });
}

template <int Groups>
constexpr LookupTile kOneRow[] = {mixed_tile<Groups>};
constexpr LookupTiles kMixedTiles[] = {kOneRow<1>, kOneRow<2>, kOneRow<3>};
constexpr Product kMixed = pairs_product<4, kGroup, kMixedTiles>("lookup-4", 192);

}  // namespace
