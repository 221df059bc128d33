// The prefixes that a context holds, and the cells that sequences have of them.

#pragma once

#include "automatic/held.h"

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

namespace intactkv {

// The prefix that each token of a sequence's beginning has its row of.
using origins = std::vector<const held_prefix *>;

class prefixes {
public:
    explicit prefixes(const llama_context * ctx) :
        ctx(ctx) {}

    void add(held_prefix prefix);

    const std::deque<held_prefix> & all() const { return list; }
    uint32_t longest() const { return n_longest; } // tokens

    // Marks the cells of exact caches that states were read into meanwhile and that have a prefix's rows; sequences share
    // them
    void know_restored() const;
    bool any_restored() const; // false: it has nothing to do

    // Whether all cells of a sequence are those of held prefixes, at the positions 0, 1, ..., and what they are: read from
    // the cells themselves. An empty sequence begins so too
    bool begun(llama_seq_id seq_id, origins & of) const;

    // Of a model with recurrent layers, whose prefixes are given whole: the tokens of a sequence that is at its beginning,
    // as the cells of its attention layers say; false: they cannot say it. Of an empty one, none
    bool tokens_of(llama_seq_id seq_id, std::vector<llama_token> & tokens) const;
    // The prefix whose first n tokens a sequence has without anything computed (deferred.h), nullptr: it does not. Throws
    // std::runtime_error if it is held no more
    const held_prefix * deferred(llama_seq_id seq_id, uint32_t & n) const;
    // By how much such a sequence was moved since. Throws std::runtime_error: not all of its tokens by as much
    int32_t shift_of(llama_seq_id seq_id) const;
    bool any_deferred() const;
    // One of which sequences can wait for the last token, that begins with these tokens and goes on; nullptr: none
    const held_prefix * to_wait_for(const std::vector<llama_token> & tokens) const;
    // Gives sequences the first n tokens of a prefix so, in place of what they have. As load()
    bool defer(const std::vector<llama_seq_id> & seqs, const held_prefix & prefix, uint32_t n) const;

    bool whole_only() const { return !list.empty() && list.front().whole_only(); }

    // Gives sequences, which have the same cells, those of tokens b..e-1 of a prefix, which they do not have yet. They are
    // shared with other sequences of the stream that have them. false: the cache has no room, something may have been
    // done. Of a model with recurrent layers it is all of a prefix, and takes the place of what they have
    bool load(const std::vector<llama_seq_id> & seqs, const held_prefix & prefix, uint32_t b, uint32_t e) const;

    // Tokens b..e-1 of these sequences were computed: their cells get the prefix's rows. false: there is no room for its
    // extra cells. Of a model with recurrent layers e is the prefix's end, and it takes the place of what they have
    bool take_over(const std::vector<llama_seq_id> & seqs, const held_prefix & prefix, uint32_t b, uint32_t e) const;

private:
    struct owner {
        const held_prefix * prefix = nullptr;
        int32_t token = -1; // an extra cell's: -1
    };

    const llama_context * ctx;
    std::deque<held_prefix> list;
    uint32_t n_longest = 0;
    std::vector<std::vector<owner>> owners; // by cache, by row

    const owner * owner_of(size_t cache, uint32_t strm, uint32_t cell) const; // nullptr: no cell of a held prefix
    bool may_share(size_t cache) const;
    bool replace(const std::vector<llama_seq_id> & seqs, const held_prefix & prefix, uint32_t n,
            const std::vector<uint8_t> & states) const;
    std::unordered_map<int32_t, uint32_t> cells_by_row(size_t cache, uint32_t strm) const;
    bool give(size_t cache, const std::vector<llama_seq_id> & seqs, const held_rows & rows,
            const std::vector<int32_t> & wanted) const;
    void take_over_cells(
            size_t cache, const std::vector<llama_seq_id> & seqs, const held_rows & rows, uint32_t b, uint32_t e) const;
    std::vector<int32_t> missing_extra(size_t cache, llama_seq_id seq_id, const held_rows & rows) const;
};

} // namespace intactkv
