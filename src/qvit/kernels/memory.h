// Memory aligned to a cache line and filled with zeros, and the parts of it that steps and kernels work on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "faults.h"
#include "raise.h"

namespace qvit {

// The sanitizer build checks what kernels are given: their parts of buffers, and codes. AddressSanitizer sees only the
// end of a buffer: what is written beyond a part of it, into a neighbour's, goes unseen.
#if defined(QVIT_CHECKED)
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

// A product of sizes. Where an address has 32 bits a large image may need more than can be counted.
template <class... Sizes>
size_t product_of(Sizes... sizes) {
    size_t product = 1;
    for (const size_t size : {static_cast<size_t>(sizes)...})
        if (__builtin_mul_overflow(product, size, &product)) raise<std::bad_alloc>();
    return product;
}

// A sum of sizes, likewise.
inline size_t sum_of(size_t first, size_t second) {
    if (__builtin_add_overflow(first, second, &first)) raise<std::bad_alloc>();
    return first;
}

inline void check(bool inside) {
    if (kChecked && !inside)
        raise<std::logic_error>("a kernel was given more than its part of a buffer, or codes that are too wide");
}

// Rows of values in a buffer, `stride` apart. Kernels take raw pointers and extents: a span gives the pointer for an
// extent, which must lie within it. Without checks a span is no more than a pointer and a stride.
template <class T>
class Span {
  public:
    Span(T* data, size_t rows, size_t width, size_t stride) : data_(data), stride_(stride) { keep(rows, width); }

    size_t stride() const { return stride_; }
    // The first `rows` rows of `width` values.
    T* get(size_t rows, size_t width) const {
        check(holds(0, rows, 0, width));
        return data_;
    }
    // The first `width` values of one row.
    T* row(size_t index, size_t width) const {
        check(holds(index, 1, 0, width));
        return data_ + index * stride_;
    }
    // Rows [row, row + rows) and columns [column, column + width) of it.
    Span part(size_t row, size_t rows, size_t column, size_t width) const {
        check(holds(row, rows, column, width));
        return {data_ + row * stride_ + column, rows, width, stride_};
    }

  private:
#if defined(QVIT_CHECKED)
    void keep(size_t rows, size_t width) {
        rows_ = rows;
        width_ = width;
    }
    bool holds(size_t row, size_t rows, size_t column, size_t width) const {
        return row + rows <= rows_ && column + width <= width_;
    }
    size_t rows_, width_;
#else
    void keep(size_t, size_t) {}
    static bool holds(size_t, size_t, size_t, size_t) { return true; }
#endif
    T* data_;
    size_t stride_;
};

constexpr size_t kCacheLine = 64, kPage = 4096;

template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t count, size_t alignment = kCacheLine) : size_(count) {
        if (count > (SIZE_MAX - 2 * alignment) / sizeof(T) || allocation_fault.strikes()) raise<std::bad_alloc>();
        // A whole vector may be read past the end.
        const size_t bytes = (count * sizeof(T) + kCacheLine + alignment - 1) / alignment * alignment;
        data_.reset(static_cast<T*>(std::aligned_alloc(alignment, bytes)));
        if (!data_) raise<std::bad_alloc>();
        std::memset(static_cast<void*>(data_.get()), 0, bytes);
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](size_t i) {
        check(i < size_);
        return data_.get()[i];
    }
    const T& operator[](size_t i) const {
        check(i < size_);
        return data_.get()[i];
    }
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }

    // The `count` values from `first` on.
    const T* from(size_t first, size_t count) const {
        check(first + count <= size_);
        return data_.get() + first;
    }
    // Some rows of `width` values, one after the other from `first` on.
    Span<T> rows(size_t count, size_t width, size_t first = 0) {
        check(first + count * width <= size_);
        return {data_.get() + first, count, width, width};
    }

  private:
    struct Free {
        void operator()(T* pointer) const { std::free(pointer); }
    };
    std::unique_ptr<T, Free> data_;
    size_t size_ = 0;
};

// What a thread writes while others work beside it lies in pages of its own. A processor fetches ahead of what is
// written, up to the page's end, and would take lines there from the thread that works in them.
template <class T>
class Workspace : public Buffer<T> {
  public:
    Workspace() = default;
    explicit Workspace(size_t count) : Buffer<T>(count, kPage) {}
};

}  // namespace qvit
