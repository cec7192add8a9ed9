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

namespace qvit {

// A range of channels made of `count` parts of `size`, each padded to `padded`.
struct Parts {
    size_t count, size;
    size_t padded() const { return round_up(size, kChannels); }
    size_t total() const { return count * padded(); }
    size_t at(size_t channel) const { return channel / size * padded() + channel % size; }
};

// Linear layer: float32 scale and bias a channel, codes as the packed file holds them (one row of bits a channel).
struct LinearSpec {
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
    size_t outputs = 0, inputs = 0;  // padded
    Buffer<uint8_t> weights;
    Buffer<float> scale, shift;  // value = sum * scale + shift
};

// Rows of codes in the form that a product reads.
struct Operand {
    const uint8_t* rows;
    size_t stride;
};

Operand operand(const Product& product, const uint8_t* codes, size_t stride, size_t rows, size_t k, uint8_t* packed);
Operand operand(const Linear& layer, const uint8_t* codes, size_t stride, size_t rows, uint8_t* packed);

// Values are a right-hand side whose channels are the head's and whose sum runs over tokens.
void pack_columns(const Product& product, const uint8_t* codes, size_t stride, size_t k, size_t width, int low,
                  uint8_t* packed);

template <class Use>
void each_tile(const Linear& layer, const Operand& left, size_t rows, int32_t* sums, Clock& clock, Work work, Use use) {
    const size_t tile = layer.product->tile;
    for (size_t first = 0; first < layer.outputs; first += tile) {
        const size_t last = std::min(first + tile, layer.outputs);
        layer.product->run(left.rows, left.stride, rows, layer.weights.data(), layer.outputs, layer.inputs, first, last,
                           sums, tile);
        clock.lap(kProducts);
        use(first, last, tile);
        clock.lap(work);
    }
}

}  // namespace qvit
