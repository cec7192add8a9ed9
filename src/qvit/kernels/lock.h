// A lock that also exists where there is no std::mutex.
#pragma once

#include <mutex>
#if defined(__wasm__)
#include <atomic>
#endif

namespace qvit {

#if defined(__wasm__)
// Held for a few copies at a time, so those who want it spin.
class Mutex {
  public:
    void lock() {
        while (held_.exchange(true, std::memory_order_acquire)) {
        }
    }
    void unlock() { held_.store(false, std::memory_order_release); }

  private:
    std::atomic<bool> held_{false};
};
#else
using Mutex = std::mutex;
#endif
using Held = std::lock_guard<Mutex>;

}  // namespace qvit
