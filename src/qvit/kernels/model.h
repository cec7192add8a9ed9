// A vision transformer that runs on codes: the plan, the threads, and the pass over the plan's steps.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "pass.h"
#include "plan.h"
#include "thread_pool.h"

namespace qvit {

class Model {
  public:
    static constexpr size_t kImagesAtOnce = 8;

    Model(Plan plan, size_t threads) : plan_(std::move(plan)), pool_(threads) {}

    Plan& plan() { return plan_; }
    const Plan& plan() const { return plan_; }

    // outputs (batch, plan().outputs()) of images (batch, channels, height, width). Calls from several threads take
    // turns. A trace takes at most kImagesAtOnce images.
    void forward(const float* images, size_t batch, float* outputs, Trace* trace = nullptr);

    // Seconds of every kind of work since the last call, summed over threads; zeros unless timed.
    std::vector<std::pair<std::string, double>> profile();
    void set_timed(bool timed) { timed_ = timed; }

  private:
    void prepare(size_t batch);
    void run(size_t batch);
    void run_task(Pass& pass, Scratch& scratch, const Phase& phase, size_t image, size_t row, size_t count);

    Plan plan_;
    bool timed_ = false;
    ThreadPool pool_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
    std::unique_ptr<Pass> pass_;
};

}  // namespace qvit
