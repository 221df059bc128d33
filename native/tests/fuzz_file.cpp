// Fuzz target for native/src/prefix_file. With clang's libFuzzer, SOURCE being the llama.cpp source that the build made:
//   clang -O1 -c -ISOURCE/vendor/hash SOURCE/vendor/hash/sha256/sha256.c
//   clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -o fuzz_file
//     -Inative/src -ISOURCE/vendor -ISOURCE/vendor/hash -ISOURCE/ggml/include native/tests/fuzz_file.cpp
//     native/src/prefix_file/*.cpp SOURCE/vendor/hash/hash.cpp sha256.o
// Without it mutate.cpp calls the same function.

#include "prefix_file/compatible.h"
#include "prefix_file/parse.h"
#include "prefix_file/read_bytes.h"
#include "sample.h"

#include <cstdio>
#include <cstdlib>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <unistd.h>

using namespace intactkv;

static void require(bool condition, const char * what) {
    if (!condition) {
        fprintf(stderr, "fuzz_file: %s\n", what);
        abort();
    }
}

static void try_parse(const uint8_t * data, size_t size) {
    const std::unique_ptr<uint8_t[]> exact(new uint8_t[size]); // one byte further is poisoned
    std::copy(data, data + size, exact.get());
    static const std::string model = sample().manifest()["model"].dump();
    prefix_view view;
    std::string manifest;
    std::string error;
    if (!parse(exact.get(), size, view, manifest, error)) {
        require(!error.empty() && error.find('\n') == std::string::npos, "the error is not one sentence");
        return;
    }
    require(view.n_cells >= view.n_tokens && view.n_cells - view.n_tokens <= 1 << 16, "the cells are not counted");
    require(view.n_tokens > 0 && view.state + view.state_size <= exact.get() + size, "the view leaves the file");
    error.clear();
    require(compatible(manifest, json::parse(manifest)["model"].dump(), "", error),
            "a prefix differs from its own model");
    error.clear();
    require(compatible(manifest, model, "", error) == error.empty(), "the error does not tell what the result does");
}

// The same bytes with a checksum that is right, so that what is behind the checksum is reached too.
static void try_sealed(const uint8_t * data, size_t size) {
    if (size < 48) {
        return;
    }
    bytes sealed = sample::seal(bytes(data, data + size - 48), "");
    std::copy(data + size - 48, data + size - 40, sealed.end() - 48); // the manifest length is the fuzzer's
    try_parse(sealed.data(), sealed.size());
}

// A file that never touches a disk, where there is such a thing.
static FILE * scratch_file() {
#ifdef __linux__
    return fdopen(memfd_create("fuzz_file", 0), "w+b");
#else
    return tmpfile();
#endif
}

static void try_file(const uint8_t * data, size_t size) {
    static FILE * file = scratch_file();
    static const std::string path = "/dev/fd/" + std::to_string(fileno(file));
    rewind(file);
    require(ftruncate(fileno(file), 0) == 0 && fwrite(data, 1, size, file) == size && fflush(file) == 0,
            "no scratch file");
    bytes content;
    std::string error;
    has_trailer(path.c_str());
    require(read_bytes(path.c_str(), content, error) == error.empty(), "the error does not tell what the result does");
    require(content.size() <= size, "more bytes than the file has");
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    try_parse(data, size);
    try_sealed(data, size);
    try_file(data, size);
    return 0;
}
