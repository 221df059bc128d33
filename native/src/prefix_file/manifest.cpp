#include "prefix_file/manifest.h"

#include "prefix_file/refuse.h"

#include "nlohmann/json.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

namespace intactkv {

using json = nlohmann::json;

static constexpr size_t MAX_MANIFEST = 16 << 20; // bytes: a million tokens with their text
static constexpr unsigned MAX_FORMAT = 2;        // 2: layers without V rows
static constexpr size_t MAX_NESTING = 32;
static constexpr size_t MAX_CACHES = 2; // base, and sliding window
static constexpr size_t MAX_LAYERS = 4096;
static constexpr uint64_t MAX_HEADS = 1 << 16;
static constexpr uint64_t MAX_HEAD_DIM = 1 << 16;
static constexpr uint64_t MAX_EXTRA = 1 << 16; // cells
static constexpr size_t N_SECTIONS = 4;        // GGML_MROPE_SECTIONS
static constexpr uint64_t MAX_STATE = 1 << 30; // values
static constexpr int64_t FORMAT = 1;
static constexpr int64_t FORMAT_NEW_KINDS = 2; // of models that readers of format 1 refused

std::string shown(const json & value) {
    std::string res;
    if (value.is_object()) {
        res = "an object";
    } else if (value.is_array()) {
        res = "an array of " + std::to_string(value.size());
    } else {
        res = value.dump(-1, ' ', true, json::error_handler_t::replace);
    }
    if (res.size() > 100) {
        res = res.substr(0, 97) + "...";
    }
    return res;
}

// A place in the manifest with its name, so that every check can say where it failed.
struct field {
    const json & value;
    std::string name; // e.g. model.caches[0].layers[3].n_head_kv

    [[noreturn]] void expected(const std::string & what) const {
        refuse("the manifest's field %s is %s, not %s: %s", name.c_str(), shown(value).c_str(), what.c_str(), REMAKE);
    }

    field operator[](const char * key) const {
        const auto it = value.find(key);
        const std::string inner = name.empty() ? key : name + "." + key;
        if (it == value.end()) {
            refuse("the manifest has no field %s: %s", inner.c_str(), REMAKE);
        }
        return { *it, inner };
    }

    field operator[](size_t i) const { return { value[i], name + "[" + std::to_string(i) + "]" }; }

    const field & object() const {
        if (!value.is_object()) {
            expected("an object");
        }
        return *this;
    }

    size_t array(size_t min, size_t max) const {
        if (!value.is_array() || value.size() < min || value.size() > max) {
            expected("an array of " + std::to_string(min) + " to " + std::to_string(max));
        }
        return value.size();
    }

    uint64_t integer(uint64_t min, uint64_t max) const {
        if (!value.is_number_unsigned() || value.get<uint64_t>() < min || value.get<uint64_t>() > max) {
            expected("an integer from " + std::to_string(min) + " to " + std::to_string(max));
        }
        return value.get<uint64_t>();
    }

    void number() const {
        if (!value.is_number() || !std::isfinite(value.get<double>())) {
            expected("a finite number");
        }
    }

    void string() const {
        if (!value.is_string()) {
            expected("a string");
        }
    }

    void boolean() const {
        if (!value.is_boolean()) {
            expected("true or false");
        }
    }

