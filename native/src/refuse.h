// Inside the file code, bad input is an exception that carries the one sentence; the functions of file.h catch it.

#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

namespace intactkv {

struct refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

#ifdef __GNUC__
[[noreturn]] inline void refuse(const char * format, ...) __attribute__((format(printf, 1, 2)));
#endif

[[noreturn]] inline void refuse(const char * format, ...) {
    char sentence[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof(sentence), format, args);
    va_end(args);
    throw refused(sentence);
}

} // namespace intactkv
