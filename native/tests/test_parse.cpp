// parse(): a valid prefix passes, anything else is refused with one sentence. Runs under address and
// undefined-behaviour sanitizers; every input is in an allocation of its exact size, so one byte too far is seen.

#include "check.h"
#include "prefix_file/parse.h"
#include "sample.h"

#include <algorithm>
#include <memory>

using namespace intactkv;

static std::string error_of(const bytes & file, prefix_view * view = nullptr, std::string * manifest = nullptr) {
    const std::unique_ptr<uint8_t[]> exact(new uint8_t[file.size()]);
    std::copy(file.begin(), file.end(), exact.get());
    prefix_view ignored_view;
    std::string ignored_manifest;
    std::string error;
    const bool ok = parse(
            exact.get(), file.size(), view ? *view : ignored_view, manifest ? *manifest : ignored_manifest, error);
    CHECK(ok == error.empty());
    if (!ok) {
        CHECK(is_sentence(error));
    }
    return error;
}

static std::string error_of(const sample & s, const json & manifest) {
    return error_of(sample::seal(s.state(), manifest.dump()));
}

static void valid() {
    const sample s;
    const bytes file = s.file();
    prefix_view view;
    std::string manifest;
    std::string error;
    check_case = "valid";
    CHECK(parse(file.data(), file.size(), view, manifest, error) && error.empty());
    CHECK(view.n_tokens == 3);
    CHECK(view.tokens == file.data() + 12);
    CHECK(view.state == file.data() + 24);
    CHECK(view.state_size == s.state().size() - 24);
    CHECK(json::parse(manifest) == s.manifest());
    CHECK(error_of(bytes()) != "");
    CHECK(!parse(nullptr, 0, view, manifest, error));

    check_case = "unaligned";
    for (size_t shift = 1; shift < 8; ++shift) {
        bytes shifted(shift);
        shifted.insert(shifted.end(), file.begin(), file.end());
        CHECK(parse(shifted.data() + shift, file.size(), view, manifest, error));
    }
}

static void truncated(const sample & s) {
    const bytes file = s.file();
    for (size_t n = 0; n < file.size(); ++n) {
        check_case = "cut at byte " + std::to_string(n);
        CHECK(error_of(bytes(file.begin(), file.begin() + n)) != "");
    }
    const bytes state = s.state();
    for (size_t n = 0; n < state.size(); ++n) {
        check_case = "state cut at byte " + std::to_string(n) + ", sealed";
        CHECK(error_of(sample::seal(bytes(state.begin(), state.begin() + n), s.manifest().dump())) != "");
    }
    for (size_t n = 1; n <= 16; ++n) {
        check_case = std::to_string(n) + " more bytes";
        bytes longer = state;
        longer.resize(longer.size() + n);
        CHECK(contains(error_of(sample::seal(longer, s.manifest().dump())), "state ends at byte"));
        longer = file;
        longer.resize(longer.size() + n); // the trailer is now inside
        CHECK(contains(error_of(longer), "not in 494e544143544b56"));
    }
    check_case = "two files in one";
    bytes twice = file;
    twice.insert(twice.end(), file.begin(), file.end());
    CHECK(contains(error_of(twice), "checksum"));
}

static void flipped() {
    const bytes file = sample().file();
    const size_t body = file.size() - 48;
    for (size_t i = 0; i < file.size(); ++i) {
        for (const int mask : { 0x01, 0x80, 0xff }) {
            check_case = "byte " + std::to_string(i) + " flipped with " + std::to_string(mask);
            bytes bad = file;
            bad[i] ^= mask;
            const std::string error = error_of(bad);
            CHECK(error != "");
            CHECK(contains(error, "checksum") || i >= body);
        }
    }
}

// every word outside the rows, one at a time, with the checksum made right again
static void wrong_words(const sample & s) {
    std::vector<std::pair<size_t, size_t>> rows;
    const bytes state = s.state(&rows);
    for (size_t i = 0; i + 4 <= state.size(); i += 4) {
        const auto is_row = [&](const auto & range) {
            return i + 4 > range.first && i < range.second;
        };
        if (std::any_of(rows.begin(), rows.end(), is_row)) {
            continue;
        }
        uint32_t old;
        memcpy(&old, &state[i], 4);
        for (const uint32_t word : { 0u, 1u, 2u, 3u, 4u, old + 1, old - 1, 0x7fffffffu, 0x80000000u, 0xffffffffu }) {
            if (word == old) {
                continue;
            }
            check_case = "word " + std::to_string(word) + " at byte " + std::to_string(i);
            bytes bad = state;
            memcpy(&bad[i], &word, 4);
            CHECK(error_of(sample::seal(bad, s.manifest().dump())) != "");
        }
    }
}

