#include <algorithm>
#include <limits>
#include <vector>

#include "steps/steps.h"

namespace qvit {

namespace {

// One vector of an image's tokens: their average, their maximum, or half the sum of both.
void pool_tokens(const Plan& plan, const Pool& pool, const Stage& stage, Span<float> x, Scratch& s,
                 Span<float> pooled) {
    const RowSpans ops(plan.isa.ops);
    const size_t width = stage.width;
    const Span<float> row = s.second.rows(1, width);
    const float* values = row.get(1, width);
    float* largest = s.normed.rows(1, width).get(1, width);
    std::vector<double> total(width, 0.0);
    std::fill_n(largest, width, -std::numeric_limits<float>::infinity());
    for (size_t token = pool.skip; token < stage.tokens; ++token) {
        std::copy_n(x.row(token, width), width, row.get(1, width));
        if (pool.before.present) ops.normalize(row, 1, pool.before.part(), row);
        for (size_t i = 0; i < width; ++i) {
            total[i] += values[i];
            largest[i] = std::max(largest[i], values[i]);
        }
    }
    const double count = static_cast<double>(stage.tokens - pool.skip);
    float* vector = pooled.get(1, width);
    for (size_t i = 0; i < width; ++i) {
        const float average = static_cast<float>(total[i] / count);
        vector[i] = pool.kind == Pool::Kind::average   ? average
                    : pool.kind == Pool::Kind::largest ? largest[i]
                                                       : 0.5f * (average + largest[i]);
    }
}

}  // namespace

void finish(const Plan& plan, Pass& pass, Scratch& s, size_t image) {
    const RowSpans ops(plan.isa.ops);
    Clock clock(pass.timed, s.seconds);
    const Pool& pool = plan.pooling;
    const Stage& stage = plan.stage();
    const size_t width = stage.width;
    const Span<float> x = pass.stream(plan.stages.size() - 1, image, 0, stage.tokens);
    const Span<float> vector = s.first.rows(1, width);
    float* outputs = pass.outputs + image * plan.outputs();
    // The mean of the classifiers, each with a vector of its own.
    const float weight = 1.0f / static_cast<float>(pool.tokens);
    if (!plan.classifiers.empty()) std::fill_n(outputs, plan.outputs(), 0.0f);
    for (size_t index = 0; index < pool.tokens; ++index) {
        if (pool.kind == Pool::Kind::token) {
            std::copy_n(x.row(index, width), width, vector.get(1, width));
            if (pool.before.present) ops.normalize(vector, 1, pool.before.part(), vector);
        } else {
            pool_tokens(plan, pool, stage, x, s, vector);
        }
        for (const Norm& norm : pool.after) ops.normalize(vector, 1, norm.part(), vector);
        if (plan.classifiers.empty()) {
            outputs = std::copy_n(vector.row(0, stage.channels), stage.channels, outputs);
            continue;
        }
        const Linear& layer = plan.classifiers[index];
        const Span<uint8_t> codes = s.codes.rows(1, width);
        ops.quantize(vector, 1, width, layer.input.rounding(), codes);
        if (pass.trace != nullptr)
            pass.trace->see({plan.classifier_place.operation, index, "head"}, image, 1, 0, 1, stage.channels, codes);
        each_tile(layer, operand(*layer.product, codes, 1, width, s.packed), 1, layer.channels, s.sums, clock, kRest,
                  [&](const Tile& tile) {
                      const int32_t* sums = tile.get();
                      for (size_t c = 0; c < tile.width; ++c)
                          outputs[tile.first + c] +=
                              weight * (static_cast<float>(sums[c]) * tile.scale[c] + tile.shift[c]);
                  });
    }
    clock.lap(kRest);
}

}  // namespace qvit
