// A vision transformer that runs on codes: its parts as they are given, and the pass over them.
//
// Everything that is constant is folded when a part is made: scales, offsets and row sums of codes become one
// multiply-add a channel, and the quantizer after a product one more factor in it. All widths are padded with zeros to
// multiples of 16 (heads each for itself), so that no kernel has a tail.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "thread_pool.h"

namespace qvit {

// A range of channels made of `count` parts of `size`, each padded to `padded`.
struct Parts {
    size_t count, size;
    size_t padded() const { return round_up(size, kChannels); }
    size_t total() const { return count * padded(); }
    size_t at(size_t channel) const { return channel / size * padded() + channel % size; }
};

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

// Linear layer: float32 scale and bias a channel, codes as the packed file holds them (one row of bits a channel).
struct LinearSpec {
    const uint8_t* codes;
    size_t row_bytes;
    int weight_bits;
    const float* scale;
    const float* bias;
    Quantizer input;
};

class Linear {
  public:
    Linear() = default;
    Linear(const Isa& isa, const LinearSpec& spec, Parts outputs, Parts inputs);

    const Product* product = nullptr;
    Quantizer input;
    size_t outputs = 0, inputs = 0;  // padded
    Buffer<uint8_t> weights;
    Buffer<float> scale, shift;  // value = sum * scale + shift
};

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

// The codes of every quantizer in one call, one byte each and unsigned: to compare with the reference.
class Trace {
  public:
    struct Name {
        const char* part;  // "patch", "qkv", "query", "key", "value", "attention", "proj", "up", "gate", "down", "head"
        size_t block, branch;
    };
    struct Codes {
        Name name;
        size_t rows, width;  // of one image
        std::vector<uint8_t> values;
    };

    explicit Trace(size_t images) : images_(images) {}
    // Take `count` rows of `width` codes as rows [row, row + count) of the `rows` that an image has.
    void see(const Name& name, size_t image, size_t rows, size_t row, size_t count, size_t width, const uint8_t* codes,
             size_t stride);
    const std::vector<Codes>& all() const { return all_; }

  private:
    size_t images_;
    std::mutex mutex_;
    std::vector<Codes> all_;
};

class Model {
  public:
    static constexpr size_t kImagesAtOnce = 8;

    Model(const Isa& isa, const Shape& shape, size_t threads);
    ~Model();

    void set_embedding(const LinearSpec& patch, Norm norm, const float* prefix, const float* positions, Norm pre);
    void add_block(Block block);
    void set_head(Norm final_norm, Norm pool_norm, std::vector<Linear> heads);
    // Fold an attention's scales; its parts are set.
    void finish(Attention& attention) const;

    // logits (batch, classes) of images (batch, channels, height, width). Calls from several threads take turns.
    // A trace takes at most kImagesAtOnce images.
    void forward(const float* images, size_t batch, float* logits, Trace* trace = nullptr);

    const Isa& isa() const { return isa_; }
    const Shape& shape() const { return shape_; }
    Parts heads_parts() const { return {shape_.heads, shape_.head_dim}; }
    Parts width_parts() const { return {1, shape_.embed_dim}; }
    // Seconds of every kind of work since the last call, summed over threads; zeros unless timed.
    std::vector<std::pair<std::string, double>> profile();
    void set_timed(bool timed) { timed_ = timed; }

  private:
    struct Scratch;
    struct Pass;
    struct Rows;

    void embed(Pass& pass, Scratch& scratch, const Rows& rows) const;
    void project(Pass& pass, Scratch& scratch, const Rows& rows, size_t block) const;
    void attend(Pass& pass, Scratch& scratch, const Rows& rows, size_t block) const;
    void feed_forward(Pass& pass, Scratch& scratch, const Rows& rows, size_t block) const;
    void classify(Pass& pass, Scratch& scratch, size_t image) const;
    void prepare(size_t batch);
    void run(size_t batch);

    const Isa& isa_;
    Shape shape_;
    size_t tokens_, patches_, width_, head_width_;  // widths padded
    Linear patch_;
    Norm patch_norm_, pre_norm_, final_norm_, pool_norm_;
    Buffer<float> prefix_, positions_;
    std::vector<Block> blocks_;
    std::vector<Linear> heads_;
    size_t branches_ = 1, largest_row_ = 0;
    bool timed_ = false;

    ThreadPool pool_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
    std::unique_ptr<Pass> pass_;
};

}  // namespace qvit
