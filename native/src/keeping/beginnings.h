// Which beginnings come again and again: what several requests have in common that then differ.

#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <list>
#include <vector>

namespace intactkv {

// What a request is made of. n_own: tokens up to which another one has to agree to be the same conversation, gone on: a
// template may end a prompt otherwise than it goes on behind a reply
struct request {
    std::vector<llama_token> tokens;
    size_t n_own;
};

// The requests that came last, a conversation counted once however often it goes on or is asked again.
class beginnings {
public:
    // n_times: 2 or more. Of what was longest ago, no more than these are remembered
    explicit beginnings(uint32_t n_times, size_t max_requests = 256, size_t max_tokens = 1 << 20) :
        n_times(n_times),
        max_requests(max_requests),
        max_tokens(max_tokens) {}

    // How many tokens this one has in common with n_times - 1 others at least. 0: nothing
    size_t add(request added);

private:
    size_t n_times, max_requests, max_tokens;
    size_t n_tokens = 0;
    std::list<request> seen; // the newest first

    bool is_known(request & added);
};

// How many tokens two texts begin with alike
size_t n_common(const std::vector<llama_token> & a, const std::vector<llama_token> & b);

} // namespace intactkv
