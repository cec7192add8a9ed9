// Linear layers on codes, and their products tile by tile.
//
// Everything that is constant is folded when a layer is made: scales, offsets and row sums of codes become one
// multiply-add a channel. All widths are padded with zeros to multiples of 16 (heads each for itself), so that no
// kernel has a tail.
#pragma once

#include <algorithm>

#include "clock.h"
#include "isa.h"
#include "memory.h"
#include "quantizer.h"
#include "row_spans.h"

namespace qvit {

// A range of channels made of `count` parts of `size`, each padded to `padded`; `total` counts the padding too.
struct Parts {
    size_t count, size;
    size_t channels() const { return product_of(count, size); }
    size_t padded() const { return round_up(size, kChannels); }
    size_t total() const { return product_of(count, padded()); }
    size_t at(size_t channel) const { return channel / size * padded() + channel % size; }
};

// Linear layer: float32 scale and bias per channel, codes as the packed file holds them (a row of bits per channel).
struct LinearSpec {
    size_t outputs, inputs;
    const uint8_t* codes;
    size_t row_bytes;
    int weight_bits;
    const float* scale;
    const float* bias;
    Quantizer input;
};

class Linear {
  public:
    Linear() = default;
    Linear(const Isa& isa, const LinearSpec& spec, Parts outputs, Parts inputs);

    const Product* product = nullptr;
    Quantizer input;
    size_t channels = 0;             // its outputs
    size_t outputs = 0, inputs = 0;  // padded
    Buffer<uint8_t> weights;
    Buffer<float> scale, shift;  // value = sum * scale + shift
};

// Rows of k codes in the form that a product reads: themselves, or packed into `packed`.
Span<uint8_t> operand(const Product& product, Span<uint8_t> codes, size_t rows, size_t k, Buffer<uint8_t>& packed);

// Channels [channel, channel + count) of a right-hand side, rows of k codes.
void pack_channels(const Product& product, Span<uint8_t> codes, size_t count, size_t k, int low, size_t channel,
                   uint8_t* packed);

// Values are a right-hand side whose channels are the head's and whose sum runs over tokens.
void pack_columns(const Product& product, Span<uint8_t> codes, size_t k, size_t width, int low,
                  Buffer<uint8_t>& packed);

// Call use(tile) for every tile of a layer's first `channels` channels.
template <class Use>
void each_tile(const Linear& layer, Span<uint8_t> left, size_t rows, size_t channels, Buffer<int32_t>& sums,
               Clock& clock, Work work, Use use) {
    const size_t step = layer.product->tile;
    const Span<int32_t> out = sums.rows(rows, step);
    for (size_t first = 0; first < layer.outputs; first += step) {
        const size_t last = std::min(first + step, layer.outputs);
        layer.product->run(left.get(rows, 0), left.stride(), rows, layer.weights.data(), layer.outputs, layer.inputs,
                           first, last, out.get(rows, last - first), step);
        clock.lap(kProducts);
        // Outputs are padded to the product's group: what is beyond the channels is nobody's.
        const size_t width = std::min(last, channels) - first;
        use(Tile{out, rows, first, width, layer.scale.from(first, width), layer.shift.from(first, width)});
        clock.lap(work);
    }
}

}  // namespace qvit
