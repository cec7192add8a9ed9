#include "norm.h"

namespace qvit {

Normalize Norm::part(size_t index) const {
    const size_t at = index * parts.padded();
    return {rms,
            eps,
            parts.size,
            parts.padded(),
            weight.from(at, parts.padded()),
            bias.from(at, parts.padded()),
            inner.empty() ? nullptr : inner.from(at, parts.padded())};
}

void Norm::fold(const std::vector<Quantizer>& quantizers) {
    for (size_t part = 0; part < parts.count; ++part) {
        const Quantizer& quantizer = quantizers[quantizers.size() == 1 ? 0 : part];
        for (size_t i = part * parts.padded(); i < part * parts.padded() + parts.size; ++i) {
            weight[i] = static_cast<float>(weight[i] / quantizer.scale);
            bias[i] = static_cast<float>((bias[i] - quantizer.start) / quantizer.scale);
            if (!inner.empty()) inner[i] = static_cast<float>(inner[i] / quantizer.scale);
        }
    }
}

Norm make_norm(bool rms, float eps, const float* weight, const float* bias, Parts parts) {
    Norm norm{true, rms, eps, parts, Buffer<float>(parts.total()), Buffer<float>(parts.total()), {}};
    for (size_t i = 0; i < parts.channels(); ++i) {
        norm.weight[parts.at(i)] = weight[i];
        norm.bias[parts.at(i)] = bias[i];
    }
    return norm;
}

Norm make_rectifier(float eps, const float* gamma, const float* beta, Parts parts) {
    Norm norm{true,
              false,
              eps,
              parts,
              Buffer<float>(parts.total()),
              Buffer<float>(parts.total()),
              Buffer<float>(parts.total())};
    for (size_t i = 0; i < parts.channels(); ++i) {
        norm.weight[parts.at(i)] = 1.0f / gamma[i];
        norm.inner[parts.at(i)] = beta[i] / gamma[i];
    }
    return norm;
}

}  // namespace qvit
