// Four lanes of NEON.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {
namespace simd {

constexpr size_t kWidth = 4;
using Float = float32x4_t;

inline Float set(float x) { return vdupq_n_f32(x); }
inline Float load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Float x) { vst1q_f32(p, x); }
inline Float load_sums(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }
inline Float round_sums(const int32_t* p, double scale, double shift) {
    const auto two = [=](int32x2_t sums) {
        const float64x2_t x = vcvtq_f64_s64(vmovl_s32(sums));
        return vcvt_f32_f64(vrndnq_f64(vfmaq_f64(vdupq_n_f64(shift), x, vdupq_n_f64(scale))));
    };
    const int32x4_t sums = vld1q_s32(p);
    return vcombine_f32(two(vget_low_s32(sums)), two(vget_high_s32(sums)));
}
inline Float add(Float a, Float b) { return vaddq_f32(a, b); }
inline Float sub(Float a, Float b) { return vsubq_f32(a, b); }
inline Float mul(Float a, Float b) { return vmulq_f32(a, b); }
inline Float div(Float a, Float b) { return vdivq_f32(a, b); }
inline Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
inline Float min(Float a, Float b) { return vminnmq_f32(a, b); }
inline Float max(Float a, Float b) { return vmaxnmq_f32(a, b); }
inline Float count_at_least(Float count, Float x, Float threshold) {
    const uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    return vaddq_f32(count, vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x, threshold), one)));
}
inline Float round(Float x) { return vrndnq_f32(x); }
inline Float reciprocal(Float x) { return vdivq_f32(vdupq_n_f32(1.0f), x); }
inline Float power_of_two(Float n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline Float copy_sign(Float size, Float sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, size); }
inline Float absolute(Float x) { return vabsq_f32(x); }
inline float reduce_add(Float x) { return vaddvq_f32(x); }
inline float reduce_max(Float x) { return vmaxvq_f32(x); }
inline void store_codes(uint8_t* p, Float x) {
    const uint16x4_t words = vmovn_u32(vcvtnq_u32_f32(x));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    std::memcpy(p, &four, sizeof four);
}

}  // namespace simd
}  // namespace
