#include <algorithm>
#include <limits>
#include <vector>

#include "steps/steps.h"

namespace qvit {

void classify(const Plan& plan, Pass& pass, Scratch& s, size_t image) {
    const RowOps& ops = plan.isa.ops;
    Clock clock(pass.timed, s.seconds);
    const float* x = pass.residual.data() + image * plan.tokens * plan.width;
    float* pooled = s.first.data();
    if (plan.shape.pool == Shape::Pool::token) {
        // One row a head: class token, distillation token.
        std::copy_n(x, plan.classifiers.size() * plan.width, pooled);
        if (plan.final_norm.present)
            ops.normalize(pooled, plan.width, plan.classifiers.size(), plan.final_norm.part(), pooled, plan.width);
    } else {
        float* row = s.second.data();
        float* largest = s.normed.data();
        std::vector<double> total(plan.width, 0.0);
        std::fill_n(largest, plan.width, -std::numeric_limits<float>::infinity());
        for (size_t token = plan.shape.skip; token < plan.tokens; ++token) {
            std::copy_n(x + token * plan.width, plan.width, row);
            if (plan.final_norm.present) ops.normalize(row, plan.width, 1, plan.final_norm.part(), row, plan.width);
            for (size_t i = 0; i < plan.width; ++i) {
                total[i] += row[i];
                largest[i] = std::max(largest[i], row[i]);
            }
        }
        const double count = static_cast<double>(plan.tokens - plan.shape.skip);
        for (size_t i = 0; i < plan.width; ++i) {
            const float average = static_cast<float>(total[i] / count);
            pooled[i] = plan.shape.pool == Shape::Pool::average   ? average
                        : plan.shape.pool == Shape::Pool::largest ? largest[i]
                                                                  : 0.5f * (average + largest[i]);
        }
    }
    if (plan.pool_norm.present)
        ops.normalize(pooled, plan.width, plan.classifiers.size(), plan.pool_norm.part(), pooled, plan.width);
    float* logits = pass.logits + image * plan.shape.classes;
    std::fill_n(logits, plan.shape.classes, 0.0f);
    const float share = 1.0f / static_cast<float>(plan.classifiers.size());
    for (size_t head = 0; head < plan.classifiers.size(); ++head) {
        const Linear& layer = plan.classifiers[head];
        ops.quantize(pooled + head * plan.width, plan.width, 1, plan.width, layer.input.rounding(), s.codes.data(),
                     plan.width);
        if (pass.trace != nullptr)
            pass.trace->see({"head", 0, head}, image, 1, 0, 1, plan.shape.embed_dim, s.codes.data(), plan.width);
        each_tile(layer, operand(layer, s.codes.data(), plan.width, 1, s.packed.data()), 1, s.sums.data(), clock, kRest,
                  [&](size_t first, size_t last, size_t) {
                      for (size_t c = first; c < std::min(last, plan.shape.classes); ++c)
                          logits[c] +=
                              share * (static_cast<float>(s.sums[c - first]) * layer.scale[c] + layer.shift[c]);
                  });
    }
}

}  // namespace qvit
