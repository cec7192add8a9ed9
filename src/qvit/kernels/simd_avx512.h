// Sixteen lanes of AVX-512.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {
namespace simd {

constexpr size_t kWidth = 16;
using Float = __m512;

inline Float set(float x) { return _mm512_set1_ps(x); }
inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
inline Float load_sums(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
inline Float round_sums(const int32_t* p, double scale, double shift) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const auto eight = [=](const int32_t* at) {
        const __m512d x = _mm512_cvtepi32_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        const __m512d y = _mm512_fmadd_pd(x, _mm512_set1_pd(scale), _mm512_set1_pd(shift));
        return _mm512_cvtpd_ps(_mm512_roundscale_pd(y, kNearest));
    };
    const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(eight(p)));
    return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(eight(p + 8)), 1));
}
inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
inline Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
inline Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
inline Float count_at_least(Float count, Float x, Float threshold) {
    const __mmask16 reached = _mm512_cmp_ps_mask(x, threshold, _CMP_GE_OQ);
    return _mm512_mask_add_ps(count, reached, count, _mm512_set1_ps(1.0f));
}
inline Float round(Float x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Float reciprocal(Float x) {
    const Float r = _mm512_rcp14_ps(x);  // one Newton step doubles its 14 bits
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.0f)));
}
inline Float power_of_two(Float n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
inline Float copy_sign(Float size, Float sign) {
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_castps_si512(size), _mm512_and_si512(_mm512_castps_si512(sign), bit)));
}
inline Float absolute(Float x) { return _mm512_abs_ps(x); }
inline float reduce_add(Float x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Float x) { return _mm512_reduce_max_ps(x); }
inline void store_codes(uint8_t* p, const Float (&x)[4]) {
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0]), _mm512_cvtps_epi32(x[1]));
    const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2]), _mm512_cvtps_epi32(x[3]));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}
inline void store_codes(uint8_t* p, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

}  // namespace simd
}  // namespace
