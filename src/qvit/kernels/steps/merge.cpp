#include <algorithm>

#include "steps/steps.h"

namespace qvit {

void normalize(const Plan& plan, Pass& pass, Scratch& s, const Task& task, const Norm& norm) {
    Clock clock(pass.timed, s.seconds);
    RowSpans(plan.isa.ops).normalize(task.x, task.count, norm.part(), task.x);
    clock.lap(kNorms);
}

void merge(const Plan& plan, Pass& pass, Scratch& s, const Task& task, const Merge& merge) {
    const RowSpans ops(plan.isa.ops);
    Clock clock(pass.timed, s.seconds);
    const Stage &from = plan.stages[merge.from], &to = plan.stages[task.stage];
    const size_t count = task.count, inputs = merge.layer.inputs;
    const Span<float> x = pass.stream(merge.from, task.image, 0, from.tokens);
    const Span<float> values = s.first.rows(count, inputs);
    const Span<uint8_t> codes = s.codes.rows(count, inputs);
    for (size_t r = 0; r < count; ++r) {
        const size_t token = task.row + r, corner = 2 * (token / to.columns) * from.columns + 2 * (token % to.columns);
        float* row = values.row(r, inputs);
        // timm's order: down before right.
        for (const size_t neighbour : {corner, corner + from.columns, corner + 1, corner + from.columns + 1})
            row = std::copy_n(x.row(neighbour, from.channels), from.channels, row);
        std::fill_n(row, inputs - 4 * from.channels, 0.0f);
    }
    clock.lap(kRest);
    if (merge.norm.present)
        ops.normalize_codes(values, count, merge.norm.part(), merge.layer.input.top, codes);
    else
        ops.quantize(values, count, inputs, merge.layer.input.rounding(), codes);
    clock.lap(kNorms);
    if (pass.trace != nullptr)
        pass.trace->see({merge.place.operation, 0, "layer"}, task.image, to.tokens, task.row, count, 4 * from.channels,
                        codes);
    each_tile(merge.layer, operand(*merge.layer.product, codes, count, inputs, s.packed), count, to.width, s.sums,
              clock, kEpilogues,
              [&](const Tile& tile) { ops.store_sums(tile, task.x.part(0, count, tile.first, tile.width)); });
}

}  // namespace qvit
