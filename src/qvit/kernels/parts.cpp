#include "parts.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

namespace qvit {

namespace {

std::array<size_t, 2> pair(const Part& part, const char* name) {
    const Part::Members& values = part.list(name);
    need(values.size() == 2, name);
    const Part both{Part::Members{{"first", values[0].second}, {"second", values[1].second}}};
    return {both.whole("first"), both.whole("second")};
}

size_t rows_of(const Part& part, const char* name) {
    const std::vector<size_t>& shape = part.floats(name).shape;
    need(!shape.empty(), name);
    return shape[0];
}

int bits_of(const Part& part, const char* name) {
    const size_t bits = part.whole(name);
    need(bits >= 2 && bits <= 8, name);
    return static_cast<int>(bits);
}

LinearSpec layer(const Part& part, const char* name) {
    const Part& given = part.part(name);
    const Part::Array<uint8_t>& codes = given.codes("codes");
    const size_t outputs = given.whole("outputs"), inputs = given.whole("inputs");
    const int bits = bits_of(given, "weight_bits");
    const size_t row_bytes = (inputs * static_cast<size_t>(bits) + 7) / 8;
    need(codes.shape == std::vector<size_t>{outputs, row_bytes}, "codes");
    const Quantizer input(given.number("input_scale"), given.number("input_offset"), bits_of(given, "input_bits"));
    return {outputs, inputs, codes.data, row_bytes, bits, given.floats("scale", outputs), given.floats("bias", outputs),
            input};
}

Linear linear(const Plan& plan, const Part& part, const char* name, Parts outputs, Parts inputs) {
    const LinearSpec spec = layer(part, name);
    need(spec.outputs == outputs.channels() && spec.inputs == inputs.channels(), name);
    return Linear(plan.isa, spec, outputs, inputs);
}

Norm norm(const Part& part, const char* name, Parts parts) {
    if (!part.has(name)) return {};
    const Part& given = part.part(name);
    const size_t count = parts.channels();
    return make_norm(given.number("rms") != 0.0, static_cast<float>(given.number("eps")), given.floats("weight", count),
                     given.floats("bias", count), parts);
}

std::vector<Quantizer> quantizers(const Part& part, const char* name, size_t heads) {
    const Part& given = part.part(name);
    const float* scale = given.floats("scale", heads);
    const float* offset = given.has("offset") ? given.floats("offset", heads) : nullptr;
    const int bits = bits_of(given, "bits");
    std::vector<Quantizer> made;
    for (size_t head = 0; head < heads; ++head)
        made.push_back(offset != nullptr ? Quantizer(scale[head], offset[head], bits)
                                         : Quantizer::unsigned_codes(scale[head], bits));
    return made;
}

// Values per channel of every head, padded.
Buffer<float> per_channel(const Part& part, const char* name, Parts heads) {
    const float* given = part.floats(name, heads.channels());
    Buffer<float> values(heads.total());
    for (size_t i = 0; i < heads.channels(); ++i) values[heads.at(i)] = given[i];
    return values;
}

Operand operand(const Part& part, const char* name, Parts heads, bool rotates) {
    const Part& given = part.part(name);
    Operand made;
    made.quantizers = quantizers(part, name, heads.count);
    if (given.has("norm")) made.norms.push_back(norm(given, "norm", heads));
    made.coded = !made.norms.empty() && !rotates;
    if (given.has("gamma")) {
        const size_t count = heads.channels();
        made.norms.push_back(make_rectifier(static_cast<float>(given.number("eps")), given.floats("gamma", count),
                                            given.floats("beta", count), heads));
        made.coded = true;
    }
    if (given.has("factor")) {
        made.factor = per_channel(given, "factor", heads);
        made.shift = per_channel(given, "shift", heads);
        made.coded = false;
    }
    return made;
}

Rotary rotary(const Part& part, size_t heads, size_t patches, size_t half) {
    Rotary made;
    if (!part.has("rotary")) return made;
    const Part& given = part.part("rotary");
    made.present = true;
    made.halves = given.number("halves") != 0.0;
    made.tables = rows_of(given, "cos");
    need(made.tables == 1 || made.tables == heads, "rotary");
    const size_t count = product_of(made.tables, patches, half);
    made.cos = Buffer<float>(count);
    made.sin = Buffer<float>(count);
    std::copy_n(given.floats("cos", count), count, made.cos.data());
    std::copy_n(given.floats("sin", count), count, made.sin.data());
    return made;
}

// The file's table has a row per offset of the query from the key, and a column per head; log2 e goes in.
void set_bias(Attention& a, const Part& part, size_t rows, size_t columns, size_t prefix) {
    constexpr double kLog2E = 1.4426950408889634;
    const size_t offsets = product_of(2 * rows - 1, 2 * columns - 1), most = sum_of(offsets, 3);
    const size_t count = prefix == 0 ? offsets : most;
    const float* given = part.floats("bias", product_of(count, a.heads.count));
    a.bias = Buffer<float>(product_of(a.heads.count, most));
    a.bias_height = rows;
    a.bias_width = columns;
    a.bias_prefix = prefix;
    for (size_t head = 0; head < a.heads.count; ++head)
        for (size_t i = 0; i < count; ++i) {
            const size_t at = i < offsets ? offsets - 1 - i : i;
            a.bias[head * most + at] = static_cast<float>(given[i * a.heads.count + head] * kLog2E);
        }
}

using Window = std::array<size_t, 4>;  // rows, columns and shifts of both; zeros without one

Window window_of(const Stage& stage, const Part& part) {
    if (!part.has("window")) return {};
    const auto [rows, columns] = pair(part, "window");
    const auto [down, right] = pair(part, "shift");
    need(rows > 0 && columns > 0 && stage.rows % rows == 0 && stage.columns % columns == 0, "window");
    // One window that covers the image is no window: its rows can be divided among threads.
    if (rows == stage.rows && columns == stage.columns && down == 0 && right == 0) return {};
    return {rows, columns, down, right};
}

Attention attention(const Plan& plan, const Part& part, size_t branch) {
    const Stage& stage = plan.stage();
    Attention a;
    a.place = plan.place(branch);
    a.heads = {part.whole("heads"), part.whole("head_dim")};
    a.norm = norm(part, "norm", stage.parts());
    a.qkv = linear(plan, part, "qkv", {3 * a.heads.count, a.heads.size}, stage.parts());
    a.proj = linear(plan, part, "proj", stage.parts(), a.heads);
    a.rotary = rotary(part, a.heads.count, stage.tokens - stage.prefix, a.heads.size / 2);
    a.query = operand(part, "query", a.heads, a.rotary.present);
    a.key = operand(part, "key", a.heads, a.rotary.present);
    a.value_quantizer = quantizers(part, "value", a.heads.count);
    a.map_quantizer = quantizers(part, "map", a.heads.count);
    a.factors.assign(part.floats("logit_scale", a.heads.count),
                     part.floats("logit_scale", a.heads.count) + a.heads.count);
    a.inner = norm(part, "inner_norm", {1, a.heads.channels()});
    if (part.has("bias")) {
        const Window window = window_of(stage, part);
        set_bias(a, part, window[0] == 0 ? stage.rows : window[0], window[0] == 0 ? stage.columns : window[1],
                 stage.prefix);
    }
    return a;
}

Activation activation(const std::string& name) {
#define QVIT_NAMED(known) \
    if (name == #known) return Activation::known;
    QVIT_ACTIVATIONS(QVIT_NAMED)
#undef QVIT_NAMED
    raise<std::invalid_argument>("the kernels have no activation function called " + name);
}

Mlp mlp(const Plan& plan, const Part& part, size_t branch) {
    const std::pair<const char*, Mlp::Kind> known[] = {{"plain", Mlp::Kind::plain},
                                                       {"glu", Mlp::Kind::glu},
                                                       {"glu_gate_last", Mlp::Kind::glu_gate_last},
                                                       {"swiglu", Mlp::Kind::swiglu}};
    const auto name = part.text("kind");
    const auto* found =
        std::find_if(std::begin(known), std::end(known), [&](auto& kind) { return name == kind.first; });
    need(found != std::end(known), "kind");
    Mlp m;
    m.place = plan.place(branch);
    m.kind = found->second;
    const Parts width = plan.stage().parts(), hidden{1, part.part("fc2").whole("inputs")};
    const bool both = m.kind == Mlp::Kind::glu || m.kind == Mlp::Kind::glu_gate_last;
    m.norm = norm(part, "norm", width);
    m.fc1 = linear(plan, part, "fc1", {both ? size_t{2} : size_t{1}, hidden.size}, width);
    if (m.kind == Mlp::Kind::swiglu) m.gate = linear(plan, part, "gate", hidden, width);
    m.fc2 = linear(plan, part, "fc2", width, hidden);
    m.inner = norm(part, "inner_norm", hidden);
    m.activation = activation(part.text("activation"));
    m.inputs = hidden.size;
    m.hidden = hidden.padded();
    return m;
}

void add_residual(Plan& plan, const Part& part) {
    std::vector<Attention> attentions;
    std::vector<Mlp> mlps;
    Window window{};
    size_t branch = 0;
    for (const auto& [unnamed, given] : part.list("branches")) {
        if (given.text("op") == "attention") {
            const Window own = window_of(plan.stage(), given);
            need(attentions.empty() || own == window, "it has attentions side by side with windows of their own");
            window = own;
            attentions.push_back(attention(plan, given, branch++));
        } else {
            mlps.push_back(mlp(plan, given, branch++));
        }
    }
    plan.residual(std::move(attentions), std::move(mlps), part.number("post") != 0.0, window);
}

void add_tokens(Plan& plan, const Part& part) {
    const Stage& stage = plan.stage();
    const size_t prefix = part.has("prefix") ? rows_of(part, "prefix") : 0;
    plan.tokens(prefix == 0 ? nullptr : part.floats("prefix", product_of(prefix, stage.channels)), prefix,
                part.has("position") ? part.floats("position", product_of(stage.tokens, stage.channels)) : nullptr);
}

void add_pool(Plan& plan, const Part& part) {
    const auto kind = part.text("kind");
    Pool pool;
    pool.kind = kind == "token" ? Pool::Kind::token
                : kind == "avg" ? Pool::Kind::average
                : kind == "max" ? Pool::Kind::largest
                                : Pool::Kind::both;
    pool.tokens = part.whole("tokens");
    pool.skip = part.whole("skip");
    const size_t tokens = plan.stage().tokens;
    need(pool.tokens > 0 && pool.tokens <= tokens && pool.skip < tokens, "tokens");
    plan.pool(std::move(pool));
}

void add_attention_pool(Plan& plan, const Part& part) {
    Attention a;
    a.place = plan.place();
    a.pools = true;
    a.heads = {part.whole("heads"), part.whole("head_dim")};
    a.qkv = linear(plan, part, "kv", {2 * a.heads.count, a.heads.size}, plan.stage().parts());
    a.proj = linear(plan, part, "proj", {1, part.part("proj").whole("outputs")}, a.heads);
    a.query.quantizers = quantizers(part, "query", a.heads.count);
    a.key = operand(part, "key", a.heads, false);
    a.value_quantizer = quantizers(part, "value", a.heads.count);
    a.map_quantizer = quantizers(part, "map", a.heads.count);
    const float* factors = part.floats("logit_scale", a.heads.count);
    a.factors.assign(factors, factors + a.heads.count);
    a.latent = per_channel(part, "latent", a.heads);
    plan.attention_pool(std::move(a));
}

void add_classify(Plan& plan, const Part& part) {
    std::vector<Linear> heads;
    for (const auto& [unnamed, layer] : part.list("heads")) {
        const Part head{Part::Members{{"head", layer}}};
        heads.push_back(linear(plan, head, "head", {1, layer.whole("outputs")}, plan.stage().parts()));
    }
    plan.classify(std::move(heads));
}

}  // namespace

void add_operation(Plan& plan, const Part& part) {
    const auto op = part.text("op");
    need((op == "embed") == plan.stages.empty(), "its first operation alone is to embed");
    if (op == "embed") {
        const auto [rows, columns] = pair(part, "patch");
        need(rows > 0 && rows <= plan.height && columns > 0 && columns <= plan.width, "patch");
        plan.embed(rows, columns, layer(part, "layer"));
    } else if (op == "tokens") {
        add_tokens(plan, part);
    } else if (op == "norm") {
        plan.norm(norm(part, "norm", plan.stage().parts()));
    } else if (op == "residual") {
        add_residual(plan, part);
    } else if (op == "merge") {
        const Stage& stage = plan.stage();
        need(stage.rows % 2 == 0 && stage.columns % 2 == 0 && stage.prefix == 0, "merge");
        plan.merge(norm(part, "norm", {1, 4 * stage.channels}), layer(part, "layer"));
    } else if (op == "pool") {
        add_pool(plan, part);
    } else if (op == "attention_pool") {
        add_attention_pool(plan, part);
    } else if (op == "classify") {
        add_classify(plan, part);
    } else {
        raise<std::invalid_argument>("the kernels have no operation called " + op);
    }
}

}  // namespace qvit
