// Plain C++: the meaning of every kernel, and what runs where nothing better does.
#include "simd_portable.h"

#include "products.h"
#include "row_ops.h"

namespace {

void run_dense(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t, size_t k, size_t first,
               size_t last, int32_t* out, size_t out_stride) {
    for (size_t r = 0; r < count; ++r)
        for (size_t panel = first; panel < last; panel += kChannels) {
            const uint8_t* weights = packed + panel * k;
            int32_t sums[kChannels] = {};
            for (size_t at = 0; at < k; at += kDepth)
                for (size_t c = 0; c < kChannels; ++c)
                    for (size_t i = 0; i < kDepth; ++i)
                        sums[c] +=
                            rows[r * stride + at + i] * static_cast<int8_t>(weights[at * kChannels + c * kDepth + i]);
            for (size_t c = 0; c < kChannels; ++c) out[r * out_stride + panel - first + c] = sums[c];
        }
}

constexpr Product kProducts[] = {
    {"dense", 8, 8, kChannels, 64, dense_weight_bytes, dense_pack_channel, byte_row, nullptr, run_dense},
};

}  // namespace

namespace qvit {
extern const Isa kPortable = {"portable", kProducts, 1, kProducts, 1, kRowOps};
}
