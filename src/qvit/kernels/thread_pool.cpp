#include "thread_pool.h"

#include <unistd.h>

namespace qvit {

namespace {

constexpr int kSpins = 4000;
constexpr int kLinger = 8 * kSpins;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin until done() or for so many rounds.
template <class Done>
void spin(int rounds, Done done) {
    for (int round = 0; round < rounds && !done(); ++round) relax();
}

}  // namespace

ThreadPool::ThreadPool(size_t threads) : threads_(threads) {}

ThreadPool::~ThreadPool() {
    if (owner_ != getpid()) {
        for (auto& worker : workers_) worker.detach();
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::start() {
    for (auto& worker : workers_) worker.detach();  // of the parent process: they do not exist here
    workers_.clear();
    owner_ = getpid();
    for (size_t thread = 1; thread < threads_; ++thread)
        workers_.emplace_back([this, thread, seen = call_.load()] { serve(thread, seen); });
}

void ThreadPool::run(const std::function<void(size_t)>& work) {
    if (threads_ > 1) {
        if (owner_ != getpid()) start();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            busy_ = threads_ - 1;
            ++call_;
        }
        wake_.notify_all();
    }
    work(0);
    if (threads_ > 1) {
        spin(kSpins, [this] { return busy_ == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }
}

void ThreadPool::serve(size_t thread, unsigned long seen) {
    for (;;) {
        const std::function<void(size_t)>* work;
        spin(kLinger, [&] { return stop_ || call_ != seen; });
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || call_ != seen; });
            if (stop_) return;
            seen = call_;
            work = work_;
        }
        (*work)(thread);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--busy_ == 0) done_.notify_one();
    }
}

void ThreadPool::barrier() {
    if (threads_ == 1) return;
    const size_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
        if (spins < kSpins)
            relax();
        else
            std::this_thread::yield();
    }
}

}  // namespace qvit
