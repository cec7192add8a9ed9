#include "trace.h"

#include <algorithm>
#include <cstring>

namespace qvit {

void Trace::see(const Name& name, size_t image, size_t rows, size_t row, size_t count, size_t width,
                Span<uint8_t> codes) {
    check(image < images_ && row + count <= rows);
    const Held held(mutex_);
    const auto same = [&](const Codes& other) {
        return std::strcmp(other.name.part, name.part) == 0 && other.name.operation == name.operation &&
               other.name.branch == name.branch;
    };
    auto found = std::find_if(all_.begin(), all_.end(), same);
    if (found == all_.end()) {
        all_.push_back({name, rows, width, std::vector<uint8_t>(images_ * rows * width)});
        found = all_.end() - 1;
    }
    for (size_t r = 0; r < count; ++r)
        std::copy_n(codes.row(r, width), width, found->values.data() + ((image * rows + row + r) * width));
}

}  // namespace qvit
