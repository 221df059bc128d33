// What a server asks of its context with LLAMA_INTACTKV_KEEP=DIRECTORY: which beginnings of prompts come again and again,
// and which of the prefixes kept there are used.
//
// Only tokens are noted here, in small files NAME.tokens: whoever runs the server computes their rows with the same
// model, exactly, which the cells of a quantized cache do not have any more, and writes the prefix file.

#pragma once

#include "keeping/beginnings.h"

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_context;

namespace intactkv {

class prefixes;

class keeper {
public:
    // Of a new context. nullptr: nothing is to be kept
    static std::unique_ptr<keeper> of_new(const llama_context & ctx);

    // Whether a file lies in the directory of LLAMA_INTACTKV_KEEP: one that cannot be used there is left out
    static bool has(const std::string & path);

    keeper(const llama_context & ctx, std::string directory, uint32_t n_times);

    // A prompt, from its first token on. Throws nothing
    void count(std::vector<llama_token> prompt, const prefixes & held);

private:
    const llama_context & ctx;
    std::string directory;
    uint32_t n_times;
    beginnings counted;
    std::vector<std::vector<llama_token>> written; // by this context
    std::unordered_map<std::string, std::chrono::steady_clock::time_point> last_used;

    void note_use(const std::vector<llama_token> & tokens, const prefixes & held);
    size_t n_own(const std::vector<llama_token> & tokens) const;
    size_t cut(const std::vector<llama_token> & tokens, size_t n) const;
    bool is_covered(const std::vector<llama_token> & tokens, const prefixes & held) const;
    void write(const std::vector<llama_token> & tokens) const;
};

} // namespace intactkv
