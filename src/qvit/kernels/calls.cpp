#include "calls.h"

#include <new>

namespace qvit {

Calls& Calls::all() {
    static Calls* const calls = new Calls;  // for ever: a daemon thread may use it while the process ends
    return *calls;
}

bool Calls::enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) return false;
    ++running_;
    return true;
}

void Calls::leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    // In a child that was forked within a call there are none; the call that goes on there was not counted.
    if (running_ > 0 && --running_ == 0) left_.notify_all();
}

void Calls::close() {
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    left_.wait(lock, [this] { return running_ == 0; });
}

void Calls::forked() {
    new (&mutex_) std::mutex;
    new (&left_) std::condition_variable;
    running_ = 0;
}

}  // namespace qvit
