// The module qvit._kernels: a model built operation by operation, and the products for tests and benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "calls.h"
#include "model.h"
#include "parts.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace qvit;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

template <class T>
Part::Array<T> array_of(const nb::handle& given) {
    const auto array = nb::cast<nb::ndarray<const T, nb::c_contig, nb::device::cpu>>(given, false);
    return {array.data(), {array.shape_ptr(), array.shape_ptr() + array.ndim()}};
}

// An operation as Python has it: dicts, lists, plain values and arrays, which stay Python's.
Part part_of(const nb::handle& given) {
    Part::Members members;
    if (nb::isinstance<nb::dict>(given)) {
        for (const auto& [name, each] : nb::borrow<nb::dict>(given))
            members.emplace_back(nb::cast<std::string>(name), part_of(each));
        return {std::move(members)};
    }
    if (nb::isinstance<nb::list>(given) || nb::isinstance<nb::tuple>(given)) {
        for (const nb::handle each : given) members.emplace_back(std::string(), part_of(each));
        return {std::move(members)};
    }
    if (given.is_none()) return {};
    if (nb::isinstance<nb::str>(given)) return {nb::cast<std::string>(given)};
    if (!nb::ndarray_check(given)) return {nb::cast<double>(given)};
    if (nb::cast<nb::ndarray<>>(given).dtype() == nb::dtype<uint8_t>()) return {array_of<uint8_t>(given)};
    return {array_of<float>(given)};
}

const Isa& isa_named(const std::string& name) {
    size_t count;
    const Isa* const* isas = available_isas(&count);
    for (size_t i = 0; i < count; ++i)
        if (name == isas[i]->name) return *isas[i];
    throw std::invalid_argument("this processor or build has no instruction set called " + name);
}

// Calls function(stop), without Python's global lock where that is allowed.
template <class Function>
void call(Function function) {
    if (!Calls::all().enter()) return function(nullptr);
    struct Leave {
        ~Leave() { Calls::all().leave(); }
    } const leave;
    const nb::gil_scoped_release release;  // ends before leave, which has the lock again
    function(&Calls::all().closing());
}

// {(operation, branch, part): codes (images, rows, width)} of at most Model::kImagesAtOnce images.
nb::dict trace(Model& model, Array<float, 4> images) {
    const size_t batch = images.shape(0);
    need(batch > 0 && batch <= Model::kImagesAtOnce, "images");
    Trace trace(batch);
    std::vector<float> outputs(batch * model.plan().outputs());
    call([&](const std::atomic<bool>* stop) { model.forward(images.data(), batch, outputs.data(), &trace, stop); });
    nb::dict codes;
    for (const Trace::Codes& each : trace.all()) {
        const nb::bytes values(each.values.data(), each.values.size());
        codes[nb::make_tuple(each.name.operation, each.name.branch, each.name.part)] =
            nb::make_tuple(values, nb::make_tuple(batch, each.rows, each.width));
    }
    return codes;
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
        constexpr int kLow = 128;
        std::vector<uint8_t> row(depth_, kLow);
        for (size_t channel = 0; channel < n_; ++channel) {
            for (size_t i = 0; i < k_; ++i) row[i] = static_cast<uint8_t>(codes.data()[channel * k_ + i] + kLow);
            product_->pack_channel(packed_.data(), depth_, channel, row.data(), kLow);
        }
    }

    // out (M, N) = a (M, K) times the transposed matrix; returns the seconds of the fastest of `repeats` runs.
    double multiply(Array<uint8_t, 2> a, nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> out,
                    int repeats) const {
        const size_t m = a.shape(0), tile = product_->tile;
        need(a.shape(1) == k_ && out.shape(0) == m && out.shape(1) == n_, "shapes do not fit");
        Buffer<uint8_t> rows(m * depth_), packed(m * product_->row_bytes(depth_));
        const Span<uint8_t> codes = rows.rows(m, depth_);
        for (size_t r = 0; r < m; ++r) std::copy_n(a.data() + r * k_, k_, codes.row(r, k_));
        const Span<uint8_t> left = operand(*product_, codes, m, depth_, packed);
        Buffer<int32_t> all(m * channels_);
        const Span<int32_t> sums = all.rows(m, channels_);
        double best = 1e30;
        for (int repeat = 0; repeat < repeats; ++repeat) {
            const auto start = std::chrono::steady_clock::now();
            for (size_t first = 0; first < channels_; first += tile) {
                const size_t last = std::min(first + tile, channels_);
                product_->run(left.get(m, 0), left.stride(), m, packed_.data(), channels_, depth_, first, last,
                              sums.part(0, m, first, last - first).get(m, last - first), channels_);
            }
            const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
            best = std::min(best, taken.count());
        }
        for (size_t r = 0; r < m; ++r) std::copy_n(sums.row(r, n_), n_, out.data() + r * n_);
        return best;
    }

  private:
    size_t n_, k_, depth_ = 0, channels_ = 0;
    const Product* product_ = nullptr;
    Buffer<uint8_t> packed_;
};

}  // namespace

