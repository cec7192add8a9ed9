// An operation of a program as it is handed over (qvit.runtime.parts): a tree of plain values and arrays.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "raise.h"

namespace qvit {

inline void need(bool condition, const char* what) {
    if (!condition) raise<std::invalid_argument>(what);
}

// A value that has a name in an operation, or the operation itself. Arrays belong to whoever handed them over.
struct Part {
    template <class T>
    struct Array {
        const T* data;
        std::vector<size_t> shape;
        size_t size() const;
    };
    using Members = std::vector<std::pair<std::string, Part>>;  // of a list without names
    std::variant<std::monostate, double, std::string, Array<float>, Array<uint8_t>, Members> value;

    // Members by name; all but `has` refuse one that is absent or of another kind, naming it.
    bool has(const char* name) const;
    const Part& part(const char* name) const;
    const Members& list(const char* name) const;
    double number(const char* name) const;
    size_t whole(const char* name) const;
    const std::string& text(const char* name) const;
    const Array<float>& floats(const char* name) const;
    const float* floats(const char* name, size_t count) const;  // of an array that has so many
    const Array<uint8_t>& codes(const char* name) const;

  private:
    const Part* find(const char* name) const;
    template <class T>
    const T& get(const char* name) const;
};

}  // namespace qvit
