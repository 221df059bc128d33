#include "prefix_file/parse.h"

#include "prefix_file/manifest.h"
#include "prefix_file/refuse.h"

#include "hash/hash.h"

#include <cinttypes>
#include <cstring>

namespace intactkv {

static constexpr uint32_t STATE_MAGIC = 0x67677371; // LLAMA_STATE_SEQ_MAGIC, 'ggsq'
static constexpr uint32_t STATE_VERSION = 3;        // LLAMA_STATE_SEQ_VERSION
static constexpr int32_t TYPE_F32 = 0;              // GGML_TYPE_F32
static constexpr int32_t TYPE_F16 = 1;              // GGML_TYPE_F16
static constexpr int32_t NO_TOKEN = -1;             // LLAMA_TOKEN_NULL
static constexpr size_t SHA256_SIZE = 32;
static constexpr size_t TRAILER_SIZE = sizeof(uint64_t) + SHA256_SIZE + TRAILER_MAGIC_SIZE;

// Walks the state. Every read is checked against what is left, so no sum of sizes can overflow.
struct reader {
    const uint8_t * data;
    size_t size;
    size_t pos = 0;

    const uint8_t * take(uint64_t n, const char * what) {
        if (n > size - pos) {
            refuse("the prefix file's state ends inside %s: %" PRIu64
                   " bytes are needed at byte %zu and %zu are left: %s",
                    what, n, pos, size - pos, REMAKE);
        }
        const uint8_t * res = data + pos;
        pos += n;
        return res;
    }

    template <typename T> T get(const char * what) {
        T res;
        memcpy(&res, take(sizeof(T), what), sizeof(T));
        return res;
    }

    template <typename T> void expect(T expected, const char * what) {
        const size_t at = pos;
        const T found = get<T>(what);
        if (found != expected) {
            refuse("the prefix file's %s is %" PRId64 " at byte %zu and must be %" PRId64 ": %s", what, (int64_t) found,
                    at, (int64_t) expected, REMAKE);
        }
    }
};

// Whether a sliding-window cache that has seen the positions 0..last has dropped pos: llama_hparams::is_masked_swa
static bool is_masked_swa(const cache_shape & cache, int64_t pos, int64_t last) {
    const int64_t n_swa = cache.n_swa;
    switch (cache.swa_type) {
        case 1: return last - pos >= n_swa;          // standard
        case 2: return pos < (last / n_swa) * n_swa; // chunked
        case 3: return last - pos > n_swa / 2;       // symmetric
        default: return false;
    }
}

// What is at a position, for messages: tokens, and behind them the extra cells.
static std::string cell_name(uint32_t cell, uint32_t n_tokens) {
    return cell < n_tokens ? "token " + std::to_string(cell) : "extra cell " + std::to_string(cell - n_tokens);
}

// Reads the cells of a cache: each position that must be there, in any order, once; position 0 for each of the n_extra
// cells too, which a sliding window leaves with the first token. Returns what each cell is: a token's position, or
// n_tokens and on for the extra cells.
static std::vector<uint32_t> read_cells(reader & in, const cache_shape & cache, const manifest & said) {
    const uint32_t n_tokens = said.tokens.size(), n_extra = said.n_extra;
    std::vector<bool> missing(n_tokens);
    uint32_t n_cells = 0;
    for (uint32_t pos = 0; pos < n_tokens; ++pos) {
        missing[pos] = !is_masked_swa(cache, pos, (int64_t) n_tokens - 1);
        n_cells += missing[pos];
    }
    const uint32_t n_extra_here = missing[0] ? n_extra : 0;
    n_cells += n_extra_here;
    in.expect<uint32_t>(1, "number of streams");
    in.expect<uint32_t>(n_cells, "number of cells");

    std::vector<uint32_t> res;
    uint32_t n_found = 0; // extra cells
    for (uint32_t i = 0; i < n_cells; ++i) {
        const size_t at = in.pos;
        const int32_t pos = in.get<int32_t>("position of a cell");
        if (pos >= 0 && (uint32_t) pos < n_tokens && missing[pos]) {
            missing[pos] = false;
            res.push_back(pos);
        } else if (pos == 0 && n_found < n_extra_here) {
            res.push_back(n_tokens + n_found++);
        } else {
            const std::string extra = n_extra ? " and " + std::to_string(n_extra) + " extra cells" : "";
            refuse("the prefix file's cell %" PRIu32 " has position %" PRId32
                   " at byte %zu, which is given too often or "
                   "not among the %" PRIu32 " that a prefix of %" PRIu32 " tokens%s has in this cache: %s",
                    i, pos, at, n_cells, n_tokens, extra.c_str(), REMAKE);
        }
        in.expect<uint32_t>(1, "number of sequences of a cell");
        if (said.cell_ext) { // a token of text is at the same position in all dimensions
            in.expect<int32_t>(pos, "x of a cell");
            in.expect<int32_t>(pos, "y of a cell");
            in.expect<int32_t>(res.back() < n_tokens ? said.tokens[res.back()] : NO_TOKEN, "token of a cell");
        }
        in.expect<int32_t>(0, "sequence of a cell");
    }
    return res;
}

// Whether one of the n F16 values is NaN or infinite: its exponent is all ones. Eight bytes at a time, because
// a prefix has as many values as a KV cache; adding the exponent's lowest bit carries into the sign bit, no further.
static bool has_nonfinite(const uint8_t * row, size_t n) {
    constexpr uint64_t EXPONENT = 0x7c007c007c007c00, LOWEST = 0x0400040004000400, CARRY = 0x8000800080008000;
    uint64_t found = 0;
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        uint64_t values;
        memcpy(&values, row + 2 * i, sizeof(values));
        found |= (values & EXPONENT) + LOWEST;
    }
    for (; i < n; ++i) {
        uint16_t value;
        memcpy(&value, row + 2 * i, sizeof(value));
        found |= (value & EXPONENT) + (LOWEST & 0xffff);
    }
    return found & CARRY;
}

