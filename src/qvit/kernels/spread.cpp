#include "spread.h"

namespace qvit {

#if defined(__linux__)

// Numbers beyond cpu_set_t's (1024) count as nobody's, and affinities that do not fit into one stay as they are.

void Spread::begin() {
    CPU_ZERO(&taken_);
    CPU_SET(sched_getcpu(), &taken_);
}

void Spread::join() {
    cpu_set_t allowed;
    if (CPU_ISSET(sched_getcpu(), &taken_) && sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        cpu_set_t free;
        CPU_AND(&free, &allowed, &taken_);
        CPU_XOR(&free, &free, &allowed);
        // Refused where none is left.
        if (sched_setaffinity(0, sizeof free, &free) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
    }
    CPU_SET(sched_getcpu(), &taken_);
}

#else

void Spread::begin() {}
void Spread::join() {}

#endif

}  // namespace qvit
