// Norms: LayerNorm, RMSNorm and the token rectifier, and a quantizer folded into one.
#pragma once

#include <vector>

#include "linear.h"

namespace qvit {

// A norm over `parts.count` groups (heads) of `parts.size` values with weights of their own.
struct Norm {
    bool present = false, rms = false;
    float eps = 0.0f;
    Parts parts{1, 1};
    Buffer<float> weight, bias, inner;

    Normalize part(size_t index = 0) const;
    // Put a quantizer into weight and bias, one for each part or one for all; the norm then gives codes.
    void fold(const std::vector<Quantizer>& quantizers);
};

Norm make_norm(bool rms, float eps, const float* weight, const float* bias, Parts parts);
// (x - mean + beta) / (gamma * deviation)
Norm make_rectifier(float eps, const float* gamma, const float* beta, Parts parts);

}  // namespace qvit
