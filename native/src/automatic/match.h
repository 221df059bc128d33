// Which of a context's prefixes a sequence begins with.

#pragma once

#include "automatic/prefixes.h"

#include <cstdint>
#include <vector>

namespace intactkv {

struct match {
    const held_prefix * prefix = nullptr;
    uint32_t n = 0;          // tokens from the sequence's first
    bool as_it_began = true; // the cells that the sequence has already are what this prefix would give it
};

// The longest; of a model with recurrent layers, of those that match to their end. tokens: all of the sequence, what it has already (of) and what is coming; open: they may go on as any
// prefix does, else what follows them is no token of a prefix.
//
// A token that differs ends a match: what matched is of use, but not of a prefix whose rows were trained together. Of two
// that match as far, the one whose cells the sequence has already; then one that is complete.
match longest_match(const prefixes & held, const std::vector<llama_token> & tokens, bool open, const origins & of);

} // namespace intactkv
