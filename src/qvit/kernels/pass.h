// The working memory of a call: what all threads share, and what each has for itself.
#pragma once

#include <algorithm>
#include <array>
#include <limits>

#include "clock.h"
#include "memory.h"
#include "plan.h"
#include "trace.h"

namespace qvit {

constexpr size_t kBlockRows = 60;      // rows that one task takes through a block: their codes stay in the second cache
constexpr size_t kRowUnit = 6;         // tasks begin at multiples of it, for whole tiles; kBlockRows is one
constexpr size_t kAttentionRows = 12;  // query rows whose logits are in the first cache together
constexpr size_t kLargestTile = 192, kLargestGroup = 64;  // of any product

// Rows [begin, end) of one image of the pass.
struct Rows {
    size_t image, begin, end;
    size_t count() const { return end - begin; }
};

// What one thread works in. Codes have one byte a value; `packed` holds them as a product reads them.
struct Scratch {
    // row: the widest row of any layer; head: the padded head dimension; tokens: padded.
    Scratch(size_t row, size_t head, size_t tokens)
        : codes(kBlockRows * row),
          packed(kBlockRows * round_up(std::max(row, tokens), 64)),
          hidden(kBlockRows * row),
          map(kAttentionRows * tokens),
          values(round_up(head, kLargestGroup) * tokens),
          key(head),
          sums(std::max(kBlockRows * kLargestTile, kAttentionRows * round_up(head, kLargestGroup))),
          scores(kAttentionRows * round_up(tokens, kLargestGroup)),
          first(kBlockRows * row),
          second(kBlockRows * row),
          normed(kBlockRows * row),
          totals(kBlockRows) {}

    Buffer<uint8_t> codes, packed, hidden, map, values;
    Buffer<int8_t> key;
    Buffer<int32_t> sums, scores;
    Buffer<float> first, second, normed, totals;
    Seconds seconds{};
};

// The state of one call: the residual stream, and the codes of queries, keys and values of two blocks (while some rows
// read a block's keys and values, others that are done with it write the next one's).
struct Pass {
    Pass(size_t batch_, const Plan& plan)
        : batch(batch_),
          padded_tokens(round_up(plan.tokens, kChannels)),
          branch_bytes(padded_tokens * plan.head_width),
          key_bytes(round_up(plan.tokens, kLargestGroup) * plan.head_width / plan.shape.heads),
          residual(batch * plan.tokens * plan.width) {
        const size_t side = batch * plan.branches;
        const float nothing = -std::numeric_limits<float>::infinity();
        for (auto& half : halves) {
            half.query = Buffer<uint8_t>(side * branch_bytes);
            half.key = Buffer<uint8_t>(side * plan.shape.heads * key_bytes);
            half.value = Buffer<uint8_t>(side * branch_bytes);
            half.bias = Buffer<float>(side * plan.shape.heads * padded_tokens);
            for (size_t i = 0; i < half.bias.size(); ++i)
                if (i % padded_tokens >= plan.tokens) half.bias[i] = nothing;
        }
    }

    struct Half {
        Buffer<uint8_t> query, key, value;  // keys packed for their product, the others one byte a code
        Buffer<float> bias;                 // of the logits, a key each; -infinity for padding
    };

    size_t batch, padded_tokens, branch_bytes, key_bytes;
    Buffer<float> residual;
    std::array<Half, 2> halves;
    const float* images = nullptr;
    float* logits = nullptr;
    Trace* trace = nullptr;
    bool timed = false;
};

}  // namespace qvit
