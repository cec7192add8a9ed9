// Which instruction sets this build and this processor have.
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <vector>

#include "isa.h"

namespace qvit {

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx512, kAvx512VlVnni, kAvxVnni, kAvx2;
#elif defined(__aarch64__)
extern const Isa kNeon;
#elif defined(__wasm__)
extern const Isa kWasm;
#endif

namespace {

#if defined(__x86_64__)
// Not every compiler that builds for AVX-VNNI knows it by name here.
[[maybe_unused]] bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

std::vector<const Isa*> find_isas() {
    std::vector<const Isa*> isas;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512 && __builtin_cpu_supports("avx512vbmi")) isas.push_back(&kAvx512);
    if (avx512) isas.push_back(&kAvx512VlVnni);
#if defined(QVIT_AVX_VNNI)
    if (avx2 && has_avx_vnni()) isas.push_back(&kAvxVnni);
#endif
    if (avx2) isas.push_back(&kAvx2);
#elif defined(__aarch64__) && defined(__linux__)
    if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) isas.push_back(&kNeon);
#elif defined(__aarch64__) && defined(__APPLE__)
    isas.push_back(&kNeon);  // every Apple processor that has macOS
#elif defined(__wasm__)
    isas.push_back(&kWasm);  // the module is compiled for it
#endif
    isas.push_back(&kPortable);
    return isas;
}

}  // namespace

const Isa* const* available_isas(size_t* count) {
    static const std::vector<const Isa*> isas = find_isas();
    *count = isas.size();
    return isas.data();
}

}  // namespace qvit
