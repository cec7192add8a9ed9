// Four lanes of WebAssembly.
#pragma once

#include <wasm_simd128.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace {
namespace simd {

constexpr size_t kWidth = 4;
using Float = v128_t;

inline Float set(float x) { return wasm_f32x4_splat(x); }
inline Float load(const float* p) { return wasm_v128_load(p); }
inline void store(float* p, Float x) { wasm_v128_store(p, x); }
inline Float load_sums(const int32_t* p) { return wasm_f32x4_convert_i32x4(wasm_v128_load(p)); }
inline Float round_sums(const int32_t* p, double scale, double shift) {
    const v128_t sums = wasm_v128_load(p), factor = wasm_f64x2_splat(scale), start = wasm_f64x2_splat(shift);
    const auto two = [=](v128_t x) {
        const v128_t values = wasm_f64x2_convert_low_i32x4(x);
        return wasm_f32x4_demote_f64x2_zero(wasm_f64x2_nearest(wasm_f64x2_add(wasm_f64x2_mul(values, factor), start)));
    };
    return wasm_i64x2_shuffle(two(sums), two(wasm_i64x2_shuffle(sums, sums, 1, 1)), 0, 2);
}
inline Float add(Float a, Float b) { return wasm_f32x4_add(a, b); }
inline Float sub(Float a, Float b) { return wasm_f32x4_sub(a, b); }
inline Float mul(Float a, Float b) { return wasm_f32x4_mul(a, b); }
inline Float div(Float a, Float b) { return wasm_f32x4_div(a, b); }
// There is no fused one that is the same everywhere.
inline Float fma(Float a, Float b, Float c) { return wasm_f32x4_add(wasm_f32x4_mul(a, b), c); }
inline Float min(Float a, Float b) { return wasm_f32x4_pmin(b, a); }
inline Float max(Float a, Float b) { return wasm_f32x4_pmax(b, a); }
inline Float count_at_least(Float count, Float x, Float threshold) {
    return wasm_f32x4_add(count, wasm_v128_and(wasm_f32x4_ge(x, threshold), wasm_f32x4_splat(1.0f)));
}
inline Float round(Float x) { return wasm_f32x4_nearest(x); }
inline Float reciprocal(Float x) { return wasm_f32x4_div(wasm_f32x4_splat(1.0f), x); }
inline Float power_of_two(Float n) {
    // Whole numbers plus 1.5 * 2^23 have their value in the last bits.
    return wasm_i32x4_shl(wasm_f32x4_add(n, wasm_f32x4_splat(12582912.0f + 127.0f)), 23);
}
inline Float copy_sign(Float size, Float sign) { return wasm_v128_bitselect(sign, size, wasm_f32x4_splat(-0.0f)); }
inline Float absolute(Float x) { return wasm_f32x4_abs(x); }
inline float reduce_add(Float x) {
    const v128_t two = wasm_f32x4_add(x, wasm_i64x2_shuffle(x, x, 1, 1));
    return wasm_f32x4_extract_lane(two, 0) + wasm_f32x4_extract_lane(two, 1);
}
inline float reduce_max(Float x) {
    const v128_t two = wasm_f32x4_pmax(x, wasm_i64x2_shuffle(x, x, 1, 1));
    const v128_t one = wasm_f32x4_pmax(two, wasm_i32x4_shuffle(two, two, 1, 1, 1, 1));
    return wasm_f32x4_extract_lane(one, 0);
}
inline void store_codes(uint8_t* p, Float x) {
    const v128_t codes = wasm_v128_and(wasm_f32x4_add(x, wasm_f32x4_splat(12582912.0f)), wasm_i32x4_splat(0xff));
    const v128_t words = wasm_i16x8_narrow_i32x4(codes, codes);
    wasm_v128_store32_lane(p, wasm_u8x16_narrow_i16x8(words, words), 0);
}

}  // namespace simd
}  // namespace
