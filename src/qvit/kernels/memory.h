// Memory aligned to a cache line and filled with zeros.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace qvit {

template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t count) : size_(count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64 + 64;  // a whole vector may be read past the end
        data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
        if (!data_) throw std::bad_alloc();
        std::memset(static_cast<void*>(data_.get()), 0, bytes);
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](size_t i) { return data_.get()[i]; }
    const T& operator[](size_t i) const { return data_.get()[i]; }
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }

  private:
    struct Free {
        void operator()(T* pointer) const { std::free(pointer); }
    };
    std::unique_ptr<T, Free> data_;
    size_t size_ = 0;
};

}  // namespace qvit
