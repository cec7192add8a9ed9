#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "steps/groups.h"
#include "steps/steps.h"

namespace qvit {

namespace {

// (a, b) becomes (a cos - b sin, b cos + a sin), for neighbours or for channels half a head apart.
void rotate(const Rotary& rotary, size_t head, size_t patch, size_t patches, size_t half, float* x) {
    const size_t at = ((rotary.tables == 1 ? 0 : head) * patches + patch) * half;
    const float *cos = rotary.cos.from(at, half), *sin = rotary.sin.from(at, half);
    const size_t apart = rotary.halves ? half : 1, step = rotary.halves ? 1 : 2;
    for (size_t i = 0; i < half; ++i) {
        float &first = x[i * step], &second = x[i * step + apart];
        const float a = first, b = second;
        first = a * cos[i] - b * sin[i];
        second = b * cos[i] + a * sin[i];
    }
}

// Queries or keys of one head from floats: norms, rotation, rectifier, codes.
void encode(const Plan& plan, const Task& task, const Attention& a, const Operand& operand, size_t head,
            Span<float> values, Span<uint8_t> codes) {
    const RowSpans ops(plan.isa.ops);
    const Stage& stage = plan.stages[task.stage];
    const size_t count = task.count, padded = a.heads.padded(), size = a.heads.size;
    const size_t floats = operand.norms.size() - operand.coded;  // norms that give floats
    for (size_t i = 0; i < floats; ++i) ops.normalize(values, count, operand.norms[i].part(head), values);
    if (a.rotary.present)
        for (size_t r = 0; r < count; ++r)
            if (const size_t token = task.token(r); token >= stage.prefix)
                rotate(a.rotary, head, token - stage.prefix, stage.tokens - stage.prefix, size / 2,
                       values.row(r, size));
    if (operand.coded) {
        ops.normalize_codes(values, count, operand.norms.back().part(head), operand.top(), codes);
        return;
    }
    if (!operand.factor.empty()) {
        const float *factor = operand.factor.from(head * padded, size),
                    *shift = operand.shift.from(head * padded, size);
        for (size_t r = 0; r < count; ++r) {
            float* x = values.row(r, size);
            for (size_t i = 0; i < size; ++i) x[i] = x[i] * factor[i] + shift[i];
        }
    }
    ops.quantize(values, count, padded, operand.quantizers[head].rounding(), codes);
    for (size_t r = 0; r < count; ++r) std::fill_n(codes.row(r, padded) + size, padded - size, uint8_t{0});
}

// The sum of some codes, added up in 16 bits as far as these hold it.
int total_of(const uint8_t* codes, size_t count) {
    constexpr size_t kSome = 256;
    int total = 0;
    for (size_t first = 0; first < count; first += kSome) {
        uint16_t sum = 0;
        for (size_t i = first; i < std::min(first + kSome, count); ++i) sum = static_cast<uint16_t>(sum + codes[i]);
        total += sum;
    }
    return total;
}

// Put a segment's codes where the attention reads them.
void keep(const Attention& a, const Segment& segment, size_t head, KeyValues::Head memory, Span<uint8_t> q,
          Span<uint8_t> k, Span<uint8_t> v) {
    const size_t padded = a.heads.padded(), size = a.heads.size;
    const int low = 1 << (a.key.quantizers[0].bits - 1);
    uint8_t* keys = memory.key.get(1, a.key_bytes);
    float* bias = memory.bias.get(1, a.padded_group);
    for (size_t r = 0; r < segment.count; ++r) {
        const size_t token = segment.token + r;
        if (!a.pools) std::memcpy(memory.query.row(token, padded), q.row(r, padded), padded);
        std::memcpy(memory.value.row(token, padded), v.row(r, padded), padded);
        const int total = total_of(k.row(r, size), size) - low * static_cast<int>(size);
        bias[token] = a.key_bias[head] * static_cast<float>(total);
    }
    pack_channels(*a.query_key, k, segment.count, padded, low, segment.token, keys);
    if (segment.token + segment.count < a.group) return;
    // Padding: no softmax sees these keys. Another attention may have left wider codes here.
    for (size_t token = a.group; token < a.padded_group; ++token) {
        bias[token] = -std::numeric_limits<float>::infinity();
        std::fill_n(memory.value.row(token, padded), padded, uint8_t{0});
    }
}

}  // namespace

void project(const Plan& plan, Pass& pass, Scratch& s, const Task& task, const Attentions& attentions) {
    const RowSpans ops(plan.isa.ops);
    Clock clock(pass.timed, s.seconds);
    const Stage& stage = plan.stages[task.stage];
    const size_t count = task.count, width = stage.width;
    const Span<uint8_t> codes = s.codes.rows(count, width);
    for (const Attention& a : attentions.branches) {
        const size_t padded = a.heads.padded();
        const auto see = [&](const char* part, size_t rows, size_t row, size_t some, size_t channels,
                             Span<uint8_t> seen) {
            if (pass.trace != nullptr)
                pass.trace->see({a.place.operation, a.place.branch, part}, task.image, rows, row, some, channels, seen);
        };
        if (attentions.post || !a.norm.present)
            ops.quantize(task.x, count, width, a.qkv.input.rounding(), codes);
        else
            ops.normalize_codes(task.x, count, a.norm.part(), a.qkv.input.top, codes);
        clock.lap(kNorms);
        see(a.pools ? "kv" : "qkv", stage.tokens, task.row, count, stage.channels, codes);

        // Queries, keys and values of all heads side by side; of a pooling attention keys and values.
        const size_t section = a.width(), sections = a.sections(), stride = sections * section;
        const Span<float> values = s.first.rows(count, stride);
        const Span<uint8_t> operands = s.hidden.rows(count, stride);
        const float all_tops[] = {a.query.top(), a.key.top(), a.value_quantizer[0].top};
        const float* tops = all_tops + 3 - sections;
        const size_t direct = a.floats_first() ? stride - section : 0;  // channels from here on become codes at once
        each_tile(a.qkv, operand(*a.qkv.product, codes, count, width, s.packed), count, stride, s.sums, clock,
                  kEpilogues, [&](const Tile& tile) {
                      for (size_t at = tile.first, end; at < tile.end(); at = end) {
                          end = std::min(tile.end(), (at / section + 1) * section);
                          if (at < direct)
                              ops.store_sums(tile.part(at, end, a.qkv.scale, a.qkv.shift),
                                             values.part(0, count, at, end - at));
                          else
                              ops.quantize_sums(tile.part(at, end, a.code_scale, a.code_shift), tops[at / section],
                                                operands.part(0, count, at, end - at));
                      }
                  });
        for (size_t at = 0; at < direct; at += padded) {
            const Operand& operand = at < direct - section ? a.query : a.key;
            encode(plan, task, a, operand, at % section / padded, values.part(0, count, at, padded),
                   operands.part(0, count, at, padded));
        }
        clock.lap(kNorms);

        KeyValues& memory = memory_of(pass, s, attentions);
        each_segment(task, attentions, a.group, [&](const Segment& segment) {
            for (size_t head = 0; head < a.heads.count; ++head) {
                const auto part = [&](size_t index) {
                    return operands.part(segment.row, segment.count, index * section + head * padded, padded);
                };
                const Span<uint8_t> q = part(0), k = part(sections - 2), v = part(sections - 1);
                const size_t groups = stage.tokens / a.group, row = traced_row(task, segment, a, head);
                const auto see_operand = [&](const char* name, Span<uint8_t> seen) {
                    see(name, groups * a.heads.count * a.group, row, segment.count, a.heads.size, seen);
                };
                if (!a.pools) see_operand("query", q);
                see_operand("key", k);
                see_operand("value", v);
                keep(a, segment, head, memory.head(attentions, a, segment.slot, head), q, k, v);
            }
        });
        clock.lap(kRest);
    }
}

}  // namespace qvit
