// Threads of WebAssembly: workers that JavaScript starts, each with an instance of the module on the same memory.
#pragma once

#include <cstddef>
#include <functional>

namespace qvit {

// As the pool of thread_pool.h. There are no exceptions here: what fails ends all of the module's instances.
class ThreadPool {
  public:
    explicit ThreadPool(size_t threads) : threads_(threads) {}
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    size_t threads() const { return threads_; }
    void run(const std::function<void(size_t)>& work);
    void barrier();

  private:
    size_t threads_;
};

}  // namespace qvit
