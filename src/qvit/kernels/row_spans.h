// Tiles of a layer's sums and the row operations on spans: what the steps call, so that every extent is checked.
#pragma once

#include "isa.h"
#include "memory.h"

namespace qvit {

// Sums of some rows with channels [first, first + width) of a layer, and the multiply-adds that make values of them.
struct Tile {
    Span<int32_t> sums;
    size_t rows, first, width;
    const float *scale, *shift;

    size_t end() const { return first + width; }
    const int32_t* get() const { return sums.get(rows, width); }
    // Channels [from, to) with multiply-adds of another kind.
    Tile part(size_t from, size_t to, const Buffer<float>& scales, const Buffer<float>& shifts) const {
        const size_t count = to - from;
        return {sums.part(0, rows, from - first, count),
                rows,
                from,
                count,
                scales.from(from, count),
                shifts.from(from, count)};
    }
};

class RowSpans {
  public:
    explicit RowSpans(const RowOps& ops) : ops_(ops) {}

    void quantize_sums(const Tile& tile, float top, Span<uint8_t> out) const {
        ops_.quantize_sums(tile.get(), tile.sums.stride(), tile.rows, tile.width, tile.scale, tile.shift, top,
                           out.get(tile.rows, tile.width), out.stride());
    }
    void activate_sums(const Tile& tile, Activation activation, Quantize quantize, Span<uint8_t> out) const {
        ops_.activate_sums(tile.get(), tile.sums.stride(), tile.rows, tile.width, tile.scale, tile.shift, activation,
                           quantize, out.get(tile.rows, tile.width), out.stride());
    }
    void step_sums(const Tile& tile, const Steps& steps, Span<uint8_t> out) const {
        ops_.step_sums(tile.get(), tile.sums.stride(), tile.rows, tile.width, tile.scale, tile.shift, steps,
                       out.get(tile.rows, tile.width), out.stride());
    }
    void store_sums(const Tile& tile, Span<float> out) const {
        ops_.store_sums(tile.get(), tile.sums.stride(), tile.rows, tile.width, tile.scale, tile.shift,
                        out.get(tile.rows, tile.width), out.stride());
    }
    void add_sums(const Tile& tile, Span<float> out) const {
        ops_.add_sums(tile.get(), tile.sums.stride(), tile.rows, tile.width, tile.scale, tile.shift,
                      out.get(tile.rows, tile.width), out.stride());
    }
    void quantize_head(Span<int32_t> sums, size_t rows, size_t width, double scale, const double* shift, float top,
                       Span<uint8_t> out) const {
        ops_.quantize_head(sums.get(rows, width), sums.stride(), rows, width, scale, shift, top, out.get(rows, width),
                           out.stride());
    }
    // shift: a row of its own for every row, or one for all.
    void softmax_codes(Span<int32_t> sums, size_t rows, size_t width, float scale, Span<float> shift, bool by_row,
                       float inverse, float top, Span<uint8_t> out, Span<float> totals) const {
        ops_.softmax_codes(sums.get(rows, width), sums.stride(), rows, width, scale,
                           shift.get(by_row ? rows : 1, width), by_row ? shift.stride() : 0, inverse, top,
                           out.get(rows, width), out.stride(), totals.get(1, rows));
    }
    void normalize_codes(Span<float> x, size_t rows, const Normalize& norm, float top, Span<uint8_t> out) const {
        ops_.normalize_codes(x.get(rows, norm.padded), x.stride(), rows, norm, top, out.get(rows, norm.padded),
                             out.stride());
    }
    void normalize(Span<float> x, size_t rows, const Normalize& norm, Span<float> out) const {
        ops_.normalize(x.get(rows, norm.padded), x.stride(), rows, norm, out.get(rows, norm.padded), out.stride());
    }
    void quantize(Span<float> x, size_t rows, size_t width, Rounding quantizer, Span<uint8_t> out) const {
        ops_.quantize(x.get(rows, width), x.stride(), rows, width, quantizer, out.get(rows, width), out.stride());
    }

  private:
    const RowOps& ops_;
};

}  // namespace qvit
