// The working memory of a call: what all threads share, and what each has for itself.
#pragma once

#include <algorithm>
#include <array>

#include "clock.h"
#include "memory.h"
#include "plan.h"
#include "sizes.h"
#include "trace.h"

namespace qvit {

// Codes of queries, keys and values, of an attention's branches and heads one after the other, for some groups of
// tokens that attend to one another.
struct KeyValues {
    KeyValues() = default;
    KeyValues(size_t codes, size_t keys, size_t biases) : query(codes), value(codes), key(keys), bias(biases) {}

    // What one head of one group needs of its tokens.
    struct Head {
        Span<uint8_t> query, value;  // a row of codes per token
        Span<uint8_t> key;           // packed for their product
        Span<float> bias;            // of the logits, one per key; -infinity for padding
    };
    Head head(const Attentions& all, const Attention& a, size_t group, size_t index) {
        const size_t size = a.heads.padded(), codes = group * all.codes + a.first_codes + index * a.head_codes;
        const size_t keys = group * all.keys + a.first_keys + index * a.key_bytes;
        return {query.rows(a.padded_group, size, codes), value.rows(a.padded_group, size, codes),
                key.rows(1, a.key_bytes, keys),
                bias.rows(1, a.padded_group, group * all.biases + a.first_bias + index * a.padded_group)};
    }

    Workspace<uint8_t> query, value, key;
    Workspace<float> bias;
};

// What one thread works in. Codes have one byte per value; `packed` holds them as a product reads them.
struct Scratch {
    explicit Scratch(const Plan& plan)
        : codes(product_of(plan.largest_task, plan.largest_row)),
          packed(product_of(plan.largest_task, round_up(std::max(plan.largest_row, plan.largest_group), 64))),
          hidden(product_of(plan.largest_task, plan.largest_row)),
          map(product_of(kAttentionRows, plan.largest_group)),
          values(product_of(round_up(plan.largest_head, kLargestGroup), plan.largest_group)),
          sums(std::max(plan.largest_task * kLargestTile,
                        product_of(kAttentionRows, round_up(plan.largest_head, kLargestGroup)))),
          scores(product_of(kAttentionRows, round_up(plan.largest_group, kLargestGroup))),
          first(product_of(plan.largest_task, plan.largest_row)),
          second(product_of(plan.largest_task, plan.largest_row)),
          normed(product_of(plan.largest_task, plan.largest_row)),
          totals(std::max(plan.largest_task, kAttentionRows)),
          shifts(product_of(kAttentionRows, plan.largest_group)),
          stream(plan.windows.empty() ? 0 : product_of(plan.largest_task, plan.largest_row)),
          windows(plan.largest_window_codes, plan.largest_window_keys, plan.largest_window_bias) {}

    Workspace<uint8_t> codes, packed, hidden, map, values;
    Workspace<int32_t> sums, scores;
    Workspace<float> first, second, normed, totals, shifts;
    Workspace<float> stream;  // rows of whole windows, side by side
    KeyValues windows;
    Seconds seconds{};
};

// The state of one call: the residual streams of every stage, and the codes of queries, keys and values of two
// attentions over whole images (while some rows read one's keys and values, others that are done with it write the next
// one's).
struct Pass {
    Pass(size_t batch_, const Plan& plan_) : batch(batch_), plan(plan_) {
        for (const Stage& stage : plan.stages) streams.emplace_back(product_of(batch, stage.tokens, stage.width));
        for (KeyValues& half : halves)
            half = KeyValues(product_of(batch, plan.largest_codes), product_of(batch, plan.largest_keys),
                             product_of(batch, plan.largest_bias));
    }

    // The residual stream of some rows of an image.
    Span<float> stream(size_t stage, size_t image, size_t row, size_t count) {
        const Stage& at = plan.stages[stage];
        return streams[stage].rows(count, at.width, (image * at.tokens + row) * at.width);
    }

    size_t batch;
    const Plan& plan;
    std::vector<Workspace<float>> streams;
    std::array<KeyValues, 2> halves;
    const float* images = nullptr;
    float* outputs = nullptr;
    Trace* trace = nullptr;
    bool timed = false;
};

// What a step works on: rows of one image, those of whole windows in the windows' order.
struct Task {
    size_t image, row, count;
    size_t stage;
    Span<float> x;                    // the residual stream of these rows
    const uint32_t* order = nullptr;  // of the windows' tokens, from the first row on

    // The token of a row.
    size_t token(size_t index) const { return order == nullptr ? row + index : order[index]; }
};

}  // namespace qvit
