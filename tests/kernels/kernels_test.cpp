// Every product of every instruction set that this processor has against a plain loop in 64-bit integers, and every row
// operation against its formula in double precision. Ends with status 1 after naming what differs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "quantizer.h"

using namespace qvit;

namespace {

int failures = 0;
size_t checks = 0;
std::mt19937 generator(1);

void fail(const char* isa, const char* what, double got, double expected) {
    if (++failures <= 20) std::printf("%s %s: %.9g instead of %.9g\n", isa, what, got, expected);
}

int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float real(double low, double high) {
    return static_cast<float>(std::uniform_real_distribution<double>(low, high)(generator));
}

Buffer<float> reals(size_t count, double low, double high) {
    Buffer<float> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = real(low, high);
    return values;
}

// Codes from low to high: random, all the largest, all the smallest, or the two in turn.
enum Pattern { kRandom, kLargest, kSmallest, kAlternating, kPatterns };

int code(Pattern pattern, size_t i, int low, int high) {
    if (pattern == kRandom) return integer(low, high);
    return pattern == kLargest || (pattern == kAlternating && i % 2 == 0) ? high : low;
}

struct Extent {
    size_t rows, channels, depth;
};

void check_product(const char* isa, const Product& product, int left_bits, int right_bits, Pattern left, Pattern right,
                   Extent size) {
    const size_t k = round_up(size.depth, kChannels), n = round_up(size.channels, product.group);
    const int low = 1 << (right_bits - 1);
    std::vector<int> a(size.rows * size.depth), w(size.channels * size.depth);
    for (size_t i = 0; i < a.size(); ++i) a[i] = code(left, i, 0, (1 << left_bits) - 1);
    for (size_t i = 0; i < w.size(); ++i) w[i] = code(right, i, -low, low - 1);

    Buffer<uint8_t> rows(size.rows * k), packed_rows, packed(product.weight_bytes(n, k));
    for (size_t r = 0; r < size.rows; ++r)
        for (size_t i = 0; i < size.depth; ++i) rows[r * k + i] = static_cast<uint8_t>(a[r * size.depth + i]);
    const uint8_t* from = rows.data();
    size_t stride = k;
    if (product.pack_rows != nullptr) {
        stride = product.row_bytes(k);
        packed_rows = Buffer<uint8_t>(size.rows * stride);
        product.pack_rows(rows.data(), k, size.rows, k, packed_rows.data(), stride);
        from = packed_rows.data();
    }

    std::vector<int64_t> expected(size.rows * n, 0);
    for (size_t r = 0; r < size.rows; ++r)
        for (size_t c = 0; c < size.channels; ++c)
            for (size_t i = 0; i < size.depth; ++i)
                expected[r * n + c] += int64_t{a[r * size.depth + i]} * w[c * size.depth + i];

    const auto run_and_compare = [&] {
        Buffer<int32_t> sums(size.rows * product.tile);
        for (size_t first = 0; first < n; first += product.tile) {
            const size_t last = std::min(first + product.tile, n);
            product.run(from, stride, size.rows, packed.data(), n, k, first, last, sums.data(), product.tile);
            for (size_t r = 0; r < size.rows; ++r)
                for (size_t c = first; c < std::min(last, size.channels); ++c, ++checks) {
                    const int64_t got = sums[r * product.tile + c - first], want = expected[r * n + c];
                    if (got != want) fail(isa, product.name, static_cast<double>(got), static_cast<double>(want));
                }
        }
    };
    std::memset(packed.data(), 0xa5, packed.size());  // what was there before must not matter
    Buffer<uint8_t> channels(size.channels * k);
    std::memset(channels.data(), low, size.channels * k);
    for (size_t c = 0; c < size.channels; ++c) {
        uint8_t* channel = channels.rows(size.channels, k).row(c, k);
        for (size_t i = 0; i < size.depth; ++i) channel[i] = static_cast<uint8_t>(w[c * size.depth + i] + low);
        product.pack_channel(packed.data(), k, c, channel, low);
    }
    run_and_compare();
    if (product.pack_channels != nullptr) {  // in two parts, each of which leaves the other's bytes alone
        std::memset(packed.data(), 0xa5, packed.size());
        const size_t half = size.channels / 2;
        product.pack_channels(packed.data(), k, half, size.channels - half, channels.data() + half * k, k, low);
        product.pack_channels(packed.data(), k, 0, half, channels.data(), k, low);
        run_and_compare();
    }
    if (product.pack_columns == nullptr) return;
    const size_t width = round_up(size.channels, kChannels);
    Buffer<uint8_t> columns(k * width);
    for (size_t c = 0; c < size.channels; ++c)
        for (size_t i = 0; i < size.depth; ++i)
            columns[i * width + c] = static_cast<uint8_t>(w[c * size.depth + i] + low);
    std::memset(packed.data(), 0xa5, packed.size());
    product.pack_columns(columns.data(), width, k, width, low, packed.data());
    run_and_compare();
}

void check_products(const char* isa, const Product* products, size_t count) {
    const Extent odd[] = {{1, 1, 1}, {2, 17, 3}, {3, 33, 70}, {7, 100, 131}, {13, 65, 530}};
    for (size_t i = 0; i < count; ++i) {
        const Product& product = products[i];
        for (const Extent& size : odd)
            for (int left = 0; left < kPatterns; ++left)
                for (int right = 0; right < kPatterns; ++right)
                    check_product(isa, product, product.left_bits, product.right_bits, static_cast<Pattern>(left),
                                  static_cast<Pattern>(right), size);
        for (int left = 2; left <= product.left_bits; ++left)
            for (int right = 2; right <= product.right_bits; ++right)
                check_product(isa, product, left, right, kRandom, kRandom, {5, 20, 150});
        for (const Pattern right : {kLargest, kSmallest})
            for (const size_t depth : {size_t{4096}, size_t{12001}})  // beyond what any narrow sum holds
                check_product(isa, product, product.left_bits, product.right_bits, kLargest, right, {3, 17, depth});
    }
}

void check_value(const char* isa, const char* what, double got, double expected, double tolerance) {
    ++checks;
    if (!(std::fabs(got - expected) <= tolerance)) fail(isa, what, got, expected);
}

// A code may go either way only if the value is within `tolerance` of a half.
void check_code(const char* isa, const char* what, int got, double value, double top, double tolerance) {
    ++checks;
    const double low = std::min(std::max(std::nearbyint(value - tolerance), 0.0), top);
    const double high = std::min(std::max(std::nearbyint(value + tolerance), 0.0), top);
    if (got < low || got > high) fail(isa, what, got, value);
}

double activated(double x, Activation activation) {
    switch (activation) {
        case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case Activation::gelu_tanh:
            return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
        case Activation::quick_gelu: return x / (1 + std::exp(-1.702 * x));
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::relu: return std::max(x, 0.0);
    }
    return x;
}

constexpr Activation kActivations[] = {
#define QVIT_LISTED(name) Activation::name,
    QVIT_ACTIVATIONS(QVIT_LISTED)
#undef QVIT_LISTED
};

// Operations on a tile of sums, in a row longer than the tile.
void check_sums(const char* isa, const RowOps& ops) {
    constexpr size_t rows = 3, width = 48, stride = 64;
    Buffer<int32_t> sums(rows * stride);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = integer(-40000, 40000);
    const Buffer<float> scale = reals(width, 1e-4, 2e-3), shift = reals(width, -8, 8);
    const auto value = [&](size_t r, size_t c) {
        return static_cast<double>(sums[r * stride + c]) * scale[c] + shift[c];
    };
    constexpr double close = 1e-5;
    Buffer<uint8_t> codes(rows * stride);
    for (const float top : {3.0f, 7.0f, 15.0f, 255.0f}) {
        ops.quantize_sums(sums.data(), stride, rows, width, scale.data(), shift.data(), top, codes.data(), stride);
        for (size_t r = 0; r < rows; ++r)
            for (size_t c = 0; c < width; ++c)
                check_code(isa, "quantize_sums", codes[r * stride + c], value(r, c), top, close);
        const std::vector<double> shifts(shift.data(), shift.data() + rows);
        ops.quantize_head(sums.data(), stride, rows, width, scale[0], shifts.data(), top, codes.data(), stride);
        for (size_t r = 0; r < rows; ++r)
            for (size_t c = 0; c < width; ++c)
                check_code(isa, "quantize_head", codes[r * stride + c],
                           static_cast<double>(sums[r * stride + c]) * scale[0] + shift[r], top, 1e-9);
        // Values a hundred-millionth of a step below and above the borders between codes, which no float could tell.
        Buffer<int32_t> even(rows * stride);
        for (size_t i = 0; i < even.size(); ++i) even[i] = 2 * static_cast<int32_t>(i % stride) - 6;
        const double borders[rows] = {0.5 - 1e-8, 0.5 + 1e-8, 0.3}, step = 0.5;
        ops.quantize_head(even.data(), stride, rows, width, step, borders, top, codes.data(), stride);
        for (size_t r = 0; r < rows; ++r)
            for (size_t c = 0; c < width; ++c)
                check_code(isa, "border", codes[r * stride + c], even[r * stride + c] * step + borders[r], top, 1e-9);
        for (const Activation activation : kActivations) {
            const Quantize quantize{3.7f, 1.25f, top};
            ops.activate_sums(sums.data(), stride, rows, width, scale.data(), shift.data(), activation, quantize,
                              codes.data(), stride);
            for (size_t r = 0; r < rows; ++r)
                for (size_t c = 0; c < width; ++c)
                    check_code(isa, "activate_sums", codes[r * stride + c],
                               activated(value(r, c), activation) * quantize.scale + quantize.shift, top, 1e-4);
        }
    }

    Buffer<float> out(rows * stride), before = reals(rows * stride, -5, 5);
    ops.store_sums(sums.data(), stride, rows, width, scale.data(), shift.data(), out.data(), stride);
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < width; ++c) check_value(isa, "store_sums", out[r * stride + c], value(r, c), close);
    for (size_t i = 0; i < before.size(); ++i) out[i] = before[i];
    ops.add_sums(sums.data(), stride, rows, width, scale.data(), shift.data(), out.data(), stride);
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < stride; ++c)
            check_value(isa, "add_sums", out[r * stride + c], before[r * stride + c] + (c < width ? value(r, c) : 0.0),
                        close);

    // Halves, exact in float, go to the even code.
    const Buffer<float> half = reals(width, 0.5, 0.5), nothing(width);
    for (size_t c = 0; c < width; ++c) sums[c] = static_cast<int32_t>(c) - 4;
    ops.quantize_sums(sums.data(), stride, 1, width, half.data(), nothing.data(), 15.0f, codes.data(), stride);
    for (size_t c = 0; c < width; ++c) check_code(isa, "half to even", codes[c], 0.5 * sums[c], 15.0, 0.0);
}