static void wrong_manifest(const sample & s) {
    const json good = s.manifest();
    const json flat = good.flatten(); // JSON pointer -> leaf
    // what another value may be: these fields take several types, or describe without deciding
    const std::vector<std::pair<std::string, json::value_t>> allowed = {
        { "/messages", json::value_t::null }, { "/messages", json::value_t::array }, // []
        { "/chat_template_sha256", json::value_t::null }, { "/calibrated", json::value_t::object },
        { "/engine/versions", json::value_t::object }, // {}
    };
    std::vector<json::json_pointer> places;
    for (const auto & item : flat.items()) {
        for (json::json_pointer at(item.key()); !at.empty(); at = at.parent_pointer()) {
            places.push_back(at);
        }
    }
    const std::vector<json> others = { nullptr, true, -1, 1.5, 18446744073709551615u, "x", json::array(),
        json::object() };
    for (const auto & at : places) {
        const json & old = good[at];
        for (const json & other : others) {
            check_case = "manifest" + at.to_string() + " = " + other.dump();
            json bad = good;
            bad[at] = other;
            const std::string error = error_of(s, bad);
            const bool same_kind = other.type() == old.type() || (other.is_number() && old.is_number_float());
            const auto is_this = [&](const auto & pair) {
                return pair.first == at.to_string() && pair.second == other.type();
            };
            const bool none = s.caches.empty() && at.to_string() == "/model/caches" && other.is_array();
            if (none || std::any_of(allowed.begin(), allowed.end(), is_this)) {
                CHECK(error == "");
            } else if (!same_kind || old.is_structured() || old.is_number_unsigned()) {
                CHECK(error != "");
            }
        }
        check_case = "manifest without " + at.to_string();
        json bad = good;
        json & parent = bad[at.parent_pointer()];
        if (parent.is_object()) {
            parent.erase(at.back());
        } else {
            parent.erase(std::stoul(at.back()));
        }
        const bool optional = contains(at.to_string(), "/versions/") || at.to_string() == "/messages/0";
        const std::string error = error_of(s, bad);
        CHECK(optional == (error == ""));
        const bool decides = at.to_string() == "/model/recurrent"; // whether states come behind the caches
        if (parent.is_object() && !optional && !decides) {
            CHECK(contains(error, "no field") && contains(error, at.back()));
        }
    }
    for (const char * at : { "/chat_template_sha256", "/model/vocab_sha256", "/reference/sha256" }) {
        check_case = at;
        for (const std::string & hex :
                { std::string(63, 'a'), std::string(65, 'a'), std::string(64, 'A'), std::string(64, 'g') }) {
            json bad = good;
            bad[json::json_pointer(at)] = hex;
            CHECK(contains(error_of(s, bad), "64 hexadecimal digits"));
        }
    }
    check_case = "what later versions add";
    json more = good;
    more["new"] = { { "deep", json::array({ 1 }) } };
    more["model"]["rope"]["scale_swa"] = 1.0;
    CHECK(error_of(s, more) == "");
    more["model"]["rope"]["scale_swa"] = json::array();
    CHECK(contains(error_of(s, more), "rope.scale_swa"));
}

