// Runs the fuzz target without libFuzzer: valid files, mutated by a generator whose seed is fixed, so that a failure
// comes again.   mutate N

#include "gguf_sample.h"

#include <cstdio>
#include <cstdlib>
#include <random>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

static std::mt19937 engine(2403);

// not std::uniform_int_distribution: its numbers differ between libraries
static size_t below(size_t n) {
    return n ? engine() % n : 0;
}

static std::vector<bytes> seeds() {
    sample windows;
    windows.caches = { { 0, 0, { 1 }, { 0, 1, 2 } }, { 1, 2, { 0, 2 }, { 1, 2 } } };
    sample long_one;
    long_one.tokens = std::vector<int32_t>(40, 3);
    long_one.caches[0].positions.clear();
    for (int i = 0; i < 40; ++i) {
        long_one.caches[0].positions.push_back(i);
    }
    sample extra; // in the second cache they have left the window with the first token
    extra.n_extra = 2;
    extra.caches = { { 0, 0, { 1 }, { 0, 1, 2, 0, 0 } }, { 1, 2, { 0, 2 }, { 1, 2 } } };
    sample latents;
    latents.head_dim_v = 0;
    sample ext = extra;
    ext.cell_ext = true;
    sample hybrid_latents = sample::hybrid(); // Kimi Linear
    hybrid_latents.head_dim_v = 0;
    sample hybrid_ext = sample::hybrid(); // Qwen 3.5
    hybrid_ext.cell_ext = true;
    return { hybrid_latents.file(), hybrid_ext.file(), sample::hybrid().file(), sample::recurrent().file(),
        sample().file(), windows.file(), long_one.file(), extra.file(), ext.file(), latents.file(),
        gguf_sample(sample().file(), true), gguf_sample(sample().file(), false), gguf_behind().file(sample().file()) };
}

// One change: at random, or where it hurts (the head, the manifest, the trailer).
static void mutate(bytes & data, const std::vector<bytes> & all) {
    static const uint64_t telling[] = { 0, 1, 2, 3, 0x7f, 0x80, 0xff, 0x7fff, 0x7c00, 0xffff, 0x7fffffff, 0x80000000,
        0xffffffff, 0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff };
    static const char * const pieces[] = { "[", "]", "{", "}", "\"", "\\", ",", ":", "null", "-1", "1e999", "0.5",
        "\xff", "true", "\\u0000" };
    const size_t at = below(4) ? below(data.size()) : data.size() - std::min(data.size(), below(64));
    switch (below(8)) {
        case 0: // bits
            if (at < data.size()) {
                data[at] ^= 1 << below(8);
            }
            break;
        case 1: { // a word
            const uint64_t word = telling[below(sizeof(telling) / sizeof(*telling))];
            const size_t n = size_t(1) << below(4);
            if (at + n <= data.size()) {
                memcpy(&data[at], &word, n);
            }
            break;
        }
        case 2: // cut
            data.resize(at);
            break;
        case 3: // remove
            data.erase(data.begin() + at, data.begin() + at + below(std::min<size_t>(data.size() - at, 32) + 1));
            break;
        case 4: // insert
            data.insert(data.begin() + at, below(32), uint8_t(engine()));
            break;
        case 5: { // a piece of JSON
            const std::string piece = pieces[below(sizeof(pieces) / sizeof(*pieces))];
            data.insert(data.begin() + at, piece.begin(), piece.end());
            break;
        }
        case 6: { // a part of another file
            const bytes & other = all[below(all.size())];
            const size_t from = below(other.size());
            data.insert(data.begin() + at, other.begin() + from,
                    other.begin() + from + below(std::min<size_t>(other.size() - from, 200)));
            break;
        }
        case 7: // a digit, most of which stand for something
            for (size_t i = at; i < data.size(); ++i) {
                if (data[i] >= '0' && data[i] <= '9') {
                    data[i] = uint8_t('0' + below(10));
                    break;
                }
            }
            break;
    }
}

int main(int argc, char ** argv) {
    const long n = argc == 2 ? atol(argv[1]) : 0;
    if (n <= 0) {
        fprintf(stderr, "usage: mutate N\n");
        return 2;
    }
    const std::vector<bytes> all = seeds();
    for (const bytes & seed : all) {
        LLVMFuzzerTestOneInput(seed.data(), seed.size());
    }
    for (long i = 0; i < n; ++i) {
        bytes data = all[below(all.size())];
        for (size_t changes = 1 + below(4); changes > 0; --changes) {
            mutate(data, all);
        }
        LLVMFuzzerTestOneInput(data.data(), data.size());
    }
    printf("%ld mutated files\n", n);
    return 0;
}
