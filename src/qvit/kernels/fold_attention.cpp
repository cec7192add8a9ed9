// What of an attention is constant, folded into multiply-adds.
#include <algorithm>

#include "plan.h"

namespace qvit {

namespace {

constexpr double kLog2E = 1.4426950408889634;

// The multiply-adds from sums of qkv to codes, for one of its sections.
void fold_section(Attention& a, size_t section, const std::vector<Quantizer>& quantizers) {
    for (size_t head = 0; head < a.heads.count; ++head) {
        const Quantizer& quantizer = quantizers[head];
        const size_t at = section * a.width() + head * a.heads.padded();
        for (size_t i = at; i < at + a.heads.size; ++i) {
            a.code_scale[i] = static_cast<float>(a.qkv.scale[i] / quantizer.scale);
            a.code_shift[i] = static_cast<float>((a.qkv.shift[i] - quantizer.start) / quantizer.scale);
        }
    }
}

}  // namespace

void Attention::finish(const Isa& isa) {
    code_scale = Buffer<float>(qkv.outputs);
    code_shift = Buffer<float>(qkv.outputs);
    size_t section = 0;
    if (!pools) fold_section(*this, section++, query.quantizers);
    fold_section(*this, section++, key.quantizers);
    fold_section(*this, section, value_quantizer);
    for (Operand* operand : {&query, &key})
        if (operand->coded) operand->norms.back().fold(operand->quantizers);
    query_key = &choose(isa.moving, isa.moving_count, query.quantizers[0].bits, key.quantizers[0].bits);
    map_value = &choose(isa.moving, isa.moving_count, map_quantizer[0].bits, value_quantizer[0].bits);
    // Codes at once, unless a norm comes first.
    const double per_step = inner.present ? 1.0 : 1.0 / proj.input.scale;
    out_shift = -proj.input.start * per_step;
    for (size_t head = 0; head < heads.count; ++head) {
        const Quantizer &q = query.quantizers[head], &k = key.quantizers[head], &v = value_quantizer[head];
        const double low = 1 << (v.bits - 1), map = map_quantizer[head].scale;
        const double factor = static_cast<double>(factors[head]) * kLog2E;
        // Of the four terms of (a u + s)(b c + z) summed over channels, u unsigned and c signed codes, those without c
        // are the same for all keys: softmax does not see them.
        logit_scale.push_back(static_cast<float>(factor * q.scale * k.scale));
        key_bias.push_back(static_cast<float>(factor * q.start * k.scale));
        map_inverse.push_back(static_cast<float>(1.0 / map));
        const double offset = v.start + v.scale * low;  // of signed codes
        out_scale.push_back(map * v.scale * per_step);
        out_total.push_back(map * offset * per_step);
    }
    if (inner.present) inner.fold({proj.input});
    if (pools) {
        latent_codes = Buffer<uint8_t>(width());
        const Span<float> values = latent.rows(heads.count, heads.padded());
        const Span<uint8_t> codes = latent_codes.rows(heads.count, heads.padded());
        for (size_t head = 0; head < heads.count; ++head) {
            const Span<uint8_t> own = codes.part(head, 1, 0, heads.padded());
            RowSpans(isa.ops).quantize(values.part(head, 1, 0, heads.padded()), 1, heads.padded(),
                                       query.quantizers[head].rounding(), own);
            std::fill_n(own.row(0, heads.padded()) + heads.size, heads.padded() - heads.size, uint8_t{0});
        }
    }
}

}  // namespace qvit