static void hostile_manifest() {
    const sample s;
    const std::string good = s.manifest().dump();
    const auto error_with = [&](const std::string & manifest) {
        return error_of(sample::seal(s.state(), manifest));
    };
    const auto with_text = [&](const std::string & text) {
        std::string res = good;
        const size_t at = res.find("intactkv-export 0.1.0");
        return error_with(res.replace(at, 21, text));
    };
    check_case = "hostile manifest";
    CHECK(contains(error_with(""), "not JSON"));
    CHECK(contains(error_with("1"), "not an object"));
    CHECK(contains(error_with("[]"), "not an object"));
    CHECK(contains(error_with(good + "x"), "not JSON from its byte " + std::to_string(good.size() + 1)));
    CHECK(contains(error_with(good + std::string(1, 0)), "not JSON from its byte " + std::to_string(good.size() + 1)));
    CHECK(error_with(" " + good + "\n ") == "");
    CHECK(contains(error_with(std::string(1000000, '[')), "nested deeper than 32"));
    CHECK(contains(error_with(std::string(1000000, '{')), "nested deeper than 32"));
    CHECK(contains(error_with("\"" + std::string(1000000, '[')), "not JSON"));
    CHECK(contains(error_with("\"\\"), "not JSON"));
    CHECK(contains(error_with(std::string((16 << 20) + 1, ' ')), "at most 16777216 are allowed"));
    CHECK(with_text("[[[{{{ \\\" \\\\") == "");
    CHECK(contains(with_text("\xff"), "not JSON"));
    CHECK(contains(with_text("\xed\xa0\x80"), "not JSON")); // a surrogate
    CHECK(contains(with_text("\n"), "not JSON"));
    CHECK(with_text("\\ud83d\\ude00") == "");

    json bad = s.manifest();
    bad["created_by"] = json::array({ 1 });
    CHECK(contains(error_of(s, bad), "created_by is an array of 1, not a string"));
    bad = s.manifest();
    bad["bos_only"] = "\x1b[31m\n" + std::string(100000, 'x');
    CHECK(contains(error_of(s, bad), "bos_only is \"\\u001b[31m\\nxxx"));
    bad = s.manifest();
    bad["format"] = 3;
    CHECK(contains(error_of(s, bad), "format is 3 and this version reads the formats 1 and 2"));

    std::string huge = good;
    huge.replace(huge.find("100000.0"), 8, "1e999");
    CHECK(contains(error_with(huge), "no double"));
    huge.replace(huge.find("1e999"), 5, "NaN");
    CHECK(contains(error_with(huge), "not JSON"));
}

static void tokens() {
    sample s;
    json manifest = s.manifest();
    check_case = "token differs";
    manifest["tokens"][1] = 8;
    CHECK(contains(error_of(s, manifest), "token is 7 at byte 16 and must be 8"));
    for (const int64_t token : { int64_t(10), int64_t(-1), int64_t(1) << 32 }) {
        check_case = "token " + std::to_string(token);
        s.tokens[2] = token;
        manifest["tokens"] = { 1, 7, token };
        CHECK(contains(
                error_of(s, manifest), "tokens[2] is " + std::to_string(token) + ", not an integer from 0 to 9"));
    }
    s = sample();
    check_case = "no tokens";
    s.tokens = {};
    s.caches[0].positions = {};
    CHECK(contains(error_of(s.file()), "tokens is an array of 0"));
    check_case = "one token";
    s.tokens = { 1 };
    s.caches[0].positions = { 0 };
    CHECK(error_of(s.file()) == "");
}

static void cells() {
    sample s;
    check_case = "cells in another order";
    s.caches[0].positions = { 2, 0, 1 };
    CHECK(error_of(s.file()) == "");
    for (const std::vector<int> & positions : std::vector<std::vector<int>>{
                 { 0, 1 }, { 0, 1, 2, 3 }, { 0, 1, 1 }, { 0, 1, 3 }, { 0, 1, -1 }, { 0, 1, 0x7fffffff }, {} }) {
        s.caches[0].positions = positions;
        check_case = "cells " + json(positions).dump();
        CHECK(error_of(s.file()) != "");
    }
}

