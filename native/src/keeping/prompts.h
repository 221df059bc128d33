// Prompts, put together from the batches in which they come.

#pragma once

#include "llama.h"

#include <cstddef>
#include <functional>
#include <vector>

struct llama_batch_ext;
struct llama_context;

namespace intactkv {

class prompts {
public:
    using tokens = std::vector<llama_token>;

    explicit prompts(const llama_context & ctx);

    // A batch that will be decoded. ended: gets each prompt that ends in it: what its sequence has, from the first token
    // on, as far as that is known
    void see(const llama_batch_ext & batch, const std::function<void(const tokens &)> & ended);

    // A state was read into a sequence. own: of its own, from where it was before, as a server's checkpoints are
    void restored(llama_seq_id seq_id, bool own);

private:
    // A model without attention layers has no cells that say which tokens a sequence has. So they are remembered, as long
    // as each comes at the position behind the last: what a program has done meanwhile shows in the position.
    struct remembered {
        tokens all;
        bool known = true; // these are all
        bool back = false; // it may go on behind any of them
    };

    const llama_context & ctx;
    std::vector<bool> open; // by sequence: has tokens behind which nothing was asked for yet
    std::vector<remembered> sequences;

    void remember(remembered & of, llama_pos pos, llama_token id);
    tokens tokens_of(const llama_batch_ext & batch, llama_seq_id seq_id, size_t last) const;
};

} // namespace intactkv
