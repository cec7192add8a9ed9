// AVX-512 with VNNI, and with VBMI for 2 bits.
#include "simd_avx512.h"

#include "kept.h"
#include "lookup.h"
#include "row_ops.h"

namespace {

// A tile of Rows x 16 Panels sums: one vpdpbusd does 64 multiply-adds, exactly.
template <int Rows, int Panels>
void dense_tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
    __m512i sums[Rows][Panels];
    each_sum<Rows, Panels>([&](auto r, auto p) { sums[r][p] = _mm512_setzero_si512(); });
    const size_t panel = kChannels * k;
    for (size_t at = 0; at < k; at += kDepth) {
        __m512i weights[Panels];
        unrolled<Panels>([&](auto p) { weights[p] = _mm512_loadu_si512(w + p * panel + at * kChannels); });
        unrolled<Rows>([&](auto r) {
            const __m512i codes = _mm512_set1_epi32(load_word(a + r * stride + at));
            unrolled<Panels>([&](auto p) { sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], codes, weights[p]); });
        });
    }
    each_sum<Rows, Panels>(
        [&](auto r, auto p) { _mm512_storeu_si512(out + r * out_stride + p * kChannels, sums[r][p]); });
}

using Tile = void (*)(const uint8_t*, size_t, const uint8_t*, size_t, int32_t*, size_t);

constexpr int kRows = 6, kPanels = 4;  // 24 of the 32 registers hold sums

template <int Panels>
constexpr Tile kTiles[kRows] = {dense_tile<1, Panels>, dense_tile<2, Panels>, dense_tile<3, Panels>,
                                dense_tile<4, Panels>, dense_tile<5, Panels>, dense_tile<6, Panels>};
constexpr const Tile* kDenseTiles[kPanels] = {kTiles<1>, kTiles<2>, kTiles<3>, kTiles<4>};

void run_dense(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t, size_t k, size_t first,
               size_t last, int32_t* out, size_t out_stride) {
    for (size_t channel = first; channel < last; channel += kPanels * kChannels) {
        const size_t panels = std::min<size_t>(kPanels, (last - channel) / kChannels);
        for (size_t r = 0; r < count; r += kRows) {
            const size_t height = std::min<size_t>(kRows, count - r);
            kDenseTiles[panels - 1][height - 1](rows + r * stride, stride, packed + channel * k, k,
                                                out + r * out_stride + channel - first, out_stride);
        }
    }
}

