// The row operations, written once over the vectors of simd_*.h; a source file of an instruction set includes both.
//
// All names are local to that file: the same inline function compiled for two instruction sets would otherwise be
// merged by the linker, and the wrong one kept.
#pragma once

#include <cmath>
#include <type_traits>

#include "isa.h"

namespace {

using namespace qvit;
using simd::Float;
using simd::kWidth;

inline Float clamp_code(Float x, Float top) { return simd::max(simd::min(simd::round(x), top), simd::set(0.0f)); }

// 2^x for x <= 0; below -126 it is 0. The polynomial is a fit of degree 6 to 2^f on [-1/2, 1/2] with the
// value at 0 held at 1; its largest error, 2.7e-9 of the value, is below float's own.
inline Float exp2_negative(Float x) {
    const Float floor = simd::set(-126.0f);
    const Float bounded = simd::max(x, floor);
    const Float n = simd::round(bounded), f = simd::sub(bounded, n);
    Float p = simd::set(1.54744310e-4f);
    p = simd::fma(p, f, simd::set(1.34002825e-3f));
    p = simd::fma(p, f, simd::set(9.61801130e-3f));
    p = simd::fma(p, f, simd::set(5.55032752e-2f));
    p = simd::fma(p, f, simd::set(2.40226507e-1f));
    p = simd::fma(p, f, simd::set(6.93147182e-1f));
    p = simd::fma(p, f, simd::set(1.0f));
    return simd::mul(p, simd::power_of_two(n));
}

constexpr float kLog2E = 1.44269504088896f;

inline Float exp_negative(Float x) { return exp2_negative(simd::mul(x, simd::set(kLog2E))); }

// 1 / (1 + e^-x), from e^-|x| so that nothing overflows.
inline Float sigmoid(Float x) {
    const Float e = exp_negative(simd::sub(simd::set(0.0f), simd::absolute(x)));
    const Float small = simd::mul(e, simd::reciprocal(simd::add(simd::set(1.0f), e)));  // of -|x|, at most 1/2
    const Float half = simd::set(0.5f);
    return simd::add(half, simd::copy_sign(simd::sub(half, small), x));
}

// erf as t P(t^2) / Q(t^2) on [-3.8, 3.8], beyond which it is 1 to float's precision; the coefficients are a minimax
// fit of degrees 4 and 5 in t^2, whose absolute error in float arithmetic is below 5e-7.
inline Float erf(Float x) {
    const Float t = simd::max(simd::min(x, simd::set(3.8f)), simd::set(-3.8f)), u = simd::mul(t, t);
    Float p = simd::set(2.99735700e-4f);
    p = simd::fma(p, u, simd::set(8.24481628e-3f));
    p = simd::fma(p, u, simd::set(6.61750651e-2f));
    p = simd::fma(p, u, simd::set(3.06138674e-1f));
    p = simd::fma(p, u, simd::set(1.12837766f));
    Float q = simd::set(1.77245318e-5f);
    q = simd::fma(q, u, simd::set(2.09156862e-3f));
    q = simd::fma(q, u, simd::set(2.39676319e-2f));
    q = simd::fma(q, u, simd::set(1.60249879e-1f));
    q = simd::fma(q, u, simd::set(6.04624551e-1f));
    q = simd::fma(q, u, simd::set(1.0f));
    return simd::mul(simd::mul(t, p), simd::reciprocal(q));
}

template <Activation kind>
inline Float activated(Float x) {
    if constexpr (kind == Activation::gelu) {
        const Float half = simd::mul(x, simd::set(0.5f));
        return simd::fma(half, erf(simd::mul(x, simd::set(0.70710678f))), half);
    }
    if constexpr (kind == Activation::gelu_tanh) {
        // (1 + tanh u) / 2 = sigmoid(2 u)
        const Float cubic = simd::fma(simd::mul(x, x), simd::set(0.044715f), simd::set(1.0f));
        return simd::mul(x, sigmoid(simd::mul(simd::mul(x, cubic), simd::set(1.59576912f))));
    }
    if constexpr (kind == Activation::quick_gelu) return simd::mul(x, sigmoid(simd::mul(x, simd::set(1.702f))));
    if constexpr (kind == Activation::silu) return simd::mul(x, sigmoid(x));
    if constexpr (kind == Activation::relu) return simd::max(x, simd::set(0.0f));
    return x;
}

// Call f with the activation as a constant of the compiler's, so that the choice is made once a tile.
template <class Function>
inline void with_activation(Activation activation, Function f) {
    switch (activation) {
#define QVIT_CASE(name) \
    case Activation::name: f(std::integral_constant<Activation, Activation::name>()); break;
        QVIT_ACTIVATIONS(QVIT_CASE)
#undef QVIT_CASE
    }
}

void quantize_sums(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                   const float* shift, float top, uint8_t* out, size_t out_stride) {
    const Float t = simd::set(top);
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < width; c += kWidth) {
            const Float x = simd::load_sums(sums + r * stride + c);
            const Float y = simd::fma(x, simd::load(scale + c), simd::load(shift + c));
            simd::store_codes(out + r * out_stride + c, clamp_code(y, t));
        }
}

