// WebAssembly with vectors of 128 bits; compiled once more with relaxed SIMD for the engines that have it.
#include "simd_wasm.h"

#include "bytes_wasm.h"
#include "lookup_tiles.h"
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

#endif

// 32 multiply-adds by one swizzle and one addition.
constexpr size_t kGroup = sizeof(v128_t);
constexpr LookupTile kOneGroup[] = {lookup_tile<1, 1>, lookup_tile<2, 1>, lookup_tile<3, 1>};
constexpr LookupTile kTwoGroups[] = {lookup_tile<1, 2>, lookup_tile<2, 2>, lookup_tile<3, 2>};
constexpr LookupTiles kLookupTiles[] = {kOneGroup, kTwoGroups};

// Vectors at constant distances, which V8 adds to an address.
constexpr size_t kWideGroup = 4 * sizeof(v128_t);
constexpr LookupTile kOneRow[] = {mixed_tile<kWideGroup, 1>};
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
