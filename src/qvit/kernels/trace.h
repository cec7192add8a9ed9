// The codes of every quantizer in one call, to compare with the reference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lock.h"
#include "memory.h"

namespace qvit {

// The codes of every quantizer in one call, one byte each and unsigned.
class Trace {
  public:
    struct Name {
        size_t operation, branch;  // of the program
        const char* part;  // "layer", "qkv", "query", "key", "value", "map", "proj", "fc1", "gate", "fc2", "head"
    };
    struct Codes {
        Name name;
        size_t rows, width;  // of one image
        std::vector<uint8_t> values;
    };

    explicit Trace(size_t images) : images_(images) {}
    // Take `count` rows of `width` codes as rows [row, row + count) of the `rows` that an image has.
    void see(const Name& name, size_t image, size_t rows, size_t row, size_t count, size_t width, Span<uint8_t> codes);
    const std::vector<Codes>& all() const { return all_; }

  private:
    size_t images_;
    Mutex mutex_;
    std::vector<Codes> all_;
};

}  // namespace qvit
