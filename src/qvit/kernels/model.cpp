#include "model.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>

namespace qvit {

namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr size_t kBlockRows = 60;      // rows that one task takes through a block: their codes stay in the second cache
constexpr size_t kRowUnit = 6;         // tasks begin at multiples of it, for whole tiles; kBlockRows is one
constexpr size_t kAttentionRows = 12;  // query rows whose logits are in the first cache together
constexpr size_t kLargestTile = 192, kLargestGroup = 64;  // of any product

// What the time of a pass goes to.
enum Work : size_t { kProducts, kAttentionProducts, kSoftmax, kNorms, kActivation, kEpilogues, kRest, kWorks };
constexpr const char* kWorkNames[kWorks] = {"linear products",
                                            "attention products",
                                            "softmax",
                                            "norms and their quantization",
                                            "activation function",
                                            "bias, residual, quantization",
                                            "embedding, layout, head"};

// One channel's codes from its row of bits.
void unpack(const uint8_t* row, int bits, size_t count, int8_t* codes) {
    const int low = 1 << (bits - 1);
    const unsigned mask = (1u << bits) - 1;
    unsigned held = 0;
    int available = 0;
    for (size_t i = 0; i < count; ++i) {
        if (available < bits) {
            held |= static_cast<unsigned>(*row++) << available;
            available += 8;
        }
        codes[i] = static_cast<int8_t>(static_cast<int>(held & mask) - low);
        held >>= bits;
        available -= bits;
    }
}

}  // namespace

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
        case Activation::none: break;
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
    const double minimum = activation == Activation::relu ? 0.0 : low;
    steps.count = static_cast<size_t>(quantizer.top);
    for (size_t j = 0; j < steps.count; ++j) {
        const double value = quantizer.start + quantizer.scale * (static_cast<double>(j) + 0.5);
        if (value <= activated(minimum, activation)) {
            steps.rising[j] = static_cast<float>(-nothing);  // every value
            continue;
        }
        steps.rising[j] = static_cast<float>(reaches(value, minimum, kFar, activation));
        const double falling = reaches(value, minimum, -kFar, activation);
        if (activation == Activation::relu || std::isinf(falling)) continue;
        steps.falling[j] = static_cast<float>(-falling);
        steps.falls = true;
    }
    return steps;
}

}  // namespace

Linear::Linear(const Isa& isa, const LinearSpec& spec, Parts out, Parts in)
    : product(&choose(isa.products, isa.product_count, spec.input.bits, spec.weight_bits)),
      input(spec.input),
      outputs(round_up(out.total(), product->group)),
      inputs(in.total()),
      weights(product->weight_bytes(outputs, inputs)),
      scale(outputs),
      shift(outputs) {
    std::vector<int8_t> codes(in.count * in.size), padded(inputs);
    for (size_t channel = 0; channel < out.count * out.size; ++channel) {
        unpack(spec.codes + channel * spec.row_bytes, spec.weight_bits, codes.size(), codes.data());
        int64_t total = 0;
        for (const int8_t code : codes) total += code;
        for (size_t part = 0; part < in.count; ++part)
            std::copy_n(codes.data() + part * in.size, in.size, padded.data() + part * in.padded());
        const size_t at = out.at(channel);
        product->pack_channel(weights.data(), inputs, at, padded.data());
        const double step = static_cast<double>(spec.scale[channel]);
        scale[at] = static_cast<float>(input.scale * step);
        shift[at] = static_cast<float>(input.start * step * static_cast<double>(total) + spec.bias[channel]);
    }
}