// The codes of an activation function by counting, of quantizers whose borders lie anywhere: around its minimum, beyond
// its values, and where it is as good as a line.
void check_steps(const char* isa, const RowOps& ops) {
    constexpr size_t width = 4096;
    Buffer<int32_t> sums(width);
    for (size_t c = 0; c < width; ++c) sums[c] = static_cast<int32_t>(c) - static_cast<int32_t>(width / 2);
    for (const Activation activation : kActivations) {
        double minimum = 0.0;
        for (double x = -5.0; x < 0.0; x += 1e-3) minimum = std::min(minimum, activated(x, activation));
        std::vector<Quantizer> quantizers{{300.0, 450.0, 2}, {300.0, -900.0, 2}};
        for (int n = 0; n < 10; ++n) quantizers.emplace_back(real(0.02, 1.0), real(-1.0, 1.5), 2);
        // The lowest border lies above the start by half a step, and the start below the offset by two.
        for (const double beside : {-1e-3, 1e-3, 4e-3}) quantizers.emplace_back(0.1, minimum + beside + 0.15, 2);
        for (const Quantizer& quantizer : quantizers)
            for (const float unit : {0.003f, 1.0f}) {
                const Steps steps = steps_of(activation, quantizer);
                check_value(isa, "steps", static_cast<double>(steps.count), 3, 0.0);
                Buffer<float> scale(width), shift(width);
                for (size_t c = 0; c < width; ++c) scale[c] = unit;
                Buffer<uint8_t> codes(width);
                ops.step_sums(sums.data(), width, 1, width, scale.data(), shift.data(), steps, codes.data(), width);
                for (size_t c = 0; c < width; ++c) {
                    const double y = activated(static_cast<double>(sums[c]) * unit, activation);
                    check_code(isa, "step_sums", codes[c], (y - quantizer.start) / quantizer.scale, 3.0, 1e-4);
                }
            }
    }
    check_value(isa, "no steps", static_cast<double>(steps_of(Activation::silu, Quantizer(0.1, 0.0, 3)).count), 0, 0.0);
}

