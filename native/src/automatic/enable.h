// Which contexts have automatic prefixes.

#pragma once

#include <memory>

struct llama_context;

namespace intactkv {

class automatic;

// Of a new context: those in the model's file and those that LLAMA_INTACTKV names. nullptr: none, or it can use none.
// Throws std::runtime_error for one that fails verification, or that the user has named and this context cannot use;
// intactkv_error() says so too
std::shared_ptr<automatic> of_new(llama_context & ctx);

// Whether the contexts that this thread makes have any; returns what it was
bool set_enabled(bool value);

} // namespace intactkv
