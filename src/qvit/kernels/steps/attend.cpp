#include <algorithm>
#include <utility>

#include "steps/groups.h"
#include "steps/steps.h"

namespace qvit {

namespace {

constexpr float kMasked = -100.0f * 1.44269504088896f;  // between parts of a window that are no neighbours, as in timm

// A row of the logits' bias for one query: of the keys, of their positions, and of windows that were shifted.
void bias_row(const Attention& a, size_t head, size_t token, const float* keys, const uint8_t* regions, float* out) {
    std::copy_n(keys, a.padded_group, out);
    if (a.has_positions()) {
        const size_t height = a.bias_height, width = a.bias_width, line = 2 * width - 1;
        const size_t offsets = (2 * height - 1) * line;
        const float* table = a.bias.from(head * (offsets + 3), offsets + 3);
        const float* prefix = table + offsets;  // from a prefix token, to one, between them
        const bool from_prefix = token < a.bias_prefix;
        for (size_t i = 0; i < a.bias_prefix; ++i) out[i] += from_prefix ? prefix[2] : prefix[1];
        float* patches = out + a.bias_prefix;
        if (from_prefix) {
            for (size_t i = 0; i < height * width; ++i) patches[i] += prefix[0];
        } else {
            const size_t row = (token - a.bias_prefix) / width, column = (token - a.bias_prefix) % width;
            for (size_t k = 0; k < height; ++k) {
                const float* from = table + (k + height - 1 - row) * line + width - 1 - column;
                for (size_t l = 0; l < width; ++l) patches[k * width + l] += from[l];
            }
        }
    }
    if (regions != nullptr)
        for (size_t i = 0; i < a.group; ++i) out[i] += regions[i] == regions[token] ? 0.0f : kMasked;
}

// The regions of a window's tokens, if they are not all neighbours.
const uint8_t* regions_of(const Windows* windows, size_t window) {
    if (windows == nullptr || windows->regions.empty()) return nullptr;
    check((window + 1) * windows->tokens <= windows->regions.size());
    const uint8_t* first = windows->regions.data() + window * windows->tokens;
    return std::all_of(first, first + windows->tokens, [&](uint8_t region) { return region == *first; }) ? nullptr
                                                                                                         : first;
}

// What one head gives for a segment's queries: codes for the projection, or values where a norm comes first.
void attend_head(const Plan& plan, Pass& pass, Scratch& s, Clock& clock, const Task& task, const Attention& a,
                 const Segment& segment, const uint8_t* regions, size_t head, KeyValues::Head memory,
                 Span<uint8_t> codes, Span<float> values) {
    const RowSpans ops(plan.isa.ops);
    const size_t padded = a.heads.padded(), depth = a.padded_group;
    const float top = a.map_quantizer[0].top;
    const int value_low = 1 << (a.value_quantizer[0].bits - 1);
    const size_t score_width = round_up(depth, a.query_key->group), out_width = round_up(padded, a.map_value->group);
    const bool biased = a.has_positions() || regions != nullptr;
    const uint8_t* keys = memory.key.get(1, kChecked ? a.query_key->weight_bytes(score_width, padded) : 0);
    const float* key_bias = memory.bias.get(1, depth);
    pack_columns(*a.map_value, memory.value, depth, padded, value_low, s.values);
    clock.lap(kRest);
    for (size_t r = 0; r < segment.count; r += kAttentionRows) {
        const size_t some = std::min(kAttentionRows, segment.count - r);
        const Span<int32_t> scores = s.scores.rows(some, score_width);
        const Span<int32_t> sums = s.sums.rows(some, out_width);
        const Span<uint8_t> map = s.map.rows(some, depth);
        const float* totals = s.totals.from(0, some);
        const Span<uint8_t> query =
            operand(*a.query_key, memory.query.part(segment.token + r, some, 0, padded), some, padded, s.packed);
        a.query_key->run(query.get(some, 0), query.stride(), some, keys, score_width, padded, 0, score_width,
                         scores.get(some, score_width), score_width);
        clock.lap(kAttentionProducts);
        Span<float> bias = memory.bias;
        if (biased) {
            bias = s.shifts.rows(some, depth);
            for (size_t i = 0; i < some; ++i)
                bias_row(a, head, segment.token + r + i, key_bias, regions, bias.row(i, depth));
        }
        ops.softmax_codes(scores, some, depth, a.logit_scale[head], bias, biased, a.map_inverse[head], top, map,
                          s.totals.rows(1, some));
        clock.lap(kSoftmax);
        if (pass.trace != nullptr) {
            const size_t tokens = plan.stages[task.stage].tokens, groups = a.pools ? 1 : tokens / a.group;
            const size_t queries = a.pools ? 1 : a.group;
            const size_t row = a.pools ? head : traced_row(task, segment, a, head) + r;
            pass.trace->see({a.place.operation, a.place.branch, "map"}, task.image, groups * a.heads.count * queries,
                            row, some, a.group, map);
        }
        const Span<uint8_t> left = operand(*a.map_value, map, some, depth, s.packed);
        a.map_value->run(left.get(some, 0), left.stride(), some, s.values.data(), out_width, depth, 0, out_width,
                         sums.get(some, out_width), out_width);
        clock.lap(kAttentionProducts);
        if (!a.inner.present) {
            double shift[kAttentionRows];
            for (size_t i = 0; i < some; ++i) shift[i] = totals[i] * a.out_total[head] + a.out_shift;
            ops.quantize_head(sums, some, padded, a.out_scale[head], shift, a.proj.input.top,
                              codes.part(segment.row + r, some, head * padded, padded));
        } else {
            const Span<float> out = values.part(segment.row + r, some, head * padded, padded);
            for (size_t i = 0; i < some; ++i) {
                const int32_t* from = sums.row(i, a.heads.size);
                float* to = out.row(i, a.heads.size);
                for (size_t c = 0; c < a.heads.size; ++c)
                    to[c] = static_cast<float>(from[c] * a.out_scale[head] + totals[i] * a.out_total[head]);
            }
        }
        clock.lap(kEpilogues);
    }
}

// The norm before the projection runs over the heads' channels side by side, without their padding.
void normalize_heads(const Plan& plan, Scratch& s, const Attention& a, size_t count, Span<float> values,
                     Span<uint8_t> codes) {
    const RowSpans ops(plan.isa.ops);
    const Parts heads = a.heads;
    const size_t padded = heads.padded(), channels = round_up(heads.channels(), kChannels);
    const Span<float> packed = s.second.rows(count, channels);
    const Span<uint8_t> normed = s.hidden.rows(count, channels);
    for (size_t r = 0; r < count; ++r) {
        float* to = packed.row(r, channels);
        std::fill_n(to, channels, 0.0f);
        for (size_t head = 0; head < heads.count; ++head)
            std::copy_n(values.row(r, a.width()) + head * padded, heads.size, to + head * heads.size);
    }
    ops.normalize_codes(packed, count, a.inner.part(), a.proj.input.top, normed);
    for (size_t r = 0; r < count; ++r)
        for (size_t head = 0; head < heads.count; ++head) {
            uint8_t* to = codes.row(r, a.width()) + head * padded;
            to = std::copy_n(normed.row(r, channels) + head * heads.size, heads.size, to);
            // Weights of padding are 0, but a wider code there would spill over into its neighbours when packed.
            std::fill_n(to, padded - heads.size, uint8_t{0});
        }
}

}  // namespace

void attend(const Plan& plan, Pass& pass, Scratch& s, const Task& task, const Attentions& attentions) {
    const RowSpans ops(plan.isa.ops);
    Clock clock(pass.timed, s.seconds);
    const Windows* windows = attentions.windows == 0 ? nullptr : &plan.windows[attentions.windows - 1];
    const size_t count = task.count, width = plan.stages[task.stage].width;
    for (const Attention& a : attentions.branches) {
        const size_t padded = a.heads.padded();
        const Span<float> values = s.first.rows(count, a.width());
        const Span<uint8_t> codes = s.codes.rows(count, a.width());
        KeyValues& memory = memory_of(pass, s, attentions);
        for (size_t head = 0; head < a.heads.count; ++head)
            each_segment(task, attentions, a.group, [&](const Segment& segment) {
                KeyValues::Head part = memory.head(attentions, a, segment.slot, head);
                if (a.pools) {
                    std::copy_n(a.latent_codes.from(head * padded, padded), padded, part.query.row(0, padded));
                    if (pass.trace != nullptr)
                        pass.trace->see({a.place.operation, a.place.branch, "query"}, task.image, a.heads.count, head,
                                        1, a.heads.size, part.query);
                }
                const uint8_t* regions =
                    regions_of(windows, windows == nullptr ? 0 : (task.row + segment.row) / a.group);
                attend_head(plan, pass, s, clock, task, a, segment, regions, head, part, codes, values);
            });
        if (a.inner.present) {
            normalize_heads(plan, s, a, count, values, codes);
            clock.lap(kNorms);
        }
        if (pass.trace != nullptr)
            for (size_t head = 0; head < a.heads.count; ++head)
                each_segment(task, attentions, a.group, [&](const Segment& segment) {
                    const size_t groups = a.pools ? 1 : plan.stages[task.stage].tokens / a.group;
                    const size_t row = a.pools ? head : traced_row(task, segment, a, head);
                    pass.trace->see({a.place.operation, a.place.branch, "proj"}, task.image,
                                    groups * a.heads.count * (a.pools ? 1 : a.group), row, segment.count, a.heads.size,
                                    codes.part(segment.row, segment.count, head * padded, a.heads.size));
                });
        const bool apart = attentions.post && a.norm.present;
        const Span<float> to = apart ? s.first.rows(count, width) : task.x;
        each_tile(a.proj, operand(*a.proj.product, codes, count, a.width(), s.packed), count, width, s.sums, clock,
                  kEpilogues, [&](const Tile& tile) {
                      const Span<float> part = to.part(0, count, tile.first, tile.width);
                      apart || a.pools ? ops.store_sums(tile, part) : ops.add_sums(tile, part);
                  });
        if (apart) {
            ops.normalize(to, count, a.norm.part(), to);
            float* sum = task.x.get(count, width);
            const float* out = to.get(count, width);
            for (size_t i = 0; i < count * width; ++i) sum[i] += out[i];
            clock.lap(kNorms);
        }
    }
}

}  // namespace qvit
