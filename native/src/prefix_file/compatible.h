// Whether a prefix belongs to the model of a context: what its manifest says against what the context says of itself.

#pragma once

#include <string>

namespace intactkv {

// Compares manifest.model with intactkv_describe() of a context, then the reference model's identity with that in
// the GGUF (key intactkv.reference.sha256; "" if it has none: then not compared). The first difference is the error.
bool compatible(const std::string & manifest_json, const std::string & describe_json,
        const std::string & gguf_reference_sha256, std::string & error);

} // namespace intactkv
