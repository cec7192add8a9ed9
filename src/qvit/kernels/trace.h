// The codes of every quantizer in one call, to compare with the reference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace qvit {

// The codes of every quantizer in one call, one byte each and unsigned: to compare with the reference.
class Trace {
  public:
    struct Name {
        const char* part;  // "patch", "qkv", "query", "key", "value", "attention", "proj", "up", "gate", "down", "head"
        size_t block, branch;
    };
    struct Codes {
        Name name;
        size_t rows, width;  // of one image
        std::vector<uint8_t> values;
    };

    explicit Trace(size_t images) : images_(images) {}
    // Take `count` rows of `width` codes as rows [row, row + count) of the `rows` that an image has.
    void see(const Name& name, size_t image, size_t rows, size_t row, size_t count, size_t width, const uint8_t* codes,
             size_t stride);
    const std::vector<Codes>& all() const { return all_; }

  private:
    size_t images_;
    std::mutex mutex_;
    std::vector<Codes> all_;
};

}  // namespace qvit
