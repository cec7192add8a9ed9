// The module qvit._kernels: a model built part by part from arrays, and the products for tests and benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace qvit;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

const Isa& isa_named(const std::string& name) {
    size_t count;
    const Isa* const* isas = available_isas(&count);
    for (size_t i = 0; i < count; ++i)
        if (name == isas[i]->name) return *isas[i];
    throw std::invalid_argument("this processor or build has no instruction set called " + name);
}

void need(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

template <class T>
T get(const nb::dict& part, const char* name) {
    return nb::cast<T>(part[name]);
}

const float* floats(const nb::dict& part, const char* name, size_t count) {
    const auto array = get<nb::ndarray<const float, nb::c_contig, nb::device::cpu>>(part, name);
    need(array.size() == count, name);
    return array.data();
}

bool has(const nb::dict& part, const char* name) { return part.contains(name) && !part[name].is_none(); }

Quantizer quantizer(const nb::dict& part) {
    return Quantizer(get<double>(part, "input_scale"), get<double>(part, "input_offset"), get<int>(part, "input_bits"));
}

LinearSpec linear_spec(const nb::dict& part, size_t outputs, size_t inputs) {
    const auto codes = get<Array<uint8_t, 2>>(part, "codes");
    const int bits = get<int>(part, "weight_bits");
    need(bits >= 2 && bits <= 8, "bits");
    need(codes.shape(0) == outputs && codes.shape(1) == (inputs * static_cast<size_t>(bits) + 7) / 8, "codes");
    return {codes.data(),   codes.shape(1), bits, floats(part, "scale", outputs), floats(part, "bias", outputs),
            quantizer(part)};
}

Linear linear(const Isa& isa, const nb::dict& part, Parts outputs, Parts inputs) {
    return Linear(isa, linear_spec(part, outputs.count * outputs.size, inputs.count * inputs.size), outputs, inputs);
}

Norm norm(const nb::dict& part, const char* name, Parts parts) {
    if (!has(part, name)) return {};
    const auto given = get<nb::dict>(part, name);
    const size_t count = parts.count * parts.size;
    return make_norm(get<bool>(given, "rms"), get<float>(given, "eps"), floats(given, "weight", count),
                     floats(given, "bias", count), parts);
}

std::vector<Quantizer> head_quantizers(const nb::dict& part, const char* name, size_t heads, bool is_signed) {
    const auto given = get<nb::dict>(part, name);
    const float* scale = floats(given, "scale", heads);
    const float* offset = is_signed ? floats(given, "offset", heads) : nullptr;
    const int bits = get<int>(given, "bits");
    std::vector<Quantizer> quantizers;
    for (size_t head = 0; head < heads; ++head)
        quantizers.push_back(is_signed ? Quantizer(scale[head], offset[head], bits)
                                       : Quantizer::unsigned_codes(scale[head], bits));
    return quantizers;
}

Attention attention(const Plan& plan, const nb::dict& part) {
    const Parts heads = plan.heads_parts();
    Attention a;
    a.norm = norm(part, "norm", plan.width_parts());
    a.qkv = linear(plan.isa, get<nb::dict>(part, "qkv"), {3 * heads.count, heads.size}, plan.width_parts());
    a.proj = linear(plan.isa, get<nb::dict>(part, "proj"), plan.width_parts(), heads);
    for (auto [operand, norms] : {std::pair{"query", &a.query}, std::pair{"key", &a.key}}) {
        const auto given = get<nb::dict>(part, operand);
        if (has(given, "norm")) norms->push_back(norm(given, "norm", heads));
        if (has(given, "gamma")) {
            const size_t count = heads.count * heads.size;
            norms->push_back(make_rectifier(get<float>(given, "eps"), floats(given, "gamma", count),
                                            floats(given, "beta", count), heads));
        }
    }
    a.query_quantizer = head_quantizers(part, "query", heads.count, true);
    a.key_quantizer = head_quantizers(part, "key", heads.count, true);
    a.value_quantizer = head_quantizers(part, "value", heads.count, true);
    a.map_quantizer = head_quantizers(part, "attention", heads.count, false);
    a.inner = norm(part, "inner", {1, heads.count * heads.size});
    plan.finish(a);
    return a;
}

Activation activation(const std::string& name) {
    const std::pair<const char*, Activation> known[] = {{"gelu", Activation::gelu},
                                                        {"gelu_tanh", Activation::gelu_tanh},
                                                        {"quick_gelu", Activation::quick_gelu},
                                                        {"silu", Activation::silu},
                                                        {"relu", Activation::relu}};
    for (const auto& [its_name, value] : known)
        if (name == its_name) return value;
    throw std::invalid_argument("activation");
}

Mlp mlp(const Plan& plan, const nb::dict& part) {
    Mlp m;
    const Parts width = plan.width_parts(), hidden{1, get<size_t>(part, "hidden")};
    const auto kind = get<std::string>(part, "kind");
    m.kind = kind == "plain"        ? Mlp::Kind::plain
             : kind == "first_half" ? Mlp::Kind::first_half
             : kind == "last_half"  ? Mlp::Kind::second_half
                                    : Mlp::Kind::split;
    const bool both = m.kind == Mlp::Kind::first_half || m.kind == Mlp::Kind::second_half;
    m.norm = norm(part, "norm", width);
    m.up = linear(plan.isa, get<nb::dict>(part, "up"), {both ? size_t{2} : size_t{1}, hidden.size}, width);
    if (m.kind == Mlp::Kind::split) m.gate = linear(plan.isa, get<nb::dict>(part, "gate"), hidden, width);
    m.down = linear(plan.isa, get<nb::dict>(part, "down"), width, hidden);
    m.inner = norm(part, "inner", hidden);
    m.activation = activation(get<std::string>(part, "activation"));
    m.inputs = hidden.size;
    m.hidden = hidden.padded();
    return m;
}

void set_embedding(Plan& plan, const nb::dict& part) {
    const Shape& shape = plan.shape;
    const size_t inputs = shape.channels * shape.patch_height * shape.patch_width;
    const size_t patches = (shape.height / shape.patch_height) * (shape.width / shape.patch_width);
    plan.set_embedding(linear_spec(get<nb::dict>(part, "patch"), shape.embed_dim, inputs),
                       norm(part, "norm", plan.width_parts()),
                       shape.prefix == 0 ? nullptr : floats(part, "prefix", shape.prefix * shape.embed_dim),
                       has(part, "positions") ? floats(part, "positions", patches * shape.embed_dim) : nullptr,
                       norm(part, "pre_norm", plan.width_parts()));
}

void add_block(Plan& plan, const nb::dict& part) {
    Block block;
    block.post = get<bool>(part, "post");
    for (nb::handle each : get<nb::list>(part, "attentions"))
        block.attentions.push_back(attention(plan, nb::cast<nb::dict>(each)));
    for (nb::handle each : get<nb::list>(part, "mlps")) block.mlps.push_back(mlp(plan, nb::cast<nb::dict>(each)));
    plan.add_block(std::move(block));
}

void set_head(Plan& plan, const nb::dict& part) {
    std::vector<Linear> heads;
    for (nb::handle each : get<nb::list>(part, "heads"))
        heads.push_back(linear(plan.isa, nb::cast<nb::dict>(each), {1, plan.shape.classes}, plan.width_parts()));
    plan.set_head(norm(part, "norm", plan.width_parts()), norm(part, "pool_norm", plan.width_parts()),
                  std::move(heads));
}

// {(part, block, branch): codes (images, rows, width)} of at most Model::kImagesAtOnce images.
nb::dict trace(Model& model, Array<float, 4> images) {
    const size_t batch = images.shape(0);
    need(batch > 0 && batch <= Model::kImagesAtOnce, "images");
    Trace trace(batch);
    std::vector<float> logits(batch * model.plan().shape.classes);
    model.forward(images.data(), batch, logits.data(), &trace);
    nb::dict codes;
    for (const Trace::Codes& each : trace.all()) {
        const nb::bytes values(each.values.data(), each.values.size());
        codes[nb::make_tuple(each.name.part, each.name.block, each.name.branch)] =
            nb::make_tuple(values, nb::make_tuple(batch, each.rows, each.width));
    }
    return codes;
}

Shape shape_of(const nb::dict& part) {
    const auto pool = get<std::string>(part, "pool");
    return {get<size_t>(part, "channels"),
            get<size_t>(part, "height"),
            get<size_t>(part, "width"),
            get<size_t>(part, "patch_height"),
            get<size_t>(part, "patch_width"),
            get<size_t>(part, "embed_dim"),
            get<size_t>(part, "heads"),
            get<size_t>(part, "head_dim"),
            get<size_t>(part, "prefix"),
            get<size_t>(part, "skip"),
            get<size_t>(part, "classes"),
            get<float>(part, "attention_scale"),
            pool == "token" ? Shape::Pool::token
            : pool == "avg" ? Shape::Pool::average
            : pool == "max" ? Shape::Pool::largest
                            : Shape::Pool::both};
}

// Signed codes (N, K) packed for one product of one instruction set: what tests and benchmarks see of a kernel.
class Matrix {
  public:
    Matrix(const std::string& isa, const std::string& name, Array<int8_t, 2> codes)
        : n_(codes.shape(0)), k_(codes.shape(1)) {
        const Isa& set = isa_named(isa);
        for (size_t i = 0; i < set.product_count; ++i)
            if (name == set.products[i].name) product_ = &set.products[i];
        need(product_ != nullptr, "this instruction set has no such product");
        depth_ = round_up(k_, kChannels);
        channels_ = round_up(n_, product_->group);
        packed_ = Buffer<uint8_t>(product_->weight_bytes(channels_, depth_));
        std::vector<int8_t> row(depth_);
        for (size_t channel = 0; channel < n_; ++channel) {
            std::copy_n(codes.data() + channel * k_, k_, row.data());
            product_->pack_channel(packed_.data(), depth_, channel, row.data());
        }
    }

    // out (M, N) = a (M, K) times the transposed matrix; returns the seconds of the fastest of `repeats` runs.
    double multiply(Array<uint8_t, 2> a, nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> out,
                    int repeats) const {
        const size_t m = a.shape(0), tile = product_->tile;
        need(a.shape(1) == k_ && out.shape(0) == m && out.shape(1) == n_, "shapes do not fit");
        Buffer<uint8_t> rows(m * depth_), packed;
        for (size_t r = 0; r < m; ++r) std::copy_n(a.data() + r * k_, k_, rows.data() + r * depth_);
        const uint8_t* left = rows.data();
        size_t stride = depth_;
        if (product_->pack_rows != nullptr) {
            stride = product_->row_bytes(depth_);
            packed = Buffer<uint8_t>(m * stride);
            product_->pack_rows(rows.data(), depth_, m, depth_, packed.data(), stride);
            left = packed.data();
        }
        Buffer<int32_t> sums(m * channels_);
        double best = 1e30;
        for (int repeat = 0; repeat < repeats; ++repeat) {
            const auto start = std::chrono::steady_clock::now();
            for (size_t first = 0; first < channels_; first += tile)
                product_->run(left, stride, m, packed_.data(), channels_, depth_, first,
                              std::min(first + tile, channels_), sums.data() + first, channels_);
            const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
            best = std::min(best, taken.count());
        }
        for (size_t r = 0; r < m; ++r) std::copy_n(sums.data() + r * channels_, n_, out.data() + r * n_);
        return best;
    }

  private:
    size_t n_, k_, depth_ = 0, channels_ = 0;
    const Product* product_ = nullptr;
    Buffer<uint8_t> packed_;
};

}  // namespace

