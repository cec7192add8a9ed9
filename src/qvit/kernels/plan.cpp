#include "plan.h"

#include <algorithm>
#include <utility>

namespace qvit {

namespace {

constexpr double kLog2E = 1.4426950408889634;

}  // namespace

Plan::Plan(const Isa& isa_, const Shape& shape_)
    : isa(isa_),
      shape(shape_),
      patches((shape.height / shape.patch_height) * (shape.width / shape.patch_width)),
      tokens(patches + shape.prefix),
      width(round_up(shape.embed_dim, kChannels)),
      head_width(shape.heads * round_up(shape.head_dim, kChannels)) {}

void Plan::set_embedding(const LinearSpec& patch_, Norm norm, const float* prefix_, const float* positions_, Norm pre) {
    const size_t inputs = shape.channels * shape.patch_height * shape.patch_width;
    patch = Linear(isa, patch_, width_parts(), {1, inputs});
    patch_norm = std::move(norm);
    pre_norm = std::move(pre);
    prefix = Buffer<float>(shape.prefix * width);
    positions = Buffer<float>(patches * width);
    for (size_t i = 0; i < shape.prefix; ++i)
        std::copy_n(prefix_ + i * shape.embed_dim, shape.embed_dim, prefix.data() + i * width);
    for (size_t i = 0; positions_ != nullptr && i < patches; ++i)
        std::copy_n(positions_ + i * shape.embed_dim, shape.embed_dim, positions.data() + i * width);
    largest_row = std::max({largest_row, patch.inputs, patch.outputs});
}

void Plan::finish(Attention& a) const {
    const Parts heads = heads_parts();
    const size_t side = heads.total(), padded = heads.padded();
    a.code_scale = Buffer<float>(a.qkv.outputs);
    a.code_shift = Buffer<float>(a.qkv.outputs);
    const std::vector<Quantizer>* sections[] = {&a.query_quantizer, &a.key_quantizer, &a.value_quantizer};
    for (size_t section = 0; section < 3; ++section)
        for (size_t head = 0; head < heads.count; ++head) {
            const Quantizer& quantizer = (*sections[section])[head];
            const size_t at = section * side + head * padded;
            for (size_t i = at; i < at + heads.size; ++i) {
                a.code_scale[i] = static_cast<float>(a.qkv.scale[i] / quantizer.scale);
                a.code_shift[i] = static_cast<float>((a.qkv.shift[i] - quantizer.start) / quantizer.scale);
            }
        }
    if (!a.query.empty()) {
        a.query.back().fold(a.query_quantizer);
        a.key.back().fold(a.key_quantizer);
    }
    a.scores = &choose(isa.moving, isa.moving_count, a.query_quantizer[0].bits, a.key_quantizer[0].bits);
    a.mix = &choose(isa.moving, isa.moving_count, a.map_quantizer[0].bits, a.value_quantizer[0].bits);
    const double factor = shape.attention_scale * kLog2E;
    // Codes at once, unless a norm comes first.
    const Quantizer& next = a.proj.input;
    const double per_step = a.inner.present ? 1.0 : 1.0 / next.scale;
    a.out_shift = -next.start * per_step;
    for (size_t head = 0; head < heads.count; ++head) {
        const Quantizer &q = a.query_quantizer[head], &k = a.key_quantizer[head], &v = a.value_quantizer[head];
        const double low = 1 << (v.bits - 1), map = a.map_quantizer[head].scale;
        // Of the four terms of (a u + s)(b c + z) summed over channels, u unsigned and c signed codes, those without c
        // are the same for all keys: softmax does not see them.
        a.logit_scale.push_back(static_cast<float>(factor * q.scale * k.scale));
        a.key_bias.push_back(static_cast<float>(factor * q.start * k.scale));
        a.map_inverse.push_back(static_cast<float>(1.0 / map));
        const double offset = v.start + v.scale * low;  // of signed codes
        a.out_scale.push_back(map * v.scale * per_step);
        a.out_total.push_back(map * offset * per_step);
    }
    if (a.inner.present) a.inner.fold({a.proj.input});
}

void Plan::add_block(Block block) {
    const auto consider = [this](const Linear& layer) {
        largest_row = std::max({largest_row, layer.inputs, layer.outputs});
    };
    branches = std::max(branches, block.attentions.size());
    for (Attention& attention : block.attentions) {
        consider(attention.qkv);
        consider(attention.proj);
        if (!block.post) attention.norm.fold({attention.qkv.input});
    }
    for (Mlp& mlp : block.mlps) {
        consider(mlp.up);
        consider(mlp.down);
        largest_row = std::max(largest_row, 2 * mlp.hidden);
        if (!block.post && mlp.kind != Mlp::Kind::split) mlp.norm.fold({mlp.up.input});
        if (mlp.inner.present) mlp.inner.fold({mlp.down.input});
        mlp.steps = steps_of(mlp.activation, mlp.down.input);
    }
    blocks.push_back(std::move(block));
}

void Plan::set_head(Norm final, Norm pool, std::vector<Linear> layers) {
    final_norm = std::move(final);
    pool_norm = std::move(pool);
    classifiers = std::move(layers);
    for (const Linear& layer : classifiers) largest_row = std::max({largest_row, layer.inputs, layer.outputs});
}

}  // namespace qvit
