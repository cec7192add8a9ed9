// A vision transformer that runs on codes: the plan, the threads, and the pass over the plan's steps.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fork.h"
#include "lock.h"
#include "pass.h"
#include "plan.h"
#include "thread_pool.h"

namespace qvit {

// Thrown by a call that was told to stop.
struct Stopped : std::exception {};

class Model {
  public:
    static constexpr size_t kImagesAtOnce = 8;

    Model(Plan plan, size_t threads) : plan_(std::move(plan)), threads_(threads) {}

    Plan& plan() { return plan_; }
    const Plan& plan() const { return plan_; }

    // outputs (batch, plan().outputs()) of images (batch, channels, height, width). Calls from several threads take
    // turns. A trace takes at most kImagesAtOnce images. Between some images and the next a call looks whether it is
    // to stop, and then throws Stopped. After any exception the next call starts afresh.
    void forward(const float* images, size_t batch, float* outputs, Trace* trace = nullptr,
                 const std::atomic<bool>* stop = nullptr);

    // A phase as a call carries it out: its steps by name, whether its rows are in the order of windows, and first row
    // and number of rows of each task of one image.
    struct Scheduled {
        std::vector<std::string> steps;
        bool windows;
        std::vector<std::pair<size_t, size_t>> tasks;
    };
    std::vector<Scheduled> schedule(size_t batch) const;

    // Seconds of every kind of work since the last call, summed over threads; zeros unless timed.
    std::vector<std::pair<std::string, double>> profile();
    void set_timed(bool timed) { timed_ = timed; }

  private:
    // Threads, and the memory that they work in; made by the first call, as a whole.
    struct Workshop {
        Workshop(const Plan& plan, size_t threads);
        std::vector<std::unique_ptr<Scratch>> scratch;
        std::unique_ptr<Pass> pass;
        ThreadPool pool;
    };

    void prepare(size_t batch);
    void run(size_t batch);
    void run_task(Pass& pass, Scratch& scratch, const Phase& phase, size_t image, size_t row, size_t count);
    void forked();

    Plan plan_;
    size_t threads_;
    std::atomic<bool> timed_{false};
    Mutex turn_;
    std::unique_ptr<Workshop> workshop_;
    OnFork on_fork_{[](void* self) { static_cast<Model*>(self)->forked(); }, this};
};

}  // namespace qvit