// Cells that stand for no token: at position 0, as many as the manifest says, wherever the first token's is.
static void extra_cells() {
    sample s;
    s.n_extra = 2;
    for (const std::vector<int> & positions :
            std::vector<std::vector<int>>{ { 0, 1, 2, 0, 0 }, { 0, 0, 0, 1, 2 }, { 2, 0, 0, 1, 0 } }) {
        s.caches[0].positions = positions;
        check_case = "extra cells " + json(positions).dump();
        const bytes file = s.file();
        prefix_view view;
        CHECK(error_of(file, &view) == "");
        CHECK(view.n_tokens == 3 && view.n_cells == 5);
    }
    for (const std::vector<int> & positions :
            std::vector<std::vector<int>>{ { 0, 1, 2 }, { 0, 1, 2, 0 }, { 0, 1, 2, 0, 0, 0 }, { 0, 1, 2, 0, 1 },
                    { 0, 1, 2, 0, 3 }, { 0, 0, 0, 0, 1 }, { 0, 1, 2, 2, 2 }, { 0, 1, 2, 0, -1 } }) {
        s.caches[0].positions = positions;
        check_case = "extra cells " + json(positions).dump();
        CHECK(error_of(s.file()) != "");
    }
    check_case = "in a manifest that has none";
    s.n_extra = 0;
    s.caches[0].positions = { 0, 1, 2, 0, 0 };
    CHECK(contains(error_of(s.file()), "number of cells is 5 at byte 28 and must be 3"));
    check_case = "counts that no file has";
    json manifest = s.manifest();
    for (const json & count : std::vector<json>{ 0, -1, 65537, 0xffffffffu, UINT64_MAX, 1.0, "2", nullptr, true }) {
        manifest["extra_cells"] = count;
        CHECK(contains(error_of(s, manifest), "extra_cells is " + count.dump() + ", not an integer from 1 to 65536"));
    }
    for (const uint32_t count : { 1, 3, 65536 }) {
        manifest["extra_cells"] = count;
        CHECK(contains(error_of(s, manifest), "must be " + std::to_string(3 + count)));
    }
    check_case = "as many as it says, and the file ends";
    bytes state = s.state();
    const uint32_t n_cells = 3 + 65536;
    memcpy(&state[28], &n_cells, 4);
    manifest["extra_cells"] = 65536;
    CHECK(error_of(sample::seal(state, manifest.dump())) != "");

    check_case = "left behind by a window, with the first token";
    s.n_extra = 2;
    s.caches = { { 0, 0, { 1 }, { 0, 1, 2, 0, 0 } }, { 1, 2, { 0 }, { 1, 2 } } };
    CHECK(error_of(s.file()) == "");
    s.caches[1].positions = { 1, 2, 0, 0 };
    CHECK(contains(error_of(s.file()), "number of cells is 4"));
    s.caches[1].positions = { 1, 0 };
    CHECK(contains(error_of(s.file()), "2 that a prefix of 3 tokens and 2 extra cells has in this cache"));
    s.caches[1] = { 1, 3, { 0 }, { 0, 1, 2, 0, 0 } };
    CHECK(error_of(s.file()) == "");

    check_case = "not finite";
    s.caches = { { 0, 0, { 0, 1 }, { 0, 1, 2, 0, 0 } } };
    std::vector<std::pair<size_t, size_t>> rows;
    bytes bad = s.state(&rows);
    const uint16_t infinity = 0x7c00;
    memcpy(&bad[rows[1].second - 2], &infinity, 2);
    CHECK(contains(error_of(sample::seal(bad, s.manifest().dump())), "in K of KV cache 0, layer 1, extra cell 1 (the"));
}

// sliding windows: the rule of llama_hparams::is_masked_swa, worked out by hand for 7 tokens (last position 6)
static void windows() {
    const struct {
        int type, n_swa;
        std::vector<int> kept;
    } rules[] = {
        { 0, 3, { 0, 1, 2, 3, 4, 5, 6 } },
        { 1, 1, { 6 } },
        { 1, 3, { 4, 5, 6 } },
        { 1, 6, { 1, 2, 3, 4, 5, 6 } },
        { 1, 7, { 0, 1, 2, 3, 4, 5, 6 } },
        { 1, 0x7fffffff, { 0, 1, 2, 3, 4, 5, 6 } },
        { 2, 1, { 6 } },
        { 2, 3, { 6 } },
        { 2, 4, { 4, 5, 6 } },
        { 2, 6, { 6 } },
        { 2, 7, { 0, 1, 2, 3, 4, 5, 6 } },
        { 3, 1, { 6 } },
        { 3, 4, { 4, 5, 6 } },
        { 3, 5, { 4, 5, 6 } },
    };
    sample s;
    s.tokens = { 1, 2, 3, 4, 5, 6, 7 };
    const std::vector<int> all = { 0, 1, 2, 3, 4, 5, 6 };
    for (const auto & rule : rules) {
        s.caches = { { 0, 0, { 1, 3 }, all }, { rule.type, rule.n_swa, { 0, 2 }, rule.kept } };
        check_case = "window type " + std::to_string(rule.type) + " of " + std::to_string(rule.n_swa);
        CHECK(error_of(s.file()) == "");
        std::swap(s.caches[0], s.caches[1]);
        CHECK(error_of(s.file()) == "");
        std::swap(s.caches[0], s.caches[1]);
        if (rule.kept.size() < 7) {
            s.caches[1].positions = all;
            CHECK(contains(error_of(s.file()), "number of cells is 7"));
            s.caches[1].positions = rule.kept;
            s.caches[1].positions[0] -= 1;
            CHECK(contains(error_of(s.file()), "position " + std::to_string(rule.kept[0] - 1)));
        }
    }
    s.caches = { { 0, 0, { 1 }, all }, { 1, 0, { 0 }, {} } };
    check_case = "a window of no tokens";
    CHECK(contains(error_of(s.file()), "n_swa is 0"));
    s.caches = { { 0, 0, { 1 }, all }, { 4, 1, { 0 }, {} } };
    CHECK(contains(error_of(s.file()), "swa_type is 4"));
    check_case = "layers only in the second cache";
    s.caches = { { 0, 0, {}, all }, { 1, 9, { 0 }, all } };
    CHECK(error_of(s.file()) == "");
    s.caches = { { 0, 0, {}, all } };
    CHECK(contains(error_of(s.file()), "no layers"));
    check_case = "three caches";
    s.caches = { { 0, 0, { 0 }, all }, { 0, 0, { 1 }, all }, { 0, 0, { 2 }, all } };
    CHECK(contains(error_of(s.file()), "caches is an array of 3"));
    check_case = "layers out of order";
    s.caches = { { 0, 0, { 1, 0 }, all } };
    CHECK(contains(error_of(s.file()), "layers[1].il is 0, not above that of the layer before it, 1"));
}

