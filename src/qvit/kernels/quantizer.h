// Activation quantizers, and the thresholds of one that follows an activation function.
#pragma once

#include "isa.h"

namespace qvit {

// An activation quantizer: value = scale * code + offset with signed codes of `bits` bits; held for unsigned ones,
// code + 2^(bits - 1), whose offset is `start`.
struct Quantizer {
    Quantizer() = default;
    Quantizer(double scale, double offset, int bits);
    static Quantizer unsigned_codes(double scale, int bits);
    Quantize folded() const;    // as a multiply-add
    Rounding rounding() const;  // step by step

    double scale = 1.0, offset = 0.0, start = 0.0;
    int bits = 8;
    float top = 255.0f;
};

// The codes of `activation` by comparing, for a quantizer of few enough; count is 0 for others.
Steps steps_of(Activation activation, const Quantizer& quantizer);

}  // namespace qvit
