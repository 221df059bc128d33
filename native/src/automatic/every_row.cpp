// Drafting heads read something of every token of a batch: the hidden state before the output (MTP), or the input of some
// layers (EAGLE). A batch that is computed in several goes leaves it as if it had been computed in one.

#include "automatic/automatic.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

namespace intactkv {

bool automatic::every_row() const {
    const auto & layers = ctx.cparams.embeddings_layer_inp;
    return (ctx.cparams.embeddings_nextn && !ctx.cparams.embeddings_nextn_masked) ||
            std::find(layers.begin(), layers.end(), true) != layers.end();
}

// The context's buffers of such rows, and how many values a row has. They move when outputs are reserved.
std::vector<std::pair<float *, size_t>> automatic::row_buffers() const {
    std::vector<std::pair<float *, size_t>> res;
    if (ctx.cparams.embeddings_nextn && !ctx.cparams.embeddings_nextn_masked) {
        res.emplace_back(ctx.embd_nextn.data, ctx.model.hparams.n_embd_out());
    }
    for (size_t il = 0; il < ctx.embd_layer_inp.size(); ++il) {
        if (ctx.cparams.embeddings_layer_inp[il]) {
            res.emplace_back(ctx.embd_layer_inp[il].data, ctx.model.hparams.n_embd);
        }
    }
    return res;
}

// Of the tokens just computed, whose outputs are in order.
void automatic::keep_rows(const std::vector<uint32_t> & batch_index) {
    const auto buffers = row_buffers();
    every.resize(buffers.size());
    for (size_t b = 0; b < buffers.size(); ++b) {
        const auto & [data, n] = buffers[b];
        for (size_t i = 0; i < batch_index.size(); ++i) {
            every[b].resize(std::max(every[b].size(), (batch_index[i] + 1) * n));
            memcpy(every[b].data() + batch_index[i] * n, data + i * n, n * sizeof(float));
        }
    }
}

void automatic::give_rows() {
    const auto buffers = row_buffers();
    for (size_t b = 0; b < every.size(); ++b) {
        memcpy(buffers[b].first, every[b].data(), every[b].size() * sizeof(float));
    }
    every.clear();
}

} // namespace intactkv
