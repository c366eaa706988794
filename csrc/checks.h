// Errors of bad arguments: the stable ABI passes on std::runtime_error alone, so the Python side
// turns one whose text begins with this marker into a ValueError (medusa_kernels/_ops.py).
#pragma once

#include <sstream>
#include <stdexcept>

namespace medusa_kernels {

template <typename... Args>
[[noreturn, gnu::cold, gnu::noinline]] void value_error(const Args&... args) {
    std::ostringstream text;
    text << "ValueError: ";
    (text << ... << args);
    throw std::runtime_error(text.str());
}

}  // namespace medusa_kernels

#define MK_CHECK_VALUE(condition, ...)                  \
    do {                                                \
        if (!(condition)) [[unlikely]]                  \
            ::medusa_kernels::value_error(__VA_ARGS__); \
    } while (0)