// The first `count` bytes of a vector, or all.
inline __mmask64 first_bytes(size_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

// 16 rows of 16 words become columns.
inline void transpose(__m512i (&words)[16]) {
    __m512i pairs[16], fours[16];
    unrolled<8>([&](auto i) {
        pairs[2 * i] = _mm512_unpacklo_epi32(words[2 * i], words[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(words[2 * i], words[2 * i + 1]);
    });
    unrolled<4>([&](auto i) {  // column 4 l + c of rows 4 i to 4 i + 3 is lane l of fours[4 i + c]
        unrolled<2>([&](auto half) {
            const __m512i low = pairs[4 * i + half], high = pairs[4 * i + 2 + half];
            fours[4 * i + 2 * half] = _mm512_unpacklo_epi64(low, high);
            fours[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(low, high);
        });
    });
    unrolled<4>([&](auto c) {
        const __m512i even[] = {_mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88),
                                _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88)};
        const __m512i odd[] = {_mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd),
                               _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd)};
        words[c] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        words[4 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        words[8 + c] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        words[12 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    });
}

// The channels of a panel at once. Words of other channels may be another thread's, so they are not written.
void dense_pack_channels(uint8_t* packed, size_t k, size_t channel, size_t channels, const uint8_t* codes,
                         size_t stride, int low) {
    const __m512i shift = _mm512_set1_epi8(static_cast<char>(low));
    const size_t last = channel + channels;
    for (size_t end; channel < last; channel = end) {
        const size_t lane = channel % kChannels, panel = channel - lane;
        end = std::min(last, panel + kChannels);
        const __mmask16 mask = static_cast<__mmask16>(((1u << (end - channel)) - 1) << lane);
        for (size_t at = 0; at < k; at += 64) {
            __m512i words[kChannels] = {};
            for (size_t i = 0; i < end - channel; ++i)
                words[lane + i] =
                    _mm512_sub_epi8(_mm512_maskz_loadu_epi8(first_bytes(k - at), codes + i * stride + at), shift);
            transpose(words);
            for (size_t i = 0; i < std::min<size_t>(k - at, 64); i += kDepth)
                _mm512_mask_storeu_epi32(packed + dense_index(panel, at + i, k), mask, words[i / kDepth]);
        }
        codes += (end - channel) * stride;
    }
}

// Weights of up to 4 bits stay two to a byte in memory: half the bytes to keep and to load, and vpdpbusd leaves the
// units that unpack them idle anyway. A byte holds code + 8 of a channel in its low half and of the channel 16 further
// on in its high half: [n / 32 pairs of panels][k / 4][16 channels][4 k].
constexpr size_t kPair = 2 * kChannels;

size_t nibble_weight_bytes(size_t n, size_t k) { return n * k / 2; }

void nibble_pack_channel(uint8_t* packed, size_t k, size_t channel, const uint8_t* codes, int low) {
    const size_t base = channel / kPair * kChannels * k, lane = channel % kChannels * kDepth;
    const int high = channel % kPair / kChannels * 4;
    for (size_t at = 0; at < k; ++at) {
        uint8_t& byte = packed[base + at / kDepth * kChannels * kDepth + lane + at % kDepth];
        byte = static_cast<uint8_t>((byte & (0xF0 >> high)) | (codes[at] - low + 8) << high);
    }
}

template <int Rows, int Pairs>
void nibble_tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t k, int32_t* out, size_t out_stride) {
    __m512i sums[Rows][2 * Pairs];
    each_sum<Rows, 2 * Pairs>([&](auto r, auto p) { sums[r][p] = _mm512_setzero_si512(); });
    const __m512i low = _mm512_set1_epi8(0x0F), eight = _mm512_set1_epi8(8);
    for (size_t at = 0; at < k; at += kDepth) {
        __m512i weights[2 * Pairs];
        unrolled<Pairs>([&](auto p) {
            const __m512i both = _mm512_loadu_si512(w + p * kChannels * k + at * kChannels);
            weights[2 * p] = _mm512_sub_epi8(_mm512_and_si512(both, low), eight);
            weights[2 * p + 1] = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), eight);
        });
        unrolled<Rows>([&](auto r) {
            const __m512i codes = _mm512_set1_epi32(load_word(a + r * stride + at));
            unrolled<2 * Pairs>([&](auto p) { sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], codes, weights[p]); });
        });
    }
    each_sum<Rows, 2 * Pairs>(
        [&](auto r, auto p) { _mm512_storeu_si512(out + r * out_stride + p * kChannels, sums[r][p]); });
}

template <int Pairs>
constexpr Tile kNibbles[kRows] = {nibble_tile<1, Pairs>, nibble_tile<2, Pairs>, nibble_tile<3, Pairs>,
                                  nibble_tile<4, Pairs>, nibble_tile<5, Pairs>, nibble_tile<6, Pairs>};
constexpr const Tile* kNibbleTiles[kPanels / 2] = {kNibbles<1>, kNibbles<2>};

void run_nibbles(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t, size_t k,
                 size_t first, size_t last, int32_t* out, size_t out_stride) {
    for (size_t channel = first; channel < last; channel += kPanels * kChannels) {
        const size_t pairs = std::min<size_t>(kPanels / 2, (last - channel) / kPair);
        for (size_t r = 0; r < count; r += kRows) {
            const size_t height = std::min<size_t>(kRows, count - r);
            kNibbleTiles[pairs - 1][height - 1](rows + r * stride, stride, packed + channel / 2 * k, k,
                                                out + r * out_stride + channel - first, out_stride);
        }
    }
}

// 2 bits x 2 bits: three codes of a channel are 6 bits, and so are three codes of a row. So a row's triple chooses one
// of 64 constant tables of 64 bytes, in which vpermb looks up 64 channels' triples at once: 192 multiply-adds by one
// vpermb and one vpaddusb.
//
// Layout: [n / 64 groups][64 starts, k / 3 triples][64 channels], a byte a triple w0 + 4 w1 + 16 w2 of the codes modulo
// 4. A triple is (i, i + T, i + 2 T) with T = ceil(k / 3), so that a row is packed by whole vectors. A row's triple is
// held times 64, the distance of its table, in 16 bits.
constexpr size_t kGroup = 64, kTriple = 3, kTableBytes = sizeof(uint16_t);
constexpr size_t kBeforeWidening =
    (255 / (Terms<2>::kRange * kTriple) - 1) / 4 * 4 + 1;                // one step, then four at a time
constexpr size_t kTriplesAtOnce = 65535 / (Terms<2>::kRange * kTriple);  // what a 16-bit sum holds

