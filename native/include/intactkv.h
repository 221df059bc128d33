// intactkv: a prefix of F16 cells in front of a quantized KV cache (IntactKV, arXiv 2403.01241).
//
// These functions are part of libllama as intactkv-export builds it. A program that never calls them still
// gets intact cells: upstream's llama_state_seq_load_file() and llama_state_seq_set_data() accept an F16
// sequence state for a quantized cache, and keep its rows at F16.
//
// Words: a *cell* is one token's slot in the KV cache. An *intact* cell is one that attention reads at F16
// although the cache is quantized; its rows live in the *arena*, one F16 K row and one F16 V row per layer.
// *Extra* cells of a prefix stand for no token: they were trained, and are at the first token's position, 0. So tokens go
// on at the position after the prefix's tokens, and a sequence holds as many cells more than it has tokens.
// A first token and its extra cells that were trained so stay *in sight*: no sliding window hides them from later tokens
// of their sequence. In such layers' cache they stay when what was near them is gone: llama_memory_seq_pos_min() leaves
// them out then, and a state that has them is refused by stock llama.cpp.
//
// Errors: functions that can fail say so in their return value; intactkv_error() then gives one sentence.
// Threads: as with llama.cpp, one context must not be used by two threads at a time.

#ifndef INTACTKV_H
#define INTACTKV_H

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Version of intactkv-export this library was built from, e.g. "0.1.0".
LLAMA_API const char * intactkv_version(void);

// The last failure on this thread, one sentence; "" before the first. Valid until the next call that fails.
LLAMA_API const char * intactkv_error(void);

// What a prefix must match, as JSON: architecture, vocabulary (SHA-256 over the token texts), and per KV cache
// its layers with n_head_kv, head sizes and RoPE base, then the RoPE settings in force *in this context*.
// Valid until the next call on this thread. NULL if the model cannot carry a prefix: intactkv_error() has the reason.
LLAMA_API const char * intactkv_describe(const struct llama_context * ctx);

// Loads a prefix file (`.ikv`) held in memory into sequence seq_id, which it replaces. The file's checksum, its
// identity (model, vocabulary, RoPE, reference weights) and its structure are verified before one byte reaches
// the cache. In an F16 or F32 cache the cells are ordinary; in any other they are intact. A model with recurrent layers
// gets their states too, those behind the last token: no part of such a prefix is of use.
// Returns the number of prefix tokens, or -1.
LLAMA_API int32_t intactkv_load(struct llama_context * ctx, const void * data, size_t size, llama_seq_id seq_id);

// The same from a file: an `.ikv`, or a GGUF that has one embedded (docs/reference/format.md).
LLAMA_API int32_t intactkv_load_file(struct llama_context * ctx, const char * path, llama_seq_id seq_id);

// All of intactkv_load()'s checks and nothing else. ctx may be NULL: then checksum and structure only.
// Returns the number of prefix tokens, or -1.
LLAMA_API int32_t intactkv_verify(const struct llama_context * ctx, const void * data, size_t size);

// Number of intact cells of sequence seq_id (-1: of all sequences), those of the tail among them.
LLAMA_API int32_t intactkv_n_cells(const struct llama_context * ctx, llama_seq_id seq_id);

// The tail: the newest n_cells cells of each sequence are intact while they are among the newest, and the tokens of one
// ubatch see each other at F16 whatever its length. 0: none. -1: the default, 128 where K or V has less than 8 bits a
// value and the fused kernel reads the cache, else 0; so begins a context unless INTACTKV_TAIL=N says otherwise. Cells
// that were evaluated before stay as they are, and lose their marks with the next batch if they are too many. A cache of
// F16 or F32 has no use for a tail and gets none.
// Returns the tail in force, or -1: out of memory, INTACTKV_ATTN=stock, flash attention off with a V that is neither F16
// nor F32, or a model that can have no intact cells.
LLAMA_API int32_t intactkv_set_tail(struct llama_context * ctx, int32_t n_cells);