static void huge_sizes() {
    const sample s;
    for (const uint64_t heads : { uint64_t(65536), uint64_t(65537), UINT64_MAX, uint64_t(1) << 63 }) {
        check_case = "n_head_kv " + std::to_string(heads);
        json manifest = s.manifest();
        manifest["model"]["caches"][0]["layers"][0]["n_head_kv"] = heads;
        manifest["model"]["caches"][0]["layers"][0]["head_dim_k"] = 65536;
        bytes state = s.state();
        const uint64_t row = 2 * heads * 65536;
        const size_t at = 24 + 8 + 36 + 8 + 4; // row size of the first layer
        memcpy(&state[at], &row, 8);
        const std::string error = error_of(sample::seal(state, manifest.dump()));
        CHECK(contains(error, heads == 65536 ? "state ends inside the rows" : "n_head_kv"));
    }
    check_case = "manifest length";
    const bytes good = s.file();
    for (const uint64_t n :
            { UINT64_MAX, UINT64_MAX - 47, uint64_t(1) << 63, uint64_t(good.size()), uint64_t(good.size() - 47) }) {
        bytes bad = good;
        memcpy(&bad[bad.size() - 48], &n, 8);
        CHECK(contains(error_of(bad), "manifest has " + std::to_string(n) + " bytes"));
    }
    for (const uint64_t n :
            { uint64_t(0), uint64_t(1), uint64_t(good.size() - 48), uint64_t(s.manifest().dump().size() + 1) }) {
        bytes bad = good;
        memcpy(&bad[bad.size() - 48], &n, 8);
        CHECK(error_of(bad) != "");
    }
    check_case = "a layer without attention";
    json manifest = s.manifest();
    manifest["model"]["caches"][0]["layers"][1]["n_head_kv"] = 0;
    CHECK(contains(error_of(s, manifest), "row size of a layer is 18"));
    std::vector<std::pair<size_t, size_t>> rows;
    bytes state = s.state(&rows);
    for (const size_t i : { 3, 1 }) { // V, K of layer 1: no rows, of no bytes
        state.erase(state.begin() + rows[i].first, state.begin() + rows[i].second);
        std::fill_n(state.begin() + rows[i].first - 8, 8, 0);
    }
    CHECK(error_of(sample::seal(state, manifest.dump())) == "");
}

