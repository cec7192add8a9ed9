// The pool of WebAssembly, which has the caller's thread alone.
#pragma once

#include <cstddef>
#include <functional>

namespace qvit {

// As the pool of thread_pool.h. There are no exceptions here: what fails ends the module's instance.
class ThreadPool {
  public:
    explicit ThreadPool(size_t) {}
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    size_t threads() const { return 1; }
    void run(const std::function<void(size_t)>& work) { work(0); }
    void barrier() {}
};

}  // namespace qvit
