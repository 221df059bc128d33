// Automatic prefixes: whatever a program decodes, a sequence whose tokens begin with a prefix that its context holds gets
// that prefix's cells, loaded instead of computed.
//
// Nothing is remembered of a sequence from one batch to the next: its cells say whether it is still a prefix's beginning
// (prefixes::begun), whatever the program did to them meanwhile. With recurrent layers one cannot step back, and no part of a
// prefix is of use: there a prefix takes the place of a sequence that is at its beginning, when its last token comes.

#pragma once

#include "automatic/plan.h"
#include "automatic/prefixes.h"
#include "keeping/keeper.h"
#include "keeping/mismatch.h"
#include "keeping/prompts.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_batch_ext;
struct llama_context;

namespace intactkv {

class automatic {
public:
    // nullptr: the context has none
    static automatic * of(const llama_context * ctx);

    // Adds a prefix to those of a context; "" or why not
    static std::string add(llama_context & ctx, const void * data, size_t size, const std::string & name);

    explicit automatic(llama_context & ctx) :
        ctx(ctx),
        held(&ctx),
        seen(ctx),
        unlike(ctx) {}

    // Throws std::runtime_error. view: of a verified file that fits the context
    // source: something that lives as long as the context holds it
    void hold(const prefix_view & view, const std::string & name, std::shared_ptr<const void> source = nullptr) {
        held.add(intactkv::hold(&ctx, view, name));
        sources.push_back(std::move(source));
    }

    // What its sequences begin with is counted, and what they use is noted; nullptr: it is not
    void keep(std::unique_ptr<keeper> by) { kept = std::move(by); }
    bool keeps() const { return kept != nullptr; }

    // In place of llama_context::decode(). false: the batch is upstream's to compute, nothing was done
    bool decode(const llama_batch_ext & batch, int & status);

    bool on = true; // false: decode() leaves all to upstream

    // Computes what a sequence (-1: each) has that was deferred: it is about to be saved. false: it cannot be
    bool finish(llama_seq_id seq_id);

    // A state was read into a sequence (own: of its own, from before); whether it waits for the rest of a prefix. Throws
    // std::runtime_error: of one that this context does not hold
    bool restored(llama_seq_id seq_id, bool own);

    // Into a sequence, which it replaces; "" or why not
    std::string load(int32_t i, llama_seq_id seq_id);

    const prefixes & all() const { return held; }
    size_t n_bytes() const;                              // beside the arenas'
    uint64_t n_not_computed() const { return n_loaded; } // tokens so far

private:
    llama_context & ctx;
    prefixes held;
    std::vector<std::shared_ptr<const void>> sources;
    uint64_t n_loaded = 0;
    prompts seen;
    mismatch unlike;
    std::unique_ptr<keeper> kept;
    bool inside = false; // decode() computes what is left of a batch
    bool waits = false;  // tokens of some sequence were deferred (deferred.h)

    // outputs of the goes before the last, by index in the caller's batch
    std::vector<std::pair<uint32_t, std::vector<float>>> outputs;

    std::vector<std::vector<float>> every; // of every token, by index in the caller's batch (every_row.cpp)

    // what the last batch has left for the program to read
    struct kept_outputs {
        std::vector<uint8_t> bytes;
        uint32_t n = 0;
        std::vector<int32_t> ids;
        std::map<llama_seq_id, std::vector<float>> of_sequences;
        std::vector<uint32_t> n_logits, n_probs, n_candidates; // of backend sampling
    };

    kept_outputs keep_outputs();
    void give_back(const kept_outputs & last);

    bool is_plain(const llama_batch_ext & batch) const;
    void look_at_prompts(const llama_batch_ext & batch);
    void settle();
    int finish(const std::vector<llama_seq_id> & seqs);
    std::vector<llama_seq_id> left_waiting(const llama_batch_ext & batch, const std::vector<start> & starts) const;
    int run(const llama_batch_ext & batch, std::vector<start> & starts);
    int begin_anew(const start & s);
    int go_on(const llama_batch_ext & batch, const std::vector<start> & starts, size_t round, size_t n_rounds);
    void undo(const std::vector<start> & starts);
    void collect(const std::vector<uint32_t> & batch_index, bool last);
    bool every_row() const;
    std::vector<std::pair<float *, size_t>> row_buffers() const;
    void keep_rows(const std::vector<uint32_t> & batch_index);
    void give_rows();
    int compute(const llama_batch_ext & batch);
};

} // namespace intactkv