void check_softmax(const char* isa, const RowOps& ops, size_t width, double spread) {
    constexpr size_t rows = 6;         // some of them side by side, and some that are left
    const size_t columns = width - 5;  // the rest is padding
    Buffer<int32_t> sums(rows * width);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = integer(-1000, 1000);
    Buffer<float> shift = reals(rows * width, -1, 1);
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = columns; c < width; ++c) shift[r * width + c] = -std::numeric_limits<float>::infinity();
    const float scale = static_cast<float>(spread / 1000);
    Buffer<uint8_t> codes(rows * width);
    float totals[rows];
    for (const size_t stride : {size_t{0}, width})  // one row of shifts for all, and one for each
        for (const float top : {3.0f, 15.0f, 255.0f}) {
            const float inverse = top / 0.9f;
            ops.softmax_codes(sums.data(), width, rows, width, scale, shift.data(), stride, inverse, top, codes.data(),
                              width, totals);
            for (size_t r = 0; r < rows; ++r) {
                std::vector<double> powers(width);
                double largest = -1e300, sum = 0.0, total = 0.0;
                for (size_t c = 0; c < columns; ++c) {
                    powers[c] = static_cast<double>(sums[r * width + c]) * scale + shift[r * stride + c];
                    largest = std::max(largest, powers[c]);
                }
                for (size_t c = 0; c < columns; ++c) sum += powers[c] = std::exp2(powers[c] - largest);
                for (size_t c = 0; c < width; ++c) {
                    // A logit of some hundred has a float error of some 1e-5, and so has its power.
                    check_code(isa, "softmax_codes", codes[r * width + c], powers[c] / sum * inverse, top,
                               std::max(1e-3, 1e-5 * static_cast<double>(top)));
                    total += codes[r * width + c];
                }
                check_value(isa, "softmax totals", totals[r], total, 0.0);
            }
        }
}

