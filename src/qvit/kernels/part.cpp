#include "part.h"

#include <cmath>

namespace qvit {

template <class T>
size_t Part::Array<T>::size() const {
    size_t size = 1;
    for (const size_t side : shape) size *= side;
    return size;
}

const Part* Part::find(const char* name) const {
    if (const auto* members = std::get_if<Members>(&value))
        for (const auto& member : *members)
            if (member.first == name) return &member.second;
    return nullptr;
}

bool Part::has(const char* name) const {
    const Part* found = find(name);
    return found != nullptr && !std::holds_alternative<std::monostate>(found->value);
}

const Part& Part::part(const char* name) const {
    const Part* found = find(name);
    need(found != nullptr, name);
    return *found;
}

template <class T>
const T& Part::get(const char* name) const {
    const T* found = std::get_if<T>(&part(name).value);
    need(found != nullptr, name);
    return *found;
}

const Part::Members& Part::list(const char* name) const { return get<Members>(name); }
double Part::number(const char* name) const { return get<double>(name); }
const std::string& Part::text(const char* name) const { return get<std::string>(name); }
const Part::Array<float>& Part::floats(const char* name) const { return get<Array<float>>(name); }
const Part::Array<uint8_t>& Part::codes(const char* name) const { return get<Array<uint8_t>>(name); }

size_t Part::whole(const char* name) const {
    constexpr double kMost = 1 << 16;  // as in the file
    const double given = number(name);
    need(given >= 0.0 && given <= kMost && given == std::floor(given), name);
    return static_cast<size_t>(given);
}

const float* Part::floats(const char* name, size_t count) const {
    const Array<float>& array = floats(name);
    need(array.size() == count, name);
    return array.data;
}

template struct Part::Array<float>;
template struct Part::Array<uint8_t>;

}  // namespace qvit
