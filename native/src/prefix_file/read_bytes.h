// Files on disk: the bytes of a prefix, wherever they are kept.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace intactkv {

// Reads an `.ikv` file, or one embedded in a GGUF: behind its tensors, or in its array intactkv.state. The bytes are as
// unchecked as the file.
bool read_bytes(const char * path, std::vector<uint8_t> & out, std::string & error);

// Whether path is a file that ends in the trailer's magic.
bool has_trailer(const char * path);

} // namespace intactkv
