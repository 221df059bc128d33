#include "prefix_file/compatible.h"

#include "prefix_file/manifest.h"
#include "prefix_file/refuse.h"

#include "nlohmann/json.hpp"

#include <set>
#include <string>
#include <vector>

namespace intactkv {

using json = nlohmann::json;

// One value of the prefix's model against that of the context. Integers and doubles compare by value, exactly.
static void check_same(const std::string & what, const json * prefix, const json * model, const char * remedy) {
    if (prefix && model && *prefix == *model) {
        return;
    }
    refuse("the prefix belongs to another model: %s is %s in the prefix and %s in the model: %s", what.c_str(),
            prefix ? shown(*prefix).c_str() : "not given", model ? shown(*model).c_str() : "not given", remedy);
}

// Two objects: the keys in the order given, then all others that either of them has.
static void check_same(const std::string & what, const json & prefix, const json & model,
        const std::vector<const char *> & keys, const char * remedy) {
    const auto get = [](const json & object, const std::string & key) {
        const auto it = object.find(key);
        return it == object.end() ? nullptr : &*it;
    };
    std::set<std::string> seen;
    for (const char * key : keys) {
        check_same(what + key, get(prefix, key), get(model, key), remedy);
        seen.insert(key);
    }
    for (const json * object : { &model, &prefix }) {
        for (const auto & item : object->items()) {
            if (!item.value().is_structured() && seen.insert(item.key()).second) {
                check_same(what + item.key(), get(prefix, item.key()), get(model, item.key()), remedy);
            }
        }
    }
}

static constexpr const char * OTHER_MODEL =
        "use the prefix that was made for this model, or make one with intactkv-export prefix";
static constexpr const char * OTHER_ROPE =
        "open the model with the RoPE settings the prefix was made with, or make a prefix for these";

static size_t n_layers(const json & caches) {
    size_t res = 0;
    for (const json & cache : caches) {
        res += cache.at("layers").size();
    }
    return res;
}

// Sizes of all layers first, RoPE of all layers later: a model with other sizes is another model.
static void check_layers(const json & prefix, const json & model, bool sizes) {
    for (size_t c = 0; c < model.size(); ++c) {
        const json & a = prefix[c].at("layers");
        const json & b = model[c].at("layers");
        for (size_t i = 0; i < b.size(); ++i) {
            const std::string what = "layer " + shown(b[i].at("il")) + " ";
            if (!sizes) {
                check_same(what, a[i], b[i], { "rope_base" }, OTHER_ROPE);
                continue;
            }
            for (const char * key : { "il", "n_head_kv", "head_dim_k", "head_dim_v" }) {
                check_same(what + key, &a[i].at(key), &b[i].at(key), OTHER_MODEL);
            }
        }
    }
}

static void check_caches(const json & prefix, const json & model) {
    const json layers[] = { n_layers(prefix), n_layers(model) };
    const json n_caches[] = { prefix.size(), model.size() };
    check_same("the number of layers", &layers[0], &layers[1], OTHER_MODEL);
    check_same("the number of KV caches", &n_caches[0], &n_caches[1], OTHER_MODEL);
    for (size_t c = 0; c < model.size(); ++c) {
        const std::string what = "KV cache " + std::to_string(c) + " ";
        const json counts[] = { prefix[c].at("layers").size(), model[c].at("layers").size() };
        check_same(what + "n_layer", &counts[0], &counts[1], OTHER_MODEL);
        check_same(what, prefix[c], model[c], { "n_swa", "swa_type" }, OTHER_MODEL);
    }
}

// Of two models, either of which may have none: what the recurrent layers keep of a sequence
static void check_recurrent(const json & prefix, const json & model) {
    const json none = 0;
    const auto n_states = [](const json & x) {
        return json(x.contains("recurrent") ? x.at("recurrent").at("layers").size() : 0);
    };
    const json counts[] = { n_states(prefix), n_states(model) };
    check_same("the number of recurrent layers", &counts[0], &counts[1], OTHER_MODEL);
    if (counts[1] == none) {
        return;
    }
    const json &a = prefix.at("recurrent"), &b = model.at("recurrent");
    check_same("n_layer", &a.at("n_layer"), &b.at("n_layer"), OTHER_MODEL);
    for (size_t i = 0; i < b.at("layers").size(); ++i) {
        const json &x = a.at("layers")[i], &y = b.at("layers")[i];
        for (const char * key : { "il", "n_r", "n_s" }) {
            check_same("recurrent layer " + shown(y.at("il")) + " " + key, &x.at(key), &y.at(key), OTHER_MODEL);
        }
    }
}

bool compatible(const std::string & manifest_json, const std::string & describe_json,
        const std::string & gguf_reference_sha256, std::string & error) {
    try {
        const json root = parse_json(manifest_json.data(), manifest_json.size());
        const json model = json::parse(describe_json);
        const json & prefix = root.at("model");

        for (const char * key : { "arch", "n_vocab", "vocab_sha256" }) {
            check_same(key, &prefix.at(key), &model.at(key), OTHER_MODEL);
        }
        check_caches(prefix.at("caches"), model.at("caches"));
        check_layers(prefix.at("caches"), model.at("caches"), true);
        check_recurrent(prefix, model);
        check_layers(prefix.at("caches"), model.at("caches"), false);
        check_same("rope ", prefix.at("rope"), model.at("rope"), { "type", "n_rot", "scaling", "scale" }, OTHER_ROPE);
        if (model.at("rope").contains("sections")) { // then the prefix has them too: its type is the same
            const json & a = prefix.at("rope").at("sections");
            const json & b = model.at("rope").at("sections");
            for (size_t i = 0; i < b.size(); ++i) {
                check_same("rope sections[" + std::to_string(i) + "]", &a.at(i), &b[i], OTHER_ROPE);
            }
        }

        if (!gguf_reference_sha256.empty()) {
            const json reference = gguf_reference_sha256;
            check_same("the reference model's SHA-256", &root.at("reference").at("sha256"), &reference, OTHER_MODEL);
        }
        return true;
    } catch (const refused & err) {
        error = err.what();
    } catch (const std::exception & err) { // a manifest that parse() has not seen, or no memory
        error = std::string("the prefix cannot be compared with the model: ") + err.what();
    }
    return false;
}

} // namespace intactkv