Normalize Norm::part(size_t index) const {
    const size_t at = index * parts.padded();
    return {rms,
            eps,
            parts.size,
            parts.padded(),
            weight.data() + at,
            bias.data() + at,
            inner.empty() ? nullptr : inner.data() + at};
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
    for (size_t i = 0; i < parts.count * parts.size; ++i) {
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
    for (size_t i = 0; i < parts.count * parts.size; ++i) {
        norm.weight[parts.at(i)] = 1.0f / gamma[i];
        norm.inner[parts.at(i)] = beta[i] / gamma[i];
    }
    return norm;
}

// What one thread works in. Codes have one byte a value; `packed` holds them as a product reads them.
struct Model::Scratch {
    // row: the widest row of any layer; head: the padded head dimension; tokens: padded.
    Scratch(size_t row, size_t head, size_t tokens)
        : codes(kBlockRows * row),
          packed(kBlockRows * round_up(std::max(row, tokens), 64)),
          hidden(kBlockRows * row),
          map(kAttentionRows * tokens),
          values(round_up(head, kLargestGroup) * tokens),
          key(head),
          sums(std::max(kBlockRows * kLargestTile, kAttentionRows * round_up(head, kLargestGroup))),
          scores(kAttentionRows * round_up(tokens, kLargestGroup)),
          first(kBlockRows * row),
          second(kBlockRows * row),
          normed(kBlockRows * row),
          totals(kBlockRows) {}

    Buffer<uint8_t> codes, packed, hidden, map, values;
    Buffer<int8_t> key;
    Buffer<int32_t> sums, scores;
    Buffer<float> first, second, normed, totals;
    std::array<double, kWorks> seconds{};
};

namespace {

// Adds the time since the last lap to a kind of work; does nothing unless timed.
class Clock {
  public:
    Clock(bool on, std::array<double, kWorks>& seconds) : on_(on), seconds_(seconds) {
        if (on_) last_ = std::chrono::steady_clock::now();
    }
    void lap(Work work) {
        if (!on_) return;
        const auto now = std::chrono::steady_clock::now();
        seconds_[work] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

  private:
    bool on_;
    std::array<double, kWorks>& seconds_;
    std::chrono::steady_clock::time_point last_;
};

// Rows of codes in the form that a product reads.
struct Operand {
    const uint8_t* rows;
    size_t stride;
};

Operand operand(const Product& product, const uint8_t* codes, size_t stride, size_t rows, size_t k, uint8_t* packed) {
    if (product.pack_rows == nullptr) return {codes, stride};
    const size_t bytes = product.row_bytes(k);
    product.pack_rows(codes, stride, rows, k, packed, bytes);
    return {packed, bytes};
}

Operand operand(const Linear& layer, const uint8_t* codes, size_t stride, size_t rows, uint8_t* packed) {
    return operand(*layer.product, codes, stride, rows, layer.inputs, packed);
}

// Values are a right-hand side whose channels are the head's and whose sum runs over tokens.
void pack_columns(const Product& product, const uint8_t* codes, size_t stride, size_t k, size_t width, int low,
                  uint8_t* packed) {
    if (product.pack_columns != nullptr) return product.pack_columns(codes, stride, k, width, low, packed);
    for (size_t channel = 0; channel < width; channel += kChannels)
        for (size_t at = 0; at < k; at += kDepth) {
            const uint8_t* from = codes + at * stride + channel;
            uint8_t* to = packed + dense_index(channel, at, k);
            for (size_t c = 0; c < kChannels; ++c)
                for (size_t i = 0; i < kDepth; ++i)
                    to[c * kDepth + i] = static_cast<uint8_t>(from[i * stride + c] - low);
        }
}

// Call use(first, last) for every tile of a layer's channels, its sums being in `sums` with the tile's stride.
template <class Use>
void each_tile(const Linear& layer, const Operand& left, size_t rows, int32_t* sums, Clock& clock, Work work, Use use) {
    const size_t tile = layer.product->tile;
    for (size_t first = 0; first < layer.outputs; first += tile) {
        const size_t last = std::min(first + tile, layer.outputs);
        layer.product->run(left.rows, left.stride, rows, layer.weights.data(), layer.outputs, layer.inputs, first, last,
                           sums, tile);
        clock.lap(kProducts);
        use(first, last, tile);
        clock.lap(work);
    }
}

}  // namespace

// Rows [begin, end) of one image of the pass.
struct Model::Rows {
    size_t image, begin, end;
    size_t count() const { return end - begin; }
};

// The state of one call: the residual stream, and the codes of queries, keys and values of two blocks (while some rows
// read a block's keys and values, others that are done with it write the next one's).
struct Model::Pass {
    Pass(size_t batch_, const Model& model)
        : batch(batch_),
          padded_tokens(round_up(model.tokens_, kChannels)),
          branch_bytes(padded_tokens * model.head_width_),
          key_bytes(round_up(model.tokens_, kLargestGroup) * model.head_width_ / model.shape_.heads),
          residual(batch * model.tokens_ * model.width_) {
        const size_t side = batch * model.branches_;
        const float nothing = -std::numeric_limits<float>::infinity();
        for (auto& half : halves) {
            half.query = Buffer<uint8_t>(side * branch_bytes);
            half.key = Buffer<uint8_t>(side * model.shape_.heads * key_bytes);
            half.value = Buffer<uint8_t>(side * branch_bytes);
            half.bias = Buffer<float>(side * model.shape_.heads * padded_tokens);
            for (size_t i = 0; i < half.bias.size(); ++i)
                if (i % padded_tokens >= model.tokens_) half.bias[i] = nothing;
        }
    }

    struct Half {
        Buffer<uint8_t> query, key, value;  // keys packed for their product, the others one byte a code
        Buffer<float> bias;                 // of the logits, a key each; -infinity for padding
    };

    size_t batch, padded_tokens, branch_bytes, key_bytes;
    Buffer<float> residual;
    std::array<Half, 2> halves;
    const float* images = nullptr;
    float* logits = nullptr;
    Trace* trace = nullptr;
};

void Trace::see(const Name& name, size_t image, size_t rows, size_t row, size_t count, size_t width,
                const uint8_t* codes, size_t stride) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto same = [&](const Codes& other) {
        return std::strcmp(other.name.part, name.part) == 0 && other.name.block == name.block &&
               other.name.branch == name.branch;
    };
    auto found = std::find_if(all_.begin(), all_.end(), same);
    if (found == all_.end()) {
        all_.push_back({name, rows, width, std::vector<uint8_t>(images_ * rows * width)});
        found = all_.end() - 1;
    }
    for (size_t r = 0; r < count; ++r)
        std::copy_n(codes + r * stride, width, found->values.data() + ((image * rows + row + r) * width));
}

Model::Model(const Isa& isa, const Shape& shape, size_t threads)
    : isa_(isa),
      shape_(shape),
      tokens_(0),
      patches_((shape.height / shape.patch_height) * (shape.width / shape.patch_width)),
      width_(round_up(shape.embed_dim, kChannels)),
      head_width_(shape.heads * round_up(shape.head_dim, kChannels)),
      pool_(threads) {
    tokens_ = patches_ + shape.prefix;
}

Model::~Model() = default;

void Model::set_embedding(const LinearSpec& patch, Norm norm, const float* prefix, const float* positions, Norm pre) {
    const size_t inputs = shape_.channels * shape_.patch_height * shape_.patch_width;
    patch_ = Linear(isa_, patch, width_parts(), {1, inputs});
    patch_norm_ = std::move(norm);
    pre_norm_ = std::move(pre);
    prefix_ = Buffer<float>(shape_.prefix * width_);
    positions_ = Buffer<float>(patches_ * width_);
    for (size_t i = 0; i < shape_.prefix; ++i)
        std::copy_n(prefix + i * shape_.embed_dim, shape_.embed_dim, prefix_.data() + i * width_);
    for (size_t i = 0; positions != nullptr && i < patches_; ++i)
        std::copy_n(positions + i * shape_.embed_dim, shape_.embed_dim, positions_.data() + i * width_);
    largest_row_ = std::max({largest_row_, patch_.inputs, patch_.outputs});
}

void Model::finish(Attention& a) const {
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
    a.scores = &choose(isa_.moving, isa_.moving_count, a.query_quantizer[0].bits, a.key_quantizer[0].bits);
    a.mix = &choose(isa_.moving, isa_.moving_count, a.map_quantizer[0].bits, a.value_quantizer[0].bits);
    const double factor = shape_.attention_scale * kLog2E;
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

void Model::add_block(Block block) {
    const auto consider = [this](const Linear& layer) {
        largest_row_ = std::max({largest_row_, layer.inputs, layer.outputs});
    };
    branches_ = std::max(branches_, block.attentions.size());
    for (Attention& attention : block.attentions) {
        consider(attention.qkv);
        consider(attention.proj);
        if (!block.post) attention.norm.fold({attention.qkv.input});
    }
    for (Mlp& mlp : block.mlps) {
        consider(mlp.up);
        consider(mlp.down);
        largest_row_ = std::max(largest_row_, 2 * mlp.hidden);
        if (!block.post && mlp.kind != Mlp::Kind::split) mlp.norm.fold({mlp.up.input});
        if (mlp.inner.present) mlp.inner.fold({mlp.down.input});
        mlp.steps = steps_of(mlp.activation, mlp.down.input);
    }
    blocks_.push_back(std::move(block));
}

void Model::set_head(Norm final_norm, Norm pool_norm, std::vector<Linear> heads) {
    final_norm_ = std::move(final_norm);
    pool_norm_ = std::move(pool_norm);
    heads_ = std::move(heads);
    for (const Linear& head : heads_) largest_row_ = std::max({largest_row_, head.inputs, head.outputs});
}

void Model::embed(Pass& pass, Scratch& s, const Rows& rows) const {
    Clock clock(timed_, s.seconds);
    float* x = pass.residual.data() + (rows.image * tokens_ + rows.begin) * width_;
    const size_t prefix = std::min(rows.end, std::max(rows.begin, shape_.prefix)) - rows.begin;
    for (size_t r = 0; r < prefix; ++r) std::copy_n(prefix_.data() + (rows.begin + r) * width_, width_, x + r * width_);

    const size_t ph = shape_.patch_height, pw = shape_.patch_width, columns = shape_.width / pw;
    const float* image = pass.images + rows.image * shape_.channels * shape_.height * shape_.width;
    const size_t count = rows.count() - prefix, inputs = patch_.inputs;
    for (size_t r = 0; r < count; ++r) {
        const size_t patch = rows.begin + prefix + r - shape_.prefix;
        float* to = s.first.data() + r * inputs;
        for (size_t c = 0; c < shape_.channels; ++c)
            for (size_t i = 0; i < ph; ++i) {
                const size_t line = (c * shape_.height + patch / columns * ph + i) * shape_.width;
                to = std::copy_n(image + line + patch % columns * pw, pw, to);
            }
    }
    clock.lap(kRest);
    isa_.ops.quantize(s.first.data(), inputs, count, inputs, patch_.input.rounding(), s.codes.data(), inputs);
    clock.lap(kEpilogues);
    if (pass.trace != nullptr && count > 0)
        pass.trace->see({"patch", 0, 0}, rows.image, patches_, rows.begin + prefix - shape_.prefix, count,
                        shape_.channels * ph * pw, s.codes.data(), inputs);
    float* patches = x + prefix * width_;
    const float* positions = positions_.data() + (rows.begin + prefix - shape_.prefix) * width_;
    each_tile(patch_, operand(patch_, s.codes.data(), inputs, count, s.packed.data()), count, s.sums.data(), clock,
              kEpilogues, [&](size_t first, size_t last, size_t tile) {
                  const size_t end = std::min(last, width_);
                  if (first < end)
                      isa_.ops.store_sums(s.sums.data(), tile, count, end - first, patch_.scale.data() + first,
                                          patch_.shift.data() + first, patches + first, width_);
              });
    if (patch_norm_.present) isa_.ops.normalize(patches, width_, count, patch_norm_.part(), patches, width_);
    for (size_t i = 0; i < count * width_; ++i) patches[i] += positions[i];
    if (pre_norm_.present) isa_.ops.normalize(x, width_, rows.count(), pre_norm_.part(), x, width_);
    clock.lap(kRest);
}

// Queries, keys and values of a block: codes from the residual stream.
void Model::project(Pass& pass, Scratch& s, const Rows& rows, size_t index) const {
    Clock clock(timed_, s.seconds);
    const Block& block = blocks_[index];
    Pass::Half& half = pass.halves[index % 2];
    const float* x = pass.residual.data() + (rows.image * tokens_ + rows.begin) * width_;
    const Parts heads = heads_parts();
    const size_t count = rows.count(), padded = heads.padded(), depth = pass.padded_tokens;
    for (size_t branch = 0; branch < block.attentions.size(); ++branch) {
        const Attention& a = block.attentions[branch];
        if (block.post)
            isa_.ops.quantize(x, width_, count, width_, a.qkv.input.rounding(), s.codes.data(), width_);
        else
            isa_.ops.normalize_codes(x, width_, count, a.norm.part(), a.qkv.input.top, s.codes.data(), width_);
        clock.lap(kNorms);
        if (pass.trace != nullptr)
            pass.trace->see({"qkv", index, branch}, rows.image, tokens_, rows.begin, count, shape_.embed_dim,
                            s.codes.data(), width_);

        const size_t stride = 3 * head_width_;
        const float tops[] = {a.query_quantizer[0].top, a.key_quantizer[0].top, a.value_quantizer[0].top};
        const size_t direct = a.query.empty() ? 0 : 2 * head_width_;  // channels from here on become codes at once
        each_tile(a.qkv, operand(a.qkv, s.codes.data(), width_, count, s.packed.data()), count, s.sums.data(), clock,
                  kEpilogues, [&](size_t first, size_t last, size_t tile) {
                      for (size_t at = first, end; at < std::min(last, stride); at = end) {
                          const size_t section = at / head_width_;
                          end = std::min({last, stride, (section + 1) * head_width_});
                          const int32_t* sums = s.sums.data() + at - first;
                          if (at < direct)
                              isa_.ops.store_sums(sums, tile, count, end - at, a.qkv.scale.data() + at,
                                                  a.qkv.shift.data() + at, s.first.data() + at, stride);
                          else
                              isa_.ops.quantize_sums(sums, tile, count, end - at, a.code_scale.data() + at,
                                                     a.code_shift.data() + at, tops[section], s.hidden.data() + at,
                                                     stride);
                      }
                  });
        if (direct != 0)
            for (size_t section = 0; section < 2; ++section) {
                const std::vector<Norm>& norms = section == 0 ? a.query : a.key;
                for (size_t head = 0; head < heads.count; ++head) {
                    const size_t at = section * head_width_ + head * padded;
                    float* from = s.first.data() + at;
                    for (size_t i = 0; i + 1 < norms.size(); ++i)
                        isa_.ops.normalize(from, stride, count, norms[i].part(head), from, stride);
                    isa_.ops.normalize_codes(from, stride, count, norms.back().part(head), tops[section],
                                             s.hidden.data() + at, stride);
                }
            }
        clock.lap(kNorms);

        const size_t which = (rows.image * branches_ + branch);
        uint8_t* query = half.query.data() + which * pass.branch_bytes;
        uint8_t* key = half.key.data() + which * heads.count * pass.key_bytes;
        uint8_t* value = half.value.data() + which * pass.branch_bytes;
        const int key_low = 1 << (a.key_quantizer[0].bits - 1);
        for (size_t head = 0; head < heads.count; ++head) {
            const uint8_t* q = s.hidden.data() + head * padded;
            const uint8_t* k = q + head_width_;
            const uint8_t* v = k + head_width_;
            float* bias = half.bias.data() + (which * heads.count + head) * depth;
            if (pass.trace != nullptr)
                for (auto [part, codes] : {std::pair{"query", q}, std::pair{"key", k}, std::pair{"value", v}})
                    pass.trace->see({part, index, branch}, rows.image, heads.count * tokens_,
                                    head * tokens_ + rows.begin, count, heads.size, codes, stride);
            for (size_t r = 0; r < count; ++r) {
                const size_t token = rows.begin + r, at = (head * depth + token) * padded;
                std::memcpy(query + at, q + r * stride, padded);
                std::memcpy(value + at, v + r * stride, padded);
                const uint8_t* from = k + r * stride;
                for (size_t i = 0; i < padded; ++i) s.key[i] = static_cast<int8_t>(from[i] - key_low);
                int total = 0;
                for (size_t i = 0; i < heads.size; ++i) total += s.key[i];
                a.scores->pack_channel(key + head * pass.key_bytes, padded, token, s.key.data());
                bias[token] = a.key_bias[head] * static_cast<float>(total);
            }
        }
        clock.lap(kRest);
    }
}

// x += projection of the attention's output.
void Model::attend(Pass& pass, Scratch& s, const Rows& rows, size_t index) const {
    Clock clock(timed_, s.seconds);
    const Block& block = blocks_[index];
    const Pass::Half& half = pass.halves[index % 2];
    float* x = pass.residual.data() + (rows.image * tokens_ + rows.begin) * width_;
    const Parts heads = heads_parts();
    const size_t count = rows.count(), padded = heads.padded(), depth = pass.padded_tokens;
    for (size_t branch = 0; branch < block.attentions.size(); ++branch) {
        const Attention& a = block.attentions[branch];
        const size_t which = rows.image * branches_ + branch;
        const float top = a.map_quantizer[0].top;
        const int value_low = 1 << (a.value_quantizer[0].bits - 1);
        for (size_t head = 0; head < heads.count; ++head) {
            const size_t base = which * pass.branch_bytes + head * padded * depth;
            const uint8_t* query = half.query.data() + base;
            const uint8_t* keys = half.key.data() + (which * heads.count + head) * pass.key_bytes;
            const size_t score_width = round_up(depth, a.scores->group), mix_width = round_up(padded, a.mix->group);
            pack_columns(*a.mix, half.value.data() + base, padded, depth, padded, value_low, s.values.data());
            clock.lap(kRest);
            const float* bias = half.bias.data() + (which * heads.count + head) * depth;
            for (size_t r = 0; r < count; r += kAttentionRows) {
                const size_t some = std::min(kAttentionRows, count - r);
                const Operand left =
                    operand(*a.scores, query + (rows.begin + r) * padded, padded, some, padded, s.packed.data());
                a.scores->run(left.rows, left.stride, some, keys, score_width, padded, 0, score_width, s.scores.data(),
                              score_width);
                clock.lap(kAttentionProducts);
                isa_.ops.softmax_codes(s.scores.data(), score_width, some, depth, a.logit_scale[head], bias,
                                       a.map_inverse[head], top, s.map.data(), depth, s.totals.data());
                clock.lap(kSoftmax);
                if (pass.trace != nullptr)
                    pass.trace->see({"attention", index, branch}, rows.image, heads.count * tokens_,
                                    head * tokens_ + rows.begin + r, some, tokens_, s.map.data(), depth);
                const Operand map = operand(*a.mix, s.map.data(), depth, some, depth, s.packed.data());
                a.mix->run(map.rows, map.stride, some, s.values.data(), mix_width, depth, 0, mix_width, s.sums.data(),
                           mix_width);
                clock.lap(kAttentionProducts);
                if (!a.inner.present) {
                    double shift[kAttentionRows];
                    for (size_t i = 0; i < some; ++i) shift[i] = s.totals[i] * a.out_total[head] + a.out_shift;
                    isa_.ops.quantize_head(s.sums.data(), mix_width, some, padded, a.out_scale[head], shift,
                                           a.proj.input.top, s.codes.data() + r * head_width_ + head * padded,
                                           head_width_);
                } else {
                    for (size_t i = 0; i < some; ++i)
                        for (size_t c = 0; c < heads.size; ++c)
                            s.first[(r + i) * head_width_ + head * padded + c] = static_cast<float>(
                                s.sums[i * mix_width + c] * a.out_scale[head] + s.totals[i] * a.out_total[head]);
                }
                clock.lap(kEpilogues);
            }
        }
        if (a.inner.present) {
            // The norm runs over the heads' channels side by side, without their padding.
            const size_t packed_width = round_up(heads.count * heads.size, kChannels);
            for (size_t r = 0; r < count; ++r) {
                float* to = s.second.data() + r * packed_width;
                std::fill_n(to, packed_width, 0.0f);
                for (size_t head = 0; head < heads.count; ++head)
                    std::copy_n(s.first.data() + r * head_width_ + head * padded, heads.size, to + head * heads.size);
            }
            isa_.ops.normalize_codes(s.second.data(), packed_width, count, a.inner.part(), a.proj.input.top,
                                     s.hidden.data(), packed_width);
            for (size_t r = 0; r < count; ++r)
                for (size_t head = 0; head < heads.count; ++head)
                    std::copy_n(s.hidden.data() + r * packed_width + head * heads.size, heads.size,
                                s.codes.data() + r * head_width_ + head * padded);
            clock.lap(kNorms);
        }
        if (pass.trace != nullptr)
            for (size_t head = 0; head < heads.count; ++head)
                pass.trace->see({"proj", index, branch}, rows.image, heads.count * tokens_, head * tokens_ + rows.begin,
                                count, heads.size, s.codes.data() + head * padded, head_width_);
        float* to = block.post ? s.first.data() : x;
        each_tile(a.proj, operand(a.proj, s.codes.data(), head_width_, count, s.packed.data()), count, s.sums.data(),
                  clock, kEpilogues, [&](size_t first, size_t last, size_t tile) {
                      const size_t end = std::min(last, width_);
                      if (first >= end) return;
                      const auto store = block.post ? isa_.ops.store_sums : isa_.ops.add_sums;
                      store(s.sums.data(), tile, count, end - first, a.proj.scale.data() + first,
                            a.proj.shift.data() + first, to + first, width_);
                  });
        if (block.post) {
            isa_.ops.normalize(to, width_, count, a.norm.part(), to, width_);
            for (size_t i = 0; i < count * width_; ++i) x[i] += to[i];
            clock.lap(kNorms);
        }
    }
}

void Model::feed_forward(Pass& pass, Scratch& s, const Rows& rows, size_t index) const {
    Clock clock(timed_, s.seconds);
    const Block& block = blocks_[index];
    float* x = pass.residual.data() + (rows.image * tokens_ + rows.begin) * width_;
    const size_t count = rows.count();
    // Branches that run side by side all start from x as it is now: their sum is kept until the last is done.
    const bool apart = block.post || block.mlps.size() > 1;
    float* sum = apart ? s.second.data() : x;
    if (apart) std::fill_n(sum, count * width_, 0.0f);
    for (size_t branch = 0; branch < block.mlps.size(); ++branch) {
        const Mlp& mlp = block.mlps[branch];
        const size_t hidden = mlp.hidden;
        const auto enter = [&](const Linear& layer) {
            const Rounding input = layer.input.rounding();
            if (block.post) {
                isa_.ops.quantize(x, width_, count, width_, input, s.codes.data(), width_);
            } else if (mlp.kind != Mlp::Kind::split) {
                isa_.ops.normalize_codes(x, width_, count, mlp.norm.part(), input.top, s.codes.data(), width_);
            } else {  // two layers with quantizers of their own
                isa_.ops.normalize(x, width_, count, mlp.norm.part(), s.normed.data(), width_);
                isa_.ops.quantize(s.normed.data(), width_, count, width_, input, s.codes.data(), width_);
            }
            clock.lap(kNorms);
            if (pass.trace != nullptr)
                pass.trace->see({&layer == &mlp.up ? "up" : "gate", index, branch}, rows.image, tokens_, rows.begin,
                                count, shape_.embed_dim, s.codes.data(), width_);
            return operand(layer, s.codes.data(), width_, count, s.packed.data());
        };
        const Quantize next = mlp.down.input.folded();
        if (mlp.kind == Mlp::Kind::plain && !mlp.inner.present) {
            each_tile(mlp.up, enter(mlp.up), count, s.sums.data(), clock, kActivation,
                      [&](size_t first, size_t last, size_t tile) {
                          const size_t end = std::min(last, hidden);
                          if (first >= end) return;
                          if (mlp.steps.count > 0)
                              isa_.ops.step_sums(s.sums.data(), tile, count, end - first, mlp.up.scale.data() + first,
                                                 mlp.up.shift.data() + first, mlp.steps, s.hidden.data() + first,
                                                 hidden);
                          else
                              isa_.ops.activate_sums(s.sums.data(), tile, count, end - first,
                                                     mlp.up.scale.data() + first, mlp.up.shift.data() + first,
                                                     mlp.activation, next, s.hidden.data() + first, hidden);
                      });
        } else {
            // Floats first: up and gate side by side, or up alone; then what enters the second layer.
            const size_t stride = mlp.kind == Mlp::Kind::plain ? hidden : 2 * hidden;
            // A layer's outputs are padded to its product's group: what is beyond its own part belongs to the other.
            const size_t part = mlp.kind == Mlp::Kind::split ? hidden : stride;
            const auto store = [&](const Linear& layer, size_t offset) {
                each_tile(layer, enter(layer), count, s.sums.data(), clock, kEpilogues,
                          [&](size_t first, size_t last, size_t tile) {
                              const size_t end = std::min(last, part);
                              if (first < end)
                                  isa_.ops.store_sums(s.sums.data(), tile, count, end - first,
                                                      layer.scale.data() + first, layer.shift.data() + first,
                                                      s.first.data() + offset + first, stride);
                          });
            };
            if (mlp.kind == Mlp::Kind::split) store(mlp.gate, hidden);
            store(mlp.up, 0);
            for (size_t r = 0; r < count; ++r) {
                float* from = s.first.data() + r * stride;
                float* to = s.first.data() + r * hidden;
                float* gate = mlp.kind == Mlp::Kind::plain || mlp.kind == Mlp::Kind::first_half ? from : from + hidden;
                isa_.ops.activate(gate, hidden, mlp.activation);
                if (mlp.kind == Mlp::Kind::plain) continue;
                for (size_t i = 0; i < hidden; ++i) to[i] = from[i] * from[i + hidden];
            }
            clock.lap(kActivation);
            if (mlp.inner.present)
                isa_.ops.normalize_codes(s.first.data(), hidden, count, mlp.inner.part(), next.top, s.hidden.data(),
                                         hidden);
            else
                isa_.ops.quantize(s.first.data(), hidden, count, hidden, mlp.down.input.rounding(), s.hidden.data(),
                                  hidden);
            clock.lap(kNorms);
        }
        if (pass.trace != nullptr)
            pass.trace->see({"down", index, branch}, rows.image, tokens_, rows.begin, count, mlp.inputs,
                            s.hidden.data(), hidden);
        each_tile(mlp.down, operand(mlp.down, s.hidden.data(), hidden, count, s.packed.data()), count, s.sums.data(),
                  clock, kEpilogues, [&](size_t first, size_t last, size_t tile) {
                      const size_t end = std::min(last, width_);
                      if (first < end)
                          isa_.ops.add_sums(s.sums.data(), tile, count, end - first, mlp.down.scale.data() + first,
                                            mlp.down.shift.data() + first, sum + first, width_);
                  });
        if (block.post) isa_.ops.normalize(sum, width_, count, mlp.norm.part(), sum, width_);
    }
    if (apart)
        for (size_t i = 0; i < count * width_; ++i) x[i] += sum[i];
    clock.lap(kRest);
}

void Model::classify(Pass& pass, Scratch& s, size_t image) const {
    Clock clock(timed_, s.seconds);
    const float* x = pass.residual.data() + image * tokens_ * width_;
    float* pooled = s.first.data();
    if (shape_.pool == Shape::Pool::token) {
        // One row a head: class token, distillation token.
        std::copy_n(x, heads_.size() * width_, pooled);
        if (final_norm_.present) isa_.ops.normalize(pooled, width_, heads_.size(), final_norm_.part(), pooled, width_);
    } else {
        float* row = s.second.data();
        float* largest = s.normed.data();
        std::vector<double> total(width_, 0.0);
        std::fill_n(largest, width_, -std::numeric_limits<float>::infinity());
        for (size_t token = shape_.skip; token < tokens_; ++token) {
            std::copy_n(x + token * width_, width_, row);
            if (final_norm_.present) isa_.ops.normalize(row, width_, 1, final_norm_.part(), row, width_);
            for (size_t i = 0; i < width_; ++i) {
                total[i] += row[i];
                largest[i] = std::max(largest[i], row[i]);
            }
        }
        const double count = static_cast<double>(tokens_ - shape_.skip);
        for (size_t i = 0; i < width_; ++i) {
            const float average = static_cast<float>(total[i] / count);
            pooled[i] = shape_.pool == Shape::Pool::average   ? average
                        : shape_.pool == Shape::Pool::largest ? largest[i]
                                                              : 0.5f * (average + largest[i]);
        }
    }
    if (pool_norm_.present) isa_.ops.normalize(pooled, width_, heads_.size(), pool_norm_.part(), pooled, width_);
    float* logits = pass.logits + image * shape_.classes;
    std::fill_n(logits, shape_.classes, 0.0f);
    const float share = 1.0f / static_cast<float>(heads_.size());
    for (size_t head = 0; head < heads_.size(); ++head) {
        const Linear& layer = heads_[head];
        isa_.ops.quantize(pooled + head * width_, width_, 1, width_, layer.input.rounding(), s.codes.data(), width_);
        if (pass.trace != nullptr)
            pass.trace->see({"head", 0, head}, image, 1, 0, 1, shape_.embed_dim, s.codes.data(), width_);
        each_tile(layer, operand(layer, s.codes.data(), width_, 1, s.packed.data()), 1, s.sums.data(), clock, kRest,
                  [&](size_t first, size_t last, size_t) {
                      for (size_t c = first; c < std::min(last, shape_.classes); ++c)
                          logits[c] +=
                              share * (static_cast<float>(s.sums[c - first]) * layer.scale[c] + layer.shift[c]);
                  });
    }
}

void Model::prepare(size_t batch) {
    if (scratch_.empty())
        for (size_t thread = 0; thread < pool_.threads(); ++thread)
            scratch_.push_back(
                std::make_unique<Scratch>(largest_row_, head_width_ / shape_.heads, round_up(tokens_, kChannels)));
    if (pass_ == nullptr || pass_->batch < batch) {
        pass_.reset();  // first the old memory, then the new
        pass_ = std::make_unique<Pass>(batch, *this);
    }
}

void Model::forward(const float* images, size_t batch, float* logits, Trace* trace) {
    const std::lock_guard<std::mutex> turn(mutex_);
    if (batch == 0) return;
    const size_t at_once = std::max(kImagesAtOnce, pool_.threads());
    prepare(std::min(batch, at_once));
    pass_->trace = trace;
    const size_t pixels = shape_.channels * shape_.height * shape_.width;
    for (size_t done = 0; done < batch; done += at_once) {
        pass_->images = images + done * pixels;
        pass_->logits = logits + done * shape_.classes;
        run(std::min(at_once, batch - done));
    }
}

// Rows go through a whole block at a time: the attention needs all keys and values of an image, everything else is a
// row's own. So there is one barrier a block, before its attention.
void Model::run(size_t batch) {
    Pass& pass = *pass_;
    const size_t threads = pool_.threads(), units = (tokens_ + kRowUnit - 1) / kRowUnit;
    // As few tasks an image as fit the scratch memory and share out evenly among the threads.
    size_t parts = (units * kRowUnit + kBlockRows - 1) / kBlockRows;
    while (batch * parts % threads != 0 && parts < units) ++parts;
    const auto rows_of = [&](size_t task) {
        const size_t part = task % parts;
        return Rows{task / parts, units * part / parts * kRowUnit,
                    std::min(tokens_, units * (part + 1) / parts * kRowUnit)};
    };
    // With a token for the classifier, nothing of the other rows is needed after the last attention.
    const bool few = shape_.pool == Shape::Pool::token && pass.trace == nullptr;
    const size_t depth = blocks_.size();
    std::vector<std::atomic<size_t>> next(depth + 2);
    for (auto& counter : next) counter.store(0, std::memory_order_relaxed);

    pool_.run([&](size_t thread) {
        Scratch& scratch = *scratch_[thread];
        for (size_t phase = 0; phase <= depth; ++phase) {
            for (size_t task; (task = next[phase].fetch_add(1)) < batch * parts;) {
                Rows rows = rows_of(task);
                if (phase == depth && few) rows.end = std::min(rows.end, heads_.size());
                if (rows.begin >= rows.end) continue;
                if (phase == 0) embed(pass, scratch, rows);
                if (phase > 0) attend(pass, scratch, rows, phase - 1);
                if (phase > 0) feed_forward(pass, scratch, rows, phase - 1);
                if (phase < depth) project(pass, scratch, rows, phase);
            }
            pool_.barrier();
        }
        for (size_t image; (image = next.back().fetch_add(1)) < batch;) classify(pass, scratch, image);
    });
}

std::vector<std::pair<std::string, double>> Model::profile() {
    const std::lock_guard<std::mutex> turn(mutex_);
    std::vector<std::pair<std::string, double>> profile;
    for (size_t work = 0; work < kWorks; ++work) {
        double seconds = 0.0;
        for (auto& scratch : scratch_) {
            seconds += scratch->seconds[work];
            scratch->seconds[work] = 0.0;
        }
        profile.emplace_back(kWorkNames[work], seconds);
    }
    return profile;
}

}  // namespace qvit
