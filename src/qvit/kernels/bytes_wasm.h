// Vectors of 128 bits of WebAssembly, for lookups.
#pragma once

#include <wasm_simd128.h>

#include <cstddef>
#include <cstdint>

namespace {
namespace bytes {

using Vector = v128_t;

inline Vector zero() { return wasm_i32x4_splat(0); }
inline Vector load(const void* p) { return wasm_v128_load(p); }
inline void store(void* p, Vector x) { wasm_v128_store(p, x); }
inline Vector repeat(const uint8_t* table) { return load(table); }
#if defined(__wasm_relaxed_simd__)
inline Vector look_up(Vector table, Vector index) { return wasm_i8x16_relaxed_swizzle(table, index); }
#else
inline Vector look_up(Vector table, Vector index) { return wasm_i8x16_swizzle(table, index); }
#endif
inline Vector add8(Vector a, Vector b) { return wasm_i8x16_add(a, b); }
inline Vector add16(Vector a, Vector b) { return wasm_i16x8_add(a, b); }
inline Vector add32(Vector a, Vector b) { return wasm_i32x4_add(a, b); }
inline Vector sub16(Vector a, Vector b) { return wasm_i16x8_sub(a, b); }
inline Vector raise8(Vector x) { return wasm_i16x8_shl(x, 8); }
inline Vector high8(Vector x) { return wasm_u16x8_shr(x, 8); }
inline Vector high16(Vector x) { return wasm_u32x4_shr(x, 16); }
inline Vector low16(Vector x) { return wasm_v128_and(x, wasm_i32x4_splat(0xffff)); }

}  // namespace bytes
}  // namespace
