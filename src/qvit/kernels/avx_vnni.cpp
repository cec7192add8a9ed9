// AVX2 with VNNI in AVX's encoding: Intel's processors without AVX-512.
#include "simd_avx2.h"

#include "products_vnni256.h"
#include "row_ops.h"

namespace qvit {
extern const Isa kAvxVnni = {"avx-vnni", kVnniProducts, kVnniCount, kVnniProducts, kVnniCount, kRowOps};
}
