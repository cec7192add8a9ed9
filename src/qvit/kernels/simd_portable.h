// One lane: what the row operations mean, on any machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
namespace simd {

constexpr size_t kWidth = 1;
using Float = float;

inline Float set(float x) { return x; }
inline Float load(const float* p) { return *p; }
inline void store(float* p, Float x) { *p = x; }
inline Float load_sums(const int32_t* p) { return static_cast<float>(*p); }
// sums * scale + shift to the next whole number, in double precision until it is one
inline Float round_sums(const int32_t* p, double scale, double shift) {
    return static_cast<float>(std::nearbyint(*p * scale + shift));
}
inline Float add(Float a, Float b) { return a + b; }
inline Float sub(Float a, Float b) { return a - b; }
inline Float mul(Float a, Float b) { return a * b; }
inline Float div(Float a, Float b) { return a / b; }
inline Float fma(Float a, Float b, Float c) { return a * b + c; }
inline Float min(Float a, Float b) { return a < b ? a : b; }
inline Float max(Float a, Float b) { return a > b ? a : b; }
// count, one more where x >= threshold
inline Float count_at_least(Float count, Float x, Float threshold) { return x >= threshold ? count + 1.0f : count; }
inline Float round(Float x) { return std::nearbyint(x); }
inline Float reciprocal(Float x) { return 1.0f / x; }
// 2^n for a whole number n >= -126
inline Float power_of_two(Float n) { return std::ldexp(1.0f, static_cast<int>(n)); }
inline Float copy_sign(Float size, Float sign) { return std::copysign(size, sign); }
inline Float absolute(Float x) { return std::fabs(x); }
inline float reduce_add(Float x) { return x; }
inline float reduce_max(Float x) { return x; }
// Numbers 0..255 as bytes, rounded to the nearest, a half to the even one
inline void store_codes(uint8_t* p, Float x) { *p = static_cast<uint8_t>(std::nearbyint(x)); }

}  // namespace simd
}  // namespace