static void read_rows(reader & in, const char * name, size_t cache, uint32_t il, uint64_t row_bytes,
        const std::vector<uint32_t> & cells, uint32_t n_tokens) {
    in.expect<int32_t>(TYPE_F16, "type of a layer's rows");
    in.expect<uint64_t>(row_bytes, "row size of a layer");
    for (const uint32_t cell : cells) {
        const size_t at = in.pos;
        if (has_nonfinite(in.take(row_bytes, "the rows of a layer"), row_bytes / 2)) {
            refuse("the prefix has NaN or infinity in %s of KV cache %zu, layer %" PRIu32 ", %s (the row "
                   "at byte %zu), where all values must be finite: compute it again with the engine in F32",
                    name, cache, il, cell_name(cell, n_tokens).c_str(), at);
        }
    }
}

static void read_cache(reader & in, size_t index, const cache_shape & cache, const manifest & said) {
    const std::vector<uint32_t> cells = read_cells(in, cache, said);
    const uint32_t n_tokens = said.tokens.size();
    in.expect<uint32_t>(0, "flag for a transposed V");
    in.expect<uint32_t>(cache.layers.size(), "number of layers");
    for (const layer_shape & layer : cache.layers) {
        read_rows(in, "K", index, layer.il, layer.k_row_bytes, cells, n_tokens);
    }
    for (const layer_shape & layer : cache.layers) {
        if (layer.has_v) {
            read_rows(in, "V", index, layer.il, layer.v_row_bytes, cells, n_tokens);
        }
    }
}

// One side of the recurrent layers' states. what: for messages
static void read_states(
        reader & in, const recurrent_shape & shape, uint64_t state_shape::*n_values, const char * what) {
    for (const state_shape & layer : shape.layers) {
        const uint64_t n = layer.*n_values;
        in.expect<int32_t>(TYPE_F32, "type of a layer's state");
        in.expect<uint64_t>(n * sizeof(float), "size of a layer's state");
        const size_t at = in.pos;
        const uint8_t * values = in.take(n * sizeof(float), "the state of a layer");
        uint32_t found = 0;
        for (uint64_t i = 0; i < n; ++i) {
            uint32_t value;
            memcpy(&value, values + i * sizeof(float), sizeof(value));
            found |= (value & 0x7fffffff) + 0x00800000; // the exponent's lowest bit: carries where all are ones
        }
        if (found & 0x80000000) {
            refuse("the prefix has NaN or infinity in the %s state of layer %" PRIu32
                   " (at byte %zu), where all values "
                   "must be finite: compute it again with the engine in F32",
                    what, layer.il, at);
        }
    }
}