void check_norms(const char* isa, const RowOps& ops, size_t width, bool rms, bool rectifier) {
    constexpr size_t rows = 6;
    const size_t padded = round_up(width, kChannels), stride = padded + 16;
    Buffer<float> x(rows * stride), weight(padded), bias(padded), inner(padded);
    for (size_t c = 0; c < width; ++c) {
        weight[c] = real(-2, 2);
        bias[c] = real(0, 12);
        inner[c] = real(-1, 1);
        for (size_t r = 0; r < rows; ++r) x[r * stride + c] = real(-3, 5);
    }
    const Normalize norm{rms, 1e-6f, width, padded, weight.data(), bias.data(), rectifier ? inner.data() : nullptr};
    Buffer<float> out(rows * stride);
    Buffer<uint8_t> codes(rows * stride);
    ops.normalize(x.data(), stride, rows, norm, out.data(), stride);
    ops.normalize_codes(x.data(), stride, rows, norm, 15.0f, codes.data(), stride);
    for (size_t r = 0; r < rows; ++r) {
        double mean = 0.0, variance = 0.0;
        for (size_t c = 0; c < width && !rms; ++c) mean += x[r * stride + c] / static_cast<double>(width);
        for (size_t c = 0; c < width; ++c)
            variance += (x[r * stride + c] - mean) * (x[r * stride + c] - mean) / static_cast<double>(width);
        for (size_t c = 0; c < width; ++c) {
            const double centred = (x[r * stride + c] - mean) * weight[c] + (rectifier ? inner[c] : 0.0);
            const double y = centred / std::sqrt(variance + 1e-6) + bias[c];
            check_value(isa, "normalize", out[r * stride + c], y, 2e-5 * std::max(1.0, std::fabs(y)));
            check_code(isa, "normalize_codes", codes[r * stride + c], y, 15.0, 2e-5);
        }
    }
}

