// Processors of their own for the threads of one call.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

namespace qvit {

// A scheduler may wake a thread on the processor of the one that woke it though others are idle (to let processors of a
// virtual machine sleep, for example), and leave both there for some milliseconds: longer than an image takes. A thread
// that finds itself so moves to another of the processors that it may use, if the call has not taken all. It may use
// the same as before afterwards: whoever sets affinities, or moves threads, keeps the last word.
class Spread {
  public:
    // The present thread is the first of a call.
    void begin();
    // The present thread is one more; it has moved if it had to. Not by several threads at a time.
    void join();

#if defined(__linux__)
  private:
    cpu_set_t taken_;
#endif
};

}  // namespace qvit
