// Prefix files (`.ikv`): everything between bytes that nobody has checked and a KV state that may be loaded.
//
// The file is a llama.cpp sequence state with F16 rows, then a manifest, then a trailer (little endian):
//   u32 magic 'ggsq', u32 version 3, u32 n_tokens, i32 tokens[n_tokens]
//   per KV cache:  u32 n_stream = 1, u32 n_cells, per cell { i32 pos, u32 n_seq_id = 1, i32 seq_id = 0 },
//                  u32 v_trans = 0, u32 n_layer,
//                  per layer { i32 type = F16, u64 row_bytes, n_cells rows of K }, the same for V of those
//                  layers that have it (not MLA)
//   of a model with recurrent layers, one state for the sequence:
//                  u32 n_cells = 1, i32 pos = n_tokens - 1, u32 n_seq_id = 0, u32 s_trans = 0, u32 n_layer of the model,
//                  per recurrent layer { i32 type = F32, u64 bytes, its convolution's state }, the same for its own
//   manifest: UTF-8 JSON
//   u64 manifest length, SHA-256 of all bytes before that length, 8 bytes "INTACTKV"
//
// Its cells are those of the tokens, at the positions 0, 1, ..., and at position 0 also the extra ones, which stand for no
// token: the manifest has their number. Of the cells at position 0 the first is the first token's.
//
// No function of parse.h, compatible.h and read_bytes.h throws, aborts, or prints. An error is one sentence: what is
// wrong, where, both values, and what to do. This folder needs nothing of llama.cpp but its SHA-256 and JSON libraries.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace intactkv {

// Where things are in the bytes given to parse(), which must outlive it.
struct prefix_view {
    uint32_t n_tokens = 0;
    uint32_t n_cells = 0;             // those of the tokens, and the extra ones
    const uint8_t * tokens = nullptr; // n_tokens times i32, maybe unaligned
    const uint8_t * state = nullptr;  // the KV state: the bytes right after the tokens
    size_t state_size = 0;            // up to the manifest, which is not part of it
    size_t recurrent_size = 0;        // of it, its last bytes: the recurrent states, 0: it has none
    bool calibrated = false;          // its rows were trained, together
    bool in_sight = false;            // so that no sliding window hides them
};

// Checks everything that the bytes alone can tell: trailer, checksum, the manifest's shape, and that tokens and
// KV state are byte for byte what the manifest says, with finite values. false: error is set, out is unspecified.
bool parse(const void * data, size_t size, prefix_view & out, std::string & manifest_json, std::string & error);

// The trailer's last bytes.
constexpr char TRAILER_MAGIC[] = "INTACTKV";
constexpr size_t TRAILER_MAGIC_SIZE = sizeof(TRAILER_MAGIC) - 1;

} // namespace intactkv
