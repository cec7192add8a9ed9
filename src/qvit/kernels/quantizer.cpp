#include "quantizer.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace qvit {

Quantizer::Quantizer(double scale_, double offset_, int bits_)
    : scale(scale_),
      offset(offset_),
      start(offset_ - scale_ * (1 << (bits_ - 1))),
      bits(bits_),
      top(static_cast<float>((1 << bits_) - 1)) {}

Quantizer Quantizer::unsigned_codes(double scale, int bits) {
    Quantizer quantizer(scale, 0.0, bits);
    quantizer.start = 0.0;
    return quantizer;
}

Quantize Quantizer::folded() const {
    return {static_cast<float>(1.0 / scale), static_cast<float>(-start / scale), top};
}

Rounding Quantizer::rounding() const {
    return {static_cast<float>(scale), static_cast<float>(offset), -static_cast<float>(1 << (bits - 1)), top};
}

namespace {

double activated(double x, Activation activation) {
    switch (activation) {
        case Activation::gelu: return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
        case Activation::gelu_tanh:
            return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / 3.14159265358979) * (x + 0.044715 * x * x * x)));
        case Activation::quick_gelu: return x / (1.0 + std::exp(-1.702 * x));
        case Activation::silu: return x / (1.0 + std::exp(-x));
        case Activation::relu: return std::max(x, 0.0);
    }
    return x;
}

// Where a function that rises (or falls) from a to b first reaches a value; infinity if it does not.
double reaches(double value, double a, double b, Activation activation) {
    if (activated(b, activation) < value) return std::numeric_limits<double>::infinity();
    for (int halving = 0; halving < 200; ++halving) {
        const double middle = 0.5 * (a + b);
        (activated(middle, activation) >= value ? b : a) = middle;
    }
    return b;
}

}  // namespace

Steps steps_of(Activation activation, const Quantizer& quantizer) {
    constexpr double kFar = 1e6;
    const double nothing = std::numeric_limits<double>::infinity();
    Steps steps{};
    for (size_t j = 0; j < kSteps; ++j) steps.rising[j] = steps.falling[j] = static_cast<float>(nothing);
    if (quantizer.top > static_cast<float>(kSteps)) return steps;
    double low = -10.0, high = 0.0;  // around the minimum
    for (int third = 0; third < 200; ++third) {
        const double a = low + (high - low) / 3.0, b = high - (high - low) / 3.0;
        const bool left = activated(a, activation) < activated(b, activation);
        (left ? high : low) = left ? b : a;
    }
    steps.count = static_cast<size_t>(quantizer.top);
    for (size_t j = 0; j < steps.count; ++j) {
        const double value = quantizer.start + quantizer.scale * (static_cast<double>(j) + 0.5);
        if (value <= activated(low, activation)) {
            steps.rising[j] = static_cast<float>(-nothing);  // every value
            continue;
        }
        steps.rising[j] = static_cast<float>(reaches(value, low, kFar, activation));
        const double falling = reaches(value, low, -kFar, activation);
        if (std::isinf(falling)) continue;  // relu does not fall
        steps.falling[j] = static_cast<float>(-falling);
        steps.falls = true;
    }
    return steps;
}

}  // namespace qvit
