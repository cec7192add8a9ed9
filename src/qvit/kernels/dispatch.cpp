// Which instruction sets this build and this processor have.
#include "isa.h"

namespace qvit {

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx512;
#endif

const Isa* const* available_isas(size_t* count) {
    static const Isa* isas[8];
    static size_t found = 0;
    static const bool once = [] {
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
            isas[found++] = &kAvx512;
#endif
        isas[found++] = &kPortable;
        return true;
    }();
    static_cast<void>(once);
    *count = found;
    return isas;
}

}  // namespace qvit
