// The steps of a pass over some rows of one image.
#pragma once

#include "pass.h"

namespace qvit {

// The residual stream's first values: prefix tokens and embedded patches.
void embed(const Plan& plan, Pass& pass, Scratch& scratch, const Rows& rows);
// Queries, keys and values of a block: codes from the residual stream.
void project(const Plan& plan, Pass& pass, Scratch& scratch, const Rows& rows, size_t block);
// x += projection of the attention's output.
void attend(const Plan& plan, Pass& pass, Scratch& scratch, const Rows& rows, size_t block);
// x += the MLP of x.
void feed_forward(const Plan& plan, Pass& pass, Scratch& scratch, const Rows& rows, size_t block);
// An image's logits.
void classify(const Plan& plan, Pass& pass, Scratch& scratch, size_t image);

}  // namespace qvit
