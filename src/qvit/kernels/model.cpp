#include "model.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <utility>

#include "steps/steps.h"

namespace qvit {

namespace {

// The tasks of a phase: ranges of an image's rows, or whole windows of it.
struct Tasks {
    Tasks(const Plan& plan, size_t number, size_t batch, size_t threads, bool traced)
        : Tasks(plan, plan.phases[number], batch, threads) {
        // With the first tokens for the classifiers, nothing of the other rows is needed after the last attention.
        if (number + 1 == plan.phases.size() && plan.pooling.kind == Pool::Kind::token && !traced)
            needed = plan.pooling.tokens;
    }

    Tasks(const Plan& plan, const Phase& phase, size_t batch, size_t threads)
        : tokens(plan.stages[phase.stage].tokens),
          needed(tokens),
          windows(phase.windows == 0 ? nullptr : &plan.windows[phase.windows - 1]) {
        if (windows != nullptr) {
            parts = (windows->count + windows->at_once - 1) / windows->at_once;
            return;
        }
        units = (tokens + kRowUnit - 1) / kRowUnit;
        // As few tasks per image as fit the scratch memory and divide evenly among the threads.
        parts = (units * kRowUnit + kBlockRows - 1) / kBlockRows;
        while (batch * parts % threads != 0 && parts < units) ++parts;
    }

    // First row and number of rows of a part, in the phase's order of them.
    std::pair<size_t, size_t> rows(size_t part) const {
        if (windows != nullptr) {
            const size_t first = part * windows->at_once, last = std::min(first + windows->at_once, windows->count);
            return {first * windows->tokens, (last - first) * windows->tokens};
        }
        const size_t begin = units * part / parts * kRowUnit;
        const size_t end = std::min(tokens, units * (part + 1) / parts * kRowUnit);
        return {begin, std::min(end, std::max(needed, begin)) - begin};
    }

