// Tests of native/src/prefix_file. tests/native/test_prefix_file.py compiles and runs them.
//   test_file DIR             all tests, DIR for scratch files; exit code 1 if a check does not hold
//   test_file --check PATH... for each file a line: "ok" and its tokens, or "refused" and the sentence

#include "check.h"
#include "prefix_file/parse.h"
#include "prefix_file/read_bytes.h"

#include <cstring>

void test_parse();
void test_compatible();
void test_read_bytes(const char * dir);

static void check_file(const char * path) {
    std::vector<uint8_t> data;
    intactkv::prefix_view view;
    std::string manifest;
    std::string error;
    if (!intactkv::read_bytes(path, data, error) || !intactkv::parse(data.data(), data.size(), view, manifest, error)) {
        printf("refused %s\n", error.c_str());
        return;
    }
    printf("ok");
    for (uint32_t i = 0; i < view.n_tokens; ++i) {
        int32_t token;
        memcpy(&token, view.tokens + 4 * i, 4);
        printf(" %d", token);
    }
    printf("\n");
}

int main(int argc, char ** argv) {
    if (argc >= 3 && strcmp(argv[1], "--check") == 0) {
        for (int i = 2; i < argc; ++i) {
            check_file(argv[i]);
        }
        return 0;
    }
    if (argc != 2) {
        fprintf(stderr, "usage: test_file DIR | --check PATH...\n");
        return 2;
    }
    test_parse();
    test_compatible();
    test_read_bytes(argv[1]);
    printf("%zu checks, %zu failures\n", n_checks, n_failures);
    return n_failures > 0;
}
