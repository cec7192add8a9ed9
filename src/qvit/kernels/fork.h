// What survives a fork: the child process has one thread, and whatever the others held stays held for ever.
#pragma once

namespace qvit {

#if defined(__wasm__)
// No process forks there.
struct OnFork {
    OnFork(void (*)(void* object), void*) {}
};
#else
// As the last member of an object with threads or locks: calls `forked(object)` in every child process before anything
// else runs there. That forgets the threads and makes the locks anew; the parent's other threads, which the child does
// not have, may have been anywhere in the object's functions.
class OnFork {
  public:
    OnFork(void (*forked)(void* object), void* object);
    ~OnFork();
    OnFork(const OnFork&) = delete;
    OnFork& operator=(const OnFork&) = delete;

  private:
    friend struct Forks;
    void (*forked_)(void*);
    void* object_;
    OnFork *before_ = nullptr, *after_ = nullptr;
};
#endif

}  // namespace qvit