struct Tables {
    alignas(64) uint8_t bytes[64][64];
    Tables() {
        for (int row = 0; row < 64; ++row)
            for (int channel = 0; channel < 64; ++channel) bytes[row][channel] = lookup_entry<2, kTriple>(row, channel);
    }
};
const Tables kTables;

inline const uint8_t* table(size_t distance) { return &kTables.bytes[0][0] + distance; }

size_t triples(size_t k) { return (k + kTriple - 1) / kTriple; }

size_t lookup_weight_bytes(size_t n, size_t k) { return n / kGroup * (kStarts<kGroup> + triples(k) * kGroup); }

// Triples [at, at + 64) of one channel; the sum of its codes is added to `totals`.
inline __m512i channel_triples(const uint8_t* codes, size_t k, size_t at, int low, __m512i& totals) {
    const __m512i shift = _mm512_set1_epi8(static_cast<char>(low)), two_bits = _mm512_set1_epi8(3);
    const size_t count = triples(k), some = std::min<size_t>(count - at, 64);
    __m512i triple = _mm512_setzero_si512();
    for (size_t part = kTriple; part-- > 0;) {
        const size_t first = at + part * count;
        const __mmask64 mask = first_bytes(std::min(some, first < k ? k - first : 0));
        const __m512i code = _mm512_maskz_loadu_epi8(mask, codes + first);
        totals = _mm512_add_epi64(totals, _mm512_sad_epu8(code, _mm512_setzero_si512()));
        triple = _mm512_or_si512(_mm512_slli_epi16(triple, 2),
                                 _mm512_and_si512(_mm512_maskz_sub_epi8(mask, code, shift), two_bits));
    }
    return triple;
}

inline void store_channel_start(uint8_t* group, size_t channel, size_t k, int low, __m512i totals) {
    const int total = static_cast<int>(_mm512_reduce_add_epi64(totals)) - low * static_cast<int>(k);
    store_start<2>(group, channel % kGroup, total, kTriple * triples(k));
}

void lookup_pack_channel(uint8_t* packed, size_t k, size_t channel, const uint8_t* codes, int low) {
    const size_t count = triples(k);
    uint8_t* group = packed + channel / kGroup * lookup_weight_bytes(kGroup, k);
    uint8_t* to = group + kStarts<kGroup> + lookup_lane<kGroup>(channel);
    __m512i totals = _mm512_setzero_si512();
    for (size_t at = 0; at < count; at += 64) {
        alignas(64) uint8_t bytes[64];
        _mm512_store_si512(bytes, channel_triples(codes, k, at, low, totals));
        for (size_t i = 0; i < std::min<size_t>(count - at, 64); ++i) to[(at + i) * kGroup] = bytes[i];
    }
    store_channel_start(group, channel, k, low, totals);
}

// Sixteen channels at once, a quarter of a group, whose lanes are the same bytes of sixteen words: four triples of each
// are gathered into these words, and stored one by one where the quarter's bytes are. Other bytes may be another
// thread's, so they are not written, not even as they are.
void lookup_pack_channels(uint8_t* packed, size_t k, size_t channel, size_t channels, const uint8_t* codes,
                          size_t stride, int low) {
    constexpr size_t kQuarter = kGroup / 4;
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i rows = _mm512_slli_epi32(order, 6);
    const size_t count = triples(k), last = channel + channels;
    for (size_t end; channel < last; channel = end) {
        end = std::min(last, (channel / kQuarter + 1) * kQuarter);
        uint8_t* group = packed + channel / kGroup * lookup_weight_bytes(kGroup, k);
        const size_t some = end - channel, lane = lookup_lane<kGroup>(channel), byte = lane % 4;
        const __mmask64 words = first_bytes(lane - byte + 4 * some) & ~first_bytes(lane - byte);
        const __mmask64 mask = words & uint64_t{0x1111111111111111} << byte;
        __m512i totals[kQuarter] = {};
        for (size_t at = 0; at < count; at += 64) {
            alignas(64) uint8_t bytes[kQuarter][64];
            for (size_t i = 0; i < some; ++i)
                _mm512_store_si512(bytes[lane / 4 + i], channel_triples(codes + i * stride, k, at, low, totals[i]));
            for (size_t i = 0; i < std::min<size_t>(count - at, 64); i += 4) {
                const __m512i four = _mm512_i32gather_epi32(rows, bytes[0] + i, 1);
                uint8_t* to = group + kStarts<kGroup> + (at + i) * kGroup;
                for (size_t j = 0; j < std::min<size_t>(count - at - i, 4); ++j) {
                    const __m512i turn = _mm512_set1_epi32(static_cast<int>(8 * (byte + 4 - j)));
                    _mm512_mask_storeu_epi8(to + j * kGroup, mask, _mm512_rolv_epi32(four, turn));
                }
            }
        }
        for (size_t i = 0; i < some; ++i) store_channel_start(group, channel + i, k, low, totals[i]);
        codes += some * stride;
    }
}