void quantize_head(const int32_t* sums, size_t stride, size_t rows, size_t width, double scale, const double* shift,
                   float top, uint8_t* out, size_t out_stride) {
    const Float t = simd::set(top), zero = simd::set(0.0f);
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < width; c += kWidth) {
            const Float whole = simd::round_sums(sums + r * stride + c, scale, shift[r]);
            simd::store_codes(out + r * out_stride + c, simd::max(simd::min(whole, t), zero));
        }
}

void activate_sums(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                   const float* shift, Activation activation, Quantize quantize, uint8_t* out, size_t out_stride) {
    with_activation(activation, [&](auto kind) {
        const Float a = simd::set(quantize.scale), b = simd::set(quantize.shift), t = simd::set(quantize.top);
        for (size_t r = 0; r < rows; ++r)
            for (size_t c = 0; c < width; c += kWidth) {
                const Float x = simd::load_sums(sums + r * stride + c);
                const Float y = activated<kind()>(simd::fma(x, simd::load(scale + c), simd::load(shift + c)));
                simd::store_codes(out + r * out_stride + c, clamp_code(simd::fma(y, a, b), t));
            }
    });
}

template <bool falls>
inline void count_steps(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                        const float* shift, const Steps& steps, uint8_t* out, size_t out_stride) {
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < width; c += kWidth) {
            const Float x = simd::load_sums(sums + r * stride + c);
            const Float y = simd::fma(x, simd::load(scale + c), simd::load(shift + c));
            Float code = simd::set(0.0f);
            for (const float step : steps.rising) code = simd::count_at_least(code, y, simd::set(step));
            const Float negative = simd::sub(simd::set(0.0f), y);
            if constexpr (falls)
                for (const float step : steps.falling) code = simd::count_at_least(code, negative, simd::set(step));
            simd::store_codes(out + r * out_stride + c, code);
        }
}

void step_sums(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale, const float* shift,
               const Steps& steps, uint8_t* out, size_t out_stride) {
    const auto count = steps.falls ? count_steps<true> : count_steps<false>;
    count(sums, stride, rows, width, scale, shift, steps, out, out_stride);
}

void store_sums(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale, const float* shift,
                float* out, size_t out_stride) {
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < width; c += kWidth) {
            const Float x = simd::load_sums(sums + r * stride + c);
            simd::store(out + r * out_stride + c, simd::fma(x, simd::load(scale + c), simd::load(shift + c)));
        }
}

void add_sums(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale, const float* shift,
              float* out, size_t out_stride) {
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < width; c += kWidth) {
            float* at = out + r * out_stride + c;
            const Float x = simd::load_sums(sums + r * stride + c);
            const Float y = simd::fma(x, simd::load(scale + c), simd::load(shift + c));
            simd::store(at, simd::add(simd::load(at), y));
        }
}

