#include "linear.h"

#include <algorithm>
#include <vector>

namespace qvit {

namespace {

// One channel's unsigned codes from its row of bits.
void unpack(const uint8_t* row, int bits, size_t count, uint8_t* codes) {
    const unsigned mask = (1u << bits) - 1;
    unsigned held = 0;
    int available = 0;
    for (size_t i = 0; i < count; ++i) {
        if (available < bits) {
            held |= static_cast<unsigned>(*row++) << available;
            available += 8;
        }
        codes[i] = static_cast<uint8_t>(held & mask);
        held >>= bits;
        available -= bits;
    }
}

size_t weight_bytes(const Product& product, size_t outputs, size_t inputs) {
    // None takes more than a byte a weight, and a sum a channel: what can be counted here does not wrap there.
    product_of(outputs, sum_of(inputs, sizeof(int32_t)));
    return product.weight_bytes(outputs, inputs);
}

}  // namespace

Linear::Linear(const Isa& isa, const LinearSpec& spec, Parts out, Parts in)
    : product(&choose(isa.products, isa.product_count, spec.input.bits, spec.weight_bits)),
      input(spec.input),
      channels(out.channels()),
      outputs(round_up(out.total(), product->group)),
      inputs(in.total()),
      weights(weight_bytes(*product, outputs, inputs)),
      scale(outputs),
      shift(outputs) {
    const int low = 1 << (spec.weight_bits - 1);
    std::vector<uint8_t> codes(in.channels()), padded(inputs, static_cast<uint8_t>(low));
    for (size_t channel = 0; channel < channels; ++channel) {
        unpack(spec.codes + channel * spec.row_bytes, spec.weight_bits, codes.size(), codes.data());
        int64_t total = 0;
        for (const uint8_t code : codes) total += code - low;
        for (size_t part = 0; part < in.count; ++part)
            std::copy_n(codes.data() + part * in.size, in.size, padded.data() + part * in.padded());
        const size_t at = out.at(channel);
        product->pack_channel(weights.data(), inputs, at, padded.data(), low);
        const double step = static_cast<double>(spec.scale[channel]);
        scale[at] = static_cast<float>(input.scale * step);
        shift[at] = static_cast<float>(input.start * step * static_cast<double>(total) + spec.bias[channel]);
    }
}

Span<uint8_t> operand(const Product& product, Span<uint8_t> codes, size_t rows, size_t k, Buffer<uint8_t>& packed) {
    if (kChecked)
        for (size_t r = 0; r < rows; ++r)
            for (size_t i = 0; i < k; ++i) check(codes.row(r, k)[i] >> product.left_bits == 0);
    if (product.pack_rows == nullptr) return codes.part(0, rows, 0, k);
    const size_t bytes = product.row_bytes(k);
    const Span<uint8_t> to = packed.rows(rows, bytes);
    product.pack_rows(codes.get(rows, k), codes.stride(), rows, k, to.get(rows, bytes), bytes);
    return to;
}

void pack_channels(const Product& product, Span<uint8_t> codes, size_t count, size_t k, int low, size_t channel,
                   uint8_t* packed) {
    if (product.pack_channels != nullptr)
        return product.pack_channels(packed, k, channel, count, codes.get(count, k), codes.stride(), low);
    for (size_t r = 0; r < count; ++r) product.pack_channel(packed, k, channel + r, codes.row(r, k), low);
}

void pack_columns(const Product& product, Span<uint8_t> codes, size_t k, size_t width, int low,
                  Buffer<uint8_t>& packed) {
    const uint8_t* columns = codes.get(k, width);
    uint8_t* panels = packed.rows(1, kChecked ? product.weight_bytes(round_up(width, product.group), k) : 0).get(1, 0);
    if (product.pack_columns != nullptr) return product.pack_columns(columns, codes.stride(), k, width, low, panels);
    for (size_t channel = 0; channel < width; channel += kChannels)
        for (size_t at = 0; at < k; at += kDepth) {
            const uint8_t* from = columns + at * codes.stride() + channel;
            uint8_t* to = panels + dense_index(channel, at, k);
            for (size_t c = 0; c < kChannels; ++c)
                for (size_t i = 0; i < kDepth; ++i)
                    to[c * kDepth + i] = static_cast<uint8_t>(from[i * codes.stride() + c] - low);
        }
}

}  // namespace qvit
