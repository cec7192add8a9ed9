// What JavaScript calls: one model per instance of the module, built operation by operation.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "model.h"
#include "parts.h"

#define QVIT_EXPORT(name) extern "C" [[clang::export_name(#name)]]

// Throws an error in JavaScript; the instance is of no use after it.
extern "C" [[noreturn, clang::import_module("qvit"), clang::import_name("fail")]] void throw_error(const char* what);

namespace qvit {

void fail(const char* what) { throw_error(what); }

}  // namespace qvit

using namespace qvit;

namespace {

std::unique_ptr<Model> model;
std::unique_ptr<Trace> seen;
// The operation that is being handed over, from the outermost members in.
std::vector<std::pair<std::string, Part::Members>> open_parts;

void add(const char* name, Part part) {
    need(!open_parts.empty(), "an operation");
    open_parts.back().second.emplace_back(name, std::move(part));
}

template <class T>
void add_array(const char* name, const T* data, const size_t* shape, size_t dimensions) {
    add(name, {Part::Array<T>{data, {shape, shape + dimensions}}});
}

}  // namespace

QVIT_EXPORT(allocate) void* allocate(size_t bytes) {
    void* memory = std::aligned_alloc(64, round_up(bytes, 64));
    if (memory == nullptr) raise<std::bad_alloc>();
    return memory;
}

QVIT_EXPORT(release) void release(void* memory) { std::free(memory); }

// CRC-32, as zlib computes it.
QVIT_EXPORT(checksum) uint32_t checksum(const uint8_t* data, size_t size) {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> made{};
        for (uint32_t i = 0; i < 256; ++i) {
            made[i] = i;
            for (int bit = 0; bit < 8; ++bit) made[i] = made[i] >> 1 ^ (made[i] & 1 ? 0xedb88320u : 0u);
        }
        return made;
    }();
    uint32_t sum = ~0u;
    for (size_t i = 0; i < size; ++i) sum = sum >> 8 ^ table[(sum ^ data[i]) & 0xff];
    return ~sum;
}

// A model without operations; `slow` for plain C++ instead of vectors.
QVIT_EXPORT(create) void create(size_t channels, size_t height, size_t width, size_t threads, bool slow) {
    size_t count;
    const Isa* const* isas = available_isas(&count);
    model = std::make_unique<Model>(Plan(*isas[slow ? count - 1 : 0], channels, height, width), threads);
}

QVIT_EXPORT(open_part) void open_part(const char* name) { open_parts.push_back({name, {}}); }
QVIT_EXPORT(add_number) void add_number(const char* name, double value) { add(name, {value}); }
QVIT_EXPORT(add_text) void add_text(const char* name, const char* text) { add(name, {std::string(text)}); }
QVIT_EXPORT(add_floats) void add_floats(const char* name, const float* data, const size_t* shape, size_t dimensions) {
    add_array(name, data, shape, dimensions);
}
QVIT_EXPORT(add_codes) void add_codes(const char* name, const uint8_t* data, const size_t* shape, size_t dimensions) {
    add_array(name, data, shape, dimensions);
}

// The end of what open_part began: of a member, or of an operation, which the model takes.
QVIT_EXPORT(close_part) void close_part() {
    need(model != nullptr && !open_parts.empty(), "an operation");
    auto [name, members] = std::move(open_parts.back());
    open_parts.pop_back();
    Part part{std::move(members)};
    open_parts.empty() ? add_operation(model->plan(), part) : add(name.c_str(), std::move(part));
}

QVIT_EXPORT(outputs) size_t outputs() {
    need(!model->plan().stages.empty(), "it has no operations");
    return model->plan().outputs();
}

QVIT_EXPORT(forward) void forward(const float* images, size_t batch, float* outputs) {
    model->forward(images, batch, outputs);
}

// As forward, and keeps the codes of every quantizer; returns of how many.
QVIT_EXPORT(trace) size_t trace(const float* images, size_t batch, float* outputs) {
    seen = std::make_unique<Trace>(batch);
    model->forward(images, batch, outputs, seen.get());
    return seen->all().size();
}

// Codes that were kept; what they are of into `about`: operation, branch, part, rows and width.
QVIT_EXPORT(traced) const uint8_t* traced(size_t index, size_t about[5]) {
    const Trace::Codes& codes = seen->all().at(index);
    const size_t part = reinterpret_cast<size_t>(codes.name.part);
    const size_t values[] = {codes.name.operation, codes.name.branch, part, codes.rows, codes.width};
    std::copy(std::begin(values), std::end(values), about);
    return codes.values.data();
}

#if defined(__wasm_atomics__)
// What an instance of another thread does, and after an error of its own.
QVIT_EXPORT(serve) void serve(size_t thread) { ThreadPool::serve(thread); }
QVIT_EXPORT(abandon) void abandon() { ThreadPool::abandon(); }
#endif
