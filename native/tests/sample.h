// A small valid prefix whose every part a test can change before it is turned into the bytes of an `.ikv`.
// Written from the description of the format in parse.h, not from the code that reads it.

#pragma once

#include "hash/hash.h"
#include "nlohmann/json.hpp"

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

using bytes = std::vector<uint8_t>;
using json = nlohmann::json;

template <typename T> inline void put(bytes & out, T value) {
    uint8_t raw[sizeof(T)];
    memcpy(raw, &value, sizeof(T));
    out.insert(out.end(), raw, raw + sizeof(T));
}

inline void put(bytes & out, const std::string & text) {
    out.insert(out.end(), text.begin(), text.end());
}

struct sample {
    struct cache {
        int swa_type = 0;
        int n_swa = 0;
        std::vector<int> layers;    // indices in the model
        std::vector<int> positions; // of its cells
    };

    static constexpr int N_HEAD_KV = 3, HEAD_DIM_K = 3, HEAD_DIM_V = 2; // rows that no word size divides

    std::vector<int32_t> tokens = { 1, 7, 3 };
    std::vector<cache> caches = { { 0, 0, { 0, 1 }, { 0, 1, 2 } } };
    uint64_t n_extra = 0;        // as the manifest has it, 0: not at all; their positions are among those of the cells
    bool cell_ext = false;       // cells say where they are and of which token, as they do with M-RoPE
    uint16_t value = 0x3c00;     // F16 of every element: 1.0
    int head_dim_v = HEAD_DIM_V; // 0: K has latents, there are no rows of V

    struct recurrent_layer {
        int il, n_r, n_s; // index in the model, values of its two states
    };

    int n_layer = 3;                     // of a model with recurrent layers
    std::vector<recurrent_layer> states; // its recurrent layers
    uint32_t state_value = 0x3f800000;   // F32 of every element of theirs: 1.0

    json manifest() const {
        json caches_json = json::array();
        for (const cache & c : caches) {
            json layers = json::array();
            for (const int il : c.layers) {
                layers.push_back({ { "il", il }, { "n_head_kv", N_HEAD_KV }, { "head_dim_k", HEAD_DIM_K },
                        { "head_dim_v", head_dim_v }, { "rope_base", 100000.0 } });
            }
            caches_json.push_back({ { "n_swa", c.n_swa }, { "swa_type", c.swa_type }, { "layers", layers } });
        }
        json res = {
            { "format", head_dim_v > 0 ? 1 : 2 },
            { "tokens", tokens },
            { "text", "<s>h\u00e9 INTACTKV \"[{" },
            { "messages", { { { "role", "system" }, { "content", "h\u00e9" } } } },
            { "bos_only", false },
            { "chat_template_sha256", std::string(64, 'a') },
            { "model",
                    {
                            { "arch", "llama" },
                            { "n_ctx_train", 64 },
                            { "n_vocab", 10 },
                            { "vocab_sha256", std::string(64, 'b') },
                            { "caches", caches_json },
                            { "rope",
                                    {
                                            { "type", "norm" },
                                            { "n_rot", 2 },
                                            { "scale", 1.0 },
                                            { "scaling", "none" },
                                            { "n_ctx_orig", 64 },
                                            { "ext_factor", 0.0 },
                                            { "attn_factor", 1.0 },
                                            { "beta_fast", 32.0 },
                                            { "beta_slow", 1.0 },
                                            { "factors", "none" },
                                    } },
                    } },
            { "reference",
                    { { "sha256", std::string(64, 'c') }, { "dtype", "F16" }, { "name", "m" },
                            { "quantized", false } } },
            { "engine", { { "name", "llama" }, { "dtype", "f16" }, { "versions", { { "llama.cpp", "1" } } } } },
            { "calibrated", nullptr },
            { "created_by", "intactkv-export 0.1.0" },
        };
        if (n_extra) {
            res["extra_cells"] = n_extra;
        }
        if (!states.empty()) {
            res["format"] = 2;
            json layers = json::array();
            for (const recurrent_layer & x : states) {
                layers.push_back({ { "il", x.il }, { "n_r", x.n_r }, { "n_s", x.n_s } });
            }
            res["model"]["recurrent"] = { { "n_layer", n_layer }, { "layers", layers } };
        }
        if (cell_ext) {
            res["format"] = 2;
            res["model"]["rope"]["type"] = "mrope";
            res["model"]["rope"]["sections"] = { 1, 1, 0, 0 };
        }
        return res;
    }

