// Threads that run one function together and meet at barriers inside it.
#pragma once

#if defined(__wasm__)
#include "web/thread_pool.h"
#else

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "spread.h"

namespace qvit {

// Not all threads could be started.
struct ThreadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Workers sleep between calls, so that an idle engine takes nothing from NumPy's or PyTorch's threads. They linger some
// microseconds first: a call that follows at once finds them awake. Within a call they wait for one another by spinning
// as long and then giving way.
class ThreadPool {
  public:
    // All of them are there afterwards, or none.
    explicit ThreadPool(size_t threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    size_t threads() const { return threads_; }
    // Call work(thread) once on every thread, the caller's included, and return when all have. One call at a time. What
    // one of them throws is thrown here, after the others have come to their next barrier or their end.
    void run(const std::function<void(size_t)>& work);
    // Return when every thread of the present call has arrived.
    void barrier();

  private:
    void attempt(const std::function<void(size_t)>& work, size_t thread);
    void serve(size_t thread);
    void stop();

    size_t threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Spread spread_;
    const std::function<void(size_t)>* work_ = nullptr;
    std::exception_ptr error_;
    std::atomic<unsigned long> call_{0};
    std::atomic<size_t> busy_{0};
    std::atomic<bool> stop_{false}, failed_{false};
    std::atomic<size_t> arrived_{0};
    std::atomic<size_t> generation_{0};
};

}  // namespace qvit

#endif
