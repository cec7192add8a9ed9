#include <algorithm>

#include "steps/steps.h"

namespace qvit {

void feed_forward(const Plan& plan, Pass& pass, Scratch& s, const Task& task, const Mlps& mlps) {
    const RowSpans ops(plan.isa.ops);
    Clock clock(pass.timed, s.seconds);
    const Stage& stage = plan.stages[task.stage];
    const size_t count = task.count, width = stage.width;
    const Span<float> x = task.x;
    const Span<uint8_t> codes = s.codes.rows(count, width);
    // Branches that run side by side all start from x as it is now: their sum is kept until the last is done.
    const bool apart = mlps.post || mlps.branches.size() > 1;
    const Span<float> sum = apart ? s.second.rows(count, width) : x;
    if (apart) std::fill_n(sum.get(count, width), count * width, 0.0f);
    const auto see = [&](const char* part, const Mlp& mlp, size_t channels, Span<uint8_t> seen) {
        if (pass.trace == nullptr) return;
        for (size_t r = 0; r < count; ++r)
            pass.trace->see({mlp.place.operation, mlp.place.branch, part}, task.image, stage.tokens, task.token(r), 1,
                            channels, seen.part(r, 1, 0, channels));
    };
    for (const Mlp& mlp : mlps.branches) {
        const size_t hidden = mlp.hidden;
        const auto enter = [&](const Linear& layer) {
            const Rounding input = layer.input.rounding();
            if (mlps.post || !mlp.norm.present) {
                ops.quantize(x, count, width, input, codes);
            } else if (mlp.kind != Mlp::Kind::swiglu) {
                ops.normalize_codes(x, count, mlp.norm.part(), input.top, codes);
            } else {  // two layers with quantizers of their own
                const Span<float> normed = s.normed.rows(count, width);
                ops.normalize(x, count, mlp.norm.part(), normed);
                ops.quantize(normed, count, width, input, codes);
            }
            clock.lap(kNorms);
            see(&layer == &mlp.fc1 ? "fc1" : "gate", mlp, stage.channels, codes);
            return operand(*layer.product, codes, count, width, s.packed);
        };
        const Quantize next = mlp.fc2.input.folded();
        const Span<uint8_t> activated = s.hidden.rows(count, hidden);
        if (mlp.kind == Mlp::Kind::plain && !mlp.inner.present) {
            each_tile(mlp.fc1, enter(mlp.fc1), count, hidden, s.sums, clock, kActivation, [&](const Tile& tile) {
                const Span<uint8_t> to = activated.part(0, count, tile.first, tile.width);
                if (mlp.steps.count > 0)
                    ops.step_sums(tile, mlp.steps, to);
                else
                    ops.activate_sums(tile, mlp.activation, next, to);
            });
        } else {
            // Floats first: up and gate side by side, or up alone; then what enters the second layer.
            const size_t stride = mlp.kind == Mlp::Kind::plain ? hidden : 2 * hidden;
            const Span<float> both = s.first.rows(count, stride);
            const auto store = [&](const Linear& layer, size_t first, size_t channels) {
                const Span<float> part = both.part(0, count, first, channels);
                each_tile(layer, enter(layer), count, channels, s.sums, clock, kEpilogues,
                          [&](const Tile& tile) { ops.store_sums(tile, part.part(0, count, tile.first, tile.width)); });
            };
            if (mlp.kind == Mlp::Kind::swiglu) store(mlp.gate, hidden, hidden);
            store(mlp.fc1, 0, mlp.kind == Mlp::Kind::swiglu ? hidden : stride);
            const Span<float> product = s.first.rows(count, hidden);  // a row overwrites only rows that are used up
            for (size_t r = 0; r < count; ++r) {
                float* from = both.row(r, stride);
                float* to = product.row(r, hidden);
                float* gate = mlp.kind == Mlp::Kind::plain || mlp.kind == Mlp::Kind::glu ? from : from + hidden;
                plan.isa.ops.activate(gate, hidden, mlp.activation);
                if (mlp.kind == Mlp::Kind::plain) continue;
                for (size_t i = 0; i < hidden; ++i) to[i] = from[i] * from[i + hidden];
            }
            clock.lap(kActivation);
            if (mlp.inner.present)
                ops.normalize_codes(product, count, mlp.inner.part(), next.top, activated);
            else
                ops.quantize(product, count, hidden, mlp.fc2.input.rounding(), activated);
            clock.lap(kNorms);
        }
        see("fc2", mlp, mlp.inputs, activated);
        // In a post-norm block the norm is of this branch alone.
        const bool normed = mlps.post && mlp.norm.present;
        const Span<float> out = normed ? s.normed.rows(count, width) : sum;
        each_tile(mlp.fc2, operand(*mlp.fc2.product, activated, count, hidden, s.packed), count, width, s.sums, clock,
                  kEpilogues, [&](const Tile& tile) {
                      const Span<float> part = out.part(0, count, tile.first, tile.width);
                      normed ? ops.store_sums(tile, part) : ops.add_sums(tile, part);
                  });
        if (normed) {
            ops.normalize(out, count, mlp.norm.part(), out);
            float* to = sum.get(count, width);
            const float* from = out.get(count, width);
            for (size_t i = 0; i < count * width; ++i) to[i] += from[i];
        }
    }
    if (apart) {
        float* to = x.get(count, width);
        const float* from = sum.get(count, width);
        for (size_t i = 0; i < count * width; ++i) to[i] += from[i];
    }
    clock.lap(kRest);
}

}  // namespace qvit