void lookup_pack_columns(const uint8_t* codes, size_t stride, size_t k, size_t width, int low, uint8_t* packed) {
    alignas(64) uint8_t order[kGroup];  // the channel of each lane
    for (size_t channel = 0; channel < kGroup; ++channel)
        order[lookup_lane<kGroup>(channel)] = static_cast<uint8_t>(channel);
    const __m512i lanes = _mm512_load_si512(order), shift = _mm512_set1_epi8(static_cast<char>(low));
    const size_t count = triples(k);
    for (size_t channel = 0; channel < width; channel += kGroup) {
        uint8_t* group = packed + channel / kGroup * lookup_weight_bytes(kGroup, k);
        const __mmask64 some = first_bytes(width - channel);
        __m512i starts[4];
        for (__m512i& start : starts) start = _mm512_set1_epi32(-Terms<2>::kLowest * static_cast<int>(kTriple * count));
        for (size_t i = 0; i < count; ++i) {
            __m512i triple = _mm512_setzero_si512(), total = triple;
            for (size_t part = kTriple; part-- > 0;) {
                const size_t row = i + part * count;
                triple = _mm512_slli_epi16(triple, 2);
                if (row >= k) continue;
                const __m512i code =
                    _mm512_sub_epi8(_mm512_maskz_loadu_epi8(some, codes + row * stride + channel), shift);
                triple = _mm512_or_si512(triple, _mm512_and_si512(code, _mm512_set1_epi8(3)));
                total = _mm512_add_epi8(total, code);
            }
            _mm512_storeu_si512(group + kStarts<kGroup> + i * kGroup, _mm512_permutexvar_epi8(lanes, triple));
            total = _mm512_permutexvar_epi8(lanes, total);
            unrolled<4>([&](auto part) {
                const __m512i own = _mm512_set1_epi32(1 << 8 * (part / 2 + part % 2 * 2));
                starts[part] = _mm512_dpbusd_epi32(starts[part], own, total);
            });
        }
        for (size_t part = 0; part < 4; ++part) _mm512_storeu_si512(group + part * 64, starts[part]);
    }
}

size_t lookup_row_bytes(size_t k) { return round_up(kTableBytes * triples(k), 64); }

void lookup_pack_rows(const uint8_t* codes, size_t stride, size_t rows, size_t k, uint8_t* out, size_t out_stride) {
    const size_t count = triples(k);
    for (size_t i = 0; i < count; i += 32) {
        __mmask32 masks[kTriple];
        unrolled<kTriple>([&](auto part) {
            const size_t first = i + part * count;
            masks[part] = static_cast<__mmask32>(first_bytes(std::min(count - i, first < k ? k - first : 0)));
        });
        for (size_t r = 0; r < rows; ++r) {
            __m512i words[kTriple];
            unrolled<kTriple>([&](auto part) {
                const uint8_t* from = codes + r * stride + i + part * count;
                words[part] = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(masks[part], from));
            });
            const __m512i high = _mm512_or_si512(words[1], _mm512_slli_epi16(words[2], 2));
            const __m512i triple = _mm512_or_si512(words[0], _mm512_slli_epi16(high, 2));
            _mm512_storeu_si512(out + r * out_stride + kTableBytes * i, _mm512_slli_epi16(triple, 6));
        }
    }
}