    // rows: where given, the [begin, end) of every byte range that holds rows of K or V, or a recurrent state
    bytes state(std::vector<std::pair<size_t, size_t>> * rows = nullptr) const {
        bytes out;
        put<uint32_t>(out, 0x67677371);
        put<uint32_t>(out, 3);
        put<uint32_t>(out, tokens.size());
        for (const int32_t token : tokens) {
            put(out, token);
        }
        for (const cache & c : caches) {
            put<uint32_t>(out, 1);
            put<uint32_t>(out, c.positions.size());
            bool has_first = false; // what is at its position too is an extra cell
            for (const int pos : c.positions) {
                put<int32_t>(out, pos);
                put<uint32_t>(out, 1);
                if (cell_ext) {
                    put<int32_t>(out, pos);
                    put<int32_t>(out, pos);
                    put<int32_t>(out, pos == 0 && has_first ? -1 : tokens[pos]);
                }
                has_first |= pos == 0;
                put<int32_t>(out, 0);
            }
            put<uint32_t>(out, 0);
            put<uint32_t>(out, c.layers.size());
            for (const int head_dim : { HEAD_DIM_K, head_dim_v }) {
                for (size_t i = 0; head_dim > 0 && i < c.layers.size(); ++i) {
                    put<int32_t>(out, 1);
                    put<uint64_t>(out, 2 * N_HEAD_KV * head_dim);
                    const size_t begin = out.size();
                    for (size_t j = 0; j < c.positions.size() * N_HEAD_KV * head_dim; ++j) {
                        put(out, value);
                    }
                    if (rows) {
                        rows->push_back({ begin, out.size() });
                    }
                }
            }
        }
        if (!states.empty()) {
            put_states(out, rows);
        }
        return out;
    }

    void put_states(bytes & out, std::vector<std::pair<size_t, size_t>> * rows) const {
        put<uint32_t>(out, 1);
        put<int32_t>(out, (int32_t) tokens.size() - 1);
        put<uint32_t>(out, 0);
        put<uint32_t>(out, 0);
        put<uint32_t>(out, n_layer);
        for (const auto n : { &recurrent_layer::n_r, &recurrent_layer::n_s }) {
            for (const recurrent_layer & x : states) {
                put<int32_t>(out, 0);
                put<uint64_t>(out, 4 * x.*n);
                const size_t begin = out.size();
                for (int i = 0; i < x.*n; ++i) {
                    put(out, state_value);
                }
                if (rows) {
                    rows->push_back({ begin, out.size() });
                }
            }
        }
    }

    // A model whose layers 0 and 2 are recurrent, as they are with no other
    static sample hybrid() {
        sample res;
        res.caches = { { 0, 0, { 1 }, { 0, 1, 2 } } };
        res.states = { { 0, 3, 5 }, { 2, 4, 0 } };
        return res;
    }

    static sample recurrent() {
        sample res = hybrid();
        res.caches.clear();
        return res;
    }

    bytes file() const { return seal(state(), manifest().dump()); }

    // state and manifest with the trailer that makes their bytes the right ones
    static bytes seal(bytes out, const std::string & manifest) {
        put(out, manifest);
        const std::string sha256 = hash_sha256_hex(out.data(), out.size());
        put<uint64_t>(out, manifest.size());
        for (size_t i = 0; i < sha256.size(); i += 2) {
            out.push_back(std::stoi(sha256.substr(i, 2), nullptr, 16));
        }
        put(out, std::string("INTACTKV"));
        return out;
    }
};
