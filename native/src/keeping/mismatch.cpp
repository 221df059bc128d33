#include "keeping/mismatch.h"

#include "automatic/prefixes.h"
#include "keeping/beginnings.h"
#include "keeping/keeper.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <atomic>
#include <mutex>
#include <string>

namespace intactkv {

static constexpr size_t LEAST = 4; // tokens: programs try a new context with one or two

static std::atomic<bool> told{ false };

static bool is_of_first_model(const llama_context & ctx) {
    static std::mutex mutex; // contexts are made in any thread
    static std::string first;
    const std::lock_guard<std::mutex> lock(mutex);
    const std::string & path = ctx.get_model().intact_path;
    if (first.empty()) {
        first = path;
    }
    return path == first;
}

mismatch::mismatch(const llama_context & ctx) :
    of_first_model(is_of_first_model(ctx)) {}

bool mismatch::wanted() const {
    return of_first_model && !told;
}

void mismatch::look(const std::vector<llama_token> & prompt, const prefixes & held) const {
    if (!wanted() || prompt.size() < LEAST) {
        return;
    }
    const held_prefix * nearest = nullptr;
    size_t n_same = 0, n_missed = 0;
    for (const held_prefix & p : held.all()) {
        if (p.tokens.size() == 1) {
            continue;
        }
        const size_t n = n_common(prompt, p.tokens);
        if (n == p.tokens.size() || n == prompt.size()) {
            return;
        }
        if (keeper::has(p.name)) {
            continue;
        }
        ++n_missed;
        if (nearest == nullptr || n > n_same) {
            nearest = &p;
            n_same = n;
        }
    }
    if (nearest == nullptr || told.exchange(true)) {
        return;
    }
    const std::string which = n_missed == 1
            ? "does not begin with the prefix " + nearest->name
            : "begins with none of the " + std::to_string(n_missed) + " prefixes, the nearest is " + nearest->name;
    LLAMA_LOG_WARN(
            "intactkv: a prompt %s: %zu of its %zu tokens are the same, and the prompt is computed as usual; a "
            "request needs the system prompt, the tools and the template's arguments that it was made with (this "
            "is said once)\n",
            which.c_str(), n_same, nearest->tokens.size());
}

} // namespace intactkv
