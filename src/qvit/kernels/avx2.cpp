// AVX2 with FMA.
#include "simd_avx2.h"

#include <iterator>

#include "products_256.h"
#include "row_ops.h"

namespace {

// One vpmaddubsw multiplies 32 pairs of bytes and adds neighbours, one vpaddw adds that to 16-bit sums, which are
// widened when another step could overflow them.
template <int LeftBits, int RightBits>
struct Narrow {
    static constexpr int kRows = 4;  // GCC 12 keeps the sums of no more in registers
    static constexpr size_t kLargest = 2 * ((size_t{1} << LeftBits) - 1) * (size_t{1} << (RightBits - 1));
    static constexpr size_t kBeforeWidening = 32767 / kLargest * kDepth;
    static_assert(kBeforeWidening > 0);

    template <int Rows>
    static void tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (size_t at = 0; at < k;) {
            const bool first = at == 0;
            __m256i sums[Rows][kVectors];
            each_sum<Rows, kVectors>([&](auto r, auto v) { sums[r][v] = _mm256_setzero_si256(); });
            const size_t until = std::min(at + kBeforeWidening, k);
            for (; at < until; at += kDepth) {
                const __m256i weights[] = {kept(bytes::load(w + at * kChannels)),
                                           kept(bytes::load(w + at * kChannels + 32))};
                unrolled<Rows>([&](auto r) {
                    const __m256i codes = _mm256_set1_epi32(load_word(a + r * stride + at));
                    unrolled<kVectors>([&](auto v) {
                        sums[r][v] = _mm256_add_epi16(sums[r][v], _mm256_maddubs_epi16(codes, weights[v]));
                    });
                });
            }
            each_sum<Rows, kVectors>([&](auto r, auto v) {
                int32_t* to = out + r * out_stride + v * kLanes;
                __m256i sum = _mm256_madd_epi16(sums[r][v], ones);
                if (!first) sum = _mm256_add_epi32(sum, bytes::load(to));
                bytes::store(to, sum);
            });
        }
    }
};

// Any 8 bits: even and odd bytes apart as 16-bit words, which vpmaddwd multiplies and adds exactly.
struct Wide {
    static constexpr int kRows = 4;

    template <int Rows>
    static void tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
        __m256i sums[Rows][kVectors];
        each_sum<Rows, kVectors>([&](auto r, auto v) { sums[r][v] = _mm256_setzero_si256(); });
        for (size_t at = 0; at < k; at += kDepth)
            unrolled<kVectors>([&](auto v) {
                const __m256i weights = bytes::load(w + at * kChannels + v * sizeof(__m256i));
                const __m256i odd = _mm256_srai_epi16(weights, 8);
                const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8);
                unrolled<Rows>([&](auto r) {
                    const uint32_t codes = static_cast<uint32_t>(load_word(a + r * stride + at));
                    const __m256i left_even = _mm256_set1_epi32(static_cast<int>(codes & 0x00ff00ff));
                    const __m256i left_odd = _mm256_set1_epi32(static_cast<int>(codes >> 8 & 0x00ff00ff));
                    const __m256i both =
                        _mm256_add_epi32(_mm256_madd_epi16(left_even, even), _mm256_madd_epi16(left_odd, odd));
                    sums[r][v] = _mm256_add_epi32(sums[r][v], both);
                });
            });
        each_sum<Rows, kVectors>([&](auto r, auto v) { bytes::store(out + r * out_stride + v * kLanes, sums[r][v]); });
    }
};

constexpr Product kProducts[] = {
    kLookup,
    kMixed,
    dense_product<Narrow<4, 4>>("maddubs-4", 4, 4),
    dense_product<Narrow<6, 6>>("maddubs-6", 6, 6),
    dense_product<Narrow<8, 4>>("maddubs-8", 8, 4),
    dense_product<Wide>("madd", 8, 8),
};
constexpr size_t kCount = std::size(kProducts);

}  // namespace

namespace qvit {
extern const Isa kAvx2 = {"avx2", kProducts, kCount, kProducts, kCount, kRowOps};
}
