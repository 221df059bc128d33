// What the patched llama.cpp calls besides cells/: once per context, and once per state file.

#pragma once

#include <cstdint>
#include <string>

struct llama_context;
struct llama_model;
struct llama_memory_i;

namespace intactkv {

// Gives the caches of a new context their arenas, if the model can carry a prefix.
void enable(llama_memory_i * memory, const llama_model & model);

// Or-ed into the version of a saved state that has intact cells: stock llama.cpp then refuses the file, naming it.
constexpr uint32_t STATE_VERSION_INTACT = 0x494b0000; // "IK"

uint32_t state_version(const llama_context * ctx, int32_t seq_id);

// A file that ends in the trailer of a prefix file is verified like intactkv_load_file() does, before upstream
// reads its state; any other file is none of our business. false: refused, the reason is logged.
bool verify_file(const llama_context * ctx, const char * path);

} // namespace intactkv