void check_floats(const char* isa, const RowOps& ops) {
    constexpr size_t rows = 2, width = 1024;
    Buffer<float> x = reals(rows * width, -6, 6);
    Buffer<uint8_t> codes(rows * width);
    const Rounding quantizer{0.037f, -1.3f, -128.0f, 255.0f};
    ops.quantize(x.data(), width, rows, width, quantizer, codes.data(), width);
    for (size_t i = 0; i < x.size(); ++i) {
        const float code = std::nearbyint((x[i] - quantizer.offset) / quantizer.step) - quantizer.low;
        check_code(isa, "quantize", codes[i], code, 255.0, 0.0);  // the same to the last one
    }
    for (const double range : {1.0, 8.0, 100.0})
        for (const Activation activation : kActivations) {
            x = reals(rows * width, -range, range);
            Buffer<float> y(x.size());
            for (size_t i = 0; i < x.size(); ++i) y[i] = x[i];
            ops.activate(y.data(), y.size(), activation);
            for (size_t i = 0; i < x.size(); ++i)
                check_value(isa, "activate", y[i], activated(x[i], activation), 1e-6 + 1e-6 * std::fabs(x[i]));
        }
}

// A part of a buffer gives its own values and, where accesses are checked, nothing beyond them.
void check_spans() {
    Buffer<int32_t> buffer(12);
    for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<int32_t>(i);
    const Span<int32_t> all = buffer.rows(3, 4), part = all.part(1, 2, 2, 1);
    check_value("span", "row", part.row(1, 1)[0], 10, 0.0);
    check_value("span", "stride", static_cast<double>(part.stride()), 4, 0.0);
    if (!kChecked) return;
#if defined(__cpp_exceptions)
    const auto refused = [](auto access) {
        try {
            access();
            return false;
        } catch (const std::logic_error&) {
            return true;
        }
    };
    check_value("span", "wide row", refused([&] { part.row(0, 2); }), 1, 0.0);
    check_value("span", "third row", refused([&] { part.get(3, 1); }), 1, 0.0);
    check_value("span", "wider part", refused([&] { part.part(0, 1, 0, 2); }), 1, 0.0);
    check_value("span", "shifted part", refused([&] { part.part(0, 1, 1, 1); }), 1, 0.0);
    check_value("span", "beyond the buffer", refused([&] { buffer.rows(3, 5); }), 1, 0.0);
    check_value("span", "index", refused([&] { buffer[12] = 0; }), 1, 0.0);
#endif
}

}  // namespace

#if !defined(__cpp_exceptions)
void qvit::fail(const char* what) {
    std::printf("%s\n", what);
    std::abort();
}
#endif

int main() {
    check_spans();
    size_t count;
    const Isa* const* isas = available_isas(&count);
    for (size_t i = 0; i < count; ++i) {
        const Isa& isa = *isas[i];
        check_products(isa.name, isa.products, isa.product_count);
        check_products(isa.name, isa.moving, isa.moving_count);
        check_sums(isa.name, isa.ops);
        check_steps(isa.name, isa.ops);
        for (const size_t width : {size_t{16}, size_t{208}, size_t{4112}})
            for (const double spread : {0.5, 20.0, 400.0}) check_softmax(isa.name, isa.ops, width, spread);
        for (const size_t width : {size_t{1}, size_t{24}, size_t{40}, size_t{384}})
            for (const bool rms : {false, true}) {
                check_norms(isa.name, isa.ops, width, rms, false);
                check_norms(isa.name, isa.ops, width, rms, true);
            }
        check_floats(isa.name, isa.ops);
        std::printf("%s: checked\n", isa.name);
    }
    std::printf("%zu checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
