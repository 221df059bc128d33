// Inside the file code, bad input is an exception that carries the one sentence; parse(), compatible() and read_bytes()
// catch it.

#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

namespace intactkv {

// What to do, the end of most sentences. DOWNLOAD: the bytes are not those that were written. REMAKE: the checksum was
// right, so whoever wrote the file wrote this.
inline constexpr const char * DOWNLOAD = "download it again";
inline constexpr const char * REMAKE = "make the prefix again with this version of intactkv-export";

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
