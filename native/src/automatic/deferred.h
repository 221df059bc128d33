// A sequence of a model with recurrent layers that has come to the middle of a prefix, and of which nothing was computed.
//
// Programs cut a prompt into batches: a prefix that is given whole or not at all would be computed up to the batch that has
// its last token. So its tokens wait, as long as they are the prefix's and nothing is asked about them: the sequence has
// the prefix's cells, and instead of a recurrent state a note of which prefix it is and how far, among numbers so large
// that nothing can be computed of them unnoticed. All are finite: upstream clears a state by multiplying it with 0. The note
// is where the state is, and goes where it goes: into other sequences and a server's checkpoints.

#pragma once

#include "automatic/held.h"

#include <cstdint>
#include <vector>

class llama_memory_recurrent;

namespace intactkv {

// What upstream reads for such a sequence: n tokens of a prefix
std::vector<uint8_t> deferred_state(const held_prefix & prefix, uint32_t n);

struct deferred_note {
    bool there = false;
    uint32_t n = 0;    // tokens
    uint64_t hash = 0; // of the prefix's
    int32_t shift = 0; // by how much the sequence was moved since
};

// What a sequence has instead of a state
deferred_note deferred_of(const llama_memory_recurrent & states, llama_seq_id seq_id);

} // namespace intactkv
