#include "model.h"

#include <algorithm>
#include <atomic>

#include "steps/steps.h"

namespace qvit {

void Model::prepare(size_t batch) {
    if (scratch_.empty())
        for (size_t thread = 0; thread < pool_.threads(); ++thread)
            scratch_.push_back(std::make_unique<Scratch>(plan_.largest_row, plan_.head_width / plan_.shape.heads,
                                                         round_up(plan_.tokens, kChannels)));
    if (pass_ == nullptr || pass_->batch < batch) {
        pass_.reset();  // first the old memory, then the new
        pass_ = std::make_unique<Pass>(batch, plan_);
    }
}

void Model::forward(const float* images, size_t batch, float* logits, Trace* trace) {
    const std::lock_guard<std::mutex> turn(mutex_);
    if (batch == 0) return;
    const size_t at_once = std::max(kImagesAtOnce, pool_.threads());
    prepare(std::min(batch, at_once));
    pass_->trace = trace;
    pass_->timed = timed_;
    const size_t pixels = plan_.shape.channels * plan_.shape.height * plan_.shape.width;
    for (size_t done = 0; done < batch; done += at_once) {
        pass_->images = images + done * pixels;
        pass_->logits = logits + done * plan_.shape.classes;
        run(std::min(at_once, batch - done));
    }
}

// Rows go through a whole block at a time: the attention needs all keys and values of an image, everything else is a
// row's own. So there is one barrier a block, before its attention.
void Model::run(size_t batch) {
    Pass& pass = *pass_;
    const size_t threads = pool_.threads(), units = (plan_.tokens + kRowUnit - 1) / kRowUnit;
    // As few tasks an image as fit the scratch memory and share out evenly among the threads.
    size_t parts = (units * kRowUnit + kBlockRows - 1) / kBlockRows;
    while (batch * parts % threads != 0 && parts < units) ++parts;
    const auto rows_of = [&](size_t task) {
        const size_t part = task % parts;
        return Rows{task / parts, units * part / parts * kRowUnit,
                    std::min(plan_.tokens, units * (part + 1) / parts * kRowUnit)};
    };
    // With a token for the classifier, nothing of the other rows is needed after the last attention.
    const bool few = plan_.shape.pool == Shape::Pool::token && pass.trace == nullptr;
    const size_t depth = plan_.blocks.size();
    std::vector<std::atomic<size_t>> next(depth + 2);
    for (auto& counter : next) counter.store(0, std::memory_order_relaxed);

    pool_.run([&](size_t thread) {
        Scratch& scratch = *scratch_[thread];
        for (size_t phase = 0; phase <= depth; ++phase) {
            for (size_t task; (task = next[phase].fetch_add(1)) < batch * parts;) {
                Rows rows = rows_of(task);
                if (phase == depth && few) rows.end = std::min(rows.end, plan_.classifiers.size());
                if (rows.begin >= rows.end) continue;
                if (phase == 0) embed(plan_, pass, scratch, rows);
                if (phase > 0) attend(plan_, pass, scratch, rows, phase - 1);
                if (phase > 0) feed_forward(plan_, pass, scratch, rows, phase - 1);
                if (phase < depth) project(plan_, pass, scratch, rows, phase);
            }
            pool_.barrier();
        }
        for (size_t image; (image = next.back().fetch_add(1)) < batch;) classify(plan_, pass, scratch, image);
    });
}

std::vector<std::pair<std::string, double>> Model::profile() {
    const std::lock_guard<std::mutex> turn(mutex_);
    std::vector<std::pair<std::string, double>> profile;
    for (size_t work = 0; work < kWorks; ++work) {
        double seconds = 0.0;
        for (auto& scratch : scratch_) {
            seconds += scratch->seconds[work];
            scratch->seconds[work] = 0.0;
        }
        profile.emplace_back(kWorkNames[work], seconds);
    }
    return profile;
}

}  // namespace qvit
