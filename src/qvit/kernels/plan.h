// A vision transformer as the steps find it: its parts with everything constant folded into them.
#pragma once

#include <vector>

#include "linear.h"
#include "norm.h"

namespace qvit {

struct Attention {
    Norm norm;  // before it, or after it in a post-norm block
    Linear qkv, proj;
    std::vector<Norm> query, key;  // norms of queries and keys before they are quantized, the last one with codes
    std::vector<Quantizer> query_quantizer, key_quantizer, value_quantizer, map_quantizer;  // a head each
    Norm inner;                                                                             // before the projection
    // Folded by finish(): multiply-adds from the sums of qkv to codes, of logits, of the output.
    Buffer<float> code_scale, code_shift;
    const Product *scores = nullptr, *mix = nullptr;
    std::vector<float> logit_scale, key_bias, map_inverse;
    std::vector<double> out_scale, out_total;  // out = sums * out_scale + total of the row's codes * out_total
    double out_shift = 0.0;                    // of codes
};

struct Mlp {
    Norm norm, inner;
    Linear up, gate, down;  // gate only where it is a layer of its own
    enum class Kind { plain, first_half, second_half, split } kind = Kind::plain;  // where the gate is
    Activation activation = Activation::gelu;
    size_t inputs = 0, hidden = 0;  // width that enters the last layer, and padded
    Steps steps{};                  // activation and quantization as one, for few codes
};

struct Block {
    bool post = false;
    std::vector<Attention> attentions;
    std::vector<Mlp> mlps;
};

struct Shape {
    size_t channels, height, width, patch_height, patch_width;
    size_t embed_dim, heads, head_dim, prefix, skip, classes;
    float attention_scale;
    enum class Pool { token, average, largest, both } pool;
};

struct Plan {
    Plan(const Isa& isa, const Shape& shape);

    void set_embedding(const LinearSpec& patch, Norm norm, const float* prefix, const float* positions, Norm pre);
    void add_block(Block block);
    void set_head(Norm final, Norm pool, std::vector<Linear> layers);
    // Fold an attention's scales; its parts are set.
    void finish(Attention& attention) const;

    Parts heads_parts() const { return {shape.heads, shape.head_dim}; }
    Parts width_parts() const { return {1, shape.embed_dim}; }

    const Isa& isa;
    Shape shape;
    size_t patches, tokens, width, head_width;  // widths padded
    Linear patch;
    Norm patch_norm, pre_norm, final_norm, pool_norm;
    Buffer<float> prefix, positions;
    std::vector<Block> blocks;
    std::vector<Linear> classifiers;
    size_t branches = 1, largest_row = 0;  // attentions side by side; channels of the widest row of any layer
};

}  // namespace qvit
