// The dense product of the instruction sets with 256-bit VNNI, in either of its two encodings.
#pragma once

#include <iterator>

#include "products_256.h"

namespace {

inline __m256i multiply_add(__m256i sums, __m256i codes, __m256i weights) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, codes, weights);
#else
    return _mm256_dpbusd_epi32(sums, codes, weights);
#endif
}

// One vpdpbusd does 32 multiply-adds, exactly.
struct Vnni {
    static constexpr int kRows = 6;  // 12 of the 16 registers hold sums

    template <int Rows>
    static void tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
        __m256i sums[Rows][kVectors];
        each_sum<Rows, kVectors>([&](auto r, auto v) { sums[r][v] = _mm256_setzero_si256(); });
        for (size_t at = 0; at < k; at += kDepth) {
            const __m256i weights[] = {bytes::load(w + at * kChannels), bytes::load(w + at * kChannels + 32)};
            unrolled<Rows>([&](auto r) {
                const __m256i codes = _mm256_set1_epi32(load_word(a + r * stride + at));
                unrolled<kVectors>([&](auto v) { sums[r][v] = multiply_add(sums[r][v], codes, weights[v]); });
            });
        }
        each_sum<Rows, kVectors>([&](auto r, auto v) { bytes::store(out + r * out_stride + v * kLanes, sums[r][v]); });
    }
};

constexpr Product kVnniProducts[] = {kLookup, kMixed, dense_product<Vnni>("vnni", 8, 8)};
constexpr size_t kVnniCount = std::size(kVnniProducts);

}  // namespace
