// The manifest of a prefix file: its JSON, checked for shape, and what it says about the bytes before it.

#pragma once

#include "nlohmann/json_fwd.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace intactkv {

struct layer_shape {
    uint32_t il;          // index of the layer in the model
    uint64_t k_row_bytes; // 2 * n_head_kv * head_dim_k
    uint64_t v_row_bytes; // 2 * n_head_kv * head_dim_v
    bool has_v;           // false: V is a part of K's rows (MLA), the state has no rows of it
};

struct cache_shape {
    uint32_t n_swa;    // window; 0: full attention
    uint32_t swa_type; // enum llama_swa_type
    std::vector<layer_shape> layers;
};

// Whether positions have several dimensions in a model with this type of RoPE: the cells of its state say where they are
// in a picture, and which token they are of.
bool has_cell_ext(const std::string & rope_type);

// A layer's state of a sequence beside the KV caches, F32: of its convolution (or token shift), and of the recurrence
struct state_shape {
    uint32_t il;
    uint64_t n_r;
    uint64_t n_s;
};

struct recurrent_shape {
    uint32_t n_layer = 0;            // of the model
    std::vector<state_shape> layers; // empty: the model has none
};

struct manifest {
    uint32_t n_vocab;
    std::vector<int32_t> tokens;
    uint32_t n_extra;                // cells that stand for no token
    bool calibrated;                 // the rows were trained, together
    bool in_sight;                   // so that no sliding window hides them
    bool cell_ext;                   // has_cell_ext()
    std::vector<cache_shape> caches; // in the order of the state
    recurrent_shape recurrent;       // behind them
};

// Throws refused, naming the field, unless every field is there with its type and range.
// text: UTF-8 that need not end in 0, as for parse_json().
manifest read_manifest(const char * text, size_t size);

// The JSON alone, of whatever shape. Size and nesting are bounded before anything is built from it; throws refused.
nlohmann::json parse_json(const char * text, size_t size);

// A value for an error message: ASCII, one line, short, whatever the file says.
std::string shown(const nlohmann::json & value);

} // namespace intactkv
