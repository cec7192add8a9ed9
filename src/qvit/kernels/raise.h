// How the kernels fail: with an exception. Code that is compiled without exceptions, for WebAssembly, calls `fail`,
// which has the embedder throw one of its own and does not return.
#pragma once

#include <exception>
#include <utility>

namespace qvit {

[[noreturn]] void fail(const char* what);

template <class Error, class... Arguments>
[[noreturn]] void raise(Arguments&&... arguments) {
#if defined(__cpp_exceptions)
    throw Error(std::forward<Arguments>(arguments)...);
#else
    fail(static_cast<const std::exception&>(Error(std::forward<Arguments>(arguments)...)).what());
#endif
}

}  // namespace qvit
