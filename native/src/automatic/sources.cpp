#include "automatic/sources.h"

#include "keeping/keeper.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <mutex>
#include <stdexcept>
#include <system_error>

namespace intactkv {

namespace fs = std::filesystem;

#ifdef _WIN32
static constexpr char SEPARATOR = ';';
#else
static constexpr char SEPARATOR = ':';
#endif

std::string prefix_source::name() const {
    return where.name.empty() ? path : where.name + " of " + path;
}

static void add_file(std::vector<prefix_source> & to, const std::string & path, bool named) {
    std::vector<embedded_prefix> found;
    std::string error;
    if (!list_prefixes(path.c_str(), found, error)) {
        if (keeper::has(path)) {
            LLAMA_LOG_WARN("%s: the kept prefix %s is not used: %s\n", __func__, path.c_str(), error.c_str());
            return;
        }
        throw std::runtime_error(error);
    }
    if (found.empty() && named) {
        throw std::runtime_error(path +
                " has no prefix embedded: name an .ikv file in LLAMA_INTACTKV, or embed one with "
                "intactkv-export embed");
    }
    for (const embedded_prefix & where : found) {
        to.push_back({ path, where, named });
    }
}

static std::vector<std::string> files_in(const std::string & directory) {
    std::vector<std::string> res;
    std::error_code error;
    for (fs::directory_iterator it(fs::u8path(directory), error), end; !error && it != end; it.increment(error)) {
        if (it->path().extension() == ".ikv") {
            res.push_back(it->path().u8string());
        }
    }
    if (error) {
        throw std::runtime_error("cannot read the directory " + directory + " of LLAMA_INTACTKV (" + error.message() +
                "): check its permissions");
    }
    std::sort(res.begin(), res.end());
    return res;
}

static void add_named(std::vector<prefix_source> & to, const std::string & list) {
    for (size_t begin = 0; begin <= list.size();) {
        const size_t end = std::min(list.find(SEPARATOR, begin), list.size());
        const std::string path = list.substr(begin, end - begin);
        begin = end + 1;
        std::error_code error;
        if (path.empty()) {
            continue;
        }
        if (fs::is_directory(fs::u8path(path), error)) {
            for (const std::string & file : files_in(path)) {
                add_file(to, file, true);
            }
        } else {
            add_file(to, path, true);
        }
    }
}

// What intactkv-export writes into every model that may have one: no other file is read again.
static bool may_have_embedded(const llama_model & model) {
    return !model.intact_path.empty() &&
            (model.gguf_kv.count("intactkv.state.offset") > 0 || model.gguf_kv.count("intactkv.reference.sha256") > 0);
}

std::vector<prefix_source> sources_of(const llama_model & model) {
    const char * env = getenv("LLAMA_INTACTKV");
    const std::string list = env ? env : "";
    std::vector<prefix_source> res;
    if (list == "off") {
        return res;
    }
    if (may_have_embedded(model)) {
        add_file(res, model.intact_path, false);
    }
    add_named(res, list);
    return res;
}

// by name(); contexts are made in any thread
static std::mutex users_mutex;
static std::map<std::string, std::weak_ptr<const void>> users;

std::shared_ptr<const void> of_use(const prefix_source & source) {
    const std::lock_guard<std::mutex> lock(users_mutex);
    auto & known = users[source.name()];
    auto res = known.lock();
    if (res == nullptr) {
        res = std::make_shared<const char>();
        known = res;
    }
    return res;
}

bool is_of_use(const prefix_source & source) {
    const std::lock_guard<std::mutex> lock(users_mutex);
    const auto found = users.find(source.name());
    return found != users.end() && !found->second.expired();
}

} // namespace intactkv
