// The narrow interface between the model and an instruction set: what a product of codes and a row operation are.
//
// Every instruction set fills one Isa. `portable.cpp` says in plain C++ what each function means; the others must give
// the same products bit for bit, and the same row operations up to the last places of float arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qvit {

// Channels and reduction lengths are padded with zeros to these, so that no kernel has a tail.
constexpr size_t kChannels = 16;
constexpr size_t kDepth = 4;

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The dense layout of a right-hand side with n channels (rows of w) and reduction length k:
// [n / 16 panels][k / 4][16 channels][4 k], int8.
inline size_t dense_index(size_t channel, size_t k, size_t depth) {
    return (channel / kChannels) * kChannels * depth + (k / kDepth) * kChannels * kDepth +
           (channel % kChannels) * kDepth + k % kDepth;
}

// out[m][n] = sum_k a[m][k] * w[n][k], exactly: unsigned codes on the left, signed codes on the right.
struct Product {
    const char* name;
    // Widest codes that it takes on either side.
    int left_bits, right_bits;
    // Channels are processed in groups of this many; weights are padded to a whole number of groups.
    size_t group;
    // Columns worth computing at once, a multiple of `group`: the caller's tile of sums stays in the first caches.
    size_t tile;
    // Bytes of `n` packed channels of reduction length `k`, both padded.
    size_t (*weight_bytes)(size_t n, size_t k);
    // Put the k codes of one channel into packed memory, given as unsigned ones, the signed ones plus `low`; other
    // channels' stay.
    void (*pack_channel)(uint8_t* packed, size_t k, size_t channel, const uint8_t* codes, int low);
    // Bytes of one left-hand row in the form that `run` reads.
    size_t (*row_bytes)(size_t k);
    // Bring rows of k codes, one byte each, into that form; null if it is the bytes themselves.
    void (*pack_rows)(const uint8_t* codes, size_t stride, size_t rows, size_t k, uint8_t* out, size_t out_stride);
    // Sums of `rows` left-hand rows with channels [first, last), multiples of `group`: out[row][channel - first].
    void (*run)(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t n, size_t k,
                size_t first, size_t last, int32_t* out, size_t out_stride);
    // Pack a right-hand side given the other way round: k rows of `width` unsigned codes, as above.
    // Null where the layout is the dense one.
    void (*pack_columns)(const uint8_t* codes, size_t stride, size_t k, size_t width, int low,
                         uint8_t* packed) = nullptr;
    // Put several channels into packed memory, rows of k codes. Null where it is as well to put one after the other.
    void (*pack_channels)(uint8_t* packed, size_t k, size_t channel, size_t channels, const uint8_t* codes,
                          size_t stride, int low) = nullptr;
};

// Every activation function by its name in the file: the enum, the names and the choice of the code come from this
// list.
#define QVIT_ACTIVATIONS(each) each(gelu) each(gelu_tanh) each(quick_gelu) each(silu) each(relu)

enum class Activation : int {
#define QVIT_ENUMERATOR(name) name,
    QVIT_ACTIVATIONS(QVIT_ENUMERATOR)
#undef QVIT_ENUMERATOR
};

// A quantizer folded into one multiply-add: code = clamp(round(value * scale + shift), 0, top), unsigned.
struct Quantize {
    float scale, shift, top;
};

// A quantizer of float values, in the very steps of the training wing: round((x - offset) / step) - low, clamped to
// [0, top]. Its codes are the same to the last one.
struct Rounding {
    float step, offset, low, top;
};

// An activation function and a quantizer of at most kSteps + 1 codes as one: the codes are counted by comparing, since
// all these functions fall to a minimum and rise from there. A value has code j or more where it is at least rising[j -
// 1] or where its negative is at least falling[j - 1].
constexpr size_t kSteps = 3;
struct Steps {
    float rising[kSteps], falling[kSteps];
    bool falls;    // whether any of falling is finite
    size_t count;  // of codes above 0; 0 if this is not possible
};

// LayerNorm or RMSNorm over the first `width` of `padded` values, and a token rectifier, which divides beta by the
// deviation too: ((x - mean) * weight + inner) / deviation + bias.
struct Normalize {
    bool rms;
    float eps;
    size_t width, padded;
    const float* weight;
    const float* bias;
    const float* inner;  // null for none
};

// Operations on tiles of sums and rows of floats. Widths are multiples of 16; padding is zero and stays finite.
struct RowOps {
    // codes = clamp(round(sums * scale[c] + shift[c]), 0, top)
    void (*quantize_sums)(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                          const float* shift, float top, uint8_t* out, size_t out_stride);
    // codes = clamp(round(sums * scale + shift[row]), 0, top), in double precision: the attention's output has few
    // different values, so one that lies beside a border between codes, nearer than a float resolves, is in many
    // images.
    void (*quantize_head)(const int32_t* sums, size_t stride, size_t rows, size_t width, double scale,
                          const double* shift, float top, uint8_t* out, size_t out_stride);
    // codes = quantize(activation(sums * scale[c] + shift[c]))
    void (*activate_sums)(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                          const float* shift, Activation activation, Quantize quantize, uint8_t* out,
                          size_t out_stride);
    // The same codes by counting.
    void (*step_sums)(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                      const float* shift, const Steps& steps, uint8_t* out, size_t out_stride);
    // out = sums * scale[c] + shift[c]
    void (*store_sums)(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                       const float* shift, float* out, size_t out_stride);
    // out += sums * scale[c] + shift[c]
    void (*add_sums)(const int32_t* sums, size_t stride, size_t rows, size_t width, const float* scale,
                     const float* shift, float* out, size_t out_stride);
    // Rows of logits (log2 e included) = sums * scale + shift[column]; softmax over them; codes =
    // min(round(p * inverse), top). totals[row] = sum of the row's codes. Rows of shifts lie `shift_stride` apart: 0 if
    // all rows have the same.
    void (*softmax_codes)(const int32_t* sums, size_t stride, size_t rows, size_t width, float scale,
                          const float* shift, size_t shift_stride, float inverse, float top, uint8_t* out,
                          size_t out_stride, float* totals);
    // codes = clamp(round(normalized)), with the quantizer already inside weight and bias
    void (*normalize_codes)(const float* x, size_t stride, size_t rows, const Normalize& norm, float top, uint8_t* out,
                            size_t out_stride);
    void (*normalize)(const float* x, size_t stride, size_t rows, const Normalize& norm, float* out, size_t out_stride);
    // codes = quantize(x)
    void (*quantize)(const float* x, size_t stride, size_t rows, size_t width, Rounding quantizer, uint8_t* out,
                     size_t out_stride);
    // x = activation(x)
    void (*activate)(float* x, size_t count, Activation activation);
};

struct Isa {
    const char* name;
    const Product* products;  // the first that takes the codes is the best
    size_t product_count;
    const Product* moving;  // the same for keys and values, which are packed anew for every image
    size_t moving_count;
    RowOps ops;
};

// The instruction sets that this build and this processor have, best first; portable is always the last.
const Isa* const* available_isas(size_t* count);

inline const Product& choose(const Product* products, size_t count, int left_bits, int right_bits) {
    for (size_t i = 0; i + 1 < count; ++i)
        if (left_bits <= products[i].left_bits && right_bits <= products[i].right_bits) return products[i];
    return products[count - 1];
}

}  // namespace qvit
