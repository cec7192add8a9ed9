// Register-only loops of the instructions that the kernels are made of: what this processor can reach at all.
//
// Prints, for every loop that the processor can run, its name and the billion multiply-adds per second of the fastest
// of several runs. benchmarks/kernels.py compiles and runs it.
#include <algorithm>
#include <chrono>
#include <cstdio>

namespace {

// Twelve independent sums hide every latency. No register is named as changed but those that a caller may rely on: the
// loops touch vector registers only, and nothing else here uses them.
#define TWELVE(LINE) \
    LINE("0")        \
    LINE("1") LINE("2") LINE("3") LINE("4") LINE("5") LINE("6") LINE("7") LINE("8") LINE("9") LINE("10") LINE("11")
#define DOT_512(SUM) "vpdpbusd %%zmm31, %%zmm30, %%zmm" SUM "\n"
#define DOT_256(SUM) "vpdpbusd %%ymm31, %%ymm30, %%ymm" SUM "\n"
#define LOOKUP_512(SUM) "vpermb %%zmm31, %%zmm30, %%zmm29\n vpaddusb %%zmm29, %%zmm" SUM ", %%zmm" SUM "\n"
#define LOOKUP_256(SUM) "vpshufb %%ymm15, %%ymm14, %%ymm13\n vpaddb %%ymm13, %%ymm" SUM ", %%ymm" SUM "\n"
// Four lookups fit into a byte, whose sums then become those of words and of the words' high bytes.
#define MIXED_256(SUM)                                                        \
    "vpshufb %%ymm15, %%ymm14, %%ymm13\n vpshufb %%ymm14, %%ymm15, %%ymm12\n" \
    "vpaddb %%ymm12, %%ymm13, %%ymm13\n vpshufb %%ymm15, %%ymm14, %%ymm12\n"  \
    "vpaddb %%ymm12, %%ymm13, %%ymm13\n vpshufb %%ymm14, %%ymm15, %%ymm12\n"  \
    "vpaddb %%ymm12, %%ymm13, %%ymm13\n vpsrlw $8, %%ymm13, %%ymm12\n"        \
    "vpaddw %%ymm13, %%ymm" SUM ", %%ymm" SUM "\n vpaddw %%ymm12, %%ymm" SUM ", %%ymm" SUM "\n"
#define PAIRS_256(SUM) "vpmaddubsw %%ymm15, %%ymm14, %%ymm13\n vpaddw %%ymm13, %%ymm" SUM ", %%ymm" SUM "\n"
#define WORDS_256(SUM) "vpmaddwd %%ymm15, %%ymm14, %%ymm13\n vpaddd %%ymm13, %%ymm" SUM ", %%ymm" SUM "\n"
#define CHANGED                                                                                                \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
        "xmm13", "xmm14", "xmm15"

constexpr long kRounds = 300000;

template <class Loop>
void measure(const char* name, long multiply_adds, Loop loop) {
    double best = 1e30;
    for (int run = 0; run < 7; ++run) {
        const auto start = std::chrono::steady_clock::now();
        for (long round = 0; round < kRounds; ++round) loop();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        best = std::min(best, taken.count());
    }
    std::printf("%s %.2f\n", name, 1e-9 * static_cast<double>(12 * multiply_adds * kRounds) / best);
}

}  // namespace

int main() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni"))
        measure("vpdpbusd-512", 64, [] { asm volatile(TWELVE(DOT_512)::: CHANGED); });
    if (__builtin_cpu_supports("avx512vbmi"))
        measure("vpermb-512", 192, [] { asm volatile(TWELVE(LOOKUP_512)::: CHANGED); });
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"))
        measure("vpdpbusd-256", 32, [] { asm volatile(TWELVE(DOT_256)::: CHANGED); });
    if (__builtin_cpu_supports("avx2")) {
        measure("vpshufb-256", 64, [] { asm volatile(TWELVE(LOOKUP_256)::: CHANGED); });
        measure("vpshufb-4-256", 256, [] { asm volatile(TWELVE(MIXED_256)::: CHANGED); });
        measure("vpmaddubsw-256", 32, [] { asm volatile(TWELVE(PAIRS_256)::: CHANGED); });
        measure("vpmaddwd-256", 16, [] { asm volatile(TWELVE(WORDS_256)::: CHANGED); });
    }
}
