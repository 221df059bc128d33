// compatible(): every value that changes what a prefix means is compared, and the most telling difference is named.

#include "check.h"
#include "prefix_file/compatible.h"
#include "sample.h"

#include <cmath>

using namespace intactkv;

static const std::string REFERENCE(64, 'c');

static std::string error_of(const json & manifest, const json & model, const std::string & reference = REFERENCE) {
    std::string error;
    const bool ok = compatible(manifest.dump(), model.dump(), reference, error);
    CHECK(ok == error.empty());
    if (!ok) {
        CHECK(is_sentence(error));
    }
    return error;
}

static sample two_caches() {
    sample s;
    s.caches = { { 0, 0, { 1 }, { 0, 1, 2 } }, { 1, 2, { 0, 2 }, { 1, 2 } } };
    return s;
}

static void same() {
    for (const sample & s : { sample(), two_caches() }) {
        const json manifest = s.manifest();
        json model = manifest["model"];
        check_case = "same";
        CHECK(error_of(manifest, model) == "");
        CHECK(error_of(manifest, model, "") == ""); // a GGUF without identity
        model["n_ctx_train"] = 128;
        CHECK(error_of(manifest, model) == "");
        model["caches"][0]["layers"][0]["rope_base"] = 100000; // how a writer puts a double is its own affair
        CHECK(error_of(manifest, model) == "");
    }
}

static void every_difference(sample s) {
    const json manifest = s.manifest();
    const json flat = manifest["model"].flatten();
    for (const auto & item : flat.items()) {
        const json::json_pointer at(item.key());
        json model = manifest["model"];
        json & value = model[at];
        if (value.is_string()) {
            value = "other";
        } else if (value.is_number_float()) {
            value = std::nextafter(value.get<double>(), 1e9);
        } else {
            value = value.get<int>() + 1;
        }
        check_case = item.key();
        const std::string error = error_of(manifest, model);
        if (at.back() == "n_ctx_train") {
            CHECK(error == "");
            continue;
        }
        CHECK(contains(error, at.back()));
        CHECK(contains(error, item.value().dump() + " in the prefix and " + value.dump() + " in the model"));
    }
}

static void shapes() {
    const json manifest = two_caches().manifest();
    const json model = manifest["model"];
    check_case = "fewer layers";
    json other = model;
    other["caches"][1]["layers"].erase(1);
    CHECK(contains(error_of(manifest, other), "the number of layers is 3 in the prefix and 2 in the model"));
    other["caches"][0]["layers"].push_back(model["caches"][1]["layers"][1]);
    CHECK(contains(error_of(manifest, other), "KV cache 0 n_layer is 1 in the prefix and 2"));
    check_case = "one cache";
    other["caches"][0]["layers"].push_back(model["caches"][1]["layers"][0]);
    other["caches"].erase(1);
    CHECK(contains(error_of(manifest, other), "the number of KV caches is 2 in the prefix and 1 in the model"));
    check_case = "keys that only one side has";
    other = model;
    other["rope"]["scale_swa"] = 0.5;
    CHECK(contains(error_of(manifest, other), "rope scale_swa is not given in the prefix and 0.5 in the model"));
    json newer = manifest;
    newer["model"]["rope"]["scale_swa"] = 0.5;
    CHECK(contains(error_of(newer, model), "rope scale_swa is 0.5 in the prefix and not given in the model"));
    CHECK(error_of(newer, other) == "");
    newer["model"]["caches"][0]["layers"][0]["sinks"] = 4;
    CHECK(contains(error_of(newer, other), "layer 1 sinks is 4"));
}

static void recurrent() {
    const json hybrid = sample::hybrid().manifest(), plain = sample().manifest();
    check_case = "recurrent layers that only one side has";
    json other = hybrid["model"];
    other.erase("recurrent");
    CHECK(contains(error_of(hybrid, other), "the number of recurrent layers is 2 in the prefix and 0 in the model"));
    other = plain["model"];
    other["recurrent"] = hybrid["model"]["recurrent"];
    CHECK(contains(error_of(plain, other), "the number of recurrent layers is 0 in the prefix and 2 in the model"));
    other = hybrid["model"];
    other["recurrent"]["layers"].erase(1);
    CHECK(contains(error_of(hybrid, other), "the number of recurrent layers is 2 in the prefix and 1 in the model"));
}

// with several differences: the one that says most is named
static void order() {
    const json manifest = two_caches().manifest();
    json model = manifest["model"];
    const auto next = [&](const char * at, json value, const char * expected, const std::string & reference) {
        check_case = at;
        model[json::json_pointer(at)] = value;
        CHECK(contains(error_of(manifest, model, reference), expected));
    };
    const std::string other(64, 'd');
    check_case = "another reference";
    CHECK(contains(error_of(manifest, model, other),
            "the reference model's SHA-256 is \"" + REFERENCE + "\" in the prefix and \"" + other));
    next("/rope/beta_fast", 1.0, "rope beta_fast is 32.0 in the prefix and 1.0", other);
    next("/rope/type", "neox", "rope type is \"norm\"", other);
    next("/caches/1/layers/1/rope_base", 10000.0, "layer 2 rope_base is 100000.0", other);
    next("/caches/1/layers/1/head_dim_k", 4, "layer 2 head_dim_k is 3 in the prefix and 4", other);
    next("/caches/1/n_swa", 4, "KV cache 1 n_swa is 2 in the prefix and 4", other);
    next("/vocab_sha256", other, "vocab_sha256", other);
    next("/n_vocab", 11, "n_vocab is 10 in the prefix and 11", other);
    next("/arch", "qwen2", "arch is \"llama\" in the prefix and \"qwen2\"", other);
}

static void not_json() {
    std::string error;
    const std::string manifest = sample().manifest().dump();
    const std::string model = sample().manifest()["model"].dump();
    for (const char * text :
            { "", "x", "{", "[]", "1", "null", "{}", "{\"model\":[]}", "{\"model\":{\"arch\":\"llama\"}}" }) {
        check_case = text;
        error.clear();
        CHECK(!compatible(text, model, "", error) && !error.empty());
        error.clear();
        CHECK(!compatible(manifest, text, "", error) && !error.empty());
    }
}

void test_compatible() {
    same();
    sample ext = two_caches();
    ext.cell_ext = true;
    every_difference(two_caches());
    every_difference(ext);
    every_difference(sample::hybrid());
    recurrent();
    shapes();
    order();
    not_json();
}
