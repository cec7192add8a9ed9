// How a task's rows fall into groups of tokens that attend to one another.
#pragma once

#include <algorithm>

#include "pass.h"

namespace qvit {

// Some of a task's rows, all of one group: rows [row, row + count) of the task are tokens [token, token + count) of the
// group, whose codes are in the memory's part `slot`.
struct Segment {
    size_t row, count, slot, token;
};

// Call use(segment) for every group that has rows in the task: whole windows, or a range of an image's tokens.
template <class Use>
void each_segment(const Task& task, const Attentions& attentions, size_t group, Use use) {
    if (attentions.windows == 0) {
        use(Segment{0, task.count, task.image, task.row});
    } else {
        for (size_t row = 0; row < task.count; row += group) use(Segment{row, group, row / group, 0});
    }
}

inline KeyValues& memory_of(Pass& pass, Scratch& scratch, const Attentions& attentions) {
    return attentions.windows == 0 ? pass.halves[attentions.half] : scratch.windows;
}

// The row of a segment's token in what a trace holds of an image: group by group and in each head by head.
inline size_t traced_row(const Task& task, const Segment& segment, const Attention& a, size_t head) {
    const size_t group = (task.row + segment.row) / a.group;
    return (group * a.heads.count + head) * a.group + segment.token;
}

}  // namespace qvit