    size_t tokens, needed, units = 0, parts = 0;
    const Windows* windows;
};

void run_steps(const Plan& plan, Pass& pass, Scratch& scratch, const Task& task, const std::vector<Step>& steps) {
    for (const Step& step : steps) {
        switch (step.kind) {
            case Step::Kind::embed: embed(plan, pass, scratch, task); break;
            case Step::Kind::project: project(plan, pass, scratch, task, plan.attentions[step.index]); break;
            case Step::Kind::attend: attend(plan, pass, scratch, task, plan.attentions[step.index]); break;
            case Step::Kind::feed_forward: feed_forward(plan, pass, scratch, task, plan.mlps[step.index]); break;
            case Step::Kind::norm: normalize(plan, pass, scratch, task, plan.norms[step.index]); break;
            case Step::Kind::merge: merge(plan, pass, scratch, task, plan.merges[step.index]); break;
        }
    }
}

}  // namespace

Model::Workshop::Workshop(const Plan& plan, size_t threads)
    : scratch([&] {
          std::vector<std::unique_ptr<Scratch>> all;
          for (size_t thread = 0; thread < threads; ++thread) all.push_back(std::make_unique<Scratch>(plan));
          return all;
      }()),
      pool(threads) {}

void Model::prepare(size_t batch) {
    if (workshop_ == nullptr) workshop_ = std::make_unique<Workshop>(plan_, threads_);
    std::unique_ptr<Pass>& pass = workshop_->pass;
    if (pass == nullptr || pass->batch < batch) {
        pass.reset();  // first the old memory, then the new
        pass = std::make_unique<Pass>(batch, plan_);
    }
}

// Nothing of a workshop is of use: its threads do not exist here, its memory may be half written, and to join or free
// either would hang. What is left of it is memory shared with the parent.
void Model::forked() {
    new (&turn_) Mutex;
    static_cast<void>(workshop_.release());
}

void Model::forward(const float* images, size_t batch, float* outputs, Trace* trace, const std::atomic<bool>* stop) {
    const Held turn(turn_);
    if (batch == 0) return;
    const size_t at_once = std::max(kImagesAtOnce, threads_);
    prepare(std::min(batch, at_once));
    Pass& pass = *workshop_->pass;
    pass.trace = trace;
    pass.timed = timed_;
    const size_t pixels = plan_.channels * plan_.height * plan_.width;
    for (size_t done = 0; done < batch; done += at_once) {
        if (stop != nullptr && *stop) raise<Stopped>();
        pass.images = images + done * pixels;
        pass.outputs = outputs + done * plan_.outputs();
        run(std::min(at_once, batch - done));
    }
}

void Model::run(size_t batch) {
    ThreadPool& pool = workshop_->pool;
    Pass& pass = *workshop_->pass;
    const size_t threads = pool.threads();
    std::vector<std::atomic<size_t>> next(plan_.phases.size() * threads + 1);
    for (auto& counter : next) counter.store(0, std::memory_order_relaxed);

    pool.run([&](size_t thread) {
        Scratch& scratch = *workshop_->scratch[thread];
        for (size_t phase = 0; phase < plan_.phases.size(); ++phase) {
            const Tasks tasks(plan_, phase, batch, threads, pass.trace != nullptr);
            const size_t total = batch * tasks.parts;
            // A thread's share of the rows is the same in every phase, since what it wrote is in its own caches. When
            // it is done with that it helps the others.
            for (size_t i = 0; i < threads; ++i) {
                const size_t owner = (thread + i) % threads;
                const size_t first = owner * total / threads, last = (owner + 1) * total / threads;
                std::atomic<size_t>& taken = next[phase * threads + owner];
                for (size_t task; (task = first + taken.fetch_add(1)) < last;) {
                    const auto [row, count] = tasks.rows(task % tasks.parts);
                    if (count > 0) run_task(pass, scratch, plan_.phases[phase], task / tasks.parts, row, count);
                }
            }
            Clock clock(pass.timed, scratch.seconds);
            pool.barrier();
            clock.lap(kWaiting);
        }
        for (size_t image; (image = next.back().fetch_add(1)) < batch;) finish(plan_, pass, scratch, image);
    });
}

// Rows of windows lie apart in the stream: they are gathered for all of a phase's steps, and put back.
void Model::run_task(Pass& pass, Scratch& scratch, const Phase& phase, size_t image, size_t row, size_t count) {
    if (phase.windows == 0) {
        const Task task{image, row, count, phase.stage, pass.stream(phase.stage, image, row, count)};
        return run_steps(plan_, pass, scratch, task, phase.steps);
    }
    const Stage& stage = plan_.stages[phase.stage];
    const Span<float> all = pass.stream(phase.stage, image, 0, stage.tokens);
    const Windows& windows = plan_.windows[phase.windows - 1];
    check(row + count <= windows.order.size());
    const uint32_t* order = windows.order.data() + row;
    const Task task{image, row, count, phase.stage, scratch.stream.rows(count, stage.width), order};
    for (size_t r = 0; r < count; ++r)
        std::copy_n(all.row(order[r], stage.width), stage.width, task.x.row(r, stage.width));
    run_steps(plan_, pass, scratch, task, phase.steps);
    for (size_t r = 0; r < count; ++r)
        std::copy_n(task.x.row(r, stage.width), stage.width, all.row(order[r], stage.width));
}

std::vector<Model::Scheduled> Model::schedule(size_t batch) const {
    std::vector<Scheduled> schedule;
    for (size_t phase = 0; phase < plan_.phases.size(); ++phase) {
        Scheduled made{{}, plan_.phases[phase].windows != 0, {}};
        for (const Step& step : plan_.phases[phase].steps)
            made.steps.emplace_back(kStepNames[static_cast<size_t>(step.kind)]);
        const Tasks tasks(plan_, phase, batch, threads_, false);
        for (size_t part = 0; part < tasks.parts; ++part)
            if (const auto rows = tasks.rows(part); rows.second > 0) made.tasks.push_back(rows);
        schedule.push_back(std::move(made));
    }
    return schedule;
}

std::vector<std::pair<std::string, double>> Model::profile() {
    const Held turn(turn_);
    std::vector<std::pair<std::string, double>> profile;
    for (size_t work = 0; work < kWorks; ++work) {
        double seconds = 0.0;
        if (workshop_ != nullptr)
            for (auto& scratch : workshop_->scratch) seconds += std::exchange(scratch->seconds[work], 0.0);
        profile.emplace_back(kWorkNames[work], seconds);
    }
    return profile;
}

}  // namespace qvit
