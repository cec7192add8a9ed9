// The thread pool and a model under faults: threads that meet, fail and do not start, allocations that fail, forks
// while other threads are inside a call. For ThreadSanitizer too. Ends with status 1 after naming what went wrong.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "faults.h"
#include "fork.h"
#include "model.h"

using namespace qvit;

// All allocations of this program can fail, those of the standard library for threads among them.
[[gnu::noinline]] void* operator new(size_t size) {
    void* memory = allocation_fault.strikes() ? nullptr : std::malloc(size == 0 ? 1 : size);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
    if (condition) return;
    ++failures;
    std::printf("failed: %s\n", what);
}

// Every thread adds to a cell of its own, and after a barrier reads its neighbour's.
void check_meetings(ThreadPool& pool, size_t calls) {
    const size_t threads = pool.threads();
    std::vector<size_t> cells(threads), seen(threads);
    for (size_t call = 0; call < calls; ++call) {
        pool.run([&](size_t thread) {
            for (size_t step = 1; step <= 3; ++step) {
                ++cells[thread];
                pool.barrier();
                seen[thread] += cells[(thread + 1) % threads];
                pool.barrier();
            }
        });
    }
    size_t sum = 0;
    for (size_t n = 1; n <= 3 * calls; ++n) sum += n;
    for (size_t thread = 0; thread < threads; ++thread) expect(seen[thread] == sum, "threads meet at barriers");
}

#if defined(__linux__)
// A thread that joins itself meets one on its processor.
void check_spread() {
    cpu_set_t allowed, after;
    sched_getaffinity(0, sizeof allowed, &allowed);
    const auto join = [&] {
        Spread spread;
        spread.begin();
        const int before = sched_getcpu();
        spread.join();
        return sched_getcpu() != before;
    };
    int moves = 0;  // the scheduler may undo one
    for (int n = 0; n < 20; ++n) {
        moves += join();
        sched_getaffinity(0, sizeof after, &after);
        expect(CPU_EQUAL(&allowed, &after), "a thread may use the same processors after a call");
    }
    expect(moves > 0 || CPU_COUNT(&allowed) == 1, "a thread leaves the processor of another one");

    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
    expect(!join(), "a thread that is tied to a processor stays there");
    sched_setaffinity(0, sizeof allowed, &allowed);
}
#endif

void check_exceptions(ThreadPool& pool) {
    for (size_t bad = 0; bad < pool.threads(); ++bad)
        for (int step = 0; step < 3; ++step) {
            bool caught = false;
            try {
                pool.run([&](size_t thread) {
                    for (int now = 0; now < 3; ++now) {
                        if (thread == bad && now == step) throw std::runtime_error("bad");
                        pool.barrier();
                    }
                });
            } catch (const std::runtime_error&) {
                caught = true;
            }
            expect(caught, "what a thread throws comes out of the call");
            check_meetings(pool, 2);
        }
}

void check_starts() {
    for (long number = 0; number < 3; ++number) {
        thread_fault.countdown = number;
        bool caught = false;
        try {
            ThreadPool pool(4);
        } catch (const ThreadError&) {
            caught = true;
        }
        expect(caught, "threads that do not start are an error");
    }
    ThreadPool pool(4);
    check_meetings(pool, 2);
}

// A layer of random codes; what it points to lives as long as it.
struct Layer {
    Layer(std::mt19937& random, size_t outputs, size_t inputs)
        : codes(outputs * inputs), scale(outputs, 0.02f), bias(outputs, 0.1f) {
        for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
        spec = {outputs, inputs, codes.data(), inputs, 8, scale.data(), bias.data(), Quantizer(0.05, 0.0, 8)};
    }
    std::vector<uint8_t> codes;
    std::vector<float> scale, bias;
    LinearSpec spec;
};

constexpr size_t kSize = 8, kPatch = 1, kWidth = 20, kHeads = 2, kHeadDim = 5, kClasses = 7, kImages = 3;

std::unique_ptr<Model> make_model(size_t threads) {
    size_t count;
    const Isa& isa = *available_isas(&count)[0];
    std::mt19937 random(1);
    Plan plan(isa, 1, kSize, kSize);
    plan.embed(kPatch, kPatch, Layer(random, kWidth, kPatch * kPatch).spec);
    const std::vector<float> ones(kWidth * kSize * kSize, 1.0f);
    plan.tokens(ones.data(), 1, ones.data());
    for (int block = 0; block < 2; ++block) {
        const Parts width = plan.stage().parts(), heads{kHeads, kHeadDim};
        std::vector<Attention> attentions(1);
        Attention& a = attentions[0];
        a.heads = heads;
        a.norm = make_norm(false, 1e-6f, ones.data(), ones.data(), width);
        a.qkv = Linear(isa, Layer(random, 3 * kHeads * kHeadDim, kWidth).spec, {3 * kHeads, kHeadDim}, width);
        a.proj = Linear(isa, Layer(random, kWidth, kHeads * kHeadDim).spec, width, heads);
        a.query.quantizers = a.key.quantizers = a.value_quantizer = {kHeads, Quantizer(0.1, 0.0, 4)};
        a.map_quantizer = {kHeads, Quantizer::unsigned_codes(0.05, 4)};
        a.factors.assign(kHeads, 0.5f);
        plan.residual(std::move(attentions), {}, false, {});
    }
    Pool pool;
    pool.kind = Pool::Kind::both;  // takes memory in the midst of a call
    plan.pool(std::move(pool));
    std::vector<Linear> classifiers;
    classifiers.emplace_back(isa, Layer(random, kClasses, kWidth).spec, Parts{1, kClasses}, plan.stage().parts());
    plan.classify(std::move(classifiers));
    return std::make_unique<Model>(std::move(plan), threads);
}

