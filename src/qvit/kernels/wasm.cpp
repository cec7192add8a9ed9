// WebAssembly with vectors of 128 bits; compiled once more with relaxed SIMD for the engines that have it.
#include "simd_wasm.h"

#include "lookup_pairs.h"
#include "panels.h"
#include "row_ops.h"

namespace {

constexpr size_t kLanes = 4;                  // sums in a vector
constexpr int kVectors = kChannels / kLanes;  // vectors in a panel

constexpr size_t kStep = sizeof(v128_t);  // codes of a row that are loaded at once

// use(row, vector, codes, weights) for kStep codes of some rows and a panel: four of a row's codes in all lanes, and
// four weights of a channel in each. Few rows, and constant distances: what V8 keeps in registers and adds to an
// address.
template <int Rows, class Use>
[[gnu::always_inline]] inline void each_word(const uint8_t* a, size_t stride, const uint8_t* w, Use use) {
    v128_t rows[Rows];
    unrolled<Rows>([&](auto r) { rows[r] = wasm_v128_load(a + r * stride); });
    unrolled<kStep / kDepth>([&](auto word) {
        v128_t codes[Rows];
        unrolled<Rows>([&](auto r) { codes[r] = wasm_i32x4_shuffle(rows[r], rows[r], word, word, word, word); });
        unrolled<kVectors>([&](auto v) {
            const v128_t weights = wasm_v128_load(w + (word * kVectors + v) * sizeof(v128_t));
            unrolled<Rows>([&](auto r) { use(r, v, codes[r], weights); });
        });
    });
}

// Any 8 bits: even and odd bytes apart as 16-bit words, which one instruction multiplies and adds to 32 bits.
struct Wide {
    static constexpr int kRows = 3;

    template <int Rows>
    static void tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
        v128_t sums[Rows][kVectors];
        each_sum<Rows, kVectors>([&](auto r, auto v) { sums[r][v] = wasm_i32x4_splat(0); });
        const v128_t low = wasm_i16x8_splat(0xff);
        for (size_t at = 0; at < k; at += kDepth) {
            v128_t even_codes[Rows], odd_codes[Rows];
            unrolled<Rows>([&](auto r) {
                const v128_t codes = wasm_v128_load32_splat(a + r * stride + at);
                even_codes[r] = wasm_v128_and(codes, low);
                odd_codes[r] = wasm_u16x8_shr(codes, 8);
            });
            unrolled<kVectors>([&](auto v) {
                const v128_t weights = wasm_v128_load(w + at * kChannels + v * sizeof(v128_t));
                const v128_t odd = wasm_i16x8_shr(weights, 8);
                const v128_t even = wasm_i16x8_shr(wasm_i16x8_shl(weights, 8), 8);
                unrolled<Rows>([&](auto r) {
                    const v128_t both = wasm_i32x4_add(wasm_i32x4_dot_i16x8(even_codes[r], even),
                                                       wasm_i32x4_dot_i16x8(odd_codes[r], odd));
                    sums[r][v] = wasm_i32x4_add(sums[r][v], both);
                });
            });
        }
        each_sum<Rows, kVectors>(
            [&](auto r, auto v) { wasm_v128_store(out + r * out_stride + v * kLanes, sums[r][v]); });
    }
};

#if defined(__wasm_relaxed_simd__)

// Bytes of both sides at once, exact where the left one has at most 7 bits. Pairs of products in 16 bits, which are
// widened when another step could overflow them.
template <int LeftBits, int RightBits>
struct Narrow {
    static constexpr int kRows = 2;
    static constexpr size_t kLargest = 2 * ((size_t{1} << LeftBits) - 1) * (size_t{1} << (RightBits - 1));
    static constexpr size_t kBeforeWidening = 32767 / kLargest * kDepth / kStep * kStep;
    static_assert(LeftBits <= 7 && kBeforeWidening > 0);

    template <int Rows>
    static void tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
        for (size_t at = 0; at < k;) {
            const bool first = at == 0;
            v128_t sums[Rows][kVectors];
            each_sum<Rows, kVectors>([&](auto r, auto v) { sums[r][v] = wasm_i32x4_splat(0); });
            const size_t until = std::min(at + kBeforeWidening, k);
            for (; at < until; at += kStep)
                each_word<Rows>(a + at, stride, w + at * kChannels, [&](auto r, auto v, v128_t codes, v128_t weights) {
                    sums[r][v] = wasm_i16x8_add(sums[r][v], wasm_i16x8_relaxed_dot_i8x16_i7x16(weights, codes));
                });
            each_sum<Rows, kVectors>([&](auto r, auto v) {
                int32_t* to = out + r * out_stride + v * kLanes;
                v128_t sum = wasm_i32x4_extadd_pairwise_i16x8(sums[r][v]);
                if (!first) sum = wasm_i32x4_add(sum, wasm_v128_load(to));
                wasm_v128_store(to, sum);
            });
        }
    }
};

inline v128_t look_up(v128_t table, v128_t index) { return wasm_i8x16_relaxed_swizzle(table, index); }

#else

inline v128_t look_up(v128_t table, v128_t index) { return wasm_i8x16_swizzle(table, index); }

#endif