void softmax_codes(const int32_t* sums, size_t stride, size_t rows, size_t width, float scale, const float* shifts,
                   size_t shift_stride, float inverse, float top, uint8_t* out, size_t out_stride, float* totals) {
    constexpr size_t kRow = 4096;  // columns whose exponentials are kept; beyond that they are computed again
    alignas(64) float kept[kRow];
    const Float s = simd::set(scale), t = simd::set(top);
    for (size_t r = 0; r < rows; ++r) {
        const int32_t* row = sums + r * stride;
        const float* shift = shifts + r * shift_stride;
        const auto logit = [&](size_t c) { return simd::fma(simd::load_sums(row + c), s, simd::load(shift + c)); };
        Float largest = logit(0);
        for (size_t c = kWidth; c < width; c += kWidth) largest = simd::max(largest, logit(c));
        const Float m = simd::set(simd::reduce_max(largest));
        Float sum = simd::set(0.0f);
        for (size_t c = 0; c < width; c += kWidth) {
            const Float e = exp2_negative(simd::sub(logit(c), m));
            if (c < kRow) simd::store(kept + c, e);
            sum = simd::add(sum, e);
        }
        const Float factor = simd::set(inverse / simd::reduce_add(sum));
        Float total = simd::set(0.0f);
        for (size_t c = 0; c < width; c += kWidth) {
            const Float e = c < kRow ? simd::load(kept + c) : exp2_negative(simd::sub(logit(c), m));
            const Float code = simd::min(simd::round(simd::mul(e, factor)), t);
            simd::store_codes(out + r * out_stride + c, code);
            total = simd::add(total, code);
        }
        totals[r] = simd::reduce_add(total);
    }
}

// Mean (0 for RMSNorm) and 1 / deviation of a row whose padding is zero.
struct Moments {
    float mean, inverse;
};

inline Moments moments(const float* x, const Normalize& norm) {
    const float width = static_cast<float>(norm.width);
    float mean = 0.0f;
    if (!norm.rms) {
        Float sum = simd::set(0.0f);
        for (size_t c = 0; c < norm.padded; c += kWidth) sum = simd::add(sum, simd::load(x + c));
        mean = simd::reduce_add(sum) / width;
    }
    const Float m = simd::set(mean);
    const size_t whole = norm.width / kWidth * kWidth;
    Float squares = simd::set(0.0f);
    for (size_t c = 0; c < whole; c += kWidth) {
        const Float d = simd::sub(simd::load(x + c), m);
        squares = simd::fma(d, d, squares);
    }
    float total = simd::reduce_add(squares);
    for (size_t c = whole; c < norm.width; ++c) total += (x[c] - mean) * (x[c] - mean);  // padding left out
    return {mean, 1.0f / std::sqrt(total / width + norm.eps)};
}

template <class Store>
inline void normalize_row(const float* x, const Normalize& norm, Store store) {
    const Moments row = moments(x, norm);
    const Float mean = simd::set(row.mean), inverse = simd::set(row.inverse);
    for (size_t c = 0; c < norm.padded; c += kWidth) {
        Float y = simd::mul(simd::sub(simd::load(x + c), mean), simd::load(norm.weight + c));
        if (norm.inner != nullptr) y = simd::add(y, simd::load(norm.inner + c));
        store(c, simd::fma(y, inverse, simd::load(norm.bias + c)));
    }
}

void normalize_codes(const float* x, size_t stride, size_t rows, const Normalize& norm, float top, uint8_t* out,
                     size_t out_stride) {
    const Float t = simd::set(top);
    for (size_t r = 0; r < rows; ++r)
        normalize_row(x + r * stride, norm,
                      [&](size_t c, Float y) { simd::store_codes(out + r * out_stride + c, clamp_code(y, t)); });
}

void normalize(const float* x, size_t stride, size_t rows, const Normalize& norm, float* out, size_t out_stride) {
    for (size_t r = 0; r < rows; ++r)
        normalize_row(x + r * stride, norm, [&](size_t c, Float y) { simd::store(out + r * out_stride + c, y); });
}

void quantize(const float* x, size_t stride, size_t rows, size_t width, Rounding quantizer, uint8_t* out,
              size_t out_stride) {
    const Float step = simd::set(quantizer.step), offset = simd::set(quantizer.offset);
    const Float low = simd::set(quantizer.low), top = simd::set(quantizer.top);
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < width; c += kWidth) {
            const Float y = simd::round(simd::div(simd::sub(simd::load(x + r * stride + c), offset), step));
            simd::store_codes(out + r * out_stride + c, clamp_code(simd::sub(y, low), top));
        }
}

void activate(float* x, size_t count, Activation activation) {
    with_activation(activation, [&](auto kind) {
        for (size_t c = 0; c < count; c += kWidth) simd::store(x + c, activated<kind()>(simd::load(x + c)));
    });
}

constexpr RowOps kRowOps = {quantize_sums, quantize_head,   activate_sums, step_sums, store_sums, add_sums,
                            softmax_codes, normalize_codes, normalize,     quantize,  activate};

}  // namespace
