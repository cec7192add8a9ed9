// AVX2 with VNNI in AVX-512's encoding: processors with AVX-512 and VNNI, but without VBMI.
#include "simd_avx2.h"

#include "products_vnni256.h"
#include "row_ops.h"

namespace qvit {
extern const Isa kAvx512VlVnni = {"avx512vl-vnni", kVnniProducts, kVnniCount, kVnniProducts, kVnniCount, kRowOps};
}
