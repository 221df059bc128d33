// What the patched llama.cpp calls besides cells/: once per model and context, once per batch, graph's attention and state
// file, and for hybrid memory.

#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <memory>
#include <string>

struct llama_batch_ext;
struct llama_context;
struct llama_model;
struct llama_memory_i;
class llama_io_read_i;
class llama_io_write_i;
class llama_memory_recurrent;

namespace intactkv {

class automatic;

// Gives the caches of a new context their arenas, if the model can carry a prefix. Returns its automatic prefixes, nullptr:
// it has none. Throws std::runtime_error if one of them cannot be used: the context is not made
std::shared_ptr<automatic> enable(llama_context & ctx);

// A model is being read from this file, "" if it has no name
void came_from(llama_model & model, const std::string & path);

// In place of llama_context::decode(), for a context that has automatic prefixes. false: upstream goes on
bool decode(automatic & prefixes, const llama_batch_ext & batch, int & status);

// Before sequences are saved, -1: all: what automatic prefixes have left to be computed is, unless only the states that
// cannot step back are wanted (flags), as for a server's checkpoints. Throws std::runtime_error: it cannot be
void before_saving(automatic * prefixes, int32_t seq_id, uint32_t flags);

// Behind a sequence's state that was read from memory. false: it is that of a sequence which waits for the rest of a
// prefix that this context does not hold; the reason is logged, and the sequence is empty
bool after_restoring(llama_context & ctx, int32_t seq_id, uint32_t flags);

// attention: what layer_attention::attend() has returned. Its nodes call functions of this process: a backend that takes
// every op, as that of other machines does, must not be given them because the nodes around them are its own.
void keep_on_cpu(ggml_backend_sched_t sched, ggml_backend_t cpu, ggml_tensor * attention);

// Or-ed into the version of a saved state that has intact cells: stock llama.cpp then refuses the file, naming it.
constexpr uint32_t STATE_VERSION_INTACT = 0x494b0000; // "IK"

uint32_t state_version(const llama_context * ctx, int32_t seq_id);

// A file that ends in the trailer of a prefix file is verified like intactkv_load_file() does, before upstream
// reads its state; any other file is none of our business. false: refused, the reason is logged.
// in_sight: set to whether the cells of its prefix are to stay in sight (cells/sight.h).
bool verify_file(const llama_context * ctx, const char * path, bool & in_sight);

// Whether the recurrent part of a hybrid memory has no layer: the model is of a hybrid architecture, its layers all are
// attention. Such a memory is what its attention part is, in positions and in saved states too.
bool keeps_nothing(const llama_memory_recurrent & memory);

// The recurrent part's method of this name. One that keeps nothing gives up the sequence whole, as it can go on
// anywhere, bounds no position, and is not in saved states.
bool seq_rm(llama_memory_recurrent & memory, int32_t seq_id, int32_t p0, int32_t p1);
int32_t seq_pos_min(const llama_memory_recurrent & memory, int32_t seq_id);
int32_t seq_pos_max(const llama_memory_recurrent & memory, int32_t seq_id);
void state_write(const llama_memory_recurrent & memory, llama_io_write_i & io, int32_t seq_id, uint32_t flags);
void state_read(llama_memory_recurrent & memory, llama_io_read_i & io, int32_t seq_id, uint32_t flags);

} // namespace intactkv
