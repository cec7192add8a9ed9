// NEON with the dot product of Armv8.2. A lookup as on x86 would not pay for 2 bits: vqtbl1q and an addition do 32
// multiply-adds, and so do two dot products.
#include "simd_neon.h"

#include "panels.h"
#include "row_ops.h"

namespace {

constexpr size_t kLanes = 4;                  // sums in a vector
constexpr int kVectors = kChannels / kLanes;  // vectors in a panel

// The dot product takes signed bytes only. Codes of the left side up to 7 bits are the same signed; of 8 bits, u is
// taken as (u - 128) + 128, and the sum of 64 w is added twice.
template <bool Shifted>
struct Dot {
    static constexpr int kRows = 4;  // 16 of the 32 registers hold sums

    template <int Rows>
    static void tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
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
};

constexpr Product kProducts[] = {
    dense_product<Dot<false>>("dot", 7, 8),
    dense_product<Dot<true>>("dot-shifted", 8, 8),
};

}  // namespace

namespace qvit {
extern const Isa kNeon = {"neon-dot", kProducts, 2, kProducts, 2, kRowOps};
}
