#include "parts.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

namespace nb = nanobind;

namespace qvit {

namespace {

template <class T>
T get(const nb::dict& part, const char* name) {
    return nb::cast<T>(part[name]);
}

bool has(const nb::dict& part, const char* name) { return part.contains(name) && !part[name].is_none(); }

// The values of an array of `count` floats.
const float* floats(const nb::dict& part, const char* name, size_t count) {
    const auto array = get<nb::ndarray<const float, nb::c_contig, nb::device::cpu>>(part, name);
    need(array.size() == count, name);
    return array.data();
}

LinearSpec layer(const nb::dict& part, const char* name) {
    const auto given = get<nb::dict>(part, name);
    const auto codes = get<Array<uint8_t, 2>>(given, "codes");
    const size_t outputs = get<size_t>(given, "outputs"), inputs = get<size_t>(given, "inputs");
    const int bits = get<int>(given, "weight_bits");
    need(bits >= 2 && bits <= 8, "bits");
    need(codes.shape(0) == outputs && codes.shape(1) == (inputs * static_cast<size_t>(bits) + 7) / 8, "codes");
    const Quantizer input(get<double>(given, "input_scale"), get<double>(given, "input_offset"),
                          get<int>(given, "input_bits"));
    return {outputs,
            inputs,
            codes.data(),
            codes.shape(1),
            bits,
            floats(given, "scale", outputs),
            floats(given, "bias", outputs),
            input};
}

Linear linear(const Plan& plan, const nb::dict& part, const char* name, Parts outputs, Parts inputs) {
    const LinearSpec spec = layer(part, name);
    need(spec.outputs == outputs.count * outputs.size && spec.inputs == inputs.count * inputs.size, name);
    return Linear(plan.isa, spec, outputs, inputs);
}

Norm norm(const nb::dict& part, const char* name, Parts parts) {
    if (!has(part, name)) return {};
    const auto given = get<nb::dict>(part, name);
    const size_t count = parts.count * parts.size;
    return make_norm(get<bool>(given, "rms"), get<float>(given, "eps"), floats(given, "weight", count),
                     floats(given, "bias", count), parts);
}

std::vector<Quantizer> quantizers(const nb::dict& part, const char* name, size_t heads) {
    const auto given = get<nb::dict>(part, name);
    const float* scale = floats(given, "scale", heads);
    const float* offset = has(given, "offset") ? floats(given, "offset", heads) : nullptr;
    const int bits = get<int>(given, "bits");
    std::vector<Quantizer> made;
    for (size_t head = 0; head < heads; ++head)
        made.push_back(offset != nullptr ? Quantizer(scale[head], offset[head], bits)
                                         : Quantizer::unsigned_codes(scale[head], bits));
    return made;
}

// Values per channel of every head, padded.
Buffer<float> per_channel(const nb::dict& part, const char* name, Parts heads) {
    const float* given = floats(part, name, heads.count * heads.size);
    Buffer<float> values(heads.total());
    for (size_t i = 0; i < heads.count * heads.size; ++i) values[heads.at(i)] = given[i];
    return values;
}

Operand operand(const nb::dict& part, const char* name, Parts heads, bool rotates) {
    const auto given = get<nb::dict>(part, name);
    Operand made;
    made.quantizers = quantizers(part, name, heads.count);
    if (has(given, "norm")) made.norms.push_back(norm(given, "norm", heads));
    made.coded = !made.norms.empty() && !rotates;
    if (has(given, "gamma")) {
        const size_t count = heads.count * heads.size;
        made.norms.push_back(make_rectifier(get<float>(given, "eps"), floats(given, "gamma", count),
                                            floats(given, "beta", count), heads));
        made.coded = true;
    }
    if (has(given, "factor")) {
        made.factor = per_channel(given, "factor", heads);
        made.shift = per_channel(given, "shift", heads);
        made.coded = false;
    }
    return made;
}

Rotary rotary(const nb::dict& part, size_t heads, size_t patches, size_t half) {
    Rotary made;
    if (!has(part, "rotary")) return made;
    const auto given = get<nb::dict>(part, "rotary");
    made.present = true;
    made.halves = get<bool>(given, "halves");
    made.tables = get<Array<float, 3>>(given, "cos").shape(0);
    need(made.tables == 1 || made.tables == heads, "rotary");
    const size_t count = made.tables * patches * half;
    made.cos = Buffer<float>(count);
    made.sin = Buffer<float>(count);
    std::copy_n(floats(given, "cos", count), count, made.cos.data());
    std::copy_n(floats(given, "sin", count), count, made.sin.data());
    return made;
}

// The file's table has a row per offset of the query from the key, and a column per head; log2 e goes in.
void set_bias(Attention& a, const nb::dict& part, size_t rows, size_t columns, size_t prefix) {
    constexpr double kLog2E = 1.4426950408889634;
    const size_t offsets = (2 * rows - 1) * (2 * columns - 1), count = offsets + (prefix == 0 ? 0 : 3);
    const float* given = floats(part, "bias", count * a.heads.count);
    a.bias = Buffer<float>(a.heads.count * (offsets + 3));
    a.bias_height = rows;
    a.bias_width = columns;
    a.bias_prefix = prefix;
    for (size_t head = 0; head < a.heads.count; ++head)
        for (size_t i = 0; i < count; ++i) {
            const size_t at = i < offsets ? offsets - 1 - i : i;
            a.bias[head * (offsets + 3) + at] = static_cast<float>(given[i * a.heads.count + head] * kLog2E);
        }
}

using Window = std::array<size_t, 4>;  // rows, columns and shifts of both; zeros without one

Window window_of(const Stage& stage, const nb::dict& part) {
    if (!has(part, "window")) return {};
    const auto [rows, columns] = get<std::tuple<size_t, size_t>>(part, "window");
    const auto [down, right] = get<std::tuple<size_t, size_t>>(part, "shift");
    // One window that covers the image is no window: its rows can be divided among threads.
    if (rows == stage.rows && columns == stage.columns && down == 0 && right == 0) return {};
    return {rows, columns, down, right};
}

Attention attention(const Plan& plan, const nb::dict& part, size_t branch) {
    const Stage& stage = plan.stage();
    Attention a;
    a.place = plan.place(branch);
    a.heads = {get<size_t>(part, "heads"), get<size_t>(part, "head_dim")};
    a.norm = norm(part, "norm", stage.parts());
    a.qkv = linear(plan, part, "qkv", {3 * a.heads.count, a.heads.size}, stage.parts());
    a.proj = linear(plan, part, "proj", stage.parts(), a.heads);
    a.rotary = rotary(part, a.heads.count, stage.tokens - stage.prefix, a.heads.size / 2);
    a.query = operand(part, "query", a.heads, a.rotary.present);
    a.key = operand(part, "key", a.heads, a.rotary.present);
    a.value_quantizer = quantizers(part, "value", a.heads.count);
    a.map_quantizer = quantizers(part, "map", a.heads.count);
    a.factors.assign(floats(part, "logit_scale", a.heads.count),
                     floats(part, "logit_scale", a.heads.count) + a.heads.count);
    a.inner = norm(part, "inner_norm", {1, a.heads.count * a.heads.size});
    if (has(part, "bias")) {
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
    throw std::invalid_argument("the kernels have no activation function called " + name);
}

Mlp mlp(const Plan& plan, const nb::dict& part, size_t branch) {
    const std::pair<const char*, Mlp::Kind> known[] = {{"plain", Mlp::Kind::plain},
                                                       {"glu", Mlp::Kind::glu},
                                                       {"glu_gate_last", Mlp::Kind::glu_gate_last},
                                                       {"swiglu", Mlp::Kind::swiglu}};
    const auto name = get<std::string>(part, "kind");
    const auto* found =
        std::find_if(std::begin(known), std::end(known), [&](auto& kind) { return name == kind.first; });
    need(found != std::end(known), "kind");
    Mlp m;
    m.place = plan.place(branch);
    m.kind = found->second;
    const Parts width = plan.stage().parts(), hidden{1, get<size_t>(get<nb::dict>(part, "fc2"), "inputs")};
    const bool both = m.kind == Mlp::Kind::glu || m.kind == Mlp::Kind::glu_gate_last;
    m.norm = norm(part, "norm", width);
    m.fc1 = linear(plan, part, "fc1", {both ? size_t{2} : size_t{1}, hidden.size}, width);
    if (m.kind == Mlp::Kind::swiglu) m.gate = linear(plan, part, "gate", hidden, width);
    m.fc2 = linear(plan, part, "fc2", width, hidden);
    m.inner = norm(part, "inner_norm", hidden);
    m.activation = activation(get<std::string>(part, "activation"));
    m.inputs = hidden.size;
    m.hidden = hidden.padded();
    return m;
}

void add_residual(Plan& plan, const nb::dict& part) {
    std::vector<Attention> attentions;
    std::vector<Mlp> mlps;
    Window window{};
    size_t branch = 0;
    for (nb::handle each : get<nb::list>(part, "branches")) {
        const auto given = nb::cast<nb::dict>(each);
        if (get<std::string>(given, "op") == "attention") {
            const Window own = window_of(plan.stage(), given);
            need(attentions.empty() || own == window, "it has attentions side by side with windows of their own");
            window = own;
            attentions.push_back(attention(plan, given, branch++));
        } else {
            mlps.push_back(mlp(plan, given, branch++));
        }
    }
    plan.residual(std::move(attentions), std::move(mlps), get<bool>(part, "post"), window);
}

void add_tokens(Plan& plan, const nb::dict& part) {
    const Stage& stage = plan.stage();
    const size_t prefix = has(part, "prefix") ? get<Array<float, 2>>(part, "prefix").shape(0) : 0;
    plan.tokens(prefix == 0 ? nullptr : floats(part, "prefix", prefix * stage.channels), prefix,
                has(part, "position") ? floats(part, "position", stage.tokens * stage.channels) : nullptr);
}

void add_pool(Plan& plan, const nb::dict& part) {
    const auto kind = get<std::string>(part, "kind");
    Pool pool;
    pool.kind = kind == "token" ? Pool::Kind::token
                : kind == "avg" ? Pool::Kind::average
                : kind == "max" ? Pool::Kind::largest
                                : Pool::Kind::both;
    pool.tokens = get<size_t>(part, "tokens");
    pool.skip = get<size_t>(part, "skip");
    plan.pool(std::move(pool));
}

void add_attention_pool(Plan& plan, const nb::dict& part) {
    Attention a;
    a.place = plan.place();
    a.pools = true;
    a.heads = {get<size_t>(part, "heads"), get<size_t>(part, "head_dim")};
    a.qkv = linear(plan, part, "kv", {2 * a.heads.count, a.heads.size}, plan.stage().parts());
    a.proj = linear(plan, part, "proj", {1, get<size_t>(get<nb::dict>(part, "proj"), "outputs")}, a.heads);
    a.query.quantizers = quantizers(part, "query", a.heads.count);
    a.key = operand(part, "key", a.heads, false);
    a.value_quantizer = quantizers(part, "value", a.heads.count);
    a.map_quantizer = quantizers(part, "map", a.heads.count);
    const float* factors = floats(part, "logit_scale", a.heads.count);
    a.factors.assign(factors, factors + a.heads.count);
    a.latent = per_channel(part, "latent", a.heads);
    plan.attention_pool(std::move(a));
}

void add_classify(Plan& plan, const nb::dict& part) {
    std::vector<Linear> heads;
    for (nb::handle each : get<nb::list>(part, "heads")) {
        nb::dict head;
        head["head"] = each;
        const size_t outputs = get<size_t>(nb::cast<nb::dict>(each), "outputs");
        heads.push_back(linear(plan, head, "head", {1, outputs}, plan.stage().parts()));
    }
    plan.classify(std::move(heads));
}

}  // namespace

void add_operation(Plan& plan, const nb::dict& part) {
    const auto op = get<std::string>(part, "op");
    if (op == "embed") {
        const auto [rows, columns] = get<std::tuple<size_t, size_t>>(part, "patch");
        plan.embed(rows, columns, layer(part, "layer"));
    } else if (op == "tokens") {
        add_tokens(plan, part);
    } else if (op == "norm") {
        plan.norm(norm(part, "norm", plan.stage().parts()));
    } else if (op == "residual") {
        add_residual(plan, part);
    } else if (op == "merge") {
        plan.merge(norm(part, "norm", {1, 4 * plan.stage().channels}), layer(part, "layer"));
    } else if (op == "pool") {
        add_pool(plan, part);
    } else if (op == "attention_pool") {
        add_attention_pool(plan, part);
    } else if (op == "classify") {
        add_classify(plan, part);
    } else {
        throw std::invalid_argument("the kernels have no operation called " + op);
    }
}

}  // namespace qvit