static void read_recurrent(reader & in, const recurrent_shape & shape, uint32_t n_tokens) {
    in.expect<uint32_t>(1, "number of recurrent states");
    in.expect<int32_t>(n_tokens - 1, "position of the recurrent state");
    in.expect<uint32_t>(0, "number of sequences of the recurrent state");
    in.expect<uint32_t>(0, "flag for a transposed state");
    in.expect<uint32_t>(shape.n_layer, "number of layers of the model");
    read_states(in, shape, &state_shape::n_r, "convolution's");
    read_states(in, shape, &state_shape::n_s, "recurrent");
}

static prefix_view read_state(const uint8_t * data, size_t size, const manifest & said) {
    reader in{ data, size };
    in.expect(STATE_MAGIC, "magic number");
    in.expect(STATE_VERSION, "state version");
    in.expect<uint32_t>(said.tokens.size(), "number of tokens");

    prefix_view res;
    res.n_tokens = said.tokens.size();
    res.n_cells = res.n_tokens + said.n_extra;
    res.calibrated = said.calibrated;
    res.in_sight = said.in_sight;
    res.tokens = in.data + in.pos;
    for (const int32_t token : said.tokens) { // which the manifest has within the vocabulary
        in.expect(token, "token");
    }

    res.state = in.data + in.pos;
    res.state_size = size - in.pos;
    for (size_t i = 0; i < said.caches.size(); ++i) {
        read_cache(in, i, said.caches[i], said);
    }
    const size_t recurrent = in.pos;
    if (!said.recurrent.layers.empty()) {
        read_recurrent(in, said.recurrent, res.n_tokens);
    }
    res.recurrent_size = in.pos - recurrent;
    if (in.pos != size) {
        refuse("the prefix file's state ends at byte %zu and its manifest begins at byte %zu: %s", in.pos, size,
                REMAKE);
    }
    return res;
}

static std::string hex(const uint8_t * bytes, size_t n) {
    static const char digits[] = "0123456789abcdef";
    std::string res;
    for (size_t i = 0; i < n; ++i) {
        res += digits[bytes[i] >> 4];
        res += digits[bytes[i] & 15];
    }
    return res;
}

// Returns the size of the state. What is left of the data up to the trailer is the manifest.
static size_t check_trailer(const uint8_t * data, size_t size) {
    if (size < TRAILER_SIZE) {
        refuse("the prefix file has %zu bytes and its trailer alone has %zu: %s", size, TRAILER_SIZE, DOWNLOAD);
    }
    const size_t body = size - TRAILER_SIZE; // state and manifest
    const uint8_t * checksum = data + body + sizeof(uint64_t);
    const uint8_t * magic = checksum + SHA256_SIZE;
    if (memcmp(magic, TRAILER_MAGIC, TRAILER_MAGIC_SIZE) != 0) {
        refuse("the prefix file ends in the bytes %s, not in %s (%s) at byte %zu, so it is cut off or not a prefix file: %s",
                hex(magic, TRAILER_MAGIC_SIZE).c_str(),
                hex((const uint8_t *) TRAILER_MAGIC, TRAILER_MAGIC_SIZE).c_str(), TRAILER_MAGIC,
                size - TRAILER_MAGIC_SIZE, DOWNLOAD);
    }
    uint64_t manifest_size;
    memcpy(&manifest_size, data + body, sizeof(manifest_size));
    if (manifest_size > body) {
        refuse("the prefix file's manifest has %" PRIu64
               " bytes according to byte %zu and only %zu bytes are before it: %s",
                manifest_size, body, body, DOWNLOAD);
    }
    const std::string stored = hex(checksum, SHA256_SIZE);
    const std::string actual = hash_sha256_hex(data, body);
    if (stored != actual) {
        refuse("the prefix file is damaged: its bytes have the SHA-256 checksum %s and byte %zu says %s: %s",
                actual.c_str(), body + sizeof(uint64_t), stored.c_str(), DOWNLOAD);
    }
    return body - manifest_size;
}

bool parse(const void * data, size_t size, prefix_view & out, std::string & manifest_json, std::string & error) {
    try {
        const auto * bytes = static_cast<const uint8_t *>(data);
        const size_t state_size = check_trailer(bytes, bytes ? size : 0);
        const char * text = reinterpret_cast<const char *>(bytes) + state_size;
        const size_t text_size = size - TRAILER_SIZE - state_size;
        out = read_state(bytes, state_size, read_manifest(text, text_size));
        manifest_json.assign(text, text_size);
        return true;
    } catch (const refused & err) {
        error = err.what();
    } catch (const std::exception & err) {
        error = std::string("the prefix file could not be checked (") + err.what() +
                "): free some memory and try again";
    }
    return false;
}

} // namespace intactkv
