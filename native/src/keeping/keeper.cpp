#include "keeping/keeper.h"

#include "api/describe.h"
#include "automatic/match.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "hash/hash.h"
#include "nlohmann/json.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>

#ifndef _WIN32
#include <fcntl.h>
#include <unistd.h>
#endif

namespace intactkv {

namespace fs = std::filesystem;

static constexpr size_t LEAST = 32;         // tokens that are worth a file
static constexpr size_t NEAR = 16;          // tokens: from a turn's mark, the first words of a message, or of a reply
static constexpr uint32_t N_TIMES = 3;      // where LLAMA_INTACTKV_KEEP_AFTER does not say
static constexpr uint32_t MOST_TIMES = 256; // requests that are remembered
static constexpr auto YOUNG = std::chrono::seconds(60); // as long a file that was used is not touched again

static std::string text(const char * value) {
    return value ? value : "";
}

bool keeper::has(const std::string & path) {
    const std::string directory = text(getenv("LLAMA_INTACTKV_KEEP"));
    return !directory.empty() && fs::u8path(path).parent_path() == fs::u8path(directory);
}

std::unique_ptr<keeper> keeper::of_new(const llama_context & ctx) {
    const std::string directory = text(getenv("LLAMA_INTACTKV_KEEP"));
    if (directory.empty() || text(getenv("LLAMA_INTACTKV")) == "off") {
        return nullptr;
    }
    const std::string after = text(getenv("LLAMA_INTACTKV_KEEP_AFTER"));
    char * end = nullptr;
    const unsigned long n = after.empty() ? N_TIMES : strtoul(after.c_str(), &end, 10);
    if (n < 2 || n > MOST_TIMES || (end && *end)) {
        throw std::runtime_error("LLAMA_INTACTKV_KEEP_AFTER is '" + after + "': give a number of requests, 2 to " +
                std::to_string(MOST_TIMES));
    }
    return std::make_unique<keeper>(ctx, directory, n);
}

keeper::keeper(const llama_context & ctx, std::string directory, uint32_t n_times) :
    ctx(ctx),
    directory(std::move(directory)),
    n_times(n_times),
    counted(n_times) {}

void keeper::count(std::vector<llama_token> prompt, const prefixes & held) {
    try {
        note_use(prompt, held);
        const size_t own = n_own(prompt);
        const size_t n = counted.add({ prompt, own });
        prompt.resize(cut(prompt, n));
        if (prompt.size() < LEAST || is_covered(prompt, held)) {
            return;
        }
        written.push_back(prompt); // also if it cannot be: that is said once
        write(prompt);
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: a prompt that comes again and again cannot be kept: %s\n", __func__, err.what());
    }
}

// Up to the end of the last message; where what ends a turn is none of its tokens, or far from the end, all of it.
size_t keeper::n_own(const std::vector<llama_token> & tokens) const {
    const llama_vocab * vocab = llama_model_get_vocab(&ctx.get_model());
    for (size_t n = tokens.size(); n > 0 && n + NEAR > tokens.size(); --n) {
        if (llama_vocab_is_eog(vocab, tokens[n - 1])) {
            return n;
        }
    }
    return tokens.size();
}

// Of n tokens that came again, those that will come again: not the words with which several messages happened to begin.
size_t keeper::cut(const std::vector<llama_token> & tokens, size_t n) const {
    const llama_vocab * vocab = llama_model_get_vocab(&ctx.get_model());
    for (size_t res = n; res > 0 && res + NEAR > n; --res) {
        if (llama_vocab_is_control(vocab, tokens[res - 1])) {
            return res;
        }
    }
    return n;
}

// Whether there is little to be gained: a prefix that is held, or was asked for, has all but a few of the tokens.
bool keeper::is_covered(const std::vector<llama_token> & tokens, const prefixes & held) const {
    const auto enough = [&](size_t n) {
        return tokens.size() < n + LEAST;
    };
    for (const held_prefix & p : held.all()) {
        const size_t n = n_common(tokens, p.tokens);
        const bool ends = n == p.tokens.size();
        if (enough(n) && (ends || (!p.whole && p.serves(n)))) {
            return true;
        }
    }
    // it leaves behind what a shorter prefix needs
    const bool has_window = caches_of(&ctx).size() > 1 || states_of(&ctx) != nullptr;
    return std::any_of(written.begin(), written.end(), [&](const std::vector<llama_token> & w) {
        const size_t n = n_common(tokens, w);
        return enough(n) && (n == w.size() || !has_window);
    });
}

// Whole or not at all, and for nobody else's eyes.
void keeper::write(const std::vector<llama_token> & tokens) const {
    const nlohmann::json content = {
        { "format", 1 },
        { "model", ctx.get_model().intact_path },
        { "requests", n_times },
        { "tokens", tokens },
    };
    const std::string data = content.dump();
    const std::string name = hash_sha256_hex(data.data(), data.size()).substr(0, 16);
    const fs::path target = fs::u8path(directory) / (name + ".tokens");
    const fs::path temporary = fs::u8path(directory) / ("." + name + ".tokens.tmp");
    const auto failed = [&] {
        return std::system_error(errno, std::generic_category(), target.u8string());
    };
#ifdef _WIN32
    FILE * file = _wfopen(temporary.c_str(), L"wb");
#else
    const int descriptor = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    FILE * file = descriptor < 0 ? nullptr : fdopen(descriptor, "wb");
#endif
    if (file == nullptr) {
        throw failed();
    }
    bool good = fwrite(data.data(), 1, data.size(), file) == data.size() && fflush(file) == 0;
#ifndef _WIN32
    good = good && fsync(descriptor) == 0;
#endif
    if (fclose(file) != 0 || !good) {
        throw failed();
    }
    fs::rename(temporary, target);
}

// The file of what a prompt begins with is younger now, also where the sequence has had the rows since an earlier request
// or from a state, and is given none.
void keeper::note_use(const std::vector<llama_token> & tokens, const prefixes & held) {
    const match found = longest_match(held, tokens, false, {});
    if (!found.prefix || found.n < std::min(LEAST, found.prefix->tokens.size()) || !has(found.prefix->name)) {
        return;
    }
    const auto now = std::chrono::steady_clock::now();
    const auto [it, is_new] = last_used.try_emplace(found.prefix->name, now);
    if (is_new || now - it->second > YOUNG) {
        it->second = now;
        std::error_code none; // gone meanwhile, or not ours
        fs::last_write_time(fs::u8path(found.prefix->name), fs::file_time_type::clock::now(), none);
    }
}

} // namespace intactkv