NB_MODULE(_kernels, m) {
    m.doc() = "qvit's kernels: a packed vision transformer on codes, in integer arithmetic.";
    m.def("instruction_sets", [] {
        size_t count;
        const Isa* const* isas = available_isas(&count);
        std::vector<std::string> names;
        for (size_t i = 0; i < count; ++i) names.emplace_back(isas[i]->name);
        return names;
    });
    m.def(
        "products",
        [](const std::string& isa) {
            const Isa& set = isa_named(isa);
            std::vector<std::pair<std::string, std::pair<int, int>>> products;
            for (size_t i = 0; i < set.product_count; ++i)
                products.push_back({set.products[i].name, {set.products[i].left_bits, set.products[i].right_bits}});
            return products;
        },
        "isa"_a);

    nb::class_<Matrix>(m, "Matrix")
        .def(nb::init<const std::string&, const std::string&, Array<int8_t, 2>>(), "isa"_a, "product"_a, "codes"_a)
        .def("multiply", &Matrix::multiply, "a"_a, "out"_a, "repeats"_a = 1);

    nb::class_<Model>(m, "Model")
        .def(
            "__init__",
            [](Model* self, const std::string& isa, const nb::dict& shape, size_t threads) {
                new (self) Model(isa_named(isa), shape_of(shape), threads);
            },
            "isa"_a, "shape"_a, "threads"_a)
        .def(
            "set_embedding", [](Model& model, const nb::dict& part) { set_embedding(model.plan(), part); }, "part"_a)
        .def(
            "add_block", [](Model& model, const nb::dict& part) { add_block(model.plan(), part); }, "part"_a)
        .def(
            "set_head", [](Model& model, const nb::dict& part) { set_head(model.plan(), part); }, "part"_a)
        .def(
            "forward",
            [](Model& model, Array<float, 4> images,
               nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> logits) {
                const Shape& shape = model.plan().shape;
                need(images.shape(1) == shape.channels && images.shape(2) == shape.height &&
                         images.shape(3) == shape.width && logits.shape(0) == images.shape(0) &&
                         logits.shape(1) == shape.classes,
                     "shapes do not fit");
                const nb::gil_scoped_release release;
                model.forward(images.data(), images.shape(0), logits.data());
            },
            "images"_a, "logits"_a)
        .def("trace", trace, "images"_a)
        .def("set_timed", &Model::set_timed, "timed"_a)
        .def("profile", &Model::profile);
}
