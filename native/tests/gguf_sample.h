// A small GGUF without tensors that has a key of every kind, and a prefix under one.

#pragma once

#include "sample.h"

#include <algorithm>

enum { GGUF_UINT8 = 0, GGUF_INT8 = 1, GGUF_STRING = 8, GGUF_ARRAY = 9, GGUF_FLOAT64 = 12 };

inline void put_string(bytes & out, const std::string & text) {
    put<uint64_t>(out, text.size());
    put(out, text);
}

inline void put_array(bytes & out, const std::string & key, int32_t type, uint64_t n) {
    put_string(out, key);
    put<int32_t>(out, GGUF_ARRAY);
    put<int32_t>(out, type);
    put<uint64_t>(out, n);
}

inline bytes gguf_sample(const bytes & state, bool last, const std::string & key = "intactkv.state") {
    bytes out;
    put(out, std::string("GGUF"));
    put<uint32_t>(out, 3);
    put<uint64_t>(out, 0); // tensors
    put<uint64_t>(out, 16);
    const auto put_state = [&] {
        put_array(out, key, GGUF_UINT8, state.size());
        out.insert(out.end(), state.begin(), state.end());
    };
    if (!last) {
        put_state();
    }
    const size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    for (int32_t type = 0; type <= GGUF_FLOAT64; ++type) {
        if (type != GGUF_STRING && type != GGUF_ARRAY) {
            put_string(out, "scalar." + std::to_string(type));
            put<int32_t>(out, type);
            out.resize(out.size() + sizes[type], 1);
        }
    }
    put_string(out, "general.name"); // as long as no other key
    put<int32_t>(out, GGUF_STRING);
    put_string(out, std::string(600, 'n'));
    put_array(out, "fourteen.bytes", GGUF_STRING, 3); // as long as intactkv.state
    for (const char * text : { "", "a", "bcd" }) {
        put_string(out, text);
    }
    put_array(out, "numbers", GGUF_FLOAT64, 100);
    out.resize(out.size() + 800, 0x55);
    put_array(out, "none", GGUF_INT8, 0);
    if (last) {
        put_state();
    }
    return out;
}

// where the state in a GGUF ends
inline size_t gguf_state_end(const bytes & gguf, const bytes & state) {
    return std::search(gguf.begin(), gguf.end(), state.begin(), state.end()) - gguf.begin() + state.size();
}
