// The row operations, written once over the vectors of simd_*.h; a source file of an instruction set includes both.
//
// All names are local to that file: the same inline function compiled for two instruction sets would otherwise be
// merged by the linker, and the wrong one kept.
#pragma once

#include <cmath>
#include <type_traits>

#include "isa.h"
#include "unrolled.h"

namespace {

namespace simd {

// Several vectors of codes side by side, where an instruction set has nothing of its own for them.
template <size_t Count>
inline void store_codes(uint8_t* p, const Float (&x)[Count]) {
    for (size_t i = 0; i < Count; ++i) store_codes(p + i * kWidth, x[i]);
}

}  // namespace simd

using namespace qvit;
using simd::Float;
using simd::kWidth;

inline Float clamp_code(Float x, Float top) { return simd::max(simd::min(x, top), simd::set(0.0f)); }

// Store a row of codes, of which value(column) gives a vector at a time.
template <class Value>
inline void store_row(size_t width, uint8_t* out, Value value) {
    constexpr size_t kFour = 4 * kWidth;
    size_t c = 0;
    for (; c + kFour <= width; c += kFour) {
        const Float four[] = {value(c), value(c + kWidth), value(c + 2 * kWidth), value(c + 3 * kWidth)};
        simd::store_codes(out + c, four);
    }
    for (; c < width; c += kWidth) simd::store_codes(out + c, value(c));
}

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
        store_row(width, out + r * out_stride, [&](size_t c) {
            const Float x = simd::load_sums(sums + r * stride + c);
            return clamp_code(simd::fma(x, simd::load(scale + c), simd::load(shift + c)), t);
        });
}

void quantize_head(const int32_t* sums, size_t stride, size_t rows, size_t width, double scale, const double* shift,
                   float top, uint8_t* out, size_t out_stride) {
    const Float t = simd::set(top);
    for (size_t r = 0; r < rows; ++r)
        store_row(width, out + r * out_stride,
                  [&](size_t c) { return clamp_code(simd::round_sums(sums + r * stride + c, scale, shift[r]), t); });
}

void activate_sums(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                   const float* shift, Activation activation, Quantize quantize, uint8_t* out, size_t out_stride) {
    with_activation(activation, [&](auto kind) {
        const Float a = simd::set(quantize.scale), b = simd::set(quantize.shift), t = simd::set(quantize.top);
        for (size_t r = 0; r < rows; ++r)
            store_row(width, out + r * out_stride, [&](size_t c) {
                const Float x = simd::load_sums(sums + r * stride + c);
                const Float y = activated<kind()>(simd::fma(x, simd::load(scale + c), simd::load(shift + c)));
                return clamp_code(simd::fma(y, a, b), t);
            });
    });
}

template <bool falls>
inline void count_steps(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                        const float* shift, const Steps& steps, uint8_t* out, size_t out_stride) {
    for (size_t r = 0; r < rows; ++r)
        store_row(width, out + r * out_stride, [&](size_t c) {
            const Float x = simd::load_sums(sums + r * stride + c);
            const Float y = simd::fma(x, simd::load(scale + c), simd::load(shift + c));
            Float code = simd::set(0.0f);
            for (const float step : steps.rising) code = simd::count_at_least(code, y, simd::set(step));
            const Float negative = simd::sub(simd::set(0.0f), y);
            if constexpr (falls)
                for (const float step : steps.falling) code = simd::count_at_least(code, negative, simd::set(step));
            return code;
        });
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

// Rows that are worked on side by side, since each alone would wait for its own sums; the order of a row's additions
// does not depend on it.
constexpr size_t kRowsAtOnce = 4;

// Call f(first row, number of rows as a constant) for all rows.
template <class Function>
inline void some_rows(size_t rows, Function f) {
    size_t r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) f(r, std::integral_constant<int, kRowsAtOnce>());
    for (; r < rows; ++r) f(r, std::integral_constant<int, 1>());
}

void softmax_codes(const int32_t* sums, size_t stride, size_t rows, size_t width, float scale, const float* shifts,
                   size_t shift_stride, float inverse, float top, uint8_t* out, size_t out_stride, float* totals) {
    constexpr size_t kRow = 1024;  // columns whose exponentials are kept; beyond that they are computed again
    alignas(64) float kept[kRowsAtOnce][kRow];
    const Float s = simd::set(scale), t = simd::set(top);
    some_rows(rows, [&](size_t first, auto count) {
        constexpr int kRows = count();
        const auto logit = [&](size_t r, size_t c) {
            const Float shift = simd::load(shifts + (first + r) * shift_stride + c);
            return simd::fma(simd::load_sums(sums + (first + r) * stride + c), s, shift);
        };
        Float largest[kRows], sum[kRows], factor[kRows], total[kRows];
        unrolled<kRows>([&](auto r) { largest[r] = logit(r, 0); });
        for (size_t c = kWidth; c < width; c += kWidth)
            unrolled<kRows>([&](auto r) { largest[r] = simd::max(largest[r], logit(r, c)); });
        unrolled<kRows>([&](auto r) {
            largest[r] = simd::set(simd::reduce_max(largest[r]));
            sum[r] = total[r] = simd::set(0.0f);
        });
        for (size_t c = 0; c < width; c += kWidth)
            unrolled<kRows>([&](auto r) {
                const Float e = exp2_negative(simd::sub(logit(r, c), largest[r]));
                if (c < kRow) simd::store(kept[r] + c, e);
                sum[r] = simd::add(sum[r], e);
            });
        unrolled<kRows>([&](auto r) { factor[r] = simd::set(inverse / simd::reduce_add(sum[r])); });
        unrolled<kRows>([&](auto r) {
            store_row(width, out + (first + r) * out_stride, [&](size_t c) {
                const Float e = c < kRow ? simd::load(kept[r] + c) : exp2_negative(simd::sub(logit(r, c), largest[r]));
                const Float code = simd::min(simd::round(simd::mul(e, factor[r])), t);
                total[r] = simd::add(total[r], code);
                return code;
            });
        });
        unrolled<kRows>([&](auto r) { totals[first + r] = simd::reduce_add(total[r]); });
    });
}

