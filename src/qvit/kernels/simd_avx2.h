// Eight lanes of AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {
namespace simd {

constexpr size_t kWidth = 8;
using Float = __m256;

inline Float set(float x) { return _mm256_set1_ps(x); }
inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
inline Float load_sums(const int32_t* p) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Float round_sums(const int32_t* p, double scale, double shift) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const auto four = [=](const int32_t* at) {
        const __m256d x = _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        const __m256d y = _mm256_fmadd_pd(x, _mm256_set1_pd(scale), _mm256_set1_pd(shift));
        return _mm256_cvtpd_ps(_mm256_round_pd(y, kNearest));
    };
    return _mm256_set_m128(four(p + 4), four(p));
}
inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
inline Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
inline Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
inline Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
inline Float count_at_least(Float count, Float x, Float threshold) {
    const Float reached = _mm256_cmp_ps(x, threshold, _CMP_GE_OQ);
    return _mm256_add_ps(count, _mm256_and_ps(reached, _mm256_set1_ps(1.0f)));
}
inline Float round(Float x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The divider works beside the multiplications around it, and is the same on every make of processor; rcpps is not.
inline Float reciprocal(Float x) { return _mm256_div_ps(_mm256_set1_ps(1.0f), x); }
inline Float power_of_two(Float n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Float copy_sign(Float size, Float sign) {
    return _mm256_or_ps(size, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
inline Float absolute(Float x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline float reduce_add(Float x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Float x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline void store_codes(uint8_t* p, Float x) {
    const __m256i codes = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

}  // namespace simd
}  // namespace
