#include "thread_pool.h"

#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

#include "faults.h"

namespace qvit {

namespace {

using Time = std::chrono::steady_clock;

// How long a thread waits for others on its processor before it gives it away, within a call and for the next one. A
// time, not rounds: relax() takes from 10 to 60 nanoseconds.
constexpr Time::duration kSpin = std::chrono::microseconds(50);

// Leads a thread out of a call in which another one has failed.
struct Abandoned {};

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin until done() or for kSpin; return what done() said last.
template <class Done>
bool spin(Done done) {
    constexpr int kRounds = 64;
    for (Time::time_point end{};;) {
        for (int round = 0; round < kRounds; ++round) {
            if (done()) return true;
            relax();
        }
        const Time::time_point now = Time::now();
        if (end == Time::time_point{}) end = now + kSpin;
        if (now >= end) return false;
    }
}

}  // namespace

ThreadPool::ThreadPool(size_t threads) : threads_(threads) {
    try {
        workers_.reserve(threads_ - 1);
        for (size_t thread = 1; thread < threads_; ++thread) {
            if (thread_fault.strikes()) throw std::system_error(EAGAIN, std::generic_category());
            workers_.emplace_back([this, thread] { serve(thread); });
        }
    } catch (const std::system_error& error) {
        stop();
        throw ThreadError(error.what());
    } catch (...) {
        stop();
        throw;
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(size_t)>& work) {
    if (threads_ == 1) return work(0);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        work_ = &work;
        error_ = nullptr;
        failed_ = false;
        arrived_ = 0;  // a call that failed may have left some
        busy_ = threads_ - 1;
        spread_.begin();
        ++call_;
    }
    wake_.notify_all();
    attempt(work, 0);
    spin([this] { return busy_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::attempt(const std::function<void(size_t)>& work, size_t thread) {
    try {
        work(thread);
    } catch (const Abandoned&) {
    } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        failed_ = true;
    }
}

void ThreadPool::serve(size_t thread) {
    for (unsigned long seen = 0;;) {
        const std::function<void(size_t)>* work;
        spin([&] { return stop_ || call_ != seen; });
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || call_ != seen; });
            if (stop_) return;
            seen = call_;
            work = work_;
            spread_.join();
        }
        attempt(*work, thread);
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
    const auto met = [this, generation] {
        if (failed_.load(std::memory_order_relaxed)) throw Abandoned();
        return generation_.load(std::memory_order_acquire) != generation;
    };
    if (spin(met)) return;
    while (!met()) std::this_thread::yield();
}

}  // namespace qvit
