#include "automatic/automatic.h"

#include "api/check.h"
#include "api/describe.h"
#include "prefix_file/parse.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <iterator>
#include <set>
#include <utility>

namespace intactkv {

automatic * automatic::of(const llama_context * ctx) {
    return ctx->prefixes.get();
}

std::string automatic::add(llama_context & ctx, const void * data, size_t size, const std::string & name) {
    prefix_view view;
    std::string error = check(&ctx, data, size, view);
    if (!error.empty()) {
        return error;
    }
    try {
        ctx.synchronize();
        auto to = ctx.prefixes ? ctx.prefixes : std::make_shared<automatic>(ctx);
        to->hold(view, name);
        ctx.prefixes = to;
    } catch (const std::exception & err) {
        error = format("the prefix of %u tokens could not be held: %s", view.n_tokens, err.what());
    }
    return error;
}

std::string automatic::load(int32_t i, llama_seq_id seq_id) {
    const int32_t n = held.all().size();
    if (i < 0 || i >= n) {
        return format("prefix %d does not exist: this context has %d", i, n);
    }
    if (seq_id < 0 || (uint32_t) seq_id >= ctx.n_seq_max()) {
        return format("sequence %d does not exist: this context has n_seq_max = %u", seq_id, ctx.n_seq_max());
    }
    const held_prefix & prefix = held.all()[i];
    settle();
    ctx.memory->seq_rm(seq_id, -1, -1);
    if (!held.load({ seq_id }, prefix, 0, prefix.tokens.size())) {
        ctx.memory->seq_rm(seq_id, -1, -1);
        return format("the prefix of %zu tokens could not be placed in sequence %d: the cache has no room",
                prefix.tokens.size(), seq_id);
    }
    return "";
}

size_t automatic::n_bytes() const {
    size_t res = 0;
    for (const held_prefix & p : held.all()) {
        for (const held_rows & rows : p.caches) {
            res += rows.n_bytes();
        }
        res += p.states.size();
    }
    return res;
}

// Batches that prefixes have nothing to do with: what is computed for its side effects, what is asked about every token,
// and what other weights or another attention would make of the tokens.
bool automatic::is_plain(const llama_batch_ext & batch) const {
    const llama_cparams & c = ctx.cparams;
    const auto has_vector = [&] {
        for (uint32_t il = 0; il < ctx.model.hparams.n_layer(); ++il) {
            if (ctx.cvec->tensor_for(il)) {
                return true;
            }
        }
        return false;
    };
    return !on || inside || batch.tokens.empty() || batch.tokens.size() > c.n_batch || batch.n_embd > 0 || c.warmup ||
            c.embeddings || (c.embeddings_nextn && c.embeddings_nextn_masked) || !c.causal_attn ||
            !ctx.loras->empty() || has_vector();
}

bool automatic::decode(const llama_batch_ext & batch, int & status) {
    const bool plain = is_plain(batch);
    const bool wait = waits && !inside; // some sequence may, one of this batch too
    if (plain && !wait) {
        return false;
    }
    inside = true;
    outputs.clear();
    every.clear();
    std::vector<start> starts;
    status = 0;
    try {
        if (!plain && (kept || unlike.wanted())) {
            look_at_prompts(batch);
        }
        if (held.any_restored() || wait) {
            settle();
            held.know_restored();
        }
        const bool at_once = !ctx.sampling.samplers.empty();
        const auto planned = [&] {
            return plain ? std::vector<start>() : plan(held, *ctx.memory, batch, at_once, !every_row(), every_row());
        };
        starts = planned();
        if (const auto seqs = wait ? left_waiting(batch, starts) : std::vector<llama_seq_id>(); !seqs.empty()) {
            status = finish(seqs);
            starts = status == 0 ? planned() : std::vector<start>();
        }
        if (!starts.empty()) {
            status = run(batch, starts);
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        undo(starts);
        status = -2;
    }
    waits = waits && held.any_deferred();
    inside = false;
    outputs.clear();
    return !starts.empty() || (wait && status != 0);
}

void automatic::look_at_prompts(const llama_batch_ext & batch) {
    seen.see(batch, [&](const std::vector<llama_token> & prompt) {
        if (kept) {
            kept->count(prompt, held);
        }
        unlike.look(prompt, held);
    });
}

// Sequences of a batch whose deferred tokens must be computed now: it does not go on as they wait for.
std::vector<llama_seq_id> automatic::left_waiting(
        const llama_batch_ext & batch, const std::vector<start> & starts) const {
    std::set<llama_seq_id> res;
    for (const llama_batch_ext::token & t : batch.tokens) {
        res.insert(t.seq_ids.begin(), t.seq_ids.end());
    }
    for (const start & s : starts) {
        for (const llama_seq_id seq_id : s.seqs) {
            res.erase(seq_id);
        }
    }
    std::vector<llama_seq_id> waiting;
    uint32_t n = 0;
    std::copy_if(res.begin(), res.end(), std::back_inserter(waiting),
            [&](llama_seq_id seq_id) { return seq_id >= 0 && held.deferred(seq_id, n); });
    return waiting;
}

// Computes deferred tokens, in batches of the program's size. As ctx.decode()
int automatic::finish(const std::vector<llama_seq_id> & seqs) {
    for (const llama_seq_id seq_id : seqs) {
        uint32_t n = 0;
        const held_prefix & prefix = *held.deferred(seq_id, n);
        const int32_t shift = held.shift_of(seq_id);
        ctx.memory->seq_rm(seq_id, -1, -1);
        int status = 0;
        for (uint32_t begin = 0; begin < n && status == 0; begin += ctx.cparams.n_batch) {
            llama_batch_ext again(&ctx);
            for (uint32_t i = begin; i < std::min(begin + ctx.cparams.n_batch, n); ++i) {
                llama_batch_ext::token t;
                t.id = prefix.tokens[i];
                t.pos[0] = i;
                t.seq_ids.insert(seq_id);
                again.tokens.push_back(t);
            }
            std::vector<start> starts = plan(held, *ctx.memory, again, true, false);
            status = starts.empty() ? compute(again) : run(again, starts);
        }
        if (status != 0) {
            ctx.memory->seq_rm(seq_id, -1, -1);
            held.defer({ seq_id }, prefix, n);
        }
        if (shift != 0) {
            ctx.memory->seq_add(seq_id, 0, -1, shift);
        }
        if (status != 0) {
            return status;
        }
        ctx.synchronize();
        n_loaded -= std::min<uint64_t>(n_loaded, n);
    }
    return 0;
}

bool automatic::finish(llama_seq_id seq_id) {
    if (!waits || inside) {
        return true;
    }
    inside = true;
    int status = -2;
    try {
        settle();
        std::vector<llama_seq_id> waiting;
        uint32_t n = 0;
        for (llama_seq_id i = 0; i < (llama_seq_id) ctx.n_seq_max(); ++i) {
            if ((seq_id < 0 || i == seq_id) && held.deferred(i, n)) {
                waiting.push_back(i);
            }
        }
        const kept_outputs last = waiting.empty() ? kept_outputs() : keep_outputs();
        status = finish(waiting);
        if (!waiting.empty()) {
            give_back(last);
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
    }
    inside = false;
    outputs.clear();
    return status == 0;
}

// Who saves a sequence may look at the last batch's outputs afterwards.
automatic::kept_outputs automatic::keep_outputs() {
    kept_outputs res;
    if (!ctx.buf_output) {
        return res;
    }
    ctx.output_reorder();
    const auto * bytes = (const uint8_t *) ggml_backend_buffer_get_base(ctx.buf_output.get());
    res.bytes.assign(bytes, bytes + ggml_backend_buffer_get_size(ctx.buf_output.get()));
    res.n = ctx.n_outputs;
    res.ids = ctx.output_ids;
    res.of_sequences = ctx.embd_seq;
    res.n_logits = ctx.sampling.logits_count;
    res.n_probs = ctx.sampling.probs_count;
    res.n_candidates = ctx.sampling.candidates_count;
    return res;
}

void automatic::give_back(const kept_outputs & last) {
    ctx.synchronize();
    if (last.bytes.empty()) {
        return;
    }
    ctx.output_reserve(last.n); // as that batch had them, in a buffer that never shrinks
    memcpy(ggml_backend_buffer_get_base(ctx.buf_output.get()), last.bytes.data(), last.bytes.size());
    ctx.n_outputs = last.n;
    ctx.output_ids = last.ids;
    ctx.output_swaps.clear();
    ctx.embd_seq = last.of_sequences;
    ctx.sampling.logits_count = last.n_logits;
    ctx.sampling.probs_count = last.n_probs;
    ctx.sampling.candidates_count = last.n_candidates;
}

// Into a sequence the state of one that waits may have been read.
bool automatic::restored(llama_seq_id seq_id, bool own) {
    seen.restored(seq_id, own);
    uint32_t n = 0;
    if (!held.deferred(seq_id, n)) {
        return false;
    }
    waits = true;
    return true;
}

// A copy between streams that is pending would come over what is loaded now, or looked at.
void automatic::settle() {
    ctx.sched_reserve();
    ctx.memory_update(false);
    ctx.synchronize();
}

int automatic::run(const llama_batch_ext & batch, std::vector<start> & starts) {
    settle();
    size_t n_rounds = 0;
    for (const start & s : starts) {
        n_rounds = std::max(n_rounds, s.goes.size());
    }
    const uint64_t n_before = n_loaded;
    int status = 0;
    for (start & s : starts) {
        if (held.whole_only() && s.n_there > 0) {
            s.before.resize(ctx.state_seq_get_size(s.seqs[0], 0));
            ctx.state_seq_get_data(s.seqs[0], s.before.data(), s.before.size(), 0);
        }
    }
    for (auto s = starts.begin(); s != starts.end() && status == 0; ++s) {
        status = s->begins_anew() ? begin_anew(*s) : 0;
    }
    for (size_t round = 0; round < n_rounds && status == 0; ++round) {
        status = go_on(batch, starts, round, n_rounds);
    }
    if (status == 1 || status < 0) { // as if nothing had been decoded
        undo(starts);
        n_loaded = n_before;
    }
    return status;
}

// The sequence has cells of a prefix that is not its own, as is seen now. Its tokens are evaluated again.
int automatic::begin_anew(const start & s) {
    std::vector<llama_token> tokens;
    for (uint32_t i = 0; i < s.n_there; ++i) {
        tokens.push_back(s.there[i]->tokens[i]);
    }
    for (const llama_seq_id seq_id : s.seqs) {
        ctx.memory->seq_rm(seq_id, 0, -1);
    }
    const uint32_t n = std::min(s.found.n, s.n_there);
    const uint32_t n_load = n > 0 && s.found.prefix->serves(n) ? n : 0;
    if (n_load > 0 && !held.load(s.seqs, *s.found.prefix, 0, n_load)) {
        return 1;
    }
    for (uint32_t begin = n_load; begin < s.n_there; begin += ctx.cparams.n_batch) {
        llama_batch_ext again(&ctx);
        for (uint32_t i = begin; i < std::min(begin + ctx.cparams.n_batch, s.n_there); ++i) {
            llama_batch_ext::token t;
            t.id = tokens[i];
            t.pos[0] = i;
            t.seq_ids.insert(s.seqs.begin(), s.seqs.end());
            again.tokens.push_back(t);
        }
        if (const int status = compute(again)) {
            return status;
        }
    }
    return n_load == n || held.take_over(s.seqs, *s.found.prefix, n_load, n) ? 0 : 1;
}

int automatic::go_on(const llama_batch_ext & batch, const std::vector<start> & starts, size_t round, size_t n_rounds) {
    const bool last = round + 1 == n_rounds;
    std::vector<bool> now(batch.tokens.size(), last);
    for (const start & s : starts) {
        const size_t wait = n_rounds - s.goes.size(); // all sequences end together
        for (const uint32_t i : s.batch_index) {
            now[i] = false;
        }
        if (round < wait) {
            continue;
        }
        const go & g = s.goes[round - wait];
        const uint32_t begin = round > wait ? s.goes[round - wait - 1].compute_end : s.n_there;
        if (begin < g.load_end &&
                !(s.waits ? held.defer(s.seqs, *s.found.prefix, g.load_end)
                          : held.load(s.seqs, *s.found.prefix, begin, g.load_end))) {
            return 1;
        }
        waits |= s.waits;
        n_loaded += g.load_end - begin;
        for (uint32_t pos = g.load_end; pos < g.compute_end; ++pos) {
            now[s.batch_index[pos - s.n_there]] = true;
        }
    }

    llama_batch_ext rest(&ctx);
    std::vector<uint32_t> batch_index;
    for (uint32_t i = 0; i < now.size(); ++i) {
        if (now[i]) {
            batch_index.push_back(i);
            rest.tokens.push_back(batch.tokens[i]);
        }
    }
    if (!batch_index.empty()) {
        if (const int status = compute(rest)) {
            return status;
        }
    } else if (ctx.output_reserve(0) == 0) {
        return -2;
    }
    for (const start & s : starts) {
        const size_t wait = n_rounds - s.goes.size();
        if (round < wait) {
            continue;
        }
        const go & g = s.goes[round - wait];
        const uint32_t end = std::min(g.compute_end, s.found.n);
        if (g.load_end < end) {
            ctx.synchronize();
            if (!held.take_over(s.seqs, *s.found.prefix, g.load_end, end)) {
                return 1;
            }
        }
    }
    collect(batch_index, last);
    return 0;
}

int automatic::compute(const llama_batch_ext & batch) {
    return ctx.decode(batch);
}

// The sequences are what they were before the batch.
void automatic::undo(const std::vector<start> & starts) {
    for (const start & s : starts) {
        for (const llama_seq_id seq_id : s.seqs) {
            if (s.n_there == 0 || !s.before.empty() || !held.whole_only()) {
                ctx.memory->seq_rm(seq_id, s.begins_anew() || !s.before.empty() ? 0 : s.n_there, -1);
            }
            if (!s.before.empty()) {
                ctx.state_seq_set_data(seq_id, s.before.data(), s.before.size(), 0);
            }
        }
        for (uint32_t begin = 0; s.begins_anew() && begin < s.n_there;) {
            uint32_t end = begin + 1;
            while (end < s.n_there && s.there[end] == s.there[begin]) {
                ++end;
            }
            held.load(s.seqs, *s.there[begin], begin, end);
            begin = end;
        }
    }
}

// The outputs of the tokens just computed, by their index in the caller's batch. Behind the last, the context's outputs are
// those of the caller's batch.
void automatic::collect(const std::vector<uint32_t> & batch_index, bool last) {
    const uint64_t n_vocab = ctx.model.vocab.n_tokens();
    std::vector<std::pair<uint32_t, int32_t>> rows; // in the caller's batch, in the context's buffer
    for (uint32_t i = 0; i < batch_index.size(); ++i) {
        if (ctx.output_ids[i] >= 0) {
            rows.emplace_back(batch_index[i], ctx.output_ids[i]);
        }
    }
    if (!last || !outputs.empty() || !every.empty()) {
        ctx.synchronize();
        ctx.output_reorder();
        keep_rows(batch_index);
        for (const auto & [index, row] : rows) {
            const float * logits = ctx.logits.data + row * n_vocab;
            outputs.emplace_back(index, std::vector<float>(logits, logits + n_vocab));
        }
    }
    if (!last) {
        return;
    }
    if (batch_index.empty()) { // nothing was computed
        ctx.output_swaps.clear();
    }
    if (!outputs.empty()) {
        std::sort(outputs.begin(), outputs.end(), [](const auto & a, const auto & b) { return a.first < b.first; });
        ctx.output_reserve(outputs.size());
        rows.clear();
        for (const auto & [index, logits] : outputs) {
            memcpy(ctx.logits.data + rows.size() * n_vocab, logits.data(), n_vocab * sizeof(float));
            rows.emplace_back(index, rows.size());
        }
        ctx.output_swaps.clear();
        ctx.n_outputs = rows.size();
    }
    give_rows();
    std::fill(ctx.output_ids.begin(), ctx.output_ids.end(), -1);
    for (const auto & [index, row] : rows) {
        ctx.output_ids[index] = row;
    }
}

} // namespace intactkv