static void recurrent() {
    check_case = "recurrent states";
    prefix_view view;
    sample s = sample::hybrid();
    const size_t size = 5 * 4 + 4 * 12 + 4 * (3 + 4 + 5 + 0);
    CHECK(error_of(s.file(), &view) == "" && view.recurrent_size == size);
    CHECK(error_of(sample().file(), &view) == "" && view.recurrent_size == 0);
    CHECK(error_of(sample::recurrent().file(), &view) == "" && view.recurrent_size == size && view.state_size == size);
    std::vector<std::pair<size_t, size_t>> ranges;
    const bytes state = s.state(&ranges);
    const char * const names[] = { "the convolution's state of layer 0", "the convolution's state of layer 2",
        "the recurrent state of layer 0" };
    for (size_t i = 0; i < 3; ++i) {
        const auto [begin, end] = ranges[2 + i]; // behind K and V of the one attention layer
        for (const uint32_t value : { 0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u, 0xffffffffu }) {
            for (size_t at = begin; at < end; at += 4) {
                bytes bad = state;
                memcpy(&bad[at], &value, 4);
                const std::string error = error_of(sample::seal(bad, s.manifest().dump()));
                CHECK(contains(error, "NaN or infinity in " + std::string(names[i])));
                CHECK(contains(error, "(at byte " + std::to_string(begin) + ")"));
            }
        }
    }
    for (const uint32_t value : { 0x7f7fffffu, 0xff7fffffu, 0x00000001u, 0x80000000u, 0u }) { // finite, all of them
        s.state_value = value;
        CHECK(error_of(s.file()) == "");
    }
    check_case = "states of other sizes";
    s = sample::hybrid();
    json other = s.manifest();
    std::swap(other["model"]["recurrent"]["layers"][0]["n_r"], other["model"]["recurrent"]["layers"][0]["n_s"]);
    CHECK(contains(error_of(s, other), "size of a layer's state is 12 at byte"));
    other = s.manifest();
    other["model"]["recurrent"]["layers"][1]["il"] = 0;
    CHECK(contains(error_of(s, other), "recurrent.layers[1].il is 0, not above that of the layer before it, 0"));
    other = s.manifest();
    other["model"].erase("recurrent");
    CHECK(contains(error_of(s, other), "state ends at byte"));
    other = sample::recurrent().manifest();
    other["model"].erase("recurrent");
    CHECK(contains(error_of(sample::recurrent(), other), "caches is an array of 0, not an array of 1 to 2"));
}

static void nonfinite() {
    sample s;
    for (const uint16_t finite : { 0x0000, 0x8000, 0x0001, 0x03ff, 0x7bff, 0xfbff }) {
        check_case = "finite " + std::to_string(finite);
        s.value = finite;
        CHECK(error_of(s.file()) == "");
    }
    s.value = 0xfbff; // the largest neighbours, in case they carry
    std::vector<std::pair<size_t, size_t>> rows;
    const bytes state = s.state(&rows);
    for (const uint16_t value : { 0x7c00, 0xfc00, 0x7e00, 0xffff, 0x7c01 }) {
        for (size_t r = 0; r < rows.size(); ++r) {
            const size_t row_bytes = (rows[r].second - rows[r].first) / 3;
            for (size_t at = rows[r].first; at < rows[r].second; at += 2) {
                bytes bad = state;
                memcpy(&bad[at], &value, 2);
                const std::string where = std::string(r < 2 ? "K" : "V") + " of KV cache 0, layer " +
                        std::to_string(r % 2) + ", token " + std::to_string((at - rows[r].first) / row_bytes) + " ";
                check_case = "value " + std::to_string(value) + " at byte " + std::to_string(at);
                CHECK(contains(error_of(sample::seal(bad, s.manifest().dump())), where));
            }
        }
    }
}

// A first token, and its extra cells, that no sliding window hides.
static void in_sight() {
    sample s;
    s.tokens = { 1 };
    s.n_extra = 2;
    s.caches = { { 0, 0, { 1 }, { 0, 0, 0 } }, { 1, 2, { 0 }, { 0, 0, 0 } } };
    json manifest = s.manifest();
    prefix_view view;
    for (const json & said : std::vector<json>{ json::object(), { { "in_sight", false } }, { { "in_sight", true } } }) {
        manifest["calibrated"] = said;
        check_case = "calibrated " + said.dump();
        CHECK(error_of(sample::seal(s.state(), manifest.dump()), &view) == "");
        CHECK(view.calibrated && view.in_sight == said.value("in_sight", false));
    }
    for (const json & said : std::vector<json>{ 0, 1, "true", nullptr, json::array(), json::object() }) {
        manifest["calibrated"] = { { "in_sight", said } };
        check_case = "in_sight " + said.dump();
        CHECK(contains(error_of(s, manifest), "calibrated.in_sight is "));
    }
    check_case = "of more than the first token";
    const sample several;
    manifest = several.manifest();
    manifest["calibrated"] = { { "in_sight", true } };
    CHECK(contains(
            error_of(several, manifest), "in_sight is true, not false for a prefix of 3 tokens, only the first"));
    manifest["calibrated"] = { { "in_sight", false } };
    CHECK(error_of(several, manifest) == "");
}

void test_parse() {
    valid();
    flipped();
    sample ext;
    ext.cell_ext = true;
    for (const sample & s : { sample(), ext, sample::hybrid(), sample::recurrent() }) {
        wrong_words(s);
        wrong_manifest(s);
        truncated(s);
    }
    recurrent();
    hostile_manifest();
    tokens();
    cells();
    extra_cells();
    in_sight();
    windows();
    huge_sizes();
    nonfinite();
}
