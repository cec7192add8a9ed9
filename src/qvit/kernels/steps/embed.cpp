#include <algorithm>

#include "steps/steps.h"

namespace qvit {

void embed(const Plan& plan, Pass& pass, Scratch& s, const Rows& rows) {
    const RowOps& ops = plan.isa.ops;
    Clock clock(pass.timed, s.seconds);
    float* x = pass.residual.data() + (rows.image * plan.tokens + rows.begin) * plan.width;
    const size_t prefix = std::min(rows.end, std::max(rows.begin, plan.shape.prefix)) - rows.begin;
    for (size_t r = 0; r < prefix; ++r)
        std::copy_n(plan.prefix.data() + (rows.begin + r) * plan.width, plan.width, x + r * plan.width);

    const size_t ph = plan.shape.patch_height, pw = plan.shape.patch_width, columns = plan.shape.width / pw;
    const float* image = pass.images + rows.image * plan.shape.channels * plan.shape.height * plan.shape.width;
    const size_t count = rows.count() - prefix, inputs = plan.patch.inputs;
    for (size_t r = 0; r < count; ++r) {
        const size_t patch = rows.begin + prefix + r - plan.shape.prefix;
        float* to = s.first.data() + r * inputs;
        for (size_t c = 0; c < plan.shape.channels; ++c)
            for (size_t i = 0; i < ph; ++i) {
                const size_t line = (c * plan.shape.height + patch / columns * ph + i) * plan.shape.width;
                to = std::copy_n(image + line + patch % columns * pw, pw, to);
            }
    }
    clock.lap(kRest);
    ops.quantize(s.first.data(), inputs, count, inputs, plan.patch.input.rounding(), s.codes.data(), inputs);
    clock.lap(kEpilogues);
    if (pass.trace != nullptr && count > 0)
        pass.trace->see({"patch", 0, 0}, rows.image, plan.patches, rows.begin + prefix - plan.shape.prefix, count,
                        plan.shape.channels * ph * pw, s.codes.data(), inputs);
    float* patches = x + prefix * plan.width;
    const float* positions = plan.positions.data() + (rows.begin + prefix - plan.shape.prefix) * plan.width;
    each_tile(plan.patch, operand(plan.patch, s.codes.data(), inputs, count, s.packed.data()), count, s.sums.data(),
              clock, kEpilogues, [&](size_t first, size_t last, size_t tile) {
                  const size_t end = std::min(last, plan.width);
                  if (first < end)
                      ops.store_sums(s.sums.data(), tile, count, end - first, plan.patch.scale.data() + first,
                                     plan.patch.shift.data() + first, patches + first, plan.width);
              });
    if (plan.patch_norm.present) ops.normalize(patches, plan.width, count, plan.patch_norm.part(), patches, plan.width);
    for (size_t i = 0; i < count * plan.width; ++i) patches[i] += positions[i];
    if (plan.pre_norm.present) ops.normalize(x, plan.width, rows.count(), plan.pre_norm.part(), x, plan.width);
    clock.lap(kRest);
}

}  // namespace qvit
