#include "automatic/plan.h"

#include "llama-batch.h"
#include "llama-memory.h"

#include <algorithm>
#include <map>
#include <utility>

namespace intactkv {

using token = llama_batch_ext::token;

// The tokens of each sequence, as long as they belong to the same sequences as its first, and whether they go on.
struct run {
    std::vector<llama_seq_id> seqs;
    std::vector<uint32_t> batch_index;
    bool open = true;
};

static std::vector<run> runs_of(const llama_batch_ext & batch) {
    std::vector<run> res;
    std::map<llama_seq_id, size_t> run_of;
    for (uint32_t i = 0; i < batch.tokens.size(); ++i) {
        const token & t = batch.tokens[i];
        if (t.seq_ids.empty()) {
            return {};
        }
        std::vector<llama_seq_id> seqs(t.seq_ids.begin(), t.seq_ids.end());
        std::sort(seqs.begin(), seqs.end());
        const auto known = run_of.find(seqs[0]);
        if (known == run_of.end()) {
            for (const llama_seq_id seq_id : seqs) {
                if (!run_of.emplace(seq_id, res.size()).second) {
                    return {}; // sequences that meet later: upstream refuses them
                }
            }
            res.push_back({ seqs, { i } });
            continue;
        }
        run & r = res[known->second];
        if (r.seqs == seqs && r.open) {
            r.batch_index.push_back(i);
            continue;
        }
        for (const llama_seq_id seq_id : seqs) { // they part here
            if (const auto it = run_of.find(seq_id); it != run_of.end()) {
                res[it->second].open = false;
            }
        }
    }
    return res;
}

// From the token at n_there to the run's last. Empty: the prefix is of no use to it
static std::vector<go> goes_of(const llama_batch_ext & batch, const start & s, bool at_once, bool every_row) {
    const uint32_t n = s.found.n, n_all = s.n_there + s.batch_index.size();
    const auto output = [&](uint32_t pos) {
        return batch.tokens[s.batch_index[pos - s.n_there]].output;
    };
    std::vector<go> res;
    uint32_t pos = s.n_there;
    const bool whole_only = s.found.prefix && s.found.prefix->whole_only();
    if (whole_only || every_row) { // asked about its tokens, it is computed first, and then replaced
        while (pos < n && !output(pos) && !every_row) {
            ++pos;
        }
        if (pos >= n) { // beyond it where they are not as it began: what they have is computed anew
            return { { pos, n_all } };
        }
        if (at_once) {
            return whole_only ? res : std::vector<go>{ { s.n_there, n_all } };
        }
        res.push_back({ s.n_there, n });
        if (n < n_all) {
            res.push_back({ n, n_all });
        }
        return res;
    }
    while (pos < n) {
        uint32_t end = pos;
        while (end < n && !output(end)) {
            ++end;
        }
        if (at_once && end < n && end + 1 < n_all) {
            return { { s.n_there, n_all } };
        }
        if (!s.found.prefix->serves(end)) {
            res = { { s.n_there, n } };
            pos = n;
        } else if (end < n) {
            res.push_back({ end, end + 1 });
            pos = end + 1;
        } else {
            res.push_back({ n, n_all });
            return res;
        }
    }
    if (pos < n_all || res.empty()) {
        res.push_back({ pos, n_all });
    }
    return at_once ? std::vector<go>{ { res[0].load_end, n_all } } : res;
}

// Whether a sequence is at the beginning of a prefix, or has nothing yet, and the tokens that it has
static bool begins(const prefixes & held, const llama_memory_i & memory, llama_seq_id seq_id, start & s,
        std::vector<llama_token> & tokens) {
    if (held.whole_only()) {
        const std::vector<llama_token> first = std::exchange(tokens, {});
        if (!held.tokens_of(seq_id, tokens) || (seq_id != s.seqs[0] && tokens != first)) {
            return false;
        }
    } else {
        if (!held.begun(seq_id, s.there)) {
            return false;
        }
        tokens.clear();
        for (uint32_t i = 0; i < s.there.size(); ++i) {
            tokens.push_back(s.there[i]->tokens[i]);
        }
    }
    return memory.seq_pos_max(seq_id) + 1 == (llama_pos) tokens.size();
}

// Whether all tokens of a sequence in this batch are deferred. tokens: and those that it has; waits: which are so already
static bool can_wait(const prefixes & held, const llama_batch_ext & batch, const std::vector<llama_token> & tokens,
        bool waits, start & s) {
    const held_prefix * prefix = held.to_wait_for(tokens);
    if (prefix == nullptr) {
        return false;
    }
    const bool none_computed = s.n_there == 0 || waits;
    const bool asked =
            std::any_of(s.batch_index.begin(), s.batch_index.end(), [&](uint32_t i) { return batch.tokens[i].output; });
    if (!none_computed || asked) {
        return false;
    }
    const uint32_t n_all = tokens.size();
    s.found = { prefix, n_all, true };
    s.goes = { { n_all, n_all } };
    s.waits = true;
    return true;
}

std::vector<start> plan(const prefixes & held, const llama_memory_i & memory, const llama_batch_ext & batch,
        bool at_once, bool may_wait, bool every_row) {
    const bool near = std::any_of(batch.tokens.begin(), batch.tokens.end(),
            [&](const token & t) { return (uint32_t) t.pos[0] < held.longest(); });
    if (!near) {
        return {};
    }
    std::vector<start> res;
    for (run & r : runs_of(batch)) {
        start s;
        s.seqs = r.seqs;
        std::vector<llama_token> tokens;
        const auto fits = [&](llama_seq_id seq_id) {
            return seq_id >= 0 && seq_id < batch.n_seq_max && begins(held, memory, seq_id, s, tokens);
        };
        if ((uint32_t) batch.tokens[r.batch_index[0]].pos[0] >= held.longest() ||
                !std::all_of(r.seqs.begin(), r.seqs.end(), fits)) {
            continue;
        }
        s.n_there = tokens.size();
        for (const uint32_t i : r.batch_index) {
            const token & t = batch.tokens[i];
            if (t.has_embd || t.id < 0 || (uint32_t) t.pos[0] != tokens.size()) {
                r.open = false;
                break;
            }
            tokens.push_back(t.id);
            s.batch_index.push_back(i);
        }
        if (batch.tokens[r.batch_index[0]].pos[0] != (llama_pos) s.n_there) {
            continue;
        }
        uint32_t n_deferred = 0; // of which nothing can be computed as it is
        const bool waits = held.whole_only() && s.n_there > 0 && held.deferred(s.seqs[0], n_deferred);
        if (may_wait && r.open && can_wait(held, batch, tokens, waits, s)) {
            res.push_back(std::move(s));
            continue;
        }
        s.found = longest_match(held, tokens, r.open, s.there);
        if (s.found.n <= s.n_there && !s.begins_anew()) {
            continue;
        }
        s.goes = goes_of(batch, s, at_once, every_row);
        if (!s.goes.empty() && !(waits && s.goes[0].load_end < s.found.n)) {
            res.push_back(std::move(s));
        }
    }
    return res;
}

} // namespace intactkv
