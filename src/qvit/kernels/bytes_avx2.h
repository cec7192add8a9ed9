// Vectors of 256 bits of AVX2, for lookups.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {
namespace bytes {

using Vector = __m256i;

inline Vector zero() { return _mm256_setzero_si256(); }
inline Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const Vector*>(p)); }
inline void store(void* p, Vector x) { _mm256_storeu_si256(static_cast<Vector*>(p), x); }
// A table of 16 bytes in each half.
inline Vector repeat(const uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}
inline Vector look_up(Vector table, Vector index) { return _mm256_shuffle_epi8(table, index); }
inline Vector add8(Vector a, Vector b) { return _mm256_add_epi8(a, b); }
inline Vector add16(Vector a, Vector b) { return _mm256_add_epi16(a, b); }
inline Vector add32(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
inline Vector sub16(Vector a, Vector b) { return _mm256_sub_epi16(a, b); }
// Low bytes of 16-bit words as high ones.
inline Vector raise8(Vector x) { return _mm256_slli_epi16(x, 8); }
// Halves of words of 16 and 32 bits.
inline Vector high8(Vector x) { return _mm256_srli_epi16(x, 8); }
inline Vector high16(Vector x) { return _mm256_srli_epi32(x, 16); }
inline Vector low16(Vector x) { return _mm256_and_si256(x, _mm256_set1_epi32(0xffff)); }

}  // namespace bytes
}  // namespace
