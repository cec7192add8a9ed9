// How far two processors are from each other: nanoseconds in which a line of memory that one has written comes to the
// other. Two threads, each held on a processor of its own, answer each other by a word; printed is the fastest of
// several runs, or nothing where there are no two processors to hold threads on. benchmarks/peaks.py compiles and runs
// it.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

constexpr int kRounds = 20000, kRuns = 7;

void hold(int processor) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    sched_setaffinity(0, sizeof one, &one);
}

double nanoseconds(int first, int second) {
    alignas(64) std::atomic<int> word{0};
    hold(second);  // the thread starts there
    std::thread other([&] {
        for (int round = 0; round < kRounds; ++round) {
            while (word.load(std::memory_order_acquire) != 2 * round + 1) {
            }
            word.store(2 * round + 2, std::memory_order_release);
        }
    });
    hold(first);
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round) {
        word.store(2 * round + 1, std::memory_order_release);
        while (word.load(std::memory_order_acquire) != 2 * round + 2) {
        }
    }
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    other.join();
    return taken.count() / (2 * kRounds);
}

}  // namespace

int main() {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return 0;
    std::vector<int> processors;
    for (int processor = 0; processor < CPU_SETSIZE; ++processor)
        if (CPU_ISSET(processor, &allowed)) processors.push_back(processor);
    double best = 1e30;
    for (int run = 0; run < kRuns; ++run) best = std::min(best, nanoseconds(processors[0], processors[1]));
    std::printf("%.0f\n", best);
}