    void sha256() const {
        const auto hex = [](char c) {
            return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
        };
        const auto * text = value.get_ptr<const json::string_t *>();
        if (!text || text->size() != 64 || !std::all_of(text->begin(), text->end(), hex)) {
            expected("a SHA-256 of 64 hexadecimal digits");
        }
    }
};

// The parser itself does not recurse, but a bound keeps everything that later walks the value from doing so.
static void check_nesting(const char * text, size_t size) {
    size_t depth = 0;
    bool inside = false; // a string
    for (size_t i = 0; i < size; ++i) {
        const char c = text[i];
        if (inside) {
            i += c == '\\';
            inside = c != '"';
        } else if (c == '"') {
            inside = true;
        } else if (c == '{' || c == '[') {
            if (++depth > MAX_NESTING) {
                refuse("the manifest is nested deeper than %zu at its byte %zu: %s", MAX_NESTING, i, REMAKE);
            }
        } else if (c == '}' || c == ']') {
            depth -= depth > 0;
        }
    }
}

json parse_json(const char * text, size_t size) {
    if (size > MAX_MANIFEST) {
        refuse("the manifest has %zu bytes and at most %zu are allowed: %s", size, MAX_MANIFEST, REMAKE);
    }
    if (const void * zero = memchr(text, 0, size)) { // where the parser would take the rest for absent
        refuse("the manifest is not JSON from its byte %zu on: %s", (size_t) ((const char *) zero - text) + 1, REMAKE);
    }
    check_nesting(text, size);
    try {
        return json::parse(text, text + size);
    } catch (const json::parse_error & err) {
        refuse("the manifest is not JSON from its byte %zu on: %s", err.byte, REMAKE);
    } catch (const json::exception &) {
        refuse("the manifest has a number that no double can hold: %s", REMAKE);
    }
}

static layer_shape read_layer(const field & layer, int64_t format) {
    layer.object()["rope_base"].number();
    const uint64_t heads = layer["n_head_kv"].integer(0, MAX_HEADS); // 0: a layer without attention
    const uint64_t dim_v = layer["head_dim_v"].integer(format > FORMAT ? 0 : 1, MAX_HEAD_DIM);
    return {
        (uint32_t) layer["il"].integer(0, MAX_LAYERS - 1),
        2 * heads * layer["head_dim_k"].integer(1, MAX_HEAD_DIM),
        2 * heads * dim_v,
        dim_v > 0,
    };
}

static cache_shape read_cache(const field & cache, int64_t format) {
    cache_shape res;
    res.swa_type = cache.object()["swa_type"].integer(0, 3);
    res.n_swa = cache["n_swa"].integer(res.swa_type == 0 ? 0 : 1, INT32_MAX);
    const field layers = cache["layers"];
    const size_t n = layers.array(0, MAX_LAYERS);
    for (size_t i = 0; i < n; ++i) {
        res.layers.push_back(read_layer(layers[i], format));
        if (i > 0 && res.layers[i].il <= res.layers[i - 1].il) {
            layers[i]["il"].expected("above that of the layer before it, " + std::to_string(res.layers[i - 1].il));
        }
    }
    return res;
}

static recurrent_shape read_recurrent(const field & recurrent) {
    recurrent_shape res;
    res.n_layer = recurrent.object()["n_layer"].integer(1, MAX_LAYERS);
    const field layers = recurrent["layers"];
    const size_t n = layers.array(1, res.n_layer);
    for (size_t i = 0; i < n; ++i) {
        const field layer = layers[i].object();
        res.layers.push_back({ (uint32_t) layer["il"].integer(0, res.n_layer - 1), layer["n_r"].integer(0, MAX_STATE),
                layer["n_s"].integer(0, MAX_STATE) });
        if (i > 0 && res.layers[i].il <= res.layers[i - 1].il) {
            layer["il"].expected("above that of the layer before it, " + std::to_string(res.layers[i - 1].il));
        }
    }
    return res;
}

// alone: there is nothing beside them
static std::vector<cache_shape> read_caches(const field & caches, int64_t format, bool alone) {
    std::vector<cache_shape> res;
    const size_t n = caches.array(alone ? 1 : 0, MAX_CACHES);
    size_t n_layer = 0;
    for (size_t i = 0; i < n; ++i) {
        res.push_back(read_cache(caches[i], format));
        n_layer += res.back().layers.size();
    }
    if (n_layer == 0 && alone) {
        refuse("the manifest's field %s has no layers in any cache: %s", caches.name.c_str(), REMAKE);
    }
    return res;
}

bool has_cell_ext(const std::string & rope_type) {
    return rope_type == "mrope" || rope_type == "imrope";
}

static void check_rope(const field & rope) {
    for (const char * key : { "type", "scaling", "factors" }) {
        rope.object()[key].string();
    }
    rope["n_rot"].integer(0, MAX_HEAD_DIM);
    rope["n_ctx_orig"].integer(0, UINT32_MAX);
    for (const char * key : { "scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow" }) {
        rope[key].number();
    }
    const bool cell_ext = has_cell_ext(rope["type"].value.get<std::string>());
    if (cell_ext) {
        const field sections = rope["sections"];
        sections.array(N_SECTIONS, N_SECTIONS);
        for (size_t i = 0; i < N_SECTIONS; ++i) {
            sections[i].integer(0, MAX_HEAD_DIM);
        }
    }
    for (const auto & item : rope.value.items()) {
        if (item.value().is_structured() &&
                !(cell_ext && item.key() == "sections")) { // what later versions add must be as easy to compare
            rope[item.key().c_str()].expected("a number or a string");
        }
    }
}

static void check_messages(const field & messages) {
    if (messages.value.is_null()) {
        return;
    }
    const size_t n = messages.array(0, 1 << 16);
    for (size_t i = 0; i < n; ++i) {
        messages[i].object()["role"].string();
        messages[i]["content"].string();
    }
}

// who made it, from what: nothing here decides whether it loads, except reference.sha256
static void check_origin(const field & root) {
    root["text"].string();
    check_messages(root["messages"]);
    root["bos_only"].boolean();
    if (!root["chat_template_sha256"].value.is_null()) {
        root["chat_template_sha256"].sha256();
    }

    const field reference = root["reference"].object();
    reference["sha256"].sha256();
    reference["dtype"].string();
    reference["name"].string();
    reference["quantized"].boolean();

    const field engine = root["engine"].object();
    engine["name"].string();
    engine["dtype"].string();
    const field versions = engine["versions"].object();
    for (const auto & item : versions.value.items()) {
        if (!item.value().is_string()) {
            versions.expected("an object whose values are strings");
        }
    }

    if (!root["calibrated"].value.is_null()) {
        root["calibrated"].object();
    }
    root["created_by"].string();
}

// What has left a window and is not said to stay in sight is not in the file: only a first token can say so.
static bool read_in_sight(const field & root, size_t n_tokens) {
    const json & calibrated = root.value["calibrated"];
    if (calibrated.is_null() || !calibrated.contains("in_sight")) {
        return false;
    }
    const field said = root["calibrated"]["in_sight"];
    said.boolean();
    if (said.value.get<bool>() && n_tokens > 1) {
        said.expected(
                "false for a prefix of " + std::to_string(n_tokens) + " tokens, only the first one stays in sight");
    }
    return said.value.get<bool>();
}

manifest read_manifest(const char * text, size_t size) {
    const json parsed = parse_json(text, size);
    const field root{ parsed, "" };
    if (!parsed.is_object()) {
        refuse("the manifest is %s, not an object: %s", shown(parsed).c_str(), REMAKE);
    }
    if (!root["format"].value.is_number_integer() ||
            (root["format"].value != FORMAT && root["format"].value != FORMAT_NEW_KINDS)) {
        refuse("the manifest's field format is %s and this version reads the formats 1 and 2: use the version of "
               "intactkv-export that made the prefix, or make it again",
                shown(root["format"].value).c_str());
    }

    manifest res;
    const field model = root["model"].object();
    model["arch"].string();
    model["n_ctx_train"].integer(0, UINT32_MAX);
    model["vocab_sha256"].sha256();
    res.n_vocab = model["n_vocab"].integer(1, INT32_MAX);
    const bool has_states = model.value.contains("recurrent");
    if (has_states) {
        res.recurrent = read_recurrent(model["recurrent"]);
    }
    res.caches = read_caches(model["caches"], root["format"].value.get<int64_t>(), !has_states);
    check_rope(model["rope"]);
    res.cell_ext = has_cell_ext(model["rope"]["type"].value.get<std::string>());

    const field tokens = root["tokens"];
    const size_t n_tokens = tokens.array(1, INT32_MAX);
    res.tokens.reserve(n_tokens);
    for (size_t i = 0; i < n_tokens; ++i) {
        res.tokens.push_back(tokens[i].integer(0, res.n_vocab - 1));
    }
    res.n_extra = parsed.contains("extra_cells") ? root["extra_cells"].integer(1, MAX_EXTRA) : 0;
    check_origin(root);
    res.calibrated = !root["calibrated"].value.is_null();
    res.in_sight = read_in_sight(root, n_tokens);
    return res;
}

} // namespace intactkv
