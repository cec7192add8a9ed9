// The pool of WebAssembly.
#pragma once

#include <cstddef>
#include <functional>

namespace qvit {

#if defined(__wasm_atomics__)
// As the pool of thread_pool.h. Its other threads are workers of JavaScript (thread.js): each has an instance of the
// module on the memory of all, and is in `serve` until it is ended from outside. There are no exceptions here: what
// fails on one thread ends the call on all, and with it the model.
class ThreadPool {
  public:
    explicit ThreadPool(size_t threads) : threads_(threads) {}
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    size_t threads() const { return threads_; }
    void run(const std::function<void(size_t)>& work);
    void barrier();

    // What the thread of this number (1 to threads - 1) does all its life.
    [[noreturn]] static void serve(size_t thread);
    // Ends the present call on the threads that wait for one that failed.
    static void abandon();

  private:
    size_t threads_;
};
#else
// The caller's thread alone.
class ThreadPool {
  public:
    explicit ThreadPool(size_t) {}
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    size_t threads() const { return 1; }
    void run(const std::function<void(size_t)>& work) { work(0); }
    void barrier() {}
};
#endif

}  // namespace qvit
