#include "keeping/prompts.h"

#include "api/describe.h"
#include "cells/arena.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-kv-cache.h"

#include <algorithm>

namespace intactkv {

static constexpr size_t MOST = 1 << 20; // tokens of a sequence that are remembered: one without cells has no end

prompts::prompts(const llama_context & ctx) :
    ctx(ctx),
    open(ctx.n_seq_max()),
    sequences(caches_of(&ctx).empty() ? ctx.n_seq_max() : 0) {}

// A prompt is what comes without being asked about, up to the first token that is. One reply's tokens come each asked
// about, a draft's too.
void prompts::see(const llama_batch_ext & batch, const std::function<void(const tokens &)> & ended) {
    for (size_t i = 0; i < batch.tokens.size(); ++i) {
        const llama_batch_ext::token & t = batch.tokens[i];
        if (t.seq_ids.empty()) {
            return;
        }
        const auto [first, last] = std::minmax_element(t.seq_ids.begin(), t.seq_ids.end());
        if (*first < 0 || (size_t) *last >= open.size()) {
            return; // upstream refuses it
        }
        if (!sequences.empty()) {
            for (const llama_seq_id seq_id : t.seq_ids) {
                remember(sequences[seq_id], t.pos[0], t.has_embd ? LLAMA_TOKEN_NULL : t.id);
            }
        }
        if (open[*first] && t.output) {
            ended(tokens_of(batch, *first, i));
        }
        open[*first] = !t.output;
    }
}

void prompts::remember(remembered & of, llama_pos pos, llama_token id) {
    const size_t at = pos;
    if (at == 0 || (of.back && at < of.all.size())) {
        of.known = at == 0 || of.known;
        of.all.resize(at);
    }
    of.back = false;
    of.known = of.known && at == of.all.size() && at < MOST && id >= 0;
    if (of.known) {
        of.all.push_back(id);
    } else {
        of.all = tokens();
    }
}

void prompts::restored(llama_seq_id seq_id, bool own) {
    if ((size_t) seq_id < sequences.size()) {
        sequences[seq_id].back = own;
        sequences[seq_id].known &= own;
    }
}

// From the sequence's first on, as long as there is one at each position.
prompts::tokens prompts::tokens_of(const llama_batch_ext & batch, llama_seq_id seq_id, size_t last) const {
    const auto caches = caches_of(&ctx);
    if (caches.empty()) {
        return sequences[seq_id].all;
    }
    llama_pos first = batch.tokens[last].pos[0];
    for (size_t i = 0; i < last; ++i) {
        first = batch.tokens[i].seq_ids.count(seq_id) ? std::min(first, batch.tokens[i].pos[0]) : first;
    }
    tokens res;
    const arena & a = *caches[0]->intact; // the first of them has all tokens
    const uint32_t strm = a.stream_of(seq_id);
    for (const auto & [pos, cell] : a.cells_of(strm, seq_id)) {
        const llama_token id = a.cells_in(strm).ext_get(cell).tok;
        if (pos >= first || (size_t) pos > res.size()) {
            break;
        }
        if ((size_t) pos == res.size() && id >= 0) { // extra cells are no tokens
            res.push_back(id);
        }
    }
    for (size_t i = 0; i <= last; ++i) {
        const llama_batch_ext::token & t = batch.tokens[i];
        if (t.seq_ids.count(seq_id) && !t.has_embd && t.id >= 0 && (size_t) t.pos[0] == res.size()) {
            res.push_back(t.id);
        }
    }
    return res;
}

} // namespace intactkv
