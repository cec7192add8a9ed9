#include <algorithm>

#include "steps/steps.h"

namespace qvit {

void feed_forward(const Plan& plan, Pass& pass, Scratch& s, const Rows& rows, size_t index) {
    const RowOps& ops = plan.isa.ops;
    Clock clock(pass.timed, s.seconds);
    const Block& block = plan.blocks[index];
    float* x = pass.residual.data() + (rows.image * plan.tokens + rows.begin) * plan.width;
    const size_t count = rows.count();
    // Branches that run side by side all start from x as it is now: their sum is kept until the last is done.
    const bool apart = block.post || block.mlps.size() > 1;
    float* sum = apart ? s.second.data() : x;
    if (apart) std::fill_n(sum, count * plan.width, 0.0f);
    for (size_t branch = 0; branch < block.mlps.size(); ++branch) {
        const Mlp& mlp = block.mlps[branch];
        const size_t hidden = mlp.hidden;
        const auto enter = [&](const Linear& layer) {
            const Rounding input = layer.input.rounding();
            if (block.post) {
                ops.quantize(x, plan.width, count, plan.width, input, s.codes.data(), plan.width);
            } else if (mlp.kind != Mlp::Kind::split) {
                ops.normalize_codes(x, plan.width, count, mlp.norm.part(), input.top, s.codes.data(), plan.width);
            } else {  // two layers with quantizers of their own
                ops.normalize(x, plan.width, count, mlp.norm.part(), s.normed.data(), plan.width);
                ops.quantize(s.normed.data(), plan.width, count, plan.width, input, s.codes.data(), plan.width);
            }
            clock.lap(kNorms);
            if (pass.trace != nullptr)
                pass.trace->see({&layer == &mlp.up ? "up" : "gate", index, branch}, rows.image, plan.tokens, rows.begin,
                                count, plan.shape.embed_dim, s.codes.data(), plan.width);
            return operand(layer, s.codes.data(), plan.width, count, s.packed.data());
        };
        const Quantize next = mlp.down.input.folded();
        if (mlp.kind == Mlp::Kind::plain && !mlp.inner.present) {
            each_tile(mlp.up, enter(mlp.up), count, s.sums.data(), clock, kActivation,
                      [&](size_t first, size_t last, size_t tile) {
                          const size_t end = std::min(last, hidden);
                          if (first >= end) return;
                          if (mlp.steps.count > 0)
                              ops.step_sums(s.sums.data(), tile, count, end - first, mlp.up.scale.data() + first,
                                            mlp.up.shift.data() + first, mlp.steps, s.hidden.data() + first, hidden);
                          else
                              ops.activate_sums(s.sums.data(), tile, count, end - first, mlp.up.scale.data() + first,
                                                mlp.up.shift.data() + first, mlp.activation, next,
                                                s.hidden.data() + first, hidden);
                      });
        } else {
            // Floats first: up and gate side by side, or up alone; then what enters the second layer.
            const size_t stride = mlp.kind == Mlp::Kind::plain ? hidden : 2 * hidden;
            // A layer's outputs are padded to its product's group: what is beyond its own part belongs to the other.
            const size_t part = mlp.kind == Mlp::Kind::split ? hidden : stride;
            const auto store = [&](const Linear& layer, size_t offset) {
                each_tile(layer, enter(layer), count, s.sums.data(), clock, kEpilogues,
                          [&](size_t first, size_t last, size_t tile) {
                              const size_t end = std::min(last, part);
                              if (first < end)
                                  ops.store_sums(s.sums.data(), tile, count, end - first, layer.scale.data() + first,
                                                 layer.shift.data() + first, s.first.data() + offset + first, stride);
                          });
            };
            if (mlp.kind == Mlp::Kind::split) store(mlp.gate, hidden);
            store(mlp.up, 0);
            for (size_t r = 0; r < count; ++r) {
                float* from = s.first.data() + r * stride;
                float* to = s.first.data() + r * hidden;
                float* gate = mlp.kind == Mlp::Kind::plain || mlp.kind == Mlp::Kind::first_half ? from : from + hidden;
                ops.activate(gate, hidden, mlp.activation);
                if (mlp.kind == Mlp::Kind::plain) continue;
                for (size_t i = 0; i < hidden; ++i) to[i] = from[i] * from[i + hidden];
            }
            clock.lap(kActivation);
            if (mlp.inner.present)
                ops.normalize_codes(s.first.data(), hidden, count, mlp.inner.part(), next.top, s.hidden.data(), hidden);
            else
                ops.quantize(s.first.data(), hidden, count, hidden, mlp.down.input.rounding(), s.hidden.data(), hidden);
            clock.lap(kNorms);
        }
        if (pass.trace != nullptr)
            pass.trace->see({"down", index, branch}, rows.image, plan.tokens, rows.begin, count, mlp.inputs,
                            s.hidden.data(), hidden);
        each_tile(mlp.down, operand(mlp.down, s.hidden.data(), hidden, count, s.packed.data()), count, s.sums.data(),
                  clock, kEpilogues, [&](size_t first, size_t last, size_t tile) {
                      const size_t end = std::min(last, plan.width);
                      if (first < end)
                          ops.add_sums(s.sums.data(), tile, count, end - first, mlp.down.scale.data() + first,
                                       mlp.down.shift.data() + first, sum + first, plan.width);
                  });
        if (block.post) ops.normalize(sum, plan.width, count, mlp.norm.part(), sum, plan.width);
    }
    if (apart)
        for (size_t i = 0; i < count * plan.width; ++i) x[i] += sum[i];
    clock.lap(kRest);
}

}  // namespace qvit
