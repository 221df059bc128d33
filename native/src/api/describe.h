// What a model and its context are to a prefix: the caches, whether they can carry one, and what one must match.

#pragma once

#include <string>
#include <vector>

struct llama_context;
struct llama_model;
struct llama_memory_i;
class llama_kv_cache;
class llama_memory_recurrent;

namespace intactkv {

// the caches of a memory that can have intact cells, in the order of a saved state; empty: none can
std::vector<llama_kv_cache *> caches_of(llama_memory_i * memory);
std::vector<llama_kv_cache *> caches_of(const llama_context * ctx);

// what a memory keeps beside KV caches, one state for each sequence; nullptr: it keeps nothing of the kind
llama_memory_recurrent * states_of(llama_memory_i * memory);
llama_memory_recurrent * states_of(const llama_context * ctx);

// why a model's cache can have no intact cells, "" if it can
std::string without_cells(const llama_memory_i * memory, const llama_model & model);

// why a model cannot carry a prefix, "" if it can: the same, and what a prefix needs besides
std::string unsupported(const llama_memory_i * memory, const llama_model & model);

// the JSON of intactkv_describe()
std::string describe(const llama_context * ctx);

} // namespace intactkv
