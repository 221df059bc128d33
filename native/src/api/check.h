// Whether a prefix may be loaded into a context, and what intactkv_error() says.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct llama_context;

namespace intactkv {

struct prefix_view;

// All checks of intactkv_load(): "" or why not. ctx: nullptr: those of the bytes alone
std::string check(const llama_context * ctx, const void * data, size_t size, prefix_view & view);

// Of these, whether the file is whole and belongs to the model; and whether this context, of this model, can hold it
std::string check_file(const llama_context * ctx, const void * data, size_t size, prefix_view & view);
std::string check_context(const llama_context * ctx, const prefix_view & view);

// What intactkv_error() says from now on; returns -1
int32_t fail(const std::string & error);

const char * last_error();

} // namespace intactkv
