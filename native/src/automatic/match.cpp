#include "automatic/match.h"

#include "keeping/beginnings.h"

#include <algorithm>
#include <tuple>

namespace intactkv {

// Rows that the reference computed of the same tokens are the same, whatever came behind them.
static bool same_rows(const held_prefix & a, const held_prefix & b) {
    return &a == &b || (!a.whole && !b.whole && a.n_extra == 0 && b.n_extra == 0);
}

match longest_match(const prefixes & held, const std::vector<llama_token> & tokens, bool open, const origins & of) {
    match best;
    best.as_it_began = of.empty();
    auto rank = std::make_tuple(0u, false, false);
    for (const held_prefix & p : held.all()) {
        const uint32_t n = n_common(tokens, p.tokens);
        const bool complete = n == p.tokens.size();
        const bool ended = !complete && (n < tokens.size() || !open);
        if (n == 0 || (ended && p.whole) || (p.whole_only() && !complete)) {
            continue;
        }
        const bool began =
                std::all_of(of.begin(), of.end(), [&](const held_prefix * other) { return same_rows(*other, p); });
        const auto new_rank = std::make_tuple(n, began, complete);
        if (new_rank > rank) {
            rank = new_rank;
            best = { &p, n, began };
        }
    }
    return best;
}

} // namespace intactkv
