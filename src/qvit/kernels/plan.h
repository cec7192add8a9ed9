// A program as the steps find it: its parts with everything constant folded into them, and the phases they run in.
#pragma once

#include <array>
#include <vector>

#include "linear.h"
#include "norm.h"

namespace qvit {

// What flows between two changes of its shape: rows of an image.
struct Stage {
    size_t tokens, channels, width;  // width: channels padded
    size_t rows, columns, prefix;    // the grid of patches, and tokens before them
    Parts parts() const { return {1, channels}; }
};

// Where a quantizer's codes come from, for people: operation of the program, and branch of a residual.
struct Place {
    size_t operation = 0, branch = 0;
};

struct Embedding {
    size_t patch_height = 0, patch_width = 0;
    Linear layer;
    Norm norm;
    Buffer<float> prefix, positions;
    Place place;
};

// A rotation of queries and keys: tables (tables, patches, size / 2) of one head or of all.
struct Rotary {
    bool present = false, halves = false;
    size_t tables = 1;
    Buffer<float> cos, sin;
};

// Queries or keys: their quantizers, a head each, and what comes before those.
struct Operand {
    std::vector<Quantizer> quantizers;
    std::vector<Norm> norms;      // the last one gives codes if `coded`
    bool coded = false;           // whether a norm with the quantizer folded in comes last
    Buffer<float> factor, shift;  // a multiply-add a channel before the quantizer, or none
    float top() const { return quantizers[0].top; }
};

// The windows of a grid whose tokens attend to one another, and the order of their tokens.
struct Windows {
    size_t tokens = 0, count = 0, at_once = 1;  // of a window; of an image; of a task
    std::vector<uint32_t> order;                // the row of each token, window by window
    std::vector<uint8_t> regions;               // of each of these tokens; empty if all are neighbours
};

struct Attention {
    Place place;
    Parts heads{1, 1};
    Norm norm;         // before it, or after it in a post-norm block
    Linear qkv, proj;  // of a pooling one, `qkv` gives keys and values alone
    Operand query, key;
    std::vector<Quantizer> value_quantizer, map_quantizer;  // a head each
    std::vector<float> factors;                             // of the logits, a head each
    Rotary rotary;
    Norm inner;  // before the projection
    // Relative position bias of each head, (2 height - 1) x (2 width - 1) offsets of keys from queries in ascending
    // order (log2 e included), and three values for prefix tokens.
    Buffer<float> bias;
    size_t bias_height = 0, bias_width = 0, bias_prefix = 0;
    // A pooling attention's constant queries, as codes, a row per head.
    bool pools = false;
    Buffer<float> latent;
    Buffer<uint8_t> latent_codes;

    // Folded by finish(): multiply-adds from the sums of qkv to codes, of logits, of the output.
    void finish(const Isa& isa);
    Buffer<float> code_scale, code_shift;
    const Product *query_key = nullptr, *map_value = nullptr;
    std::vector<float> logit_scale, key_bias, map_inverse;
    std::vector<double> out_scale, out_total;  // out = sums * out_scale + total of the row's codes * out_total
    double out_shift = 0.0;                    // of codes

    // Tokens that attend to one another, what a head of them takes in memory, and where this attention's heads begin in
    // the memory of all that stand side by side.
    size_t group = 0, padded_group = 0;
    size_t head_codes = 0, key_bytes = 0;
    size_t first_codes = 0, first_keys = 0, first_bias = 0;
    size_t width() const { return heads.total(); }
    size_t sections() const { return pools ? 2 : 3; }
    bool floats_first() const {
        return !query.norms.empty() || !key.norms.empty() || rotary.present || !query.factor.empty();
    }
    bool has_positions() const { return !bias.empty(); }
};

struct Mlp {
    Place place;
    Norm norm, inner;
    Linear fc1, gate, fc2;  // gate only where it is a layer of its own
    enum class Kind { plain, glu, glu_gate_last, swiglu } kind = Kind::plain;
    Activation activation = Activation::gelu;
    size_t inputs = 0, hidden = 0;  // width that enters fc2, and padded
    Steps steps{};                  // activation and quantization as one, for few codes
};

// Branches of a residual that are all attentions, or all MLPs.
struct Attentions {
    bool post = false;
    std::vector<Attention> branches;
    size_t windows = 0;  // index into Plan::windows plus one; 0 if all tokens of an image attend to one another
    size_t half = 0;     // which of two memories of keys and values, if they do
    size_t codes = 0, keys = 0, biases = 0;  // that the branches of one group take in it
};

struct Mlps {
    bool post = false;
    std::vector<Mlp> branches;
};

struct Merge {
    Place place;
    Norm norm;
    Linear layer;
    size_t from = 0;  // stage
};

struct Pool {
    enum class Kind { token, average, largest, both } kind = Kind::token;
    size_t tokens = 1, skip = 0;
    Norm before;
    std::vector<Norm> after;
};

// A step of a pass over some rows: what it does, and which of the plan's parts of that kind it is.
struct Step {
    enum class Kind { embed, project, attend, feed_forward, norm, merge } kind;
    size_t index;
};
constexpr const char* kStepNames[] = {"embed", "project", "attend", "feed_forward", "norm", "merge"};

// Steps that run one after the other on a task's rows, before all tasks meet at a barrier.
struct Phase {
    size_t stage;
    size_t windows;  // as in Attentions: tasks are whole windows, else ranges of rows
    std::vector<Step> steps;
};

class Plan {
  public:
    Plan(const Isa& isa, size_t channels, size_t height, size_t width);

    // The operations of a program, in the order they run.
    void embed(size_t patch_height, size_t patch_width, const LinearSpec& layer);
    void tokens(const float* prefix, size_t count, const float* positions);
    void norm(Norm norm);
    void residual(std::vector<Attention> attentions, std::vector<Mlp> mlps, bool post,
                  const std::array<size_t, 4>& window);
    void merge(Norm norm, const LinearSpec& layer);
    void attention_pool(Attention attention);
    void pool(Pool pool);
    void classify(std::vector<Linear> layers);

    const Stage& stage() const { return stages.back(); }
    size_t outputs() const;
    Place place(size_t branch = 0) const { return {operations, branch}; }

    const Isa& isa;
    size_t channels, height, width;  // of an image
    std::vector<Stage> stages;
    Embedding embedding;
    std::vector<Attentions> attentions;
    std::vector<Mlps> mlps;
    std::vector<Norm> norms;
    std::vector<Merge> merges;
    std::vector<Windows> windows;
    std::vector<Phase> phases;
    Pool pooling;
    std::vector<Linear> classifiers;
    Place classifier_place;
    bool pooled = false;
    size_t operations = 0;  // that are there already

    // What the memory of a call has to hold: channels of the widest row of any layer; rows of a task; of the attentions
    // over whole images, bytes of one side by side; tokens and channels of the largest head.
    size_t largest_row = 0, largest_task, largest_codes = 0, largest_keys = 0, largest_bias = 0;
    size_t largest_group = 0, largest_head = 0, largest_window_codes = 0, largest_window_keys = 0,
           largest_window_bias = 0;

  private:
    void consider(const Linear& layer);
    void consider(Attentions& group);
    void add(Step::Kind kind, size_t index);
    size_t windows_of(size_t height, size_t width, size_t shift_rows, size_t shift_columns);
};

}  // namespace qvit
