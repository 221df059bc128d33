// A prompt that begins with none of a context's prefixes is told of.
//
// Once in a process, and of its first model: a draft model beside it is given the same tokens. No word of a prompt is said,
// it may be anybody's.

#pragma once

#include "llama.h"

#include <vector>

struct llama_context;

namespace intactkv {

class prefixes;

class mismatch {
public:
    explicit mismatch(const llama_context & ctx);

    bool wanted() const; // false: nothing is left to be told

    // prompt: from its first token on. Of prefixes that are missed: not that of the first token, which serves everyone, and
    // not those that a server has kept, of prompts that it happened to see
    void look(const std::vector<llama_token> & prompt, const prefixes & held) const;

private:
    bool of_first_model;
};

} // namespace intactkv
