#include "linear.h"

#include <algorithm>
#include <vector>

namespace qvit {

namespace {

// One channel's codes from its row of bits.
void unpack(const uint8_t* row, int bits, size_t count, int8_t* codes) {
    const int low = 1 << (bits - 1);
    const unsigned mask = (1u << bits) - 1;
    unsigned held = 0;
    int available = 0;
    for (size_t i = 0; i < count; ++i) {
        if (available < bits) {
            held |= static_cast<unsigned>(*row++) << available;
            available += 8;
        }
        codes[i] = static_cast<int8_t>(static_cast<int>(held & mask) - low);
        held >>= bits;
        available -= bits;
    }
}

}  // namespace

Linear::Linear(const Isa& isa, const LinearSpec& spec, Parts out, Parts in)
    : product(&choose(isa.products, isa.product_count, spec.input.bits, spec.weight_bits)),
      input(spec.input),
      outputs(round_up(out.total(), product->group)),
      inputs(in.total()),
      weights(product->weight_bytes(outputs, inputs)),
      scale(outputs),
      shift(outputs) {
    std::vector<int8_t> codes(in.count * in.size), padded(inputs);
    for (size_t channel = 0; channel < out.count * out.size; ++channel) {
        unpack(spec.codes + channel * spec.row_bytes, spec.weight_bits, codes.size(), codes.data());
        int64_t total = 0;
        for (const int8_t code : codes) total += code;
        for (size_t part = 0; part < in.count; ++part)
            std::copy_n(codes.data() + part * in.size, in.size, padded.data() + part * in.padded());
        const size_t at = out.at(channel);
        product->pack_channel(weights.data(), inputs, at, padded.data());
        const double step = static_cast<double>(spec.scale[channel]);
        scale[at] = static_cast<float>(input.scale * step);
        shift[at] = static_cast<float>(input.start * step * static_cast<double>(total) + spec.bias[channel]);
    }
}

Operand operand(const Product& product, const uint8_t* codes, size_t stride, size_t rows, size_t k, uint8_t* packed) {
    if (product.pack_rows == nullptr) return {codes, stride};
    const size_t bytes = product.row_bytes(k);
    product.pack_rows(codes, stride, rows, k, packed, bytes);
    return {packed, bytes};
}

Operand operand(const Linear& layer, const uint8_t* codes, size_t stride, size_t rows, uint8_t* packed) {
    return operand(*layer.product, codes, stride, rows, layer.inputs, packed);
}

void pack_columns(const Product& product, const uint8_t* codes, size_t stride, size_t k, size_t width, int low,
                  uint8_t* packed) {
    if (product.pack_columns != nullptr) return product.pack_columns(codes, stride, k, width, low, packed);
    for (size_t channel = 0; channel < width; channel += kChannels)
        for (size_t at = 0; at < k; at += kDepth) {
            const uint8_t* from = codes + at * stride + channel;
            uint8_t* to = packed + dense_index(channel, at, k);
            for (size_t c = 0; c < kChannels; ++c)
                for (size_t i = 0; i < kDepth; ++i)
                    to[c * kDepth + i] = static_cast<uint8_t>(from[i * stride + c] - low);
        }
}

}  // namespace qvit
