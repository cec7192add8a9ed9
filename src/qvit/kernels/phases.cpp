// Which steps may follow one another on the same rows, and where all threads have to meet in between.
#include <algorithm>

#include "plan.h"
#include "sizes.h"

namespace qvit {

// A step joins the open phase if what it reads lies within a task's own rows; else there is a barrier and a new phase.
void Plan::add(Step::Kind kind, size_t index) {
    const size_t now = stages.size() - 1;
    const bool attention = kind == Step::Kind::project || kind == Step::Kind::attend;
    const size_t group = attention ? attentions[index].windows : 0;
    bool joins = !phases.empty() && phases.back().stage == now;
    switch (kind) {
        case Step::Kind::embed:
        case Step::Kind::merge: joins = false; break;  // reads rows of another stream
        case Step::Kind::project:
            // Inside windows it has to come with its attention; else its rows have to be in the image's order.
            joins = joins && phases.back().windows == group;
            break;
        case Step::Kind::attend:
            if (group == 0) joins = false;  // reads keys and values of a whole image
            break;
        case Step::Kind::feed_forward:
        case Step::Kind::norm: break;
    }
    if (!joins) phases.push_back({now, group, {}});
    if (kind == Step::Kind::project && group == 0) {
        // Some rows may still read the keys and values of the attention before, so two memories take turns.
        const auto whole = [](const Attentions& other) { return other.windows == 0; };
        attentions[index].half =
            static_cast<size_t>(std::count_if(attentions.begin(), attentions.end() - 1, whole)) % 2;
    }
    phases.back().steps.push_back({kind, index});
}

size_t Plan::windows_of(size_t rows, size_t columns, size_t shift_rows, size_t shift_columns) {
    const Stage& now = stage();
    Windows made;
    made.tokens = rows * columns;
    made.count = now.tokens / made.tokens;
    made.at_once = made.tokens <= kBlockRows / 2 ? kBlockRows / made.tokens : 2 * made.tokens <= kWindowRows ? 2 : 1;
    made.at_once = std::min(made.at_once, made.count);
    // The region of a place after the shift: neighbours in the image share it.
    const auto region = [](size_t at, size_t side, size_t length, size_t shift) -> uint8_t {
        return shift == 0 || at < side - length ? 0 : at < side - shift ? 1 : 2;
    };
    for (size_t top = 0; top < now.rows; top += rows)
        for (size_t left = 0; left < now.columns; left += columns)
            for (size_t i = top; i < top + rows; ++i)
                for (size_t j = left; j < left + columns; ++j) {
                    const size_t row = (i + shift_rows) % now.rows, column = (j + shift_columns) % now.columns;
                    made.order.push_back(static_cast<uint32_t>(row * now.columns + column));
                    if (shift_rows != 0 || shift_columns != 0)
                        made.regions.push_back(static_cast<uint8_t>(3 * region(i, now.rows, rows, shift_rows) +
                                                                    region(j, now.columns, columns, shift_columns)));
                }
    largest_task = std::max(largest_task, made.at_once * made.tokens);
    for (size_t i = 0; i < windows.size(); ++i)
        if (windows[i].order == made.order && windows[i].tokens == made.tokens) return i + 1;
    windows.push_back(std::move(made));
    return windows.size();
}

}  // namespace qvit