// The tail in force, 0: none.
LLAMA_API int32_t intactkv_tail(const struct llama_context * ctx);

// Number of cells of sequence seq_id (-1: of all sequences) that are intact for being new.
LLAMA_API int32_t intactkv_n_tail_cells(const struct llama_context * ctx, llama_seq_id seq_id);

// Automatic prefixes: whatever a program decodes, a sequence whose tokens begin with a prefix that its context holds gets
// that prefix's cells, loaded instead of computed. The longest that matches is used. A token that differs ends the match:
// what matched stays intact, but not of a prefix that was trained as a whole. Tokens of a prefix whose logits are asked for
// are computed, behind intact cells. A context is made with the prefixes in its model's GGUF, and those that the
// environment names: LLAMA_INTACTKV=FILE|DIRECTORY[:FILE|DIRECTORY...] (.ikv files, GGUFs, directories with *.ikv; on
// Windows with ; between them), or LLAMA_INTACTKV=off for none at all. Each is verified as intactkv_load() does: the
// context is not made if one fails. Those of the model's GGUF are left out, and the log says so, where the context cannot
// use any (embeddings, no flash attention, a small n_ctx); one that the environment names is an error there.
// Nothing is loaded for batches of embeddings, and while embeddings, a LoRA or a control vector are in use.

// Whether the contexts that this thread makes from now on have automatic prefixes; returns what it was. True at first.
LLAMA_API bool intactkv_enable_automatic(bool enabled);

// Holds one more, a prefix file in memory, verified as intactkv_load() does. name: for intactkv_prefix_name(); may be NULL.
// Returns its number, or -1.
LLAMA_API int32_t intactkv_add_prefix(struct llama_context * ctx, const void * data, size_t size, const char * name);

// Loads prefix i of these into sequence seq_id, which it replaces, as intactkv_load() does, without verifying it again.
// Returns the number of its tokens, or -1.
LLAMA_API int32_t intactkv_load_held(struct llama_context * ctx, int32_t i, llama_seq_id seq_id);

// Whether llama_decode() gives this context's prefixes to sequences by itself; returns what it was. True at first.
LLAMA_API bool intactkv_set_automatic(struct llama_context * ctx, bool automatic);

// How many the context holds, and what they are called: "NAME of PATH", or the path of a file that has one only.
// NULL: there is no such.
LLAMA_API int32_t intactkv_n_prefixes(const struct llama_context * ctx);
LLAMA_API const char * intactkv_prefix_name(const struct llama_context * ctx, int32_t i);

// Number of tokens so far that were in a batch and did not have to be computed.
LLAMA_API uint64_t intactkv_n_not_computed(const struct llama_context * ctx);

// Bytes allocated for the arenas of all layers, and for the rows of the prefixes that a context holds. With a tail they
// are allocated when it is set: for every sequence the context can have, and one ubatch.
LLAMA_API size_t intactkv_arena_bytes(const struct llama_context * ctx);

// Which attention the next batch will use:
//   "fused"     our CPU kernel in every layer, with intact cells and without. It takes a cache in CPU memory, with flash
//               attention on, of every KV type but F32, with head sizes that are multiples of 16 up to 512
//   "portable"  upstream's ops, in the layers the kernel does not take, over copies of K and V with the intact cells'
//               rows written over them: any backend
//   "stock"     upstream's ops as they are in those layers, because no cell is intact and there is no tail
// The choice is made for each layer. INTACTKV_ATTN, read when a context is made, overrides it. fused: an error if no
// layer of the cache is in CPU memory; what else the kernel does not take, it still leaves. portable: no kernel, so stock
// as long as no cell is intact. stock: F16 cells, and a tail, are refused for any cache but an F16 or F32 one.
LLAMA_API const char * intactkv_attention(const struct llama_context * ctx);

#ifdef __cplusplus
}
#endif

#endif // INTACTKV_H
