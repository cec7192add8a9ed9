#include <algorithm>

#include "steps/steps.h"

namespace qvit {

void embed(const Plan& plan, Pass& pass, Scratch& s, const Task& task) {
    const RowSpans ops(plan.isa.ops);
    Clock clock(pass.timed, s.seconds);
    const Embedding& embedding = plan.embedding;
    const Stage& stage = plan.stages[task.stage];
    const Span<float> x = task.x;
    const size_t end = task.row + task.count;
    const size_t prefix = std::min(end, std::max(task.row, stage.prefix)) - task.row;
    for (size_t r = 0; r < prefix; ++r)
        std::copy_n(embedding.prefix.from((task.row + r) * stage.width, stage.width), stage.width,
                    x.row(r, stage.width));

    if (const size_t count = task.count - prefix; count > 0) {
        const size_t first = task.row + prefix - stage.prefix;  // patch
        const size_t ph = embedding.patch_height, pw = embedding.patch_width;
        const float* image = pass.images + task.image * plan.channels * plan.height * plan.width;
        const size_t inputs = embedding.layer.inputs, pixels = plan.channels * ph * pw;
        const Span<float> values = s.first.rows(count, inputs);
        const Span<uint8_t> codes = s.codes.rows(count, inputs);
        for (size_t r = 0; r < count; ++r) {
            const size_t patch = first + r;
            float* to = values.row(r, pixels);
            for (size_t c = 0; c < plan.channels; ++c)
                for (size_t i = 0; i < ph; ++i) {
                    const size_t line = (c * plan.height + patch / stage.columns * ph + i) * plan.width;
                    to = std::copy_n(image + line + patch % stage.columns * pw, pw, to);
                }
        }
        clock.lap(kRest);
        ops.quantize(values, count, inputs, embedding.layer.input.rounding(), codes);
        clock.lap(kEpilogues);
        if (pass.trace != nullptr)
            pass.trace->see({embedding.place.operation, 0, "layer"}, task.image, stage.tokens - stage.prefix, first,
                            count, pixels, codes);
        const Span<float> patches = x.part(prefix, count, 0, stage.width);
        each_tile(embedding.layer, operand(*embedding.layer.product, codes, count, inputs, s.packed), count,
                  stage.width, s.sums, clock, kEpilogues,
                  [&](const Tile& tile) { ops.store_sums(tile, patches.part(0, count, tile.first, tile.width)); });
        if (embedding.norm.present) ops.normalize(patches, count, embedding.norm.part(), patches);
        if (!embedding.positions.empty()) {
            const float* positions = embedding.positions.from(first * stage.width, count * stage.width);
            float* values_of = patches.get(count, stage.width);
            for (size_t i = 0; i < count * stage.width; ++i) values_of[i] += positions[i];
        }
    }
    clock.lap(kRest);
}

}  // namespace qvit
