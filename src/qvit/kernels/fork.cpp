#include "fork.h"

#include <pthread.h>

#include <mutex>
#include <new>

namespace qvit {

// All objects to tell, as a list without memory of its own. Its lock is held across a fork, so that the child finds the
// list whole; it is never held for longer than setting a pointer takes.
struct Forks {
    static void add(OnFork& one) {
        static const int refused = pthread_atfork([] { lock().lock(); }, [] { lock().unlock(); }, in_child);
        if (refused != 0) throw std::bad_alloc();
        const std::lock_guard<std::mutex> held(lock());
        one.after_ = first;
        if (first != nullptr) first->before_ = &one;
        first = &one;
    }
    static void remove(OnFork& one) {
        const std::lock_guard<std::mutex> held(lock());
        (one.before_ != nullptr ? one.before_->after_ : first) = one.after_;
        if (one.after_ != nullptr) one.after_->before_ = one.before_;
    }

  private:
    static void in_child() {
        for (OnFork* each = first; each != nullptr; each = each->after_) each->forked_(each->object_);
        lock().unlock();
    }
    static std::mutex& lock() {
        static std::mutex mutex;
        return mutex;
    }
    static inline OnFork* first = nullptr;
};

OnFork::OnFork(void (*forked)(void*), void* object) : forked_(forked), object_(object) { Forks::add(*this); }

OnFork::~OnFork() { Forks::remove(*this); }

}  // namespace qvit