NB_MODULE(_kernels, m) {
    // Made before there is a thread that could fork meanwhile: a child would wait for it for ever.
    Calls::all();
    size_t count;
    available_isas(&count);
    nb::set_leak_warnings(false);  // daemon threads may keep models to the end
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
    // Which product takes codes of these bits: weights', or with `moving` those of keys and values.
    m.def(
        "product",
        [](const std::string& isa, int left_bits, int right_bits, bool moving) {
            const Isa& set = isa_named(isa);
            const Product* products = moving ? set.moving : set.products;
            const size_t count = moving ? set.moving_count : set.product_count;
            return std::string(choose(products, count, left_bits, right_bits).name);
        },
        "isa"_a, "left_bits"_a, "right_bits"_a, "moving"_a);

    nb::exception<ThreadError>(m, "ThreadError", PyExc_RuntimeError);
    nb::register_exception_translator([](const std::exception_ptr& error, void*) {
        try {
            std::rethrow_exception(error);
        } catch (const Stopped&) {
            PyErr_SetNone(PyExc_SystemExit);  // ends a thread without a word
        }
    });
    const auto close = nb::cpp_function([] {
        const nb::gil_scoped_release release;
        Calls::all().close();
    });
    nb::module_::import_("atexit").attr("register")(close);
    // For tests: which allocation or start of a thread from now on fails.
    m.def(
        "fail",
        [](long allocation, long thread) {
            allocation_fault.countdown = allocation;
            thread_fault.countdown = thread;
        },
        "allocation"_a = -1, "thread"_a = -1);

    nb::class_<Matrix>(m, "Matrix")
        .def(nb::init<const std::string&, const std::string&, Array<int8_t, 2>>(), "isa"_a, "product"_a, "codes"_a)
        .def("multiply", &Matrix::multiply, "a"_a, "out"_a, "repeats"_a = 1);

    nb::class_<Model>(m, "Model")
        .def(
            "__init__",
            [](Model* self, const std::string& isa, size_t channels, size_t height, size_t width, size_t threads) {
                new (self) Model(Plan(isa_named(isa), channels, height, width), threads);
            },
            "isa"_a, "channels"_a, "height"_a, "width"_a, "threads"_a)
        .def(
            "add", [](Model& model, const nb::dict& part) { add_operation(model.plan(), part_of(part)); }, "part"_a)
        .def(
            "forward",
            [](Model& model, Array<float, 4> images,
               nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> outputs) {
                const Plan& plan = model.plan();
                need(images.shape(1) == plan.channels && images.shape(2) == plan.height &&
                         images.shape(3) == plan.width && outputs.shape(0) == images.shape(0) &&
                         outputs.shape(1) == plan.outputs(),
                     "shapes do not fit");
                call([&](const std::atomic<bool>* stop) {
                    model.forward(images.data(), images.shape(0), outputs.data(), nullptr, stop);
                });
            },
            "images"_a, "outputs"_a)
        .def("trace", trace, "images"_a)
        .def(
            "schedule",
            [](const Model& model, size_t batch) {
                nb::list schedule;
                for (const Model::Scheduled& phase : model.schedule(batch))
                    schedule.append(nb::make_tuple(phase.steps, phase.windows, phase.tasks));
                return schedule;
            },
            "batch"_a)
        .def("set_timed", &Model::set_timed, "timed"_a)
        .def("profile", &Model::profile);
}
