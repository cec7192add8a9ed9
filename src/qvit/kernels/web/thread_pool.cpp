#include "thread_pool.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "lock.h"
#include "raise.h"

namespace qvit {

namespace {

// Some fifty microseconds: threads that compute meet sooner, and those of an idle model sleep.
constexpr int kSpins = 50000;

std::atomic<bool> failed{false};

// A number that threads wait for another one to change.
class Word {
  public:
    uint32_t get() const { return value_; }
    void set(uint32_t value) {
        value_ = value;
        wake();
    }
    void count_down() {
        if (--value_ == 0) wake();
    }
    // Return what it is when it is no longer `seen`. Inlined into `run`, Node 20 comes to wait for a change of 0 there,
    // and hangs, unless it compiles without its dynamic tiers.
    [[gnu::noinline]] uint32_t other_than(uint32_t seen) {
        for (int round = 0; round < kSpins && value_ == seen; ++round) {
        }
        while (value_ == seen && !failed) __builtin_wasm_memory_atomic_wait32(address(), static_cast<int>(seen), -1);
        if (failed) fail("one of its threads has failed");
        return value_;
    }

  private:
    void wake() { __builtin_wasm_memory_atomic_notify(address(), ~0u); }
    int* address() { return reinterpret_cast<int*>(&value_); }

    std::atomic<uint32_t> value_{0};
};

// Of the one pool that a memory has.
const std::function<void(size_t)>* present_work = nullptr;
Word call, busy, generation;
std::atomic<size_t> arrived{0};

}  // namespace

void ThreadPool::run(const std::function<void(size_t)>& work) {
    present_work = &work;
    busy.set(static_cast<uint32_t>(threads_ - 1));
    call.set(call.get() + 1);
    work(0);
    for (uint32_t left = busy.get(); left != 0;) left = busy.other_than(left);
}

void ThreadPool::barrier() {
    const uint32_t seen = generation.get();
    if (++arrived == threads_) {
        arrived = 0;
        generation.set(seen + 1);
    } else {
        generation.other_than(seen);
    }
}

void ThreadPool::serve(size_t thread) {
    for (uint32_t seen = 0;;) {
        seen = call.other_than(seen);
        (*present_work)(thread);
        busy.count_down();
    }
}

// What others wait for, or will, gets another value than they have seen.
void ThreadPool::abandon() {
    failed = true;
    generation.set(generation.get() + 1);
    busy.set(~0u);
}

}  // namespace qvit

// The C library's allocator knows one thread: those of a call take turns.
static qvit::Mutex allocator;

void* operator new(size_t bytes) {
    void* memory;
    {
        const qvit::Held held(allocator);
        memory = std::malloc(bytes);
    }
    if (memory == nullptr) qvit::raise<std::bad_alloc>();
    return memory;
}

void operator delete(void* memory) noexcept {
    const qvit::Held held(allocator);
    std::free(memory);
}

void operator delete(void* memory, size_t) noexcept { operator delete(memory); }
