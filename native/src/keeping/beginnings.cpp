#include "keeping/beginnings.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace intactkv {

size_t n_common(const std::vector<llama_token> & a, const std::vector<llama_token> & b) {
    const size_t most = std::min(a.size(), b.size());
    return std::mismatch(a.begin(), a.begin() + most, b.begin()).first - a.begin();
}

// Whether it is of a conversation that was seen; then the longer one of the two is remembered.
bool beginnings::is_known(request & added) {
    for (auto it = seen.begin(); it != seen.end(); ++it) {
        const size_t n = n_common(added.tokens, it->tokens);
        const bool goes_on = n >= it->n_own;
        if (!goes_on && n < added.n_own) {
            continue;
        }
        if (goes_on && added.tokens.size() > it->tokens.size()) {
            n_tokens += added.tokens.size() - it->tokens.size();
            *it = std::move(added);
        }
        seen.splice(seen.begin(), seen, it);
        return true;
    }
    return false;
}

size_t beginnings::add(request added) {
    if (added.tokens.empty() || is_known(added)) {
        return 0;
    }
    std::vector<size_t> common;
    for (const request & other : seen) {
        common.push_back(n_common(added.tokens, other.tokens));
    }
    n_tokens += added.tokens.size();
    seen.push_front(std::move(added));
    while (seen.size() > max_requests || (n_tokens > max_tokens && seen.size() > 1)) {
        n_tokens -= seen.back().tokens.size();
        seen.pop_back();
    }
    const size_t others = n_times - 1;
    if (common.size() < others) {
        return 0;
    }
    std::nth_element(common.begin(), common.begin() + (others - 1), common.end(), std::greater<size_t>());
    return common[others - 1];
}

} // namespace intactkv
