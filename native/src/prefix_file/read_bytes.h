// Files on disk: the bytes of a prefix, wherever they are kept.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace intactkv {

// Reads an `.ikv` file, or one embedded in a GGUF: behind its tensors, or in its array intactkv.state; the first,
// where it has several. The bytes are as unchecked as the file.
bool read_bytes(const char * path, std::vector<uint8_t> & out, std::string & error);

// One of a file's prefixes: its name, "" where there is only one, and its bytes in the file.
struct embedded_prefix {
    std::string name;
    uint64_t at;
    uint64_t size;
};

// The prefixes of a file: a GGUF has none, one, or several with different names; an `.ikv` is one. Where they are is
// checked, and what they begin and end with.
bool list_prefixes(const char * path, std::vector<embedded_prefix> & out, std::string & error);

// The bytes of one, as unchecked as the file.
bool read_prefix(const char * path, const embedded_prefix & from, std::vector<uint8_t> & out, std::string & error);

// Whether path is a file that ends in the trailer's magic.
bool has_trailer(const char * path);

} // namespace intactkv
