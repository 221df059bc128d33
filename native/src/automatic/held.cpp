#include "automatic/held.h"

#include "api/describe.h"
#include "attention/rows.h"
#include "attention/store.h"
#include "cells/arena.h"
#include "cells/sight.h"
#include "prefix_file/parse.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace intactkv {

// The file was verified: what is read here is there.
template <typename T> static T get(const uint8_t *& at) {
    T res;
    memcpy(&res, at, sizeof(T));
    at += sizeof(T);
    return res;
}

// Item of each cell in the order of the file; first: the first token that has a cell.
// ext: cells are followed by their place in a picture, and their token.
static std::vector<size_t> read_cells(const uint8_t *& at, uint32_t n_tokens, bool ext, uint32_t & first) {
    get<uint32_t>(at); // streams
    std::vector<int32_t> positions(get<uint32_t>(at));
    for (int32_t & pos : positions) {
        pos = get<int32_t>(at);
        at += sizeof(uint32_t) + (ext ? 3 : 0) * sizeof(int32_t) + sizeof(int32_t); // of one sequence, 0
    }
    first = positions.empty() ? n_tokens : *std::min_element(positions.begin(), positions.end());
    std::vector<size_t> res;
    size_t n_first = 0;
    for (const int32_t pos : positions) { // the first at position 0 is token 0
        n_first += pos == 0;
        res.push_back(pos > 0 || n_first == 1 ? pos - first : n_tokens + n_first - 2);
    }
    return res;
}

void held_rows::read(const uint8_t *& state) {
    const std::vector<size_t> items = read_cells(state, n_tokens, a->cache().has_cell_ext(), first);
    std::vector<llama_pos> positions(items.size(), 0); // by item; extra cells are at position 0
    for (uint32_t token = first; token < n_tokens; ++token) {
        positions[token - first] = token;
    }
    numbers = a->hold_rows(positions);
    a->wait();
    get<uint32_t>(state); // V is not transposed
    get<uint32_t>(state); // layers
    const std::vector<uint32_t> layers = a->layer_ids();
    for (const bool is_v : { false, true }) {
        for (const uint32_t il : layers) {
            auto & exact = is_v ? exact_v : exact_k;
            exact.emplace_back();
            const ggml_tensor * cache = is_v ? a->cache_v(il) : a->cache_k(il);
            if (cache == nullptr) { // nor has the file rows of it
                continue;
            }
            get<int32_t>(state); // F16
            const auto row_size = get<uint64_t>(state);
            take(is_v ? a->layer(il).v : a->layer(il).k, exact.back(), cache, is_v ? a->rotation().v : a->rotation().k,
                    state, items, il, is_v ? "V" : "K");
            state += row_size * items.size();
        }
    }
}

void held_rows::take(ggml_tensor * arena_rows, std::vector<uint8_t> & exact, const ggml_tensor * cache, int32_t n_rot,
        const uint8_t * data, const std::vector<size_t> & items, uint32_t il, const char * side) {
    const int64_t n = cache->ne[0];
    const size_t row_size = n * sizeof(ggml_fp16_t);
    if (n == 0) {
        return;
    }
    if (is_exact(cache->type)) {
        exact.resize(row_size * items.size());
        for (size_t i = 0; i < items.size(); ++i) {
            memcpy(exact.data() + items[i] * row_size, data + i * row_size, row_size);
        }
        return;
    }
    std::vector<ggml_fp16_t> f16(n);
    std::vector<float> f32(n);
    std::vector<uint8_t> rows(items.size() * row_size);
    for (size_t i = 0; i < items.size(); ++i) {
        memcpy(f16.data(), data + i * row_size, row_size);
        fused_widen(f16.data(), f32.data(), n);
        fused_rotate(f32.data(), n, n_rot);
        fused_narrow(GGML_TYPE_F16, f32.data(), f16.data(), n);
        // a rotated pivot could leave the range of F16 (65504), an infinity would poison every later token
        if (std::any_of(f16.begin(), f16.end(), [](ggml_fp16_t x) { return (x & 0x7c00) == 0x7c00; })) {
            throw std::runtime_error(format(
                    "%s row %zu of layer %u is not finite in the basis of this cache: use an F16 cache", side, i, il));
        }
        memcpy(rows.data() + items[i] * row_size, f16.data(), row_size);
    }
    set_rows(arena_rows, numbers, rows.data());
}

void held_rows::release() {
    a->release_rows(numbers);
}

size_t held_rows::item_of(int32_t row) const {
    return std::lower_bound(numbers.begin(), numbers.end(), (uint32_t) row) - numbers.begin();
}

