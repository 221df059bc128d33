// A small GGUF that has a key of every kind, and a prefix: under one of them, or behind its tensors.

#pragma once

#include "sample.h"

#include <algorithm>
#include <string>
#include <vector>

enum {
    GGUF_UINT8 = 0,
    GGUF_INT8 = 1,
    GGUF_UINT32 = 4,
    GGUF_STRING = 8,
    GGUF_ARRAY = 9,
    GGUF_UINT64 = 10,
    GGUF_FLOAT64 = 12
};

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

template <typename T> void put_number(bytes & out, const std::string & key, int32_t type, T value) {
    put_string(out, key);
    put<int32_t>(out, type);
    put<T>(out, value);
}

// Keys of every kind, 15 of them.
inline void put_keys(bytes & out) {
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
}

inline void put_head(bytes & out, uint64_t n_tensors, uint64_t n_kv) {
    put(out, std::string("GGUF"));
    put<uint32_t>(out, 3);
    put<uint64_t>(out, n_tensors);
    put<uint64_t>(out, n_kv);
}

// Without tensors; the state is an array.
inline bytes gguf_sample(const bytes & state, bool last, const std::string & key = "intactkv.state") {
    bytes out;
    put_head(out, 0, 16);
    const auto put_state = [&] {
        put_array(out, key, GGUF_UINT8, state.size());
        out.insert(out.end(), state.begin(), state.end());
    };
    if (!last) {
        put_state();
    }
    put_keys(out);
    if (last) {
        put_state();
    }
    return out;
}

// With n_tensors tensors of 40 bytes each, and the state behind them. The keys say `offset` and `size` instead, if given.
struct gguf_behind {
    uint32_t n_tensors = 2;
    uint32_t alignment = 32;
    int64_t offset = -1;
    int64_t size = -1;
    int32_t type = GGUF_UINT64;
    bool with_size = true;

    uint64_t each() const { return (40 + alignment - 1) / alignment * alignment; }

    bytes file(const bytes & state) const {
        bytes out;
        put_head(out, n_tensors, 15 + 1 + 1 + with_size);
        put_number<uint64_t>(out, "intactkv.state.offset", type, offset < 0 ? n_tensors * each() : uint64_t(offset));
        put_keys(out);
        put_number<uint32_t>(out, "general.alignment", GGUF_UINT32, alignment);
        if (with_size) {
            put_number<uint64_t>(out, "intactkv.state.size", type, size < 0 ? state.size() : uint64_t(size));
        }
        for (uint32_t i = 0; i < n_tensors; ++i) {
            put_string(out, "tensor." + std::to_string(i));
            put<uint32_t>(out, 2); // dimensions
            put<uint64_t>(out, 5);
            put<uint64_t>(out, 2);
            put<int32_t>(out, 0);
            put<uint64_t>(out, i * each());
        }
        out.resize((out.size() + alignment - 1) / alignment * alignment + n_tensors * each());
        out.insert(out.end(), state.begin(), state.end());
        return out;
    }
};

// Two tensors of 40 bytes, and several prefixes behind them, each where tensors may begin. The keys say what is in names,
// offsets, sizes; offsets and sizes are first what they must be.
struct gguf_several {
    std::vector<bytes> prefixes;
    std::vector<std::string> names;
    std::vector<uint64_t> offsets, sizes;

    explicit gguf_several(const std::vector<bytes> & prefixes) :
        prefixes(prefixes) {
        uint64_t at = 128;
        for (const bytes & p : prefixes) {
            names.push_back("p-" + std::to_string(names.size()));
            offsets.push_back(at);
            sizes.push_back(p.size());
            at += (p.size() + 31) / 32 * 32;
        }
    }

    bytes file(int32_t type = GGUF_UINT64) const {
        bytes out;
        put_head(out, 2, 15 + 5);
        put_keys(out);
        put_array(out, "intactkv.prefix.names", GGUF_STRING, names.size());
        for (const std::string & name : names) {
            put_string(out, name);
        }
        const auto put_numbers = [&](const char * key, const std::vector<uint64_t> & values) {
            put_array(out, key, type, values.size());
            for (const uint64_t value : values) {
                put<uint64_t>(out, value);
            }
        };
        put_numbers("intactkv.prefix.offsets", offsets);
        put_numbers("intactkv.prefix.sizes", sizes);
        put_number<uint64_t>(out, "intactkv.state.offset", GGUF_UINT64, 128);
        put_number<uint64_t>(out, "intactkv.state.size", GGUF_UINT64, prefixes[0].size());
        for (uint32_t i = 0; i < 2; ++i) {
            put_string(out, "tensor." + std::to_string(i));
            put<uint32_t>(out, 2); // dimensions
            put<uint64_t>(out, 5);
            put<uint64_t>(out, 2);
            put<int32_t>(out, 0);
            put<uint64_t>(out, i * 64);
        }
        out.resize((out.size() + 31) / 32 * 32 + 128);
        for (const bytes & p : prefixes) {
            out.resize((out.size() + 31) / 32 * 32);
            out.insert(out.end(), p.begin(), p.end());
        }
        return out;
    }
};

// where the state in a GGUF ends
inline size_t gguf_state_end(const bytes & gguf, const bytes & state) {
    return std::search(gguf.begin(), gguf.end(), state.begin(), state.end()) - gguf.begin() + state.size();
}
