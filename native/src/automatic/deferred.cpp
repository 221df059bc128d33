#include "automatic/deferred.h"

#include "llama-memory-recurrent.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>

namespace intactkv {

static constexpr uint32_t TAG = 0x494b494b;                         // "IKIK"
static constexpr uint32_t HUGE_STATE = 0x7149f2ca;                  // 1e30
static constexpr size_t HEADER = 5 * sizeof(uint32_t);              // number, position, sequences, order, layers
static constexpr size_t ENTRY = sizeof(int32_t) + sizeof(uint64_t); // type, bytes
static constexpr size_t N_NOTE = 6;                                 // values that the note takes

std::vector<uint8_t> deferred_state(const held_prefix & prefix, uint32_t n) {
    std::vector<uint8_t> res = prefix.states;
    const int32_t pos = (int32_t) n - 1;
    memcpy(res.data() + sizeof(uint32_t), &pos, sizeof(pos));
    uint32_t note[N_NOTE] = { TAG, n };
    for (size_t i = 0; i < 4; ++i) {
        note[2 + i] = prefix.hash >> 16 * i & 0xffff;
    }
    bool noted = false;
    for (size_t at = HEADER; at + ENTRY <= res.size();) {
        uint64_t size;
        memcpy(&size, res.data() + at + sizeof(int32_t), sizeof(size));
        at += ENTRY;
        for (size_t i = 0; i < size; i += sizeof(uint32_t)) {
            memcpy(res.data() + at + i, &HUGE_STATE, sizeof(uint32_t));
        }
        if (!noted && size >= sizeof(note)) {
            memcpy(res.data() + at, note, sizeof(note));
            noted = true;
        }
        at += size;
    }
    return res;
}

// The first that is wide enough, in the order of a state
static const ggml_tensor * noted_in(const llama_memory_recurrent & states) {
    for (const auto * side : { &states.r_l, &states.s_l }) {
        const auto found = std::find_if(
                side->begin(), side->end(), [](const ggml_tensor * t) { return t && t->ne[0] >= (int64_t) N_NOTE; });
        if (found != side->end()) {
            return *found;
        }
    }
    return nullptr;
}

deferred_note deferred_of(const llama_memory_recurrent & states, llama_seq_id seq_id) {
    const ggml_tensor * t = noted_in(states);
    const int32_t cell = (uint32_t) seq_id < states.size ? states.cells[seq_id].tail : -1;
    if (t == nullptr || cell < 0) {
        return {};
    }
    const int32_t src = states.cells[cell].src;
    uint32_t note[N_NOTE];
    ggml_backend_tensor_get(t, note, (src >= 0 ? src : cell) * t->nb[1], sizeof(note));
    if (note[0] != TAG) {
        return {};
    }
    deferred_note res{ true, note[1], 0, states.cells[cell].pos + 1 - (int32_t) note[1] };
    for (size_t i = 0; i < 4; ++i) {
        res.hash |= (uint64_t) note[2 + i] << 16 * i;
    }
    return res;
}

} // namespace intactkv
