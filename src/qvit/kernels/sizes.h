// Sizes that decide how work is cut into tasks.
#pragma once

#include <cstddef>

namespace qvit {

constexpr size_t kBlockRows = 99;      // rows that one task takes through a block: their codes stay in the second cache
constexpr size_t kRowUnit = 3;         // tasks begin at multiples of it, for whole tiles; kBlockRows is one
constexpr size_t kAttentionRows = 12;  // query rows whose logits are in the first cache together
constexpr size_t kLargestTile = 192, kLargestGroup = 64;  // of any product
constexpr size_t kWindowRows = 128;  // two windows make one task up to this many rows: they fill the tiles better

}  // namespace qvit
