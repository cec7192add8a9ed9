// What the instruction sets with 256-bit vectors share: the lookups of weights of 2 bits.
#pragma once

#include "bytes_avx2.h"
#include "lookup_tiles.h"
#include "panels.h"

namespace {

constexpr size_t kLanes = 8;                  // sums in a vector
constexpr int kVectors = kChannels / kLanes;  // vectors in a panel

// 64 multiply-adds by one vpshufb and one vpaddb.
constexpr size_t kGroup = sizeof(Vector);

constexpr LookupTile kOneGroup[] = {lookup_tile<1, 1>, lookup_tile<2, 1>, lookup_tile<3, 1>, lookup_tile<4, 1>};
constexpr LookupTile kTwoGroups[] = {lookup_tile<1, 2>, lookup_tile<2, 2>, lookup_tile<3, 2>, lookup_tile<4, 2>};
constexpr LookupTiles kLookupTiles[] = {kOneGroup, kTwoGroups};
constexpr Product kLookup = pairs_product<2, kGroup, kLookupTiles>("lookup", 64);

template <int Groups>
constexpr LookupTile kOneRow[] = {mixed_tile<kGroup, Groups>};
constexpr LookupTiles kMixedTiles[] = {kOneRow<1>, kOneRow<2>, kOneRow<3>};
constexpr Product kMixed = pairs_product<4, kGroup, kMixedTiles>("lookup-4", 192);

}  // namespace
