// Faults on demand: tests let an allocation or the start of a thread fail, and see what state is left.
#pragma once

#include <atomic>

namespace qvit {

struct Fault {
    // How many more times all goes well before it fails once; negative for ever.
    std::atomic<long> countdown{-1};

    bool strikes() { return countdown.load(std::memory_order_relaxed) >= 0 && countdown.fetch_sub(1) == 0; }
};

inline Fault allocation_fault, thread_fault;

}  // namespace qvit
