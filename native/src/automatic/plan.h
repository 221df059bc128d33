// What is to be done with a batch whose sequences begin with prefixes: which tokens are loaded, which are computed.

#pragma once

#include "automatic/match.h"

#include <cstdint>
#include <vector>

struct llama_batch_ext;

namespace intactkv {

// Of a sequence's tokens, counted from its first: up to load_end they are loaded, then up to compute_end computed. Those of
// the prefix that are computed, because their logits are asked for (or where a sliding window has left cells behind that
// they need), get its rows afterwards.
struct go {
    uint32_t load_end;
    uint32_t compute_end;
};

// Sequences of a batch that have the same tokens, one as a rule, and what they get.
struct start {
    std::vector<llama_seq_id> seqs;
    std::vector<uint32_t> batch_index; // of their tokens, from position n_there on
    uint32_t n_there = 0;              // tokens that they have
    origins there;                     // of them; of a model with recurrent layers, none
    std::vector<uint8_t> before;       // their state, where a whole prefix takes its place: one cannot step back in it
    match found;
    bool waits = false;   // found is not complete: its tokens are deferred (deferred.h)
    std::vector<go> goes; // one or more; what these sequences have behind batch_index is computed with the last

    bool begins_anew() const { return n_there > 0 && !found.as_it_began; }
};

// Empty: the batch is upstream's as it is. at_once: no batch may be computed in more than one go; may_wait: tokens may be
// deferred; every_row: all tokens are computed, something of each is read
std::vector<start> plan(const prefixes & held, const llama_memory_i & memory, const llama_batch_ext & batch,
        bool at_once, bool may_wait = true, bool every_row = false);

} // namespace intactkv
