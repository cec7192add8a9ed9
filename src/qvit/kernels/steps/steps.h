// The steps of a pass over a task's rows.
#pragma once

#include "pass.h"

namespace qvit {

// The residual stream's first values: prefix tokens and embedded patches.
void embed(const Plan& plan, Pass& pass, Scratch& scratch, const Task& task);
// Queries, keys and values of attentions side by side: codes from the residual stream.
void project(const Plan& plan, Pass& pass, Scratch& scratch, const Task& task, const Attentions& attentions);
// x += projections of the attentions' outputs; of a pooling attention x is that.
void attend(const Plan& plan, Pass& pass, Scratch& scratch, const Task& task, const Attentions& attentions);
// x += the MLPs of x.
void feed_forward(const Plan& plan, Pass& pass, Scratch& scratch, const Task& task, const Mlps& mlps);
// x = norm(x)
void normalize(const Plan& plan, Pass& pass, Scratch& scratch, const Task& task, const Norm& norm);
// x = a layer of four neighbours of the stage before.
void merge(const Plan& plan, Pass& pass, Scratch& scratch, const Task& task, const Merge& merge);
// An image's logits, or its pooled vectors.
void finish(const Plan& plan, Pass& pass, Scratch& scratch, size_t image);

}  // namespace qvit