template <int Rows, int Groups>
void lookup_tile(const uint8_t* a, size_t stride, const uint8_t* w, size_t group_bytes, size_t count,
                 const uint8_t* starts, int32_t* out, size_t out_stride) {
    // Sums of the 16-bit words as they are, and of their high bytes: the low bytes' sum is the difference.
    __m512i words[Rows][Groups], highs[Rows][Groups];
    each_sum<Rows, Groups>([&](auto r, auto g) { words[r][g] = highs[r][g] = _mm512_setzero_si512(); });
    // No sum is too large. Additions that saturate leave the execution units of vpermb alone, on AMD's and Intel's.
    for (size_t at = 0; at < count;) {
        __m512i bytes[Rows][Groups];
        const size_t until = std::min(at + kBeforeWidening, count);
        const auto step = [&](auto first, size_t i, const auto& table_of) {
            __m512i channels[Groups];
            unrolled<Groups>([&](auto g) { channels[g] = kept(_mm512_loadu_si512(w + g * group_bytes + i * kGroup)); });
            unrolled<Rows>([&](auto r) {
                const __m512i entries = kept(_mm512_load_si512(table_of(r)));
                unrolled<Groups>([&](auto g) {
                    const __m512i found = _mm512_permutexvar_epi8(channels[g], entries);
                    bytes[r][g] = kept(first() ? found : _mm512_adds_epu8(bytes[r][g], found));
                });
            });
        };
        const auto one_step = [&](auto first, size_t i) {
            step(first, i, [&](auto r) {
                uint16_t one;
                std::memcpy(&one, a + r * stride + kTableBytes * i, sizeof one);
                return table(one);
            });
        };
        one_step(std::true_type(), at++);
        for (; at + 4 <= until; at += 4) {
            // A row's four triples by one load: a load of each would hold up those of the tables.
            uint64_t four[Rows];
            unrolled<Rows>([&](auto r) { std::memcpy(&four[r], a + r * stride + kTableBytes * at, sizeof four[r]); });
            unrolled<4>([&](auto i) {
                step(std::false_type(), at + i,
                     [&](auto r) { return table(static_cast<uint16_t>(four[r] >> 16 * i)); });
            });
        }
        for (; at < until; ++at) one_step(std::false_type(), at);
        each_sum<Rows, Groups>([&](auto r, auto g) {
            words[r][g] = _mm512_add_epi16(words[r][g], bytes[r][g]);
            highs[r][g] = _mm512_adds_epu16(highs[r][g], _mm512_srli_epi16(bytes[r][g], 8));
        });
    }
    const __m512i low = _mm512_set1_epi32(0xFFFF);
    each_sum<Rows, Groups>([&](auto r, auto g) {
        const __m512i lows = _mm512_sub_epi16(words[r][g], _mm512_slli_epi16(highs[r][g], 8));
        const __m512i parts[4] = {_mm512_and_si512(lows, low), _mm512_srli_epi32(lows, 16),
                                  _mm512_and_si512(highs[r][g], low), _mm512_srli_epi32(highs[r][g], 16)};
        int32_t* to = out + r * out_stride + g * kGroup;
        const void* from = starts == nullptr ? static_cast<const void*>(to) : starts + g * group_bytes;
        unrolled<4>([&](auto p) {
            const __m512i start = _mm512_loadu_si512(static_cast<const int32_t*>(from) + p * 16);
            _mm512_storeu_si512(to + p * 16, _mm512_add_epi32(start, parts[p]));
        });
    });
}

// As many rows as leave registers for the sums of them all.
constexpr LookupTile kOneGroup[] = {lookup_tile<1, 1>, lookup_tile<2, 1>, lookup_tile<3, 1>,
                                    lookup_tile<4, 1>, lookup_tile<5, 1>, lookup_tile<6, 1>};
constexpr LookupTile kTwoGroups[] = {lookup_tile<1, 2>, lookup_tile<2, 2>, lookup_tile<3, 2>, lookup_tile<4, 2>};
constexpr LookupTile kThreeGroups[] = {lookup_tile<1, 3>, lookup_tile<2, 3>, lookup_tile<3, 3>};
constexpr LookupTiles kLookupTiles[] = {kOneGroup, kTwoGroups, kThreeGroups};

void run_lookup(const uint8_t* rows, size_t stride, size_t count, const uint8_t* packed, size_t, size_t k, size_t first,
                size_t last, int32_t* out, size_t out_stride) {
    run_lookup_tiles<kGroup, kTriplesAtOnce, kTableBytes>(kLookupTiles, rows, stride, count, packed, triples(k), first,
                                                          last, out, out_stride);
}

constexpr Product kLookup = {"lookup",
                             2,
                             2,
                             kGroup,
                             192,
                             lookup_weight_bytes,
                             lookup_pack_channel,
                             lookup_row_bytes,
                             lookup_pack_rows,
                             run_lookup,
                             lookup_pack_columns,
                             lookup_pack_channels};
constexpr Product kDense = {
    "vnni",  8,         8,       kChannels,          64, dense_weight_bytes, dense_pack_channel, byte_row,
    nullptr, run_dense, nullptr, dense_pack_channels};
constexpr Product kNibble = {"vnni-4", 8,       4,          kPair, 64, nibble_weight_bytes, nibble_pack_channel,
                             byte_row, nullptr, run_nibbles};
constexpr Product kProducts[] = {kLookup, kNibble, kDense};
constexpr Product kMoving[] = {kLookup, kDense};

}  // namespace

namespace qvit {
extern const Isa kAvx512 = {"avx512-vnni-vbmi", kProducts, 3, kMoving, 2, kRowOps};
}
