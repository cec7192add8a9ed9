// Threads that run one function together and meet at barriers inside it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace qvit {

// Workers sleep between calls, so that an idle engine takes nothing from NumPy's or PyTorch's threads. They linger a
// fraction of a millisecond first: a call that follows at once finds them awake and on processors of their own. Within
// a call they wait for one another by spinning for some microseconds and then giving way.
class ThreadPool {
  public:
    explicit ThreadPool(size_t threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    size_t threads() const { return threads_; }
    // Call work(thread) once on every thread, the caller's included, and return when all have. One call at a time.
    void run(const std::function<void(size_t)>& work);
    // Return when every thread of the present call has arrived.
    void barrier();

  private:
    void start();
    void serve(size_t thread, unsigned long seen);

    size_t threads_;
    std::vector<std::thread> workers_;
    long owner_ = 0;  // the process that started them: a fork has none
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(size_t)>* work_ = nullptr;
    std::atomic<unsigned long> call_{0};
    std::atomic<size_t> busy_{0};
    std::atomic<bool> stop_{false};
    std::atomic<size_t> arrived_{0};
    std::atomic<size_t> generation_{0};
};

}  // namespace qvit
