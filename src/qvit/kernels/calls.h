// The calls that run without Python's global lock, and their end before the interpreter's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "fork.h"

namespace qvit {

// A thread that asks for the global lock after the interpreter has gone is ended by Python in the middle of C++, and
// the process with it. So before the interpreter goes, calls come to their end, and later ones keep the lock.
class Calls {
  public:
    static Calls& all();

    // Whether the call may give the global lock away; then leave() follows, with the lock taken again.
    bool enter();
    void leave();
    // Let calls end early, wait for them, and let no more in. Without the global lock.
    void close();
    const std::atomic<bool>& closing() const { return closing_; }

  private:
    void forked();

    std::mutex mutex_;
    std::condition_variable left_;
    size_t running_ = 0;
    std::atomic<bool> closing_{false};
    OnFork on_fork_{[](void* self) { static_cast<Calls*>(self)->forked(); }, this};
};

}  // namespace qvit
