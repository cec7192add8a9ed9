// A value that is to stay in its register.
#pragma once

namespace {

// Keep a value in its register, as it is now. GCC would rather read it from memory again for every use, and would turn
// a chain of additions into a tree, whose branches do not fit into the registers.
template <class Vector>
[[gnu::always_inline]] inline Vector kept(Vector x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#endif
    return x;
}

}  // namespace
