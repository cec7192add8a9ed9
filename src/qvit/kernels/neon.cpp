// NEON with the dot product of Armv8.2. A lookup as on x86 would not pay for 2 bits: vqtbl1q and an addition do 32
// multiply-adds, and so do two dot products.
#include "simd_neon.h"

#include "products.h"
#include "row_ops.h"

namespace {

constexpr size_t kLanes = 4;                  // sums in a vector
constexpr int kVectors = kChannels / kLanes;  // vectors in a panel
constexpr int kRows = 4;                      // 16 of the 32 registers hold sums

// The dot product takes signed bytes only. Codes of the left side up to 7 bits are the same signed; of 8 bits, u is
// taken as (u - 128) + 128, and the sum of 64 w is added twice.
template <int Rows, bool Shifted>
void dense_tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
    int32x4_t sums[Rows][kVectors], shift[kVectors];
    unrolled<kVectors>([&](auto v) {
        shift[v] = vdupq_n_s32(0);
        unrolled<Rows>([&](auto r) { sums[r][v] = vdupq_n_s32(0); });
    });
    for (size_t at = 0; at < k; at += kDepth) {
        int8x16_t weights[kVectors];
        unrolled<kVectors>([&](auto v) {
            weights[v] = vreinterpretq_s8_u8(vld1q_u8(w + at * kChannels + v * sizeof(int8x16_t)));
            if (Shifted) shift[v] = vdotq_s32(shift[v], weights[v], vdupq_n_s8(64));
        });
        unrolled<Rows>([&](auto r) {
            int8x16_t codes = vreinterpretq_s8_s32(vdupq_n_s32(load_word(a + r * stride + at)));
            if (Shifted) codes = veorq_s8(codes, vdupq_n_s8(-128));
            unrolled<kVectors>([&](auto v) { sums[r][v] = vdotq_s32(sums[r][v], weights[v], codes); });
        });
    }
    unrolled<Rows>([&](auto r) {
        unrolled<kVectors>([&](auto v) {
            vst1q_s32(out + r * out_stride + v * kLanes, vaddq_s32(sums[r][v], vshlq_n_s32(shift[v], 1)));
        });
    });
}

using Tile = void (*)(const uint8_t*, size_t, const uint8_t*, size_t, int32_t*, size_t);

template <bool Shifted>
constexpr Tile kTiles[kRows] = {dense_tile<1, Shifted>, dense_tile<2, Shifted>, dense_tile<3, Shifted>,
                                dense_tile<4, Shifted>};

template <bool Shifted>
void run_dense(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t, size_t k, size_t first,
               size_t last, int32_t* out, size_t out_stride) {
    for (size_t channel = first; channel < last; channel += kChannels)
        for (size_t r = 0; r < count; r += kRows) {
            const size_t height = std::min<size_t>(kRows, count - r);
            kTiles<Shifted>[height - 1](rows + r* stride, stride, packed + channel* k, k,
                                        out + r* out_stride + channel - first, out_stride);
        }
}

constexpr Product kProducts[] = {
    {"dot", 7, 8, kChannels, 64, dense_weight_bytes, dense_pack_channel, byte_row, nullptr, run_dense<false>},
    {"dot-shifted", 8, 8, kChannels, 64, dense_weight_bytes, dense_pack_channel, byte_row, nullptr, run_dense<true>},
};

}  // namespace

namespace qvit {
extern const Isa kNeon = {"neon-dot", kProducts, 2, kProducts, 2, kRowOps};
}