void held_rows::write_side(ggml_tensor * cells, const ggml_tensor * arena_rows, const std::vector<uint8_t> & exact,
        const std::vector<uint32_t> & to, const std::vector<int32_t> & rows) const {
    const int64_t n = cells->ne[0];
    const size_t row_size = n * sizeof(ggml_fp16_t);
    const size_t out_size = ggml_row_size(cells->type, n);
    std::vector<ggml_fp16_t> f16(n);
    std::vector<float> f32(n);
    std::vector<uint8_t> there;
    if (arena_rows) {
        get_rows(arena_rows, rows, there);
    }
    std::vector<uint8_t> out(to.size() * out_size);
    for (size_t i = 0; i < to.size(); ++i) {
        uint8_t * dst = out.data() + i * out_size;
        memcpy(f16.data(), arena_rows ? there.data() + i * row_size : exact.data() + item_of(rows[i]) * row_size,
                row_size);
        if (cells->type == GGML_TYPE_F16) {
            memcpy(dst, f16.data(), row_size);
            continue;
        }
        fused_widen(f16.data(), f32.data(), n);
        fused_narrow(cells->type, f32.data(), dst, n);
    }
    set_rows(cells, to, out.data());
}

void held_rows::write(uint32_t strm, const std::vector<uint32_t> & cells, const std::vector<int32_t> & rows) const {
    a->wait();
    const std::vector<uint32_t> layers = a->layer_ids();
    for (size_t i = 0; i < layers.size(); ++i) {
        const arena_layer & kept = a->layer(layers[i]);
        if (ggml_tensor * k = a->stream_k(layers[i], strm); k && k->ne[0] > 0) {
            write_side(k, is_exact(k->type) ? nullptr : kept.k, exact_k[i], cells, rows);
        }
        if (ggml_tensor * v = a->stream_v(layers[i], strm); v && v->ne[0] > 0) {
            write_side(v, is_exact(v->type) ? nullptr : kept.v, exact_v[i], cells, rows);
        }
    }
    for (size_t i = 0; i < cells.size(); ++i) {
        a->mark_held(strm, cells[i], rows[i]);
        if (in_sight) {
            keep_in_sight(*a, strm, cells[i]);
        }
    }
}

static bool is_row(const ggml_tensor * cells, uint32_t cell, const uint8_t * f16) {
    const int64_t n = cells->ne[0];
    std::vector<uint8_t> want(ggml_row_size(cells->type, n));
    std::vector<uint8_t> there(want.size());
    if (cells->type == GGML_TYPE_F32) {
        fused_widen((const ggml_fp16_t *) f16, (float *) want.data(), n);
    } else {
        memcpy(want.data(), f16, want.size());
    }
    ggml_backend_tensor_get(cells, there.data(), cell * there.size(), there.size());
    return want == there;
}

bool held_rows::is_in(uint32_t strm, uint32_t cell, int32_t row) const {
    const std::vector<uint32_t> layers = a->layer_ids();
    const size_t item = item_of(row);
    for (size_t i = 0; i < layers.size(); ++i) {
        const std::pair<const ggml_tensor *, const std::vector<uint8_t> *> sides[] = {
            { a->stream_k(layers[i], strm), &exact_k[i] }, { a->stream_v(layers[i], strm), &exact_v[i] }
        };
        for (const auto & [cells, rows] : sides) {
            if (cells && cells->ne[0] > 0 &&
                    !is_row(cells, cell, rows->data() + item * cells->ne[0] * sizeof(ggml_fp16_t))) {
                return false;
            }
        }
    }
    return true;
}

size_t held_rows::n_bytes() const {
    size_t res = 0;
    for (const auto * side : { &exact_k, &exact_v }) {
        for (const auto & rows : *side) {
            res += rows.size();
        }
    }
    return res;
}

bool held_prefix::serves(uint32_t pos) const {
    if (whole_only()) {
        return pos == tokens.size();
    }
    return std::all_of(caches.begin(), caches.end(), [&](const held_rows & rows) {
        return rows.first_token() == 0 || rows.of().is_out_of_sight(rows.first_token() - 1, pos);
    });
}

static uint64_t hash_of(const std::vector<llama_token> & tokens) {
    uint64_t res = 0xcbf29ce484222325; // FNV-1a
    for (const llama_token token : tokens) {
        for (int i = 0; i < 32; i += 8) {
            res = (res ^ ((uint32_t) token >> i & 0xff)) * 0x100000001b3;
        }
    }
    return res;
}

held_prefix hold(const llama_context * ctx, const prefix_view & view, const std::string & name) {
    held_prefix res;
    res.name = name;
    res.n_extra = view.n_cells - view.n_tokens;
    res.whole = view.calibrated;
    res.tokens.resize(view.n_tokens);
    memcpy(res.tokens.data(), view.tokens, view.n_tokens * sizeof(llama_token));
    res.hash = hash_of(res.tokens);
    const uint8_t * at = view.state;
    try {
        for (const llama_kv_cache * kv : caches_of(ctx)) {
            res.caches.emplace_back(*kv->intact, view.n_tokens);
            res.caches.back().read(at);
            res.caches.back().in_sight = view.in_sight;
        }
    } catch (...) {
        for (held_rows & rows : res.caches) {
            rows.release();
        }
        throw;
    }
    res.states.assign(at, at + view.recurrent_size);
    return res;
}

} // namespace intactkv