// Mean (0 for RMSNorm) and 1 / deviation of a row whose padding is zero.
struct Moments {
    float mean, inverse;
};

template <int Rows>
inline void find_moments(const float* x, size_t stride, const Normalize& norm, Moments (&moments)[Rows]) {
    const float width = static_cast<float>(norm.width);
    Float sums[Rows], means[Rows];
    unrolled<Rows>([&](auto r) { sums[r] = simd::set(0.0f); });
    if (!norm.rms)
        for (size_t c = 0; c < norm.padded; c += kWidth)
            unrolled<Rows>([&](auto r) { sums[r] = simd::add(sums[r], simd::load(x + r * stride + c)); });
    unrolled<Rows>([&](auto r) {
        moments[r].mean = norm.rms ? 0.0f : simd::reduce_add(sums[r]) / width;
        means[r] = simd::set(moments[r].mean);
        sums[r] = simd::set(0.0f);
    });
    const size_t whole = norm.width / kWidth * kWidth;
    for (size_t c = 0; c < whole; c += kWidth)
        unrolled<Rows>([&](auto r) {
            const Float d = simd::sub(simd::load(x + r * stride + c), means[r]);
            sums[r] = simd::fma(d, d, sums[r]);
        });
    unrolled<Rows>([&](auto r) {
        const float* row = x + r * stride;
        const float mean = moments[r].mean;
        float total = simd::reduce_add(sums[r]);
        for (size_t c = whole; c < norm.width; ++c) total += (row[c] - mean) * (row[c] - mean);  // padding left out
        moments[r].inverse = 1.0f / std::sqrt(total / width + norm.eps);
    });
}

// Call store(row, normalized) for all rows, of which normalized(column) gives a vector at a time.
template <class Store>
inline void normalize_rows(const float* x, size_t stride, size_t rows, const Normalize& norm, Store store) {
    some_rows(rows, [&](size_t first, auto count) {
        constexpr int kRows = count();
        Moments moments[kRows];
        find_moments(x + first * stride, stride, norm, moments);
        unrolled<kRows>([&](auto r) {
            const Float mean = simd::set(moments[r].mean), inverse = simd::set(moments[r].inverse);
            store(first + r, [&](size_t c) {
                const Float from = simd::load(x + (first + r) * stride + c);
                Float y = simd::mul(simd::sub(from, mean), simd::load(norm.weight + c));
                if (norm.inner != nullptr) y = simd::add(y, simd::load(norm.inner + c));
                return simd::fma(y, inverse, simd::load(norm.bias + c));
            });
        });
    });
}

void normalize_codes(const float* x, size_t stride, size_t rows, const Normalize& norm, float top, uint8_t* out,
                     size_t out_stride) {
    const Float t = simd::set(top);
    normalize_rows(x, stride, rows, norm, [&](size_t r, const auto& normalized) {
        store_row(norm.padded, out + r * out_stride, [&](size_t c) { return clamp_code(normalized(c), t); });
    });
}

void normalize(const float* x, size_t stride, size_t rows, const Normalize& norm, float* out, size_t out_stride) {
    normalize_rows(x, stride, rows, norm, [&](size_t r, const auto& normalized) {
        for (size_t c = 0; c < norm.padded; c += kWidth) simd::store(out + r * out_stride + c, normalized(c));
    });
}

void quantize(const float* x, size_t stride, size_t rows, size_t width, Rounding quantizer, uint8_t* out,
              size_t out_stride) {
    const Float step = simd::set(quantizer.step), offset = simd::set(quantizer.offset);
    const Float low = simd::set(quantizer.low), top = simd::set(quantizer.top);
    for (size_t r = 0; r < rows; ++r)
        store_row(width, out + r * out_stride, [&](size_t c) {
            const Float y = simd::round(simd::div(simd::sub(simd::load(x + r * stride + c), offset), step));
            return clamp_code(simd::sub(y, low), top);
        });
}

void activate(float* x, size_t count, Activation activation) {
    with_activation(activation, [&](auto kind) {
        for (size_t c = 0; c < count; c += kWidth) simd::store(x + c, activated<kind()>(simd::load(x + c)));
    });
}

constexpr RowOps kRowOps = {quantize_sums, quantize_head,   activate_sums, step_sums, store_sums, add_sums,
                            softmax_codes, normalize_codes, normalize,     quantize,  activate};

}  // namespace
