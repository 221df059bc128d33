// CHECK(condition): counts, and says where and in which case it did not hold.

#pragma once

#include <cstdio>
#include <string>

inline size_t n_checks = 0;
inline size_t n_failures = 0;
inline std::string check_case; // what is being tried, for the message

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        ++n_checks;                                                                                                    \
        if (!(condition)) {                                                                                            \
            ++n_failures;                                                                                              \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, check_case.c_str(), #condition);                    \
        }                                                                                                              \
    } while (false)

inline bool contains(const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos;
}

// What every error must be: one line, not too long, that says what is wrong and what to do.
inline bool is_sentence(const std::string & error) {
    return error.size() > 30 && error.size() < 600 && contains(error, ": ") && !contains(error, "\n");
}