std::vector<float> call(Model& model) {
    std::vector<float> images(kImages * kSize * kSize), outputs(kImages * kClasses);
    for (size_t i = 0; i < images.size(); ++i) images[i] = static_cast<float>(i % 13) - 6.0f;
    model.forward(images.data(), kImages, outputs.data());
    return outputs;
}

void check_turns(const std::vector<float>& right) {
    const auto model = make_model(3);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller)
        callers.emplace_back([&] {
            for (int n = 0; n < 5; ++n) wrong += call(*model) != right;
        });
    for (auto& caller : callers) caller.join();
    expect(wrong == 0, "calls from several threads take turns");
}

void check_allocations(const std::vector<float>& right) {
    long number = 0;
    for (bool done = false; !done; ++number) {
        std::unique_ptr<Model> model;
        allocation_fault.countdown = number;
        try {
            model = make_model(2);
            call(*model);
            done = true;
        } catch (const std::bad_alloc&) {
        } catch (const ThreadError&) {
        }
        allocation_fault.countdown = -1;
        if (model == nullptr) model = make_model(2);
        expect(call(*model) == right, "a call after an allocation that failed");
    }
    std::printf("%ld allocations\n", number - 1);
}

// A child hears of a fork what is there then, in whatever order things were made and went, and may make more.
void check_who_hears_of_forks() {
    constexpr int kCount = 4;
    rlimit before{};
    getrlimit(RLIMIT_CPU, &before);
    const rlimit seconds{5, before.rlim_max};  // ends a child that goes through the list for ever
    setrlimit(RLIMIT_CPU, &seconds);
    std::array<int, kCount> order{0, 1, 2, 3};
    bool right = true;
    do {
        std::array<std::optional<OnFork>, kCount> hearers;
        std::array<int, kCount> heard{}, expected{1, 1, 1, 1};
        const auto hear = [](void* count) { ++*static_cast<int*>(count); };
        for (int i = 0; i < kCount; ++i) hearers[i].emplace(hear, &heard[i]);
        for (const int gone : order) {
            hearers[gone].reset();
            expected[gone] = 0;
            const pid_t child = fork();
            if (child == 0) {
                alarm(600);  // else it would wait for ever for a lock that nobody holds
                const OnFork another(hear, &heard[0]);
                _exit(heard == expected ? 0 : 1);
            }
            int status = 0;
            waitpid(child, &status, 0);
            right = right && WIFEXITED(status) && WEXITSTATUS(status) == 0;
        }
    } while (right && std::next_permutation(order.begin(), order.end()));
    expect(right, "a child hears of a fork what is there, and no other");
    setrlimit(RLIMIT_CPU, &before);
}

void check_forks(const std::vector<float>& right, size_t threads, int forks) {
    auto model = make_model(threads);
    std::atomic<bool> stop{false};
    std::thread caller([&] {
        while (!stop) call(*model);
    });
    for (int n = 0; n < forks; ++n) {
        const pid_t child = fork();
        if (child == 0) {
            bool good = true;
            for (int calls = 0; calls < 5; ++calls) good = good && call(*model) == right;
            model.reset();
            _exit(good ? 0 : 1);
        }
        int status = -1;
        expect(waitpid(child, &status, 0) == child && status == 0, "a child calls and destroys a model");
    }
    stop = true;
    caller.join();
    expect(call(*model) == right, "the parent goes on after forks");
}

}  // namespace

int main() {
    check_who_hears_of_forks();
    for (const size_t threads : {size_t{1}, size_t{2}, size_t{4}}) {
        ThreadPool pool(threads);
        check_meetings(pool, 50);
        check_exceptions(pool);
    }
    check_starts();
#if defined(__linux__)
    check_spread();
#endif
    const std::vector<float> right = call(*make_model(1));
    check_turns(right);
    check_allocations(right);
    check_forks(right, 1, 10);
#if !defined(__SANITIZE_THREAD__)  // it takes a child's new threads for the parent's
    check_forks(right, 2, 10);
#endif
    std::printf("%d failed\n", failures);
    return failures == 0 ? 0 : 1;
}
