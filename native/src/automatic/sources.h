// Where a context's prefixes come from: the model's file, and LLAMA_INTACTKV.

#pragma once

#include "prefix_file/read_bytes.h"

#include <memory>
#include <string>
#include <vector>

struct llama_model;

namespace intactkv {

// A prefix in a file. The user has named the file, or else it is the model's.
struct prefix_source {
    std::string path;
    embedded_prefix where;
    bool named;

    std::string name() const; // "PREFIX of PATH", for messages
};

// Those of a model: of its file, then those of the files and directories (their *.ikv, sorted) in LLAMA_INTACTKV. Empty
// if that is "off". Throws std::runtime_error for what cannot be read, unless a server keeps it (keeping/keeper.h)
std::vector<prefix_source> sources_of(const llama_model & model);

// A file that the user has named is of use if some context of the process holds its prefix: a draft model beside the model
// that it was made for is no error. It is of use for as long as what of_use() returns lives.
std::shared_ptr<const void> of_use(const prefix_source & source);
bool is_of_use(const prefix_source & source);

} // namespace intactkv