// Four sums of each quarter of a group, from those of 16-bit words of two bytes and those of the words' high bytes,
// which make the low bytes' sum by their difference. To what is in `starts`, or if that is null in `out`.
template <size_t Group>
[[gnu::always_inline]] inline void add_words(v128_t words, v128_t highs, const uint8_t* starts, int32_t* out) {
    const v128_t lows = wasm_i16x8_sub(words, wasm_i16x8_shl(highs, 8)), low_word = wasm_i32x4_splat(0xffff);
    const v128_t quarters[4] = {wasm_v128_and(lows, low_word), wasm_u32x4_shr(lows, 16), wasm_v128_and(highs, low_word),
                                wasm_u32x4_shr(highs, 16)};
    const void* from = starts == nullptr ? static_cast<const void*>(out) : starts;
    unrolled<4>([&](auto q) {
        constexpr size_t kChannel = q * Group / 4;
        const v128_t start = wasm_v128_load(static_cast<const int32_t*>(from) + kChannel);
        wasm_v128_store(out + kChannel, wasm_i32x4_add(start, quarters[q]));
    });
}

// The lookup for 2 bits: 32 multiply-adds by one swizzle and one addition.
constexpr size_t kGroup = 16;

template <int Rows, int Groups>
void lookup_tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t group_bytes, size_t count,
                 const uint8_t* starts, int32_t* out, size_t out_stride) {
    v128_t words[Rows][Groups], highs[Rows][Groups];
    each_sum<Rows, Groups>([&](auto r, auto g) { words[r][g] = highs[r][g] = wasm_i32x4_splat(0); });
    for (size_t at = 0; at < count;) {
        v128_t bytes[Rows][Groups];
        each_sum<Rows, Groups>([&](auto r, auto g) { bytes[r][g] = wasm_i32x4_splat(0); });
        const size_t until = std::min(at + kBeforeWidening<2>, count);
        for (; at < until; at += 2)
            unrolled<2>([&](auto i) {
                v128_t channels[Groups];
                unrolled<Groups>(
                    [&](auto g) { channels[g] = wasm_v128_load(w + g * group_bytes + (at + i) * kGroup); });
                unrolled<Rows>([&](auto r) {
                    const v128_t table = wasm_v128_load(table_at<2>(a + r * stride, at + i));
                    unrolled<Groups>(
                        [&](auto g) { bytes[r][g] = wasm_i8x16_add(bytes[r][g], look_up(table, channels[g])); });
                });
            });
        each_sum<Rows, Groups>([&](auto r, auto g) {
            words[r][g] = wasm_i16x8_add(words[r][g], bytes[r][g]);
            highs[r][g] = wasm_i16x8_add(highs[r][g], wasm_u16x8_shr(bytes[r][g], 8));
        });
    }
    each_sum<Rows, Groups>([&](auto r, auto g) {
        add_words<kGroup>(words[r][g], highs[r][g], starts == nullptr ? nullptr : starts + g * group_bytes,
                          out + r * out_stride + g * kGroup);
    });
}

constexpr LookupTile kOneGroup[] = {lookup_tile<1, 1>, lookup_tile<2, 1>, lookup_tile<3, 1>};
constexpr LookupTile kTwoGroups[] = {lookup_tile<1, 2>, lookup_tile<2, 2>, lookup_tile<3, 2>};
constexpr LookupTiles kLookupTiles[] = {kOneGroup, kTwoGroups};

// Rows of 3 and 4 bits in lookups: one row, and vectors at constant distances, which V8 adds to an address.
constexpr size_t kWideGroup = 64;

void mixed_tile(const uint8_t* a, size_t, const uint8_t* w, size_t, size_t count, const uint8_t* starts, int32_t* out,
                size_t) {
    constexpr size_t kPairs = kBeforeWidening<4>;
    constexpr int kIndices = kWideGroup / sizeof(v128_t);
    v128_t words[kIndices], highs[kIndices];
    unrolled<kIndices>([&](auto v) { words[v] = highs[v] = wasm_i32x4_splat(0); });
    for (size_t at = 0; at < count; at += kPairs) {
        v128_t bytes[kIndices];
        unrolled<kIndices>([&](auto v) { bytes[v] = wasm_i32x4_splat(0); });
        unrolled<kPairs>([&](auto i) {
            const v128_t table = wasm_v128_load(table_at<4>(a, at + i));
            unrolled<kIndices>([&](auto v) {
                const v128_t index = wasm_v128_load(w + (at + i) * kWideGroup + v * sizeof index);
                bytes[v] = wasm_i8x16_add(bytes[v], look_up(table, index));
            });
        });
        unrolled<kIndices>([&](auto v) {
            words[v] = wasm_i16x8_add(words[v], bytes[v]);
            highs[v] = wasm_i16x8_add(highs[v], wasm_u16x8_shr(bytes[v], 8));
        });
    }
    unrolled<kIndices>([&](auto v) {
        constexpr size_t kBytes = kLanes * sizeof(int32_t);
        add_words<kWideGroup>(words[v], highs[v], starts == nullptr ? nullptr : starts + v * kBytes, out + v * kLanes);
    });
}

constexpr LookupTile kOneRow[] = {mixed_tile};
constexpr LookupTiles kMixedTiles[] = {kOneRow};

constexpr Product kProducts[] = {
    pairs_product<2, kGroup, kLookupTiles>("lookup", 64),
    pairs_product<4, kWideGroup, kMixedTiles>("lookup-4", 64),
#if defined(__wasm_relaxed_simd__)
    dense_product<Narrow<4, 4>>("relaxed-4", 4, 4),
    dense_product<Narrow<6, 6>>("relaxed-6", 6, 6),
#endif
    dense_product<Wide>("dot", 8, 8),
};
constexpr size_t kCount = std::size(kProducts);
#if defined(__wasm_relaxed_simd__)
constexpr const char* kName = "relaxed-simd";
#else
constexpr const char* kName = "simd128";
#endif

}  // namespace

namespace qvit {
extern const Isa kWasm = {kName, kProducts, kCount, kProducts, kCount, kRowOps};
}
