// The time of a pass by kinds of work.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace qvit {

// What the time of a pass goes to.
enum Work : size_t {
    kProducts,
    kAttentionProducts,
    kSoftmax,
    kNorms,
    kActivation,
    kEpilogues,
    kRest,
    kWaiting,
    kWorks
};
constexpr const char* kWorkNames[kWorks] = {"linear products",
                                            "attention products",
                                            "softmax",
                                            "norms and their quantization",
                                            "activation function",
                                            "bias, residual, quantization",
                                            "embedding, layout, head",
                                            "waiting for other threads"};

using Seconds = std::array<double, kWorks>;

// Adds the time since the last lap to a kind of work; does nothing unless timed.
class Clock {
  public:
    Clock(bool on, Seconds& seconds) : on_(on), seconds_(seconds) {
        if (on_) last_ = std::chrono::steady_clock::now();
    }
    void lap(Work work) {
        if (!on_) return;
        const auto now = std::chrono::steady_clock::now();
        seconds_[work] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

  private:
    bool on_;
    Seconds& seconds_;
    std::chrono::steady_clock::time_point last_;
};

}  // namespace qvit
