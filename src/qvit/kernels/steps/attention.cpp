#include <algorithm>
#include <cstring>
#include <utility>

#include "steps/steps.h"

namespace qvit {

void project(const Plan& plan, Pass& pass, Scratch& s, const Rows& rows, size_t index) {
    const RowOps& ops = plan.isa.ops;
    Clock clock(pass.timed, s.seconds);
    const Block& block = plan.blocks[index];
    Pass::Half& half = pass.halves[index % 2];
    const float* x = pass.residual.data() + (rows.image * plan.tokens + rows.begin) * plan.width;
    const Parts heads = plan.heads_parts();
    const size_t count = rows.count(), padded = heads.padded(), depth = pass.padded_tokens;
    for (size_t branch = 0; branch < block.attentions.size(); ++branch) {
        const Attention& a = block.attentions[branch];
        if (block.post)
            ops.quantize(x, plan.width, count, plan.width, a.qkv.input.rounding(), s.codes.data(), plan.width);
        else
            ops.normalize_codes(x, plan.width, count, a.norm.part(), a.qkv.input.top, s.codes.data(), plan.width);
        clock.lap(kNorms);
        if (pass.trace != nullptr)
            pass.trace->see({"qkv", index, branch}, rows.image, plan.tokens, rows.begin, count, plan.shape.embed_dim,
                            s.codes.data(), plan.width);

        const size_t stride = 3 * plan.head_width;
        const float tops[] = {a.query_quantizer[0].top, a.key_quantizer[0].top, a.value_quantizer[0].top};
        const size_t direct = a.query.empty() ? 0 : 2 * plan.head_width;  // channels from here on become codes at once
        each_tile(a.qkv, operand(a.qkv, s.codes.data(), plan.width, count, s.packed.data()), count, s.sums.data(),
                  clock, kEpilogues, [&](size_t first, size_t last, size_t tile) {
                      for (size_t at = first, end; at < std::min(last, stride); at = end) {
                          const size_t section = at / plan.head_width;
                          end = std::min({last, stride, (section + 1) * plan.head_width});
                          const int32_t* sums = s.sums.data() + at - first;
                          if (at < direct)
                              ops.store_sums(sums, tile, count, end - at, a.qkv.scale.data() + at,
                                             a.qkv.shift.data() + at, s.first.data() + at, stride);
                          else
                              ops.quantize_sums(sums, tile, count, end - at, a.code_scale.data() + at,
                                                a.code_shift.data() + at, tops[section], s.hidden.data() + at, stride);
                      }
                  });
        if (direct != 0)
            for (size_t section = 0; section < 2; ++section) {
                const std::vector<Norm>& norms = section == 0 ? a.query : a.key;
                for (size_t head = 0; head < heads.count; ++head) {
                    const size_t at = section * plan.head_width + head * padded;
                    float* from = s.first.data() + at;
                    for (size_t i = 0; i + 1 < norms.size(); ++i)
                        ops.normalize(from, stride, count, norms[i].part(head), from, stride);
                    ops.normalize_codes(from, stride, count, norms.back().part(head), tops[section],
                                        s.hidden.data() + at, stride);
                }
            }
        clock.lap(kNorms);

        const size_t which = (rows.image * plan.branches + branch);
        uint8_t* query = half.query.data() + which * pass.branch_bytes;
        uint8_t* key = half.key.data() + which * heads.count * pass.key_bytes;
        uint8_t* value = half.value.data() + which * pass.branch_bytes;
        const int key_low = 1 << (a.key_quantizer[0].bits - 1);
        for (size_t head = 0; head < heads.count; ++head) {
            const uint8_t* q = s.hidden.data() + head * padded;
            const uint8_t* k = q + plan.head_width;
            const uint8_t* v = k + plan.head_width;
            float* bias = half.bias.data() + (which * heads.count + head) * depth;
            if (pass.trace != nullptr)
                for (auto [part, codes] : {std::pair{"query", q}, std::pair{"key", k}, std::pair{"value", v}})
                    pass.trace->see({part, index, branch}, rows.image, heads.count * plan.tokens,
                                    head * plan.tokens + rows.begin, count, heads.size, codes, stride);
            for (size_t r = 0; r < count; ++r) {
                const size_t token = rows.begin + r, at = (head * depth + token) * padded;
                std::memcpy(query + at, q + r * stride, padded);
                std::memcpy(value + at, v + r * stride, padded);
                const uint8_t* from = k + r * stride;
                for (size_t i = 0; i < padded; ++i) s.key[i] = static_cast<int8_t>(from[i] - key_low);
                int total = 0;
                for (size_t i = 0; i < heads.size; ++i) total += s.key[i];
                a.scores->pack_channel(key + head * pass.key_bytes, padded, token, s.key.data());
                bias[token] = a.key_bias[head] * static_cast<float>(total);
            }
        }
        clock.lap(kRest);
    }
}

void attend(const Plan& plan, Pass& pass, Scratch& s, const Rows& rows, size_t index) {
    const RowOps& ops = plan.isa.ops;
    Clock clock(pass.timed, s.seconds);
    const Block& block = plan.blocks[index];
    const Pass::Half& half = pass.halves[index % 2];
    float* x = pass.residual.data() + (rows.image * plan.tokens + rows.begin) * plan.width;
    const Parts heads = plan.heads_parts();
    const size_t count = rows.count(), padded = heads.padded(), depth = pass.padded_tokens;
    for (size_t branch = 0; branch < block.attentions.size(); ++branch) {
        const Attention& a = block.attentions[branch];
        const size_t which = rows.image * plan.branches + branch;
        const float top = a.map_quantizer[0].top;
        const int value_low = 1 << (a.value_quantizer[0].bits - 1);
        for (size_t head = 0; head < heads.count; ++head) {
            const size_t base = which * pass.branch_bytes + head * padded * depth;
            const uint8_t* query = half.query.data() + base;
            const uint8_t* keys = half.key.data() + (which * heads.count + head) * pass.key_bytes;
            const size_t score_width = round_up(depth, a.scores->group), mix_width = round_up(padded, a.mix->group);
            pack_columns(*a.mix, half.value.data() + base, padded, depth, padded, value_low, s.values.data());
            clock.lap(kRest);
            const float* bias = half.bias.data() + (which * heads.count + head) * depth;
            for (size_t r = 0; r < count; r += kAttentionRows) {
                const size_t some = std::min(kAttentionRows, count - r);
                const Operand left =
                    operand(*a.scores, query + (rows.begin + r) * padded, padded, some, padded, s.packed.data());
                a.scores->run(left.rows, left.stride, some, keys, score_width, padded, 0, score_width, s.scores.data(),
                              score_width);
                clock.lap(kAttentionProducts);
                ops.softmax_codes(s.scores.data(), score_width, some, depth, a.logit_scale[head], bias,
                                  a.map_inverse[head], top, s.map.data(), depth, s.totals.data());
                clock.lap(kSoftmax);
                if (pass.trace != nullptr)
                    pass.trace->see({"attention", index, branch}, rows.image, heads.count * plan.tokens,
                                    head * plan.tokens + rows.begin + r, some, plan.tokens, s.map.data(), depth);
                const Operand map = operand(*a.mix, s.map.data(), depth, some, depth, s.packed.data());
                a.mix->run(map.rows, map.stride, some, s.values.data(), mix_width, depth, 0, mix_width, s.sums.data(),
                           mix_width);
                clock.lap(kAttentionProducts);
                if (!a.inner.present) {
                    double shift[kAttentionRows];
                    for (size_t i = 0; i < some; ++i) shift[i] = s.totals[i] * a.out_total[head] + a.out_shift;
                    ops.quantize_head(s.sums.data(), mix_width, some, padded, a.out_scale[head], shift,
                                      a.proj.input.top, s.codes.data() + r * plan.head_width + head * padded,
                                      plan.head_width);
                } else {
                    for (size_t i = 0; i < some; ++i)
                        for (size_t c = 0; c < heads.size; ++c)
                            s.first[(r + i) * plan.head_width + head * padded + c] = static_cast<float>(
                                s.sums[i * mix_width + c] * a.out_scale[head] + s.totals[i] * a.out_total[head]);
                }
                clock.lap(kEpilogues);
            }
        }
        if (a.inner.present) {
            // The norm runs over the heads' channels side by side, without their padding.
            const size_t packed_width = round_up(heads.count * heads.size, kChannels);
            for (size_t r = 0; r < count; ++r) {
                float* to = s.second.data() + r * packed_width;
                std::fill_n(to, packed_width, 0.0f);
                for (size_t head = 0; head < heads.count; ++head)
                    std::copy_n(s.first.data() + r * plan.head_width + head * padded, heads.size,
                                to + head * heads.size);
            }
            ops.normalize_codes(s.second.data(), packed_width, count, a.inner.part(), a.proj.input.top, s.hidden.data(),
                                packed_width);
            for (size_t r = 0; r < count; ++r)
                for (size_t head = 0; head < heads.count; ++head)
                    std::copy_n(s.hidden.data() + r * packed_width + head * heads.size, heads.size,
                                s.codes.data() + r * plan.head_width + head * padded);
            clock.lap(kNorms);
        }
        if (pass.trace != nullptr)
            for (size_t head = 0; head < heads.count; ++head)
                pass.trace->see({"proj", index, branch}, rows.image, heads.count * plan.tokens,
                                head * plan.tokens + rows.begin, count, heads.size, s.codes.data() + head * padded,
                                plan.head_width);
        float* to = block.post ? s.first.data() : x;
        each_tile(a.proj, operand(a.proj, s.codes.data(), plan.head_width, count, s.packed.data()), count,
                  s.sums.data(), clock, kEpilogues, [&](size_t first, size_t last, size_t tile) {
                      const size_t end = std::min(last, plan.width);
                      if (first >= end) return;
                      const auto store = block.post ? ops.store_sums : ops.add_sums;
                      store(s.sums.data(), tile, count, end - first, a.proj.scale.data() + first,
                            a.proj.shift.data() + first, to + first, plan.width);
                  });
        if (block.post) {
            ops.normalize(to, plan.width, count, a.norm.part(), to, plan.width);
            for (size_t i = 0; i < count * plan.width; ++i) x[i] += to[i];
            clock.lap(kNorms);
        }
    }
}

}  // namespace qvit
